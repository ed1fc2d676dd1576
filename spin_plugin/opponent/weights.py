"""The opponent's weights: a fingerprint, and a check for damage: vLLM generates garbage from NaN without an error."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from spin_plugin.console import SpinError, say
from spin_plugin.run.atomic import write_atomically
from spin_plugin.run.checkpoint import check_safetensors, check_weights

LARGE = 1 << 30  # bytes that take seconds to read


class Facts(NamedTuple):
    """What reading a safetensors file yields."""

    stamp: list[int]
    """Size, modification time and change time (ns), and inode."""
    sha256: str
    broken: str | None
    """The first tensor that holds NaN or infinity."""


def facts_of(files: Iterable[Path], cache: Path | None = None) -> list[Facts]:
    """Read safetensors files, one thread per file, skipping those that `cache` lists as unchanged.

    A file is unchanged if its path and stamp are. That misses damage below the file system (a failing disk) and a
    second change within one tick of its clock: a few ms, seconds on a network file system that caches attributes.

    Args:
        files: read in parallel.
        cache: a JSON file that keeps the facts between runs; a damaged one is ignored.

    Raises:
        SpinError: a file is missing, truncated or not a safetensors file.
    """
    known = _read_cache(cache) if cache else {}
    files = [file.absolute() for file in files]
    stale = [file for file in files if str(file) not in known or known[str(file)].stamp != _stamp(file)]
    if (size := sum(file.stat().st_size for file in stale)) > LARGE:
        say(f"reading {size / 1e9:.1f} GB of weights to fingerprint them and to check for NaN")
    with ThreadPoolExecutor(max(1, min(len(stale), os.cpu_count() or 1))) as pool:
        known |= {str(file): facts for file, facts in zip(stale, pool.map(_read, stale), strict=True)}
    if cache and stale:
        content = json.dumps({path: facts._asdict() for path, facts in known.items()})
        write_atomically(cache, f"{content}\n{hashlib.sha256(content.encode()).hexdigest()}\n")
    return [known[str(file)] for file in files]


def fingerprint(sources: Iterable[str], revision: str | None, cache: Path | None = None) -> str:
    """Identify an opponent: by the content of local weights, by name and commit of those on the hub.

    Args:
        sources: directories, or names on the hub.
        revision: the commit of what is on the hub.
        cache: see `facts_of`.
    """
    digest = hashlib.sha256()
    for source in sources:
        if not Path(source).is_dir():
            digest.update(f"{source}@{revision}".encode())
            continue
        for facts in facts_of(sorted(Path(source).glob("*.safetensors")), cache):
            digest.update(bytes.fromhex(facts.sha256))
    return digest.hexdigest()


def require_finite(files: Iterable[Path], cache: Path | None = None) -> None:
    """Check every number in the safetensors files of a model or adapter.

    Args:
        files: the files to check.
        cache: see `facts_of`.

    Raises:
        SpinError: names the tensor that holds NaN or infinity.
    """
    files = list(files)
    for file, facts in zip(files, facts_of(files, cache), strict=True):
        if facts.broken is not None:
            raise SpinError(
                f"{file}: {facts.broken} holds NaN or infinite numbers: the training that saved it diverged, or the "
                "file is damaged; restore it from a backup, or train again with a lower learning rate"
            )


def _stamp(file: Path) -> list[int]:
    # Unlike mtime, ctime cannot be set back, so it reveals a copy that preserved mtime.
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_cache(cache: Path) -> dict[str, Facts]:
    """The cached facts; empty if the file is missing or its checksum does not match."""
    with suppress(OSError, ValueError):
        content, checksum = cache.read_text(encoding="utf-8").splitlines()
        if hashlib.sha256(content.encode()).hexdigest() == checksum:
            return {path: Facts(**facts) for path, facts in json.loads(content).items()}
    return {}


def _read(file: Path) -> Facts:
    """Digest a file and look for a tensor that is not finite."""
    from safetensors import SafetensorError, safe_open

    check_safetensors(file)
    stamp = _stamp(file)
    with open(file, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if _stamp(file) != stamp:
        raise SpinError(f"{file}: changed while it was read; wait until it is copied")
    try:
        with safe_open(file, framework="pt") as tensors:
            broken = next((name for name in sorted(tensors.keys()) if not _is_finite(tensors.get_tensor(name))), None)
    except SafetensorError as error:  # the header fits the file's size and is still wrong
        raise SpinError(f"{file} is not a readable safetensors file ({error}); copy it again") from None
    return Facts(stamp, sha256, broken)


def _is_finite(tensor: Any) -> bool:
    """Whether no number of a tensor is NaN or infinite.

    Looks at its extremes: NaN spreads to both. `torch.isfinite` takes four to five times as long, through temporaries
    larger than the tensor.
    """
    import torch

    if not tensor.is_floating_point() or not tensor.numel() or "float4" in str(tensor.dtype):  # 4 bits have no NaN
        return True
    if tensor.dtype.itemsize == 1:  # torch 2.14 cannot compare 8 bits
        tensor = tensor.float()
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def model_class(config: Any) -> Any:
    """The Auto class with which Axolotl loads a model of this configuration, text-only training included."""
    from axolotl.loaders import MULTIMODAL_AUTO_MODEL_MAPPING
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if config.model_type not in MULTIMODAL_AUTO_MODEL_MAPPING:
        return AutoModelForCausalLM
    named = MULTIMODAL_AUTO_MODEL_MAPPING[config.model_type]
    return AutoModelForImageTextToText if isinstance(named, str) else named


def require_complete(model: Path, *, trust_remote_code: bool) -> None:
    """Check that a model holds every tensor of its architecture, without reading the numbers.

    Raises:
        SpinError: names a missing tensor, which transformers and vLLM would initialize at random.
    """
    from transformers import AutoConfig

    auto = model_class(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code))
    try:
        loaded: Any = auto.from_pretrained(
            model,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    except RuntimeError as error:  # separately stored experts that cannot be merged
        raise SpinError(f"{model}: tensors do not fit the architecture: {str(error)[:200]}; copy it again") from None
    found = loaded[1]
    _refuse_missing(model, sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}))


def require_complete_adapter(adapter: Path, base_model: str, **hub: Any) -> None:
    """Check that an adapter holds every tensor that its configuration promises.

    Args:
        adapter: its directory.
        base_model: directory or hub name of the model it was trained on.
        hub: `revision` and `trust_remote_code` of the base model.

    Raises:
        SpinError: names a missing tensor, which peft would initialize at random; vLLM would skip its layer.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig

    with torch.device("meta"):
        config, code = AutoConfig.from_pretrained(base_model, **hub), hub.get("trust_remote_code")
        model = model_class(config).from_config(config, trust_remote_code=code)
        model = get_peft_model(model, PeftConfig.from_pretrained(str(adapter)))
    needed = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    held = {name for file in check_weights(adapter, "adapter_model") for name in check_safetensors(file)}
    _refuse_missing(adapter, sorted(needed - held))


def _refuse_missing(directory: Path, names: list[str]) -> None:
    if names:
        raise SpinError(
            f"{directory}: {len(names)} tensors of the architecture are missing or of another shape, {names[0]} first; "
            "restore it from a backup"
        )
