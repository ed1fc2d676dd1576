"""The processes that train together: the first one prepares and finishes an iteration, the others wait for it.

They meet by files in the run directory and not in a collective, which would time out while vLLM draws for hours.
"""

import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

from spin_plugin.messages import SpinError
from spin_plugin.run import RunDir

LAUNCHERS = {"accelerate", "torchrun", "accelerate.commands.launch", "torch.distributed.run"}
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_UNTIL_SAVED = 1800.0
SECONDS_UNTIL_SEEN = 600.0  # all processes start together; the first one works in the run directory by then
ANSWERED, SAVED = ".answered", ".saved"


def rank() -> int:
    """This process's number among all that train together."""
    return int(os.environ.get("RANK", "0"))


def others() -> int:
    """How many processes train besides this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) - 1


def wait_until_prepared(run: RunDir) -> None:
    """What every process but the first does while that one prepares the iteration.

    Pairs of an earlier start may lie there and be rebuilt by the first process, so this one asks, under a name that no
    other start has used, and goes on when the first process has renamed its question to an answer.

    Raises:
        SpinError: nobody works in the run directory that this process sees: it is another one, or the first process
            is gone.
    """
    looked, sign = time.monotonic(), None
    question = run.questions / f"{rank()}-{uuid.uuid4().hex}"
    answer = question.with_suffix(ANSWERED)
    while not answer.exists():
        if not question.exists():  # the first process has just cleared away what earlier starts had left
            with suppress(OSError):  # it is doing so
                question.parent.mkdir(parents=True, exist_ok=True)
                question.touch()
        newest = run.sign_of_life()
        if newest not in (None, sign):
            looked, sign = time.monotonic(), newest
        elif time.monotonic() - looked > SECONDS_UNTIL_SEEN:
            raise SpinError(_nobody(run, seen=sign is not None))
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _nobody(run: RunDir, *, seen: bool) -> str:
    if seen:
        return (
            f"output_dir {run.root}: the first process gives no sign of life any more; run the same command again, it "
            "goes on where that one stopped"
        )
    return (
        f"output_dir {run.root} on {socket.gethostname()} is not the one that the first process works in: "
        f"{run.holder.name} is not there; output_dir must lie on a file system that all nodes share"
    )


def clear_questions(run: RunDir) -> None:
    """Forget what an earlier start has left; the first process does this before it prepares the iteration."""
    shutil.rmtree(run.questions, ignore_errors=True)


def answer_questions(run: RunDir) -> None:
    """Let the other processes go on from now on: the iteration is prepared."""
    threading.Thread(target=_answer_questions, args=(run,), daemon=True).start()


def _answer_questions(run: RunDir) -> None:
    """Whoever asks: one that looks in the wrong moment asks again, one of an earlier start has nobody to go on with."""
    while True:
        for question in run.questions.glob("*"):
            if question.suffix not in (ANSWERED, SAVED):
                with suppress(OSError):
                    question.rename(question.with_suffix(ANSWERED))
        time.sleep(SECONDS_BETWEEN_LOOKS)


def tell_saved(run: RunDir) -> None:
    """Another process has saved what it saves: Axolotl has each of them write the tokenizer, and does not wait."""
    (run.questions / f"{rank()}{SAVED}").touch()


def wait_until_saved(run: RunDir) -> None:
    """The first process looks at the model when nobody writes any more.

    Raises:
        SpinError: another process does not come to its end.
    """
    started = time.monotonic()
    while (saved := len(list(run.questions.glob(f"*{SAVED}")))) < others():
        if time.monotonic() - started > SECONDS_UNTIL_SAVED:
            raise SpinError(
                f"only {saved} of {others()} other processes have saved after {SECONDS_UNTIL_SAVED:.0f} s; run the "
                "same command again: it goes on from the last checkpoint"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def end_with_launcher() -> None:
    """End this process when the launcher that started it is gone.

    A killed `accelerate launch` leaves its process behind, which would go on unseen and keep the run locked.
    """
    launcher = os.getppid()
    with suppress(OSError):  # no /proc, no watch
        command = Path(f"/proc/{launcher}/cmdline").read_bytes().decode(errors="replace").split("\0")[:3]
        if LAUNCHERS & {Path(word).name for word in command}:
            threading.Thread(target=_end_after, args=(launcher,), daemon=True).start()


def _end_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    for child in psutil.Process().children(recursive=True):  # vLLM's worker, and what `datasets` has started
        with suppress(psutil.Error):
            child.kill()
    os._exit(1)
