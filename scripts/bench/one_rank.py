"""Two CPU ranks, one of which gets killed, for `chaos.py --one-rank`.

The `axolotl` command cannot start two processes without a GPU, so the ranks are forks as in tests/several_processes.py,
which run the function that `axolotl train` calls in each process. No launcher stops the other rank.
"""

import os
import sys
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import several_processes  # noqa: E402

EXIT_TIMEOUT = 60.0  # seconds, documented for the other rank's exit


def set_up() -> None:
    """Call once before the first start: the forks share one import of Axolotl, with one core each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    torch.set_num_threads(1)
    several_processes.import_axolotl()


class TwoRanks:
    """Both ranks of a start, with the `poll`, `wait` and `returncode` of a single process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.logs = [directory / f"rank-{rank}.log" for rank in range(2)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        job = {"config": str(directory / "config.yml"), "processes": 2}
        self.ranks = [psutil.Process(pid) for pid in several_processes.start(job)]

    def poll(self) -> int | None:
        """Return None while a rank is running, then the first nonzero exit code, or 0."""
        codes = [code_of(rank) for rank in self.ranks]
        return None if None in codes else next(filter(None, codes), 0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, seconds: float) -> None:
        psutil.wait_procs(self.ranks, timeout=seconds)

    def kill_rank(self, rank: int) -> tuple[list[str], list[psutil.Process]]:
        """Kill one rank.

        Returns:
            Faults in how the other rank exited, and the processes still running.
        """
        killed, other = self.ranks[rank], self.ranks[1 - rank]
        children = [process for each in self.ranks for process in each.children(recursive=True)]
        killed.kill()
        began = time.monotonic()
        psutil.wait_procs(self.ranks, timeout=EXIT_TIMEOUT)
        self.seconds = time.monotonic() - began
        printed = self.logs[1 - rank].read_text(errors="replace")
        errors = [line for line in printed.splitlines() if line.startswith("spin: error: ")]
        wrong = []
        if code_of(other) == 0 and any(self.directory.glob(f"run/.barrier/*/{1 - rank}.saved")):
            self.seconds = 0.0  # it had saved and no longer depended on the other
        elif code_of(other) != 1:
            wrong.append(f"exit code {code_of(other)} of the other rank")
        elif len(errors) != 1 or f"rank {rank} exited" not in errors[0] or "Traceback" in printed:
            wrong.append(f"unexpected output: {errors or printed[-500:]}")
        return wrong, psutil.wait_procs([*self.ranks, *children], timeout=EXIT_TIMEOUT)[1]


def code_of(process: psutil.Process) -> int | None:
    try:
        return process.wait(timeout=0)
    except psutil.TimeoutExpired:
        return None
