"""Two CPU processes that train together, one of which is killed alone: what `chaos.py --one-rank` starts and strikes.

The `axolotl` command starts no two processes without a GPU, so they are forks, as in tests/several_processes.py: what
`axolotl train` calls in each process. No launcher is there that would end the other one.
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

PROMISED = 60.0  # seconds within which the other one ends


def set_up() -> None:
    """Once, before the first start: the forks share one import of Axolotl, and have a core each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    torch.set_num_threads(1)
    several_processes.import_axolotl()


class TwoRanks:
    """Both processes of a start; `poll`, `wait` and `returncode` as of a single one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.logs = [directory / f"rank-{rank}.log" for rank in range(2)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        job = {"config": str(directory / "config.yml"), "processes": 2}
        self.ranks = [psutil.Process(pid) for pid in several_processes.start(job)]

    def poll(self) -> int | None:
        """None while one lives, then the first exit code that is not 0."""
        codes = [code_of(rank) for rank in self.ranks]
        return None if None in codes else next(filter(None, codes), 0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, seconds: float) -> None:
        psutil.wait_procs(self.ranks, timeout=seconds)

    def strike(self, rank: int) -> tuple[list[str], list[psutil.Process]]:
        """Kill one of them. What is wrong with how the other one ends, and what is left of everything they started."""
        killed, other = self.ranks[rank], self.ranks[1 - rank]
        family = [process for each in self.ranks for process in each.children(recursive=True)]
        killed.kill()
        began = time.monotonic()
        psutil.wait_procs(self.ranks, timeout=PROMISED)
        self.seconds = time.monotonic() - began
        printed = self.logs[1 - rank].read_text(errors="replace")
        errors = [line for line in printed.splitlines() if line.startswith("spin: error: ")]
        wrong = []
        if code_of(other) == 0 and any(self.directory.glob(f"run/.waiting/*/{1 - rank}.saved")):
            self.seconds = 0.0  # it had done its part and needed nobody any longer
        elif code_of(other) != 1:
            wrong.append(f"exit code {code_of(other)} of the other process")
        elif len(errors) != 1 or f"process {rank} is gone" not in errors[0] or "Traceback" in printed:
            wrong.append(f"it says {errors or printed[-500:]}")
        return wrong, psutil.wait_procs([*self.ranks, *family], timeout=PROMISED)[1]


def code_of(process: psutil.Process) -> int | None:
    try:
        return process.wait(timeout=0)
    except psutil.TimeoutExpired:
        return None
