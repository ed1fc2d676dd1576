"""The opponent's weights: which they are, and whether they are sound. vLLM draws rubbish from broken ones, silently."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from spin_plugin.console import SpinError, say
from spin_plugin.run.atomic import write_atomically
from spin_plugin.run.checkpoint import check_safetensors, check_weights

# A number is NaN or infinite where all these bits are set: those of the exponent, and for F8_E4M3, which has no
# infinity, all but the sign.
NOT_FINITE: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F8_E5M2": np.uint8(0x7C),
    "F8_E4M3": np.uint8(0x7F),
}
BLOCK = 1 << 20  # numbers looked at at a time, in each thread
WORTH_A_LINE = 1 << 30  # bytes that take seconds


class Facts(NamedTuple):
    """What reading a safetensors file once has told."""

    stamp: list[int]
    """Size, time of the last change of content and of inode (ns), and inode: what changes with the file."""
    sha256: str
    broken: str | None
    """The first tensor that holds NaN or infinity."""


def facts_of(files: Iterable[Path], memory: Path | None = None) -> list[Facts]:
    """Read safetensors files, one thread a file; what `memory` knows of an unchanged file is not read again.

    A file counts as unchanged where path, size, inode, and the times of its last change are what they were. That does
    not see what changes below the file system (a failing disk), or a second change within one tick of its clock (a
    few ms, and on a network file system the seconds for which it caches attributes).

    Args:
        files: each is read once, in blocks.
        memory: a file that keeps the facts; one that is damaged is ignored.

    Raises:
        SpinError: a file is missing, truncated or no safetensors file.
    """
    known = _remembered(memory) if memory else {}
    files = [file.absolute() for file in files]
    stale = [file for file in files if str(file) not in known or known[str(file)].stamp != _stamp(file.stat())]
    if (size := sum(file.stat().st_size for file in stale)) > WORTH_A_LINE:
        say(f"reading {size / 1e9:.1f} GB of weights, for their fingerprint and to look for NaN")
    with ThreadPoolExecutor(max(1, min(len(stale), os.cpu_count() or 1))) as pool:
        known |= {str(file): facts for file, facts in zip(stale, pool.map(_read, stale), strict=True)}
    if memory and stale:
        content = json.dumps({path: facts._asdict() for path, facts in known.items()})
        write_atomically(memory, f"{content}\n{hashlib.sha256(content.encode()).hexdigest()}\n")
    return [known[str(file)] for file in files]


def fingerprint(places: Iterable[str], revision: str | None, memory: Path | None = None) -> str:
    """What tells two opponents apart: the content of local weights, the name and commit of remote ones.

    Args:
        places: directories, or names on the hub.
        revision: the commit of what is on the hub.
        memory: see `facts_of`.
    """
    digest = hashlib.sha256()
    for place in places:
        if not Path(place).is_dir():
            digest.update(f"{place}@{revision}".encode())
            continue
        for facts in facts_of(sorted(Path(place).glob("*.safetensors")), memory):
            digest.update(bytes.fromhex(facts.sha256))
    return digest.hexdigest()


def require_finite(files: Iterable[Path], memory: Path | None = None) -> None:
    """Look at every number of safetensors files.

    Args:
        files: the model's or adapter's.
        memory: see `facts_of`.

    Raises:
        SpinError: names the tensor that holds NaN or infinity.
    """
    files = list(files)
    for file, facts in zip(files, facts_of(files, memory), strict=True):
        if facts.broken is not None:
            raise SpinError(
                f"{file}: {facts.broken} holds NaN or infinite numbers, so the training that saved it has diverged or "
                "the file is damaged; restore it from a backup, or train anew with a lower learning rate"
            )


def _stamp(status: os.stat_result) -> list[int]:
    # The inode's own time cannot be set back: it tells a copy that kept the other time.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _remembered(memory: Path) -> dict[str, Facts]:
    """What the file holds; nothing where its seal does not fit."""
    with suppress(OSError, ValueError):
        content, seal = memory.read_text(encoding="utf-8").splitlines()
        if hashlib.sha256(content.encode()).hexdigest() == seal:
            return {path: Facts(**facts) for path, facts in json.loads(content).items()}
    return {}


def _read(file: Path) -> Facts:
    """One pass over a file for both: its digest, and whether all numbers are finite."""
    header = check_safetensors(file)
    tensors = sorted(header.items(), key=lambda tensor: tensor[1]["data_offsets"])  # they follow one another
    digest, broken = hashlib.sha256(), None
    with open(file, "rb") as content:
        status = os.fstat(content.fileno())
        data = status.st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
        digest.update(content.read(data))
        for name, entry in tensors:
            start, end = entry["data_offsets"]
            bits = NOT_FINITE.get(entry["dtype"])
            for block in blocks(content, end - start, 1 if bits is None else bits.itemsize):
                digest.update(block)
                if broken is None and bits is not None and _holds(block, bits):
                    broken = name
        digest.update(content.read())  # nothing, in a file that can be loaded
    return Facts(_stamp(status), digest.hexdigest(), broken)


def blocks(content: BinaryIO, size: int, number: int) -> Iterator[bytes]:
    """The next `size` bytes, so many whole numbers at a time."""
    while size:
        wanted = min(size, BLOCK * number)
        block = content.read(wanted)
        if len(block) < wanted:
            raise SpinError(f"{content.name} became shorter while it was read; wait until it is copied")
        size -= wanted
        yield block


def _holds(block: bytes, bits: np.unsignedinteger[Any]) -> bool:
    """Whether any number of a block has all these bits set."""
    return bool(((np.frombuffer(block, bits.dtype) & bits) == bits).any())


def model_class(config: Any) -> Any:
    """The Auto class by which Axolotl loads a model of this configuration, also where it is trained on text alone."""
    from axolotl.loaders import MULTIMODAL_AUTO_MODEL_MAPPING
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if config.model_type not in MULTIMODAL_AUTO_MODEL_MAPPING:
        return AutoModelForCausalLM
    named = MULTIMODAL_AUTO_MODEL_MAPPING[config.model_type]
    return AutoModelForImageTextToText if isinstance(named, str) else named


def require_complete(model: Path, *, trust_remote_code: bool) -> None:
    """Compare the tensors of a model with those that its architecture has, without reading their numbers.

    Raises:
        SpinError: names a tensor that is missing; transformers and vLLM would make one up.
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
    except RuntimeError as error:  # experts that are stored one by one do not fit together
        raise SpinError(f"{model}: its tensors do not fit its architecture: {str(error)[:200]}; copy it anew") from None
    found = loaded[1]
    _refuse_missing(model, sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}))


def require_complete_adapter(adapter: Path, base_model: str, **hub: Any) -> None:
    """The same for an adapter; `hub` is what transformers needs to know of the base model's place.

    Raises:
        SpinError: names a tensor that is missing; peft would make one up, vLLM leaves its layer out.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig

    with torch.device("meta"):
        config, code = AutoConfig.from_pretrained(base_model, **hub), hub.get("trust_remote_code")
        model = model_class(config).from_config(config, trust_remote_code=code)
        model = get_peft_model(model, PeftConfig.from_pretrained(str(adapter)))
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    held = {name for file in check_weights(adapter, "adapter_model") for name in check_safetensors(file)}
    _refuse_missing(adapter, sorted(wanted - held))


def _refuse_missing(directory: Path, names: list[str]) -> None:
    if names:
        raise SpinError(
            f"{directory}: {len(names)} tensors of the architecture are missing or of another shape, {names[0]} first; "
            "restore it from a backup"
        )
