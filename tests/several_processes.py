"""Run Axolotl's commands on several CPU processes, as `torchrun` would start them.

    python tests/several_processes.py        # started by conftest.py's `exit_codes`, once per pytest worker

Each line of stdin is a list of jobs, `[{"config": "a/config.yml", "processes": 2}, ...]`. Each job runs
`axolotl.cli.train.do_cli(config)`, which `axolotl train` and its launchers call in each process. `"command"` selects
another command, `"environment"` adds variables. The reply is a line with the exit codes of failed jobs by config. All
jobs share one import of Axolotl: each rank is a fork of this process with torchrun's environment variables. When a rank
fails, the other ranks of its job are terminated, as by torchrun, and later jobs with the same config are skipped. Ranks
append their output to `rank-N.log` beside the config. A job with `"kill": N` kills that rank after the first logged
step; the other ranks are not terminated.

Axolotl and accelerate assume that several processes have several GPUs; `use_cpus` patches this.
"""

import gc
import importlib
import json
import os
import pickle
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml


def use_cpus(*, sharded: bool) -> None:
    """Patch what keeps Axolotl from running several processes without a GPU."""
    import axolotl.utils.environment
    from accelerate import PartialState
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DistributedType
    from axolotl.loaders.model import ModelLoader

    # Axolotl queries CUDA for P2P support, which fails in a fork of torch's CUDA build
    axolotl.utils.environment.check_cuda_p2p_support = lambda: True
    # Axolotl places the model on the device numbered like the rank
    set_device_map = ModelLoader._set_device_map_config

    def on_cpu(self: Any) -> None:
        self.cfg.device_map = None
        set_device_map(self)

    ModelLoader._set_device_map_config = on_cpu
    # accelerate numbers CPUs ("cpu:1"), a device for which torch cannot load optimizer states
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    if not sharded:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate supports DDP on CPUs
        return
    # accelerate supports FSDP and DeepSpeed only on accelerators, so use gloo and the CPU device
    PartialState._prepare_backend = lambda *_args: ("gloo", DistributedType.MULTI_GPU)
    # Axolotl requests a "cuda" device mesh
    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, _kind: build(self, "cpu")
    # DeepSpeed 0.18 gathers ZeRO-2's weights into views; gloo in torch 2.13 can write to those only without autograd
    from deepspeed.comm.torch import TorchBackend

    TorchBackend.all_gather_into_tensor = torch.no_grad()(TorchBackend.all_gather_into_tensor)


def run_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Run one rank of a job; call in its own process."""
    config, processes = Path(job["config"]), job["processes"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(config.parent / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(config.parent)
    os.environ |= job.get("environment", {})
    sys.argv = ["axolotl"]
    settings = yaml.safe_load(config.read_text())
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        use_cpus(sharded=bool(settings.get("fsdp_config") or settings.get("deepspeed")))
    if settings.get("use_ray"):
        as_ray_worker(config)
    else:
        importlib.import_module(f"axolotl.cli.{job.get('command', 'train')}").do_cli(config=str(config))


def as_ray_worker(config: Path) -> None:
    """Train as with `use_ray: true` but without Ray: one process lowers and validates the configuration; a fresh one
    unpickles the result, validates it again and trains."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import ray_train_func

    pickled = config.with_suffix(".pickle")
    driver = os.fork()
    if not driver:
        pickled.write_bytes(pickle.dumps(load_cfg(str(config)).to_dict()))
        os._exit(0)
    os.waitpid(driver, 0)
    ray_train_func({"cfg": pickle.loads(pickled.read_bytes()), "cli_args": TrainerCliArgs()})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(job: dict[str, Any]) -> list[int]:
    """Fork the ranks of a job and return their process ids."""
    port, ranks = free_port(), []
    for rank in range(job["processes"]):
        pid = os.fork()
        if pid:
            ranks.append(pid)
            continue
        code = 1
        try:
            run_rank(job, rank, port)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            if sys.exc_info()[1]:
                sys.excepthook(*sys.exc_info())  # like the interpreter
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ranks


def wait(ranks: list[int]) -> int:
    """Return the exit code of the first rank that fails, or 0; terminates the others on failure."""
    alive, code = set(ranks), 0
    while alive:
        pid, status = os.wait()
        alive.discard(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in alive:
                os.kill(other, signal.SIGTERM)
    return code


def kill_in_training(config: Path, ranks: list[int], killed: int) -> int:
    """Kill one rank after the next newly logged step. Return 0 if all ranks then exit with an error."""
    metrics = Path(yaml.safe_load(config.read_text())["output_dir"]) / "iteration-0/metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    before = steps()
    while steps() <= before:
        time.sleep(0.01)
    os.kill(ranks[killed], signal.SIGKILL)
    statuses = [os.waitpid(rank, 0)[1] for rank in ranks]
    return int(not all(statuses))


def import_axolotl() -> None:
    """Import everything that the ranks need."""
    import axolotl.cli.config
    import axolotl.cli.train
    import axolotl.core.builders
    import axolotl.loaders
    import axolotl.train  # noqa: F401

    import spin_plugin.training.iteration
    import spin_plugin.training.trainer  # noqa: F401


def run_jobs(jobs: list[dict[str, Any]]) -> dict[str, int]:
    """Run jobs and return the exit codes of those that failed, by config."""
    failed: dict[str, int] = {}
    for job in jobs:
        config = job["config"]
        if config in failed:
            continue
        ranks = start(job)
        code = kill_in_training(Path(config), ranks, job["kill"]) if "kill" in job else wait(ranks)
        if code:
            failed[config] = code
    return failed


def main() -> None:
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # keep Axolotl's output out of the replies
        import_axolotl()
        gc.freeze()  # Axolotl collects garbage at every checkpoint, which takes a second with all imported objects
        for line in sys.stdin:
            answers.write(json.dumps(run_jobs(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
