"""Kill a real run at random, run the same command again until it is finished, compare with a run left alone.

    python scripts/bench/chaos.py [--runs 25] [--seed 0] [--one-rank] [--json FILE]

`--runs` counts the kills. Several of them hit one run directory, phase by phase, and the run that comes out has to hold
the same synthetic token ids, pairs, opponent values, optimizer steps and weights as the undisturbed one, no pair twice,
and no process of ours may outlive a kill. A tiny random model, `axolotl train` and vLLM as users run them.

With `--one-rank` two processes train together, and one of them is killed alone: within a minute the other one has to
end in one line. They are started below the `axolotl` command (one_rank.py).
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import one_rank  # noqa: E402
from tiny import chat_rows, make_model, spin_config, write_config, write_jsonl  # noqa: E402

SAMPLES = 40  # a prompt; 24 prompts make four shards
PHASES = ("data", "generation", "pairs", "opponent pass", "training", "checkpoint", "final save")
METHODS = ("SIGKILL to the tree", "SIGTERM to the parent", "SIGINT to all", "SIGKILL to vLLM")
ONE_RANK = ("SIGKILL to rank 0", "SIGKILL to rank 1")
LONGEST = 300.0  # seconds a command or its end may take
console = Console(soft_wrap=True)


@dataclass
class Kill:
    """One way to die, and what came of it."""

    phase: str
    method: str
    delay: float
    """Seconds after the phase was reached."""
    done: bool = False
    """Whether it hit a living process; else the phase went by too fast."""
    code: int | None = None
    seconds: float | None = None
    """Until the other process had ended, where one alone was killed."""
    left_behind: list[str] = field(default_factory=list)


@dataclass
class Play:
    """One run directory and the kills it has to survive."""

    directory: Path
    kills: list[Kill]
    two_ranks: bool
    failures: list[str] = field(default_factory=list)
    starts: int = 0

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def iteration(self) -> Path:
        return self.run / "iteration-0"

    @property
    def log(self) -> Path:
        return self.directory / f"log-{self.starts}.txt"

    @property
    def printed(self) -> str:
        """By the command that was started last."""
        logs = self.directory.glob("rank-*.log") if self.two_ranks else [self.log]
        return "".join(log.read_text(errors="replace") for log in sorted(logs))


# --- where a run stands ------------------------------------------------------------------------


def reached(play: Play, phase: str) -> bool:
    """Whether the command that was started last is in a phase."""
    log, started = play.printed, (play.directory / "started").stat().st_mtime
    # two processes meet before a plugin is asked for anything
    met = sum(_newer([alive], started) for alive in play.run.glob(".waiting/*/*.alive")) == 2
    return {
        "data": lambda: met if play.two_ranks else "AXOLOTL" in log.upper(),
        "generation": lambda: _newer(play.iteration.glob("synthetic/shard-*"), started),
        "pairs": lambda: _newer([play.iteration / ".pairs.tmp", play.iteration / "pairs"], started),
        "opponent pass": lambda: "Starting trainer" in log,
        "training": lambda: "Starting trainer" in log and _newer([play.iteration / "metrics.jsonl"], started, size=1),
        "checkpoint": lambda: _newer(play.iteration.glob("checkpoint-*"), started),
        "final save": lambda: "Training completed" in log,
    }[phase]()


def _newer(paths: Iterable[Path], time_stamp: float, size: int = 0) -> bool:
    """Whether one of the files, of so many bytes at least, was written after a time."""
    for path in paths:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if found.st_mtime > time_stamp and found.st_size >= size:
            return True
    return False


# --- one command -------------------------------------------------------------------------------


def start(play: Play) -> psutil.Popen | one_rank.TwoRanks:
    play.starts += 1
    (play.directory / "started").touch()
    if play.two_ranks:
        return one_rank.TwoRanks(play.directory)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(play.log, "w") as log:
        return psutil.Popen(
            ["axolotl", "train", "config.yml"],
            cwd=play.directory,
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "2"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for(condition: Callable[[], bool], seconds: float, pause: float = 0.003) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(pause)
    return False


def strike_one(process: one_rank.TwoRanks, kill: Kill, play: Play) -> None:
    """Kill one process alone; the other one has to end in one line, and nothing that they started may live on."""
    wrong, alive = process.strike(ONE_RANK.index(kill.method))
    kill.done, kill.code, kill.seconds = True, process.poll(), round(process.seconds, 1)
    play.failures += wrong
    _on_exit(alive, kill)


def strike(process: psutil.Popen, kill: Kill) -> None:
    """Kill by the method; a run without vLLM dies by SIGKILL instead. Nothing that we started may live on."""
    family = [process, *process.children(recursive=True)]
    vllm = [member for member in family if "vllm_worker.py" in " ".join(_command(member))]
    if kill.method == "SIGKILL to vLLM" and vllm:
        vllm[-1].kill()
    elif kill.method == "SIGTERM to the parent":
        process.terminate()
    elif kill.method == "SIGINT to all":
        os.killpg(process.pid, signal.SIGINT)
    else:
        for member in family:
            _quietly(member.kill)
    kill.done = True
    if kill.method == "SIGKILL to vLLM" and vllm:
        wait_for(lambda: process.poll() is not None, LONGEST)  # tried again, or given up with a clear line
    _, alive = psutil.wait_procs(family, timeout=60)
    kill.code = process.poll()
    _on_exit(alive, kill)


def _on_exit(alive: list[psutil.Process], kill: Kill) -> None:
    kill.left_behind = [" ".join(_command(member))[:120] for member in alive]
    for member in alive:
        _quietly(member.kill)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _quietly(action: Callable[[], object]) -> None:
    with suppress(psutil.Error):  # it was faster
        action()


# --- one run -----------------------------------------------------------------------------------


def survive(play: Play) -> None:
    """Run the command again and again: once for each kill, then until it is finished."""
    for kill in play.kills:
        process = start(play)
        wait_for(lambda p=process, k=kill: p.poll() is not None or reached(play, k.phase), LONGEST)
        wait_for(lambda p=process: p.poll() is not None, kill.delay)
        if process.poll() is None:
            if isinstance(process, one_rank.TwoRanks):
                strike_one(process, kill, play)
            else:
                strike(process, kill)
        elif process.returncode:
            play.failures.append(f"{play.log} failed by itself: {play.printed[-500:]}")
        late = "" if kill.done else " (came too late)"
        after = f" after {kill.seconds} s" if kill.seconds is not None else ""
        console.print(f"  {kill.phase}: {kill.method}{late}, exit {kill.code}{after} {kill.left_behind or ''}")
    process = start(play)
    process.wait(LONGEST)
    if process.returncode:
        play.failures.append(f"{play.log} failed: {play.printed[-500:]}")


def outcome(run: Path) -> dict[str, Any]:
    """What two runs have to have in common."""
    from safetensors.torch import load_file

    from spin_plugin.generation.shards import Shards
    from spin_plugin.run.directory import RunDir
    from spin_plugin.training.prepare import open_pairs

    directory = RunDir(run).iteration(0)
    responses = list(Shards(directory.synthetic).responses())
    pairs = open_pairs(directory)
    return {
        "finished": RunDir(run).finished(),
        "responses": [(response["example"], response["tokens"]) for response in responses],
        "pairs": hashlib.sha256((directory.pairs / "train.arrow").read_bytes()).hexdigest(),
        "number of pairs": len(pairs.train),
        "opponent": load_file(pairs.opponent_files["train"])["logps"],
        "steps": [entry["step"] for entry in directory.logged()],
        "losses": [entry["spin/loss"] for entry in directory.logged() if "spin/loss" in entry],
        "weights": load_file(directory.path / "model.safetensors"),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], float]:
    """Names of what differs, and the largest difference between two weights."""
    import torch

    names = [
        name
        for name in ("finished", "responses", "pairs", "number of pairs", "steps", "losses")
        if one[name] != other[name]
    ]
    if not torch.equal(one["opponent"], other["opponent"]):
        names.append("opponent")
    apart = max(float((one["weights"][name] - other["weights"][name]).abs().max()) for name in one["weights"])
    return names + (["weights"] if apart else []), apart


# --- all of it ---------------------------------------------------------------------------------


def prepare(directory: Path, *, two_ranks: bool) -> Path:
    directory.mkdir()
    data, model = directory.parent / "chat.jsonl", directory.parent / "model"
    if not data.exists():
        write_jsonl(data, chat_rows(24))
        make_model(model)
    generation = {"num_generations": SAMPLES, "max_tokens": 60}
    generation["vllm_kwargs"] = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
    spin = {"iterations": 1, "generation": generation}
    micro_batch = 8 if two_ranks else 16
    write_config(directory, spin_config(directory, model, data, spin=spin, save_steps=7, micro_batch_size=micro_batch))
    return directory


def draw(count: int, seed: int, *, one_alone: bool) -> list[list[Kill]]:
    """Kills, at most one a phase and in the order of the phases for each run directory."""
    rng = random.Random(seed)
    groups: list[list[Kill]] = []
    while (left := count - sum(map(len, groups))) > 0:
        phases = sorted(rng.sample(PHASES, min(left, len(PHASES) - 1)), key=PHASES.index)
        methods = [rng.choice(METHODS if phase == "generation" else METHODS[:3]) for phase in phases]
        if one_alone:
            methods = [rng.choice(ONE_RANK) for _ in phases]
        short = {"checkpoint": 0.1, "final save": 0.3, "pairs": 0.5}
        delays = [rng.uniform(0, short.get(phase, 2.0)) for phase in phases]
        groups.append([Kill(*drawn) for drawn in zip(phases, methods, delays, strict=True)])
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-rank", action="store_true", help="two processes, of which one is killed alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="spin-chaos-"))
    console.print(f"in {directory}")
    one_alone = options.one_rank
    if one_alone:
        one_rank.set_up()
    calm = Play(prepare(directory / "undisturbed", two_ranks=one_alone), [], one_alone)
    survive(calm)
    if calm.failures:
        raise SystemExit(calm.failures[0])
    expected = outcome(calm.run)
    if len(set(range(24))) * SAMPLES != len(expected["responses"]):
        raise SystemExit("the undisturbed run does not hold every response")
    plays = [
        Play(prepare(directory / str(number), two_ranks=one_alone), kills, one_alone)
        for number, kills in enumerate(draw(options.runs, options.seed, one_alone=one_alone))
    ]
    content: dict[str, Any] = {"runs": 0, "survived": 0, "identical": 0, "largest_difference": 0.0, "kills": []}
    for play in plays:
        console.print(f"run {play.directory.name}")
        survive(play)
        hits = [kill for kill in play.kills if kill.done]
        differs, apart = differences(expected, outcome(play.run)) if not play.failures else (["not finished"], 0.0)
        content["runs"] += len(hits)
        same = not play.failures and set(differs) <= {"weights", "losses", "opponent"}
        content["survived"] += sum(same and not kill.left_behind for kill in hits)
        content["identical"] += len(hits) * (not differs)
        content["largest_difference"] = max(content["largest_difference"], apart)
        content["kills"] += [asdict(kill) for kill in hits]
        console.print(f"  {play.failures or 'survived'}; differs in: {', '.join(differs) or 'nothing'} ({apart:.1e})")
        if options.json:
            options.json.write_text(json.dumps(content, indent=2) + "\n")
    methods = ONE_RANK if one_alone else METHODS
    table = Table("phase", *methods, title=f"{content['survived']} of {content['runs']} kills survived")
    for phase in PHASES:
        counts = [sum(k["phase"] == phase and k["method"] == method for k in content["kills"]) for method in methods]
        table.add_row(phase, *map(str, counts))
    console.print(table)
    raise SystemExit(content["survived"] != content["runs"])


if __name__ == "__main__":
    main()
