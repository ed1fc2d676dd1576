"""Kill a real run at random points, rerun the command until it finishes, compare with an undisturbed run.

    python scripts/bench/chaos.py [--runs 25] [--seed 0] [--one-rank] [--json FILE]

`--runs` is the number of kills. Several of them hit each run directory, in the order of the phases. The finished run
must have the same synthetic token ids, pairs, opponent log-probs, optimizer steps and weights as the undisturbed one,
and no process may survive a kill. Uses a tiny random model with real `axolotl train` and vLLM.

With `--one-rank`, two ranks train together and only one of them is killed: the other must exit with a one-line error
within a minute. one_rank.py starts them without the `axolotl` command.
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

SAMPLES = 40  # per prompt; 24 prompts make four shards
PHASES = ("data", "generation", "pairs", "opponent pass", "training", "checkpoint", "final save")
METHODS = ("SIGKILL to the tree", "SIGTERM to the parent", "SIGINT to all", "SIGKILL to vLLM")
ONE_RANK = ("SIGKILL to rank 0", "SIGKILL to rank 1")
TIMEOUT = 300.0  # seconds, for a command or its exit
console = Console(soft_wrap=True)


@dataclass
class Kill:
    """One kill and its result."""

    phase: str
    method: str
    delay: float
    """Seconds between reaching the phase and the kill."""
    done: bool = False
    """Whether it hit a running process; False if the run had already finished."""
    code: int | None = None
    seconds: float | None = None
    """Time until the other rank exited, if only one was killed."""
    left_behind: list[str] = field(default_factory=list)


@dataclass
class Trial:
    """One run directory and the kills that it must survive."""

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
        """Output of the most recent command."""
        logs = self.directory.glob("rank-*.log") if self.two_ranks else [self.log]
        return "".join(log.read_text(errors="replace") for log in sorted(logs))


# --- phase of a run ----------------------------------------------------------------------------


def reached(trial: Trial, phase: str) -> bool:
    """Whether the most recent command has reached a phase."""
    log, started = trial.printed, (trial.directory / "started").stat().st_mtime
    # the ranks rendezvous before the plugin does any work
    met = sum(_newer([alive], started) for alive in trial.run.glob(".barrier/*/*.alive")) == 2
    return {
        "data": lambda: met if trial.two_ranks else "AXOLOTL" in log.upper(),
        "generation": lambda: _newer(trial.iteration.glob("synthetic/shard-*"), started),
        "pairs": lambda: _newer([trial.iteration / ".pairs.tmp", trial.iteration / "pairs"], started),
        "opponent pass": lambda: "Starting trainer" in log,
        "training": lambda: "Starting trainer" in log and _newer([trial.iteration / "metrics.jsonl"], started, size=1),
        "checkpoint": lambda: _newer(trial.iteration.glob("checkpoint-*"), started),
        "final save": lambda: "Training completed" in log,
    }[phase]()


def _newer(paths: Iterable[Path], time_stamp: float, size: int = 0) -> bool:
    """Whether any of the files has at least `size` bytes and was written after `time_stamp`."""
    for path in paths:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if found.st_mtime > time_stamp and found.st_size >= size:
            return True
    return False


# --- one command -------------------------------------------------------------------------------


def start(trial: Trial) -> psutil.Popen | one_rank.TwoRanks:
    trial.starts += 1
    (trial.directory / "started").touch()
    if trial.two_ranks:
        return one_rank.TwoRanks(trial.directory)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(trial.log, "w") as log:
        return psutil.Popen(
            ["axolotl", "train", "config.yml"],
            cwd=trial.directory,
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


def kill_rank(process: one_rank.TwoRanks, kill: Kill, trial: Trial) -> None:
    """Kill one rank; the other must exit with a one-line error, and no child process may survive."""
    wrong, alive = process.kill_rank(ONE_RANK.index(kill.method))
    kill.done, kill.code, kill.seconds = True, process.poll(), round(process.seconds, 1)
    trial.failures += wrong
    _on_exit(alive, kill)


def kill_processes(process: psutil.Popen, kill: Kill) -> None:
    """Kill by `kill.method`, or by SIGKILL to the tree if vLLM is not running. No child process may survive."""
    tree = [process, *process.children(recursive=True)]
    vllm = [member for member in tree if "vllm_worker.py" in " ".join(_command(member))]
    if kill.method == "SIGKILL to vLLM" and vllm:
        vllm[-1].kill()
    elif kill.method == "SIGTERM to the parent":
        process.terminate()
    elif kill.method == "SIGINT to all":
        os.killpg(process.pid, signal.SIGINT)
    else:
        for member in tree:
            _quietly(member.kill)
    kill.done = True
    if kill.method == "SIGKILL to vLLM" and vllm:
        wait_for(lambda: process.poll() is not None, TIMEOUT)  # the run retries vLLM or gives up with an error
    _, alive = psutil.wait_procs(tree, timeout=60)
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
    with suppress(psutil.Error):  # it has already exited
        action()


# --- one run -----------------------------------------------------------------------------------


def survive(trial: Trial) -> None:
    """Run the command once per kill, then until it finishes."""
    for kill in trial.kills:
        process = start(trial)
        wait_for(lambda p=process, k=kill: p.poll() is not None or reached(trial, k.phase), TIMEOUT)
        wait_for(lambda p=process: p.poll() is not None, kill.delay)
        if process.poll() is None:
            if isinstance(process, one_rank.TwoRanks):
                kill_rank(process, kill, trial)
            else:
                kill_processes(process, kill)
        elif process.returncode:
            trial.failures.append(f"{trial.log} failed without a kill: {trial.printed[-500:]}")
        late = "" if kill.done else " (came too late)"
        after = f" after {kill.seconds} s" if kill.seconds is not None else ""
        console.print(f"  {kill.phase}: {kill.method}{late}, exit {kill.code}{after} {kill.left_behind or ''}")
    process = start(trial)
    process.wait(TIMEOUT)
    if process.returncode:
        trial.failures.append(f"{trial.log} failed: {trial.printed[-500:]}")


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must be equal in two runs."""
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
        "steps": [entry["step"] for entry in directory.read_log()],
        "losses": [entry["spin/loss"] for entry in directory.read_log() if "spin/loss" in entry],
        "weights": load_file(directory.path / "model.safetensors"),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], float]:
    """Return the names of differing entries and the largest difference of any weight."""
    import torch

    names = [
        name
        for name in ("finished", "responses", "pairs", "number of pairs", "steps", "losses")
        if one[name] != other[name]
    ]
    if not torch.equal(one["opponent"], other["opponent"]):
        names.append("opponent")
    largest = max(float((one["weights"][name] - other["weights"][name]).abs().max()) for name in one["weights"])
    return names + (["weights"] if largest else []), largest


# --- all trials --------------------------------------------------------------------------------


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


def sample_kills(count: int, seed: int, *, one_alone: bool) -> list[list[Kill]]:
    """Sample `count` kills, grouped by run directory, at most one per phase and in the order of the phases."""
    rng = random.Random(seed)
    groups: list[list[Kill]] = []
    while (left := count - sum(map(len, groups))) > 0:
        phases = sorted(rng.sample(PHASES, min(left, len(PHASES) - 1)), key=PHASES.index)
        methods = [rng.choice(METHODS if phase == "generation" else METHODS[:3]) for phase in phases]
        if one_alone:
            methods = [rng.choice(ONE_RANK) for _ in phases]
        short = {"checkpoint": 0.1, "final save": 0.3, "pairs": 0.5}
        delays = [rng.uniform(0, short.get(phase, 2.0)) for phase in phases]
        groups.append([Kill(*kill) for kill in zip(phases, methods, delays, strict=True)])
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="number of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-rank", action="store_true", help="kill only one of two ranks")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="spin-chaos-"))
    console.print(f"in {directory}")
    one_alone = options.one_rank
    if one_alone:
        one_rank.set_up()
    undisturbed = Trial(prepare(directory / "undisturbed", two_ranks=one_alone), [], one_alone)
    survive(undisturbed)
    if undisturbed.failures:
        raise SystemExit(undisturbed.failures[0])
    expected = outcome(undisturbed.run)
    if len(set(range(24))) * SAMPLES != len(expected["responses"]):
        raise SystemExit("the undisturbed run lacks responses")
    trials = [
        Trial(prepare(directory / str(number), two_ranks=one_alone), kills, one_alone)
        for number, kills in enumerate(sample_kills(options.runs, options.seed, one_alone=one_alone))
    ]
    content: dict[str, Any] = {"runs": 0, "survived": 0, "identical": 0, "largest_difference": 0.0, "kills": []}
    for trial in trials:
        console.print(f"run {trial.directory.name}")
        survive(trial)
        hits = [kill for kill in trial.kills if kill.done]
        differs, distance = differences(expected, outcome(trial.run)) if not trial.failures else (["not finished"], 0.0)
        content["runs"] += len(hits)
        same = not trial.failures and set(differs) <= {"weights", "losses", "opponent"}
        content["survived"] += sum(same and not kill.left_behind for kill in hits)
        content["identical"] += len(hits) * (not differs)
        content["largest_difference"] = max(content["largest_difference"], distance)
        content["kills"] += [asdict(kill) for kill in hits]
        console.print(
            f"  {trial.failures or 'survived'}; differs in: {', '.join(differs) or 'nothing'} ({distance:.1e})"
        )
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
