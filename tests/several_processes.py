"""Axolotl's commands on several CPU processes, as `torchrun` would start them.

    python tests/several_processes.py        # conftest.py's `serve` starts it, once for all tests of a worker

Each line of standard input is a list of jobs, `[{"config": "a/config.yml", "processes": 2}, ...]`, each of which plays
`axolotl.cli.train.do_cli(config)`, what `axolotl train` and its launchers call in each process. `"command"` names
another command, `"environment"` more variables. The answer is a line with the exit codes of those that failed, by their
configs. All jobs share one import of Axolotl: every rank is a fork of this process with the variables that torchrun
sets. Where one rank fails the others of its job are ended, as torchrun does, and nothing that comes after it in the
line is played with the same config. A rank's output is added to `rank-N.log` beside the config. A job with `"kill": N`
kills that rank when training has logged its first step, and no launcher ends the others.

Axolotl and accelerate take several processes for several GPUs. What differs from the command is `use_cpus`.
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
    """The places that stand between Axolotl and several processes without a GPU."""
    import axolotl.utils.environment
    from accelerate import PartialState
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DistributedType
    from axolotl.loaders.model import ModelLoader

    # Axolotl asks CUDA how two GPUs reach each other, which torch's CUDA build does not answer in a fork
    axolotl.utils.environment.check_cuda_p2p_support = lambda: True
    # Axolotl places the model on the device with the rank's number
    placed = ModelLoader._set_device_map_config

    def on_cpu(self: Any) -> None:
        self.cfg.device_map = None
        placed(self)

    ModelLoader._set_device_map_config = on_cpu
    # accelerate counts CPUs ("cpu:1"), and torch reads no optimizer's state for such a device
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    if not sharded:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate's own way to DDP on CPUs
        return
    # accelerate knows FSDP and DeepSpeed on accelerators only: the process group is gloo's, the device the CPU
    PartialState._prepare_backend = lambda *_args: ("gloo", DistributedType.MULTI_GPU)
    # Axolotl asks for a mesh of "cuda" devices by name
    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, _kind: build(self, "cpu")
    # DeepSpeed 0.18 gathers ZeRO-2's weights into views, which gloo of torch 2.13 writes to as autograd allows
    from deepspeed.comm.torch import TorchBackend

    TorchBackend.all_gather_into_tensor = torch.no_grad()(TorchBackend.all_gather_into_tensor)


def play(job: dict[str, Any], rank: int, port: int) -> None:
    """One rank of one job, in a process of its own."""
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
    """What `use_ray: true` does around Ray: one process lowers and validates the configuration, another, which knows
    nothing of that, is handed the result pickled, validates it again and trains."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import ray_train_func

    handed = config.with_suffix(".pickle")
    driver = os.fork()
    if not driver:
        handed.write_bytes(pickle.dumps(load_cfg(str(config)).to_dict()))
        os._exit(0)
    os.waitpid(driver, 0)
    ray_train_func({"cfg": pickle.loads(handed.read_bytes()), "cli_args": TrainerCliArgs()})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(job: dict[str, Any]) -> list[int]:
    """Fork the ranks of a job; returns their process ids."""
    port, ranks = free_port(), []
    for rank in range(job["processes"]):
        pid = os.fork()
        if pid:
            ranks.append(pid)
            continue
        code = 1
        try:
            play(job, rank, port)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            if sys.exc_info()[1]:
                sys.excepthook(*sys.exc_info())  # as the interpreter does
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ranks


def wait(ranks: list[int]) -> int:
    """The exit code of the first rank that failed, when the others are ended, or 0."""
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
    """Kill one rank alone after a step that no start before has logged. 0 if all end, and none well."""
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
    """What every rank needs, once."""
    import axolotl.cli.config
    import axolotl.cli.train
    import axolotl.core.builders
    import axolotl.loaders
    import axolotl.train  # noqa: F401

    import spin_plugin.training.iteration
    import spin_plugin.training.trainer  # noqa: F401


def play_all(jobs: list[dict[str, Any]]) -> dict[str, int]:
    """The exit codes of the jobs that failed."""
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
        os.dup2(2, 1)  # what Axolotl prints is no answer
        import_axolotl()
        gc.freeze()  # Axolotl collects garbage at every checkpoint: a second each time over all that was imported
        for line in sys.stdin:
            answers.write(json.dumps(play_all(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
