"""The run directory: names, the state of the iterations, atomic writes, and who may work in it.

output_dir/
  run.json              configuration and finished iterations; written last, read first
  weights.json          digests of the weights that were read
  real/                 prompts and real responses, tokenised once for the whole run
  iteration-0/          model or adapter, tokenizer, checkpoints, and
    config.yml          the configuration as it was resolved for this iteration
    synthetic/          the opponent's responses: job.json and shards with their checksums
    pairs/              the pairs, their statistics, and the opponent's log-probabilities
    metrics.jsonl       what training logged
    .replaced-*         responses and the last checkpoint that were set aside: something they came from has changed
  iteration-1/ ...
  config.json, model.safetensors, tokenizer.json, ...   links to the newest finished iteration
"""

import json
import math
import os
import shutil
import socket
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from psutil import pid_exists

from spin_plugin.messages import SpinError

FORMAT = 2
TRASH = ".removed-"
REPLACED = ".replaced-"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either absent (or as it was) or complete, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _naming(path, temporary):
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def make_folder_whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder's files under another name; the folder appears when they are complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with _naming(path, temporary):
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush(temporary.rglob("*"))
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)


def flush(files: Iterable[Path]) -> None:
    """Wait until files that others have written lie on the disk."""
    for file in files:
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())


def remove_whole(path: Path) -> None:
    """Remove a folder in one step: what a kill in the middle leaves has a name that nobody reads."""
    trash = path.with_name(f"{TRASH}{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Give a folder that cost GPU time another name, which nobody reads; only the newest one of a name is kept.

    Killed in the middle it is either still in its place or set aside; a full disk is no hindrance.

    Returns:
        where it lies now.
    """
    aside = path.with_name(f"{REPLACED}{path.name}")
    remove_whole(aside)
    os.rename(path, aside)
    return aside


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Where `path` cannot be written, say so by its name and leave nothing half-written on a disk that may be full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)  # the system does not name it once a file is open
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class IterationDir:
    """Names inside `iteration-t`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yml"

    @property
    def synthetic(self) -> Path:
        return self.path / "synthetic"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs"

    def opponent(self, weights: str) -> Path:
        """The opponent of this fingerprint with its adapter merged into it, there while vLLM, which cannot serve the
        adapter, draws from it."""
        return self.path / f"opponent-{weights[:16]}"

    @property
    def merged(self) -> Path:
        """With `adapter_chain: merge`, the model with its adapter merged into it: the base of the next iteration."""
        return self.path / "merged"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def logged(self) -> list[dict[str, float]]:
        """What training logged, oldest first; a line that was cut off when training was killed is left out."""
        if not self.metrics.exists():
            return []
        entries = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        return entries

    def set_checkpoints_aside(self) -> Path | None:
        """Keep the newest checkpoint under a name that training does not look for; older ones go.

        Returns:
            where it lies now; None where there is none.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            return None
        for replaced in (*checkpoints[:-1], *self.path.glob(f"{REPLACED}checkpoint-*")):
            remove_whole(replaced)
        return set_aside(checkpoints[-1])

    def last_metrics(self) -> dict[str, float]:
        """The newest value of everything that training logged, that of `spin/…` as its mean over the last epoch.

        Empty before the first log. A log holds means over `pairs` pairs.
        """
        entries = self.logged()
        merged = dict(ChainMap(*reversed(entries)))
        trained = [entry for entry in entries if "pairs" in entry]
        last_epoch = [entry for entry in trained if entry["epoch"] > trained[-1]["epoch"] - 1]
        if pairs := sum(entry["pairs"] for entry in last_epoch):
            for name in filter(lambda name: name.startswith("spin/"), merged):
                merged[name] = sum(entry[name] * entry["pairs"] for entry in last_epoch) / pairs
        return {name: value for name, value in merged.items() if name != "pairs"}

    def checkpoints(self) -> list[Path]:
        """Axolotl's checkpoints, oldest first, complete or not."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


@dataclass
class RunState:
    """What run.json holds."""

    config: dict[str, Any]
    finished: list[dict[str, Any]] = field(default_factory=list)
    version: str = ""


@dataclass(frozen=True)
class RunDir:
    """The `output_dir` of a SPIN configuration."""

    root: Path

    @property
    def state_file(self) -> Path:
        return self.root / "run.json"

    @property
    def real(self) -> Path:
        return self.root / "real"

    @property
    def weights(self) -> Path:
        """What is known of files with weights, so that none is read twice (weights.py)."""
        return self.root / "weights.json"

    @property
    def holder(self) -> Path:
        """Who works here; lies there as long as somebody does."""
        return self.root / "run.lock.json"

    @property
    def waiting(self) -> Path:
        """Where the processes of a distributed run wait for each other (processes.py)."""
        return self.root / ".waiting"

    def iteration(self, number: int) -> IterationDir:
        return IterationDir(self.root / f"iteration-{number}")

    def require_writable(self) -> None:
        """Find out before any work whether the directory can be made and written.

        Raises:
            SpinError: it cannot.
        """
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise SpinError(f"output_dir: {place} is no directory; use another one")
        if not os.access(place, os.W_OK | os.X_OK):
            raise SpinError(f"output_dir: {place} cannot be written; use another one")

    def read_state(self) -> RunState | None:
        """The run's state, None where no run was started.

        Raises:
            SpinError: run.json is not ours or was damaged.
        """
        if not self.state_file.exists():
            return None
        try:
            content = json.loads(self.state_file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise SpinError(
                    f"{self.state_file} was written by another version of spin-plugin ({content.get('version')}); "
                    "finish the run with that version or use another output_dir"
                )
            if not isinstance(content["config"], dict) or not isinstance(content["finished"], list):
                raise TypeError("config or finished is of another type")
            return RunState(content["config"], content["finished"], content["version"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise SpinError(
                f"{self.state_file} is damaged ({error}); restore it from a backup or use another output_dir"
            ) from None

    def write_state(self, state: RunState) -> None:
        """Replace run.json in one step."""
        content = {"format": FORMAT, "version": state.version, "config": state.config, "finished": state.finished}
        write_whole(self.state_file, json.dumps(content, indent=2, default=str) + "\n")

    def holds_responses(self) -> bool:
        """Whether anything that cost GPU time lies here."""
        return any(self.root.glob("iteration-*/synthetic/shard-*"))

    def finished(self) -> int:
        """How many iterations are finished; the number of the next one."""
        state = self.read_state()
        return len(state.finished) if state else 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out of the directory; the lock falls with the process that holds it.

        Raises:
            SpinError: another live process works here; names its host and pid.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        holder = self.holder
        lock = FileLock(self.root / "run.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise SpinError(
                f"output_dir {self.root} is in use by {_holder(holder)}; wait for it or stop it (where it is gone for "
                f"good and the file system cannot know, delete {lock.lock_file})"
            ) from None
        try:
            write_whole(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            for left in (".prepared-*", f"{TRASH}*", f"iteration-*/{TRASH}*"):
                for trash in self.root.glob(left):
                    shutil.rmtree(trash, ignore_errors=True)
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def started(self) -> list[int]:
        """Numbers of the iterations that have a folder, ascending."""
        names = (path.name.partition("-")[2] for path in self.root.glob("iteration-*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def reset(self, number: int) -> None:
        """Forget iteration `number` and all after it; run.json first, so that the run goes on wherever this is killed.

        The caller holds the lock.
        """
        state = self.read_state()
        if state and len(state.finished) > number:
            state.finished = state.finished[:number]
            self.write_state(state)
        for started in reversed(self.started()):
            if started >= number:
                remove_whole(self.iteration(started).path)
        self._unlink_newest()
        if number:
            self.link_newest(number - 1)

    def _unlink_newest(self) -> None:
        for link in self.root.iterdir():
            if link.is_symlink() and os.readlink(link).startswith("iteration-"):
                link.unlink()

    def link_newest(self, number: int) -> None:
        """Make `output_dir` itself loadable: links to the files of iteration `number`.

        `axolotl lm-eval`, `inference`, `merge-lora` and everything else that expects a model in
        `output_dir` then finds the last finished one.
        """
        source = self.iteration(number).path
        self._unlink_newest()
        for file in sorted(source.iterdir()):
            link = self.root / file.name
            if file.is_file() and _is_model_file(file.name) and not (link.exists() or link.is_symlink()):
                link.symlink_to(Path(source.name) / file.name)


def _is_model_file(name: str) -> bool:
    """Whether a file of an iteration belongs to the model or tokenizer as opposed to its making."""
    if name in ("config.yml", "metrics.jsonl", "training_args.bin", "README.md", "trainer_state.json"):
        return False
    return name.endswith((".json", ".safetensors", ".model", ".txt", ".jinja"))


def _holder(file: Path) -> str:
    """Who holds the lock; its name appears, or replaces that of a dead process, a moment after it got the lock."""
    for _ in range(30):
        with suppress(OSError, json.JSONDecodeError, KeyError):
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["host"] != socket.gethostname() or pid_exists(content["pid"]):
                return f"process {content['pid']} on {content['host']}"
        time.sleep(0.1)
    return "another process"


# Keys whose change cannot change the result: they may differ when a run goes on.
FREE_KEYS = frozenset(
    {
        "logging_steps", "save_steps", "saves_per_epoch", "save_strategy", "save_total_limit", "save_only_model",
        "debug_text_only", "debug_num_examples", "prompter", "shard", "download", "iterable", "num_processes",
        "main_process_port", "cloud", "sweep",
        "save_first_step", "eval_steps", "evals_per_epoch", "eval_strategy", "debug", "strict", "output_dir",
        "dataset_prepared_path", "dataset_num_proc", "dataset_processes", "dataset_keep_in_memory",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "hf_use_auth_token",
        "auto_resume_from_checkpoints", "resume_from_checkpoint", "axolotl_config_path", "is_preprocess",
        "export", "sync_profiler_steps", "sync_profiler_start_step",
        "device", "device_map", "ddp_timeout", "profiler_steps", "gc_steps", "include_tkps", "hub_strategy",
        "use_ray", "ray_num_workers", "ray_run_name", "inference", "merge_lora",
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading", "deepspeed",
        "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel",
    }
)  # fmt: skip
FREE_PREFIXES = ("wandb_", "use_wandb", "mlflow_", "use_mlflow", "comet_", "use_comet", "trackio_", "use_trackio",
                 "use_tensorboard", "use_otel", "otel_", "hub_", "lm_eval_", "eval_", "fsdp", "ddp_")  # fmt: skip
FREE_SPIN_KEYS = frozenset({"iterations", "schedule", "shared_prefix"})
FREE_GENERATION_KEYS = frozenset({"vllm_python", "backend", "ray_address"})
# Of Axolotl's `vllm:` block only these can change what vLLM computes.
BINDING_VLLM_KEYS = frozenset({"dtype", "max_model_len"})
# Of what is handed to vLLM as it is: how it uses memory and devices, never what it computes.
FREE_VLLM_KWARGS = frozenset(
    {
        "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill",
        "cpu_offload_gb", "disable_log_stats", "disable_custom_all_reduce", "block_size",
        "distributed_executor_backend", "pipeline_parallel_size", "download_dir", "load_format",
    }
)  # fmt: skip
SECRET_PARTS = ("token", "api_key", "password", "secret", "credential")


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration that may lie on disk: values of keys that name a secret are left out."""
    return {
        key: value if key == "special_tokens" else _without_secrets(value)
        for key, value in config.items()
        if not (isinstance(value, str) and _names_a_secret(str(key).lower()))
    }


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


def _names_a_secret(key: str) -> bool:
    return any(part in key for part in SECRET_PARTS) and not key.startswith("tokenizer_")


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that must not change within a run, nested ones joined by a dot."""
    spin = config.get("spin") or {}
    binding = {
        key: value
        for key, value in config.items()
        if key not in ("spin", "vllm")
        and key not in FREE_KEYS
        and not key.startswith(FREE_PREFIXES)
        and value is not None
    }
    # Since Axolotl 0.21 nobody needs to name the plugin.
    binding["plugins"] = [name for name in binding.get("plugins") or [] if not str(name).startswith("spin_plugin")]
    # A step that does not fit into memory may be cut into more and smaller micro-batches: its pairs stay the same.
    factors = [binding.pop(key, None) for key in ("micro_batch_size", "gradient_accumulation_steps")]
    binding["micro_batch_size × gradient_accumulation_steps"] = _product(factors)
    binding |= {f"spin.{k}": v for k, v in spin.items() if k not in FREE_SPIN_KEYS and k != "generation"}
    generation = dict(spin.get("generation") or {})
    kwargs = generation.pop("vllm_kwargs", None) or {}
    vllm = {k: v for k, v in (config.get("vllm") or {}).items() if k in BINDING_VLLM_KEYS and v not in (None, "auto")}
    binding |= {f"vllm.{k}": v for k, v in vllm.items()}
    binding |= {f"spin.generation.{k}": v for k, v in generation.items() if k not in FREE_GENERATION_KEYS}
    return binding | {f"spin.generation.vllm_kwargs.{k}": v for k, v in kwargs.items() if k not in FREE_VLLM_KWARGS}


def _product(factors: list[Any]) -> Any:
    """The product of numbers that may be absent; what is no number stays as it is, for Axolotl to refuse."""
    try:
        return math.prod(int(factor) for factor in factors if factor is not None)
    except (TypeError, ValueError):
        return factors


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any], begun: int) -> list[str]:
    """Keys by which two configurations of one run directory lead to different results.

    More iterations may be added; the schedule of the `begun` first ones may not change.
    """
    old, new = (_as_json(_binding(config)) for config in (before, now))
    keys = [key for key in sorted(old.keys() | new.keys()) if not same_value(old.get(key), new.get(key))]
    differs = not all(same_value(_scheduled(before, number), _scheduled(now, number)) for number in range(begun))
    return keys + (["spin.schedule"] if differs else [])


def same_value(old: Any, new: Any) -> bool:
    """Whether two values of a configuration mean the same; `5e-5` is a text in YAML and 0.00005 a number."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(same_value(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(same_value, old, new))
    if isinstance(old, str) != isinstance(new, str):
        with suppress(ValueError, TypeError):
            return float(old) == float(new)
    return old == new


def _scheduled(config: Mapping[str, Any], iteration: int) -> Any:
    """What the schedule changes in an iteration."""
    schedule = (config.get("spin") or {}).get("schedule") or []
    return _as_json(schedule[iteration]) if iteration < len(schedule) else {}


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
