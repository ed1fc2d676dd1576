"""The opponent's weights: which they are, and whether they are sound. vLLM draws rubbish from broken ones, silently."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from spin_plugin.checkpoint import check_safetensors, check_weights
from spin_plugin.messages import SpinError, say

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
BLOCK = 1 << 24  # numbers looked at at a time
WORTH_A_LINE = 1 << 30  # bytes that take seconds


def fingerprint(places: Iterable[str], revision: str | None) -> str:
    """What tells two opponents apart: the content of local weights, the name and revision of remote ones."""
    digest = hashlib.sha256()
    for place in places:
        if not Path(place).is_dir():
            digest.update(f"{place}@{revision}".encode())
            continue
        for file in sorted(Path(place).glob("*.safetensors")):
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def require_finite(files: Iterable[Path]) -> None:
    """Look at every number of safetensors files, one block in memory at a time.

    Raises:
        SpinError: names the tensor that holds NaN or infinity.
    """
    files = list(files)
    if (size := sum(file.stat().st_size for file in files)) > WORTH_A_LINE:
        say(f"looking for NaN in {size / 1e9:.1f} GB of weights")
    for file in files:
        header = check_safetensors(file)
        data = file.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
        with open(file, "rb") as content:
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                content.seek(data + start)
                if entry["dtype"] in NOT_FINITE and _not_finite(content, end - start, NOT_FINITE[entry["dtype"]]):
                    raise SpinError(
                        f"{file}: {name} holds NaN or infinite numbers, so the training that saved it has diverged or "
                        "the file is damaged; restore it from a backup, or train anew with a lower learning rate"
                    )


def _not_finite(content: Any, size: int, bits: np.unsignedinteger[Any]) -> bool:
    left = size // bits.itemsize
    while left:
        numbers = np.fromfile(content, bits.dtype, min(left, BLOCK))
        if ((numbers & bits) == bits).any():
            return True
        left -= len(numbers)
    return False


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


def _refuse_missing(folder: Path, names: list[str]) -> None:
    if names:
        raise SpinError(
            f"{folder}: {len(names)} tensors of the architecture are missing or of another shape, {names[0]} first; "
            "restore it from a backup"
        )
