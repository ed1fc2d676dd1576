"""Damaged weights are detected before vLLM generates with them; intact ones of every kind pass."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SMALL, make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from spin_plugin.console import SpinError
from spin_plugin.opponent import weights
from spin_plugin.opponent.weights import (
    fingerprint,
    model_class,
    require_complete,
    require_complete_adapter,
    require_finite,
)

FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn
)  # fmt: skip


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
def test_single_non_finite_number_is_found(tmp_path: Path, dtype: torch.dtype, value: str) -> None:
    damaged = torch.ones(1000).to(dtype)
    damaged[-1] = torch.tensor(float(value)).to(dtype)
    if damaged[-1].float().isfinite():  # float8_e4m3 has no infinity
        assert dtype is torch.float8_e4m3fn
        return
    save_file({"a": torch.ones(7, dtype=torch.int8), "b": torch.ones(3), "c": damaged}, tmp_path / "w.safetensors")
    with pytest.raises(SpinError, match=r"w\.safetensors: c holds NaN"):
        require_finite([tmp_path / "w.safetensors"])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_finite_number_passes(tmp_path: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    extremes = torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0], dtype=torch.float64)
    integers = {f"{kind}": torch.full((9,), -1, dtype=kind) for kind in (torch.int8, torch.int32, torch.int64)}
    save_file({"a": extremes.to(dtype), "empty": torch.ones(0), **integers}, tmp_path / "w.safetensors")
    require_finite([tmp_path / "w.safetensors"])


def raw_file(path: Path, header: dict[str, Any], data: bytes) -> Path:
    """Write a safetensors file with any header."""
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def test_4_bit_numbers_are_always_finite(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    require_finite([raw_file(tmp_path / "w.safetensors", header, b"\xff\xff")])


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "NEW", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    ],
    ids=["shape", "dtype", "hole"],
)
def test_wrong_header_is_reported(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(SpinError, match="is not a readable safetensors file"):
        require_finite([raw_file(tmp_path / "w.safetensors", {"a": entry}, bytes(8))])


# --- each file is read once --------------------------------------------------------------------


def slow_fingerprint(directory: Path) -> str:
    """A reference for `fingerprint`."""
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in sorted(directory.glob("*.safetensors"))]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def test_fingerprint_is_the_digest_of_the_digests(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert (
        fingerprint([str(tmp_path)], None)
        == fingerprint([str(tmp_path)], None, tmp_path / "m")
        == slow_fingerprint(tmp_path)
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    read: list[str] = []
    reading = weights._read
    monkeypatch.setattr(weights, "_read", lambda file: (read.append(file.name), reading(file))[1])
    return read


def test_unchanged_file_is_read_once_for_fingerprint_and_nan(model: Path, tmp_path: Path, reads: list[str]) -> None:
    cache = tmp_path / "weights.json"
    first = fingerprint([str(model)], None, cache)
    require_finite([model / "model.safetensors"], cache)
    assert fingerprint([str(model)], None, cache) == first
    assert reads == ["model.safetensors"]


def in_place(file: Path) -> None:
    """Change a number but keep size, inode and modification time."""
    before = file.stat()
    with open(file, "r+b") as content:
        content.seek(-4, os.SEEK_END)
        content.write(b"\x00\x00\xc0\x7f")  # NaN in float32
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_rename(file: Path) -> None:
    copy = file.with_name("copy")
    shutil.copy2(file, copy)
    in_place(copy)
    os.replace(copy, file)


@pytest.mark.parametrize("alter", [in_place, by_rename])
def test_changed_file_is_read_again(
    model: Path, tmp_path: Path, reads: list[str], alter: Callable[[Path], None]
) -> None:
    cache = tmp_path / "weights.json"
    first = fingerprint([str(model)], None, cache)
    alter(model / "model.safetensors")
    assert fingerprint([str(model)], None, cache) == slow_fingerprint(model) != first
    for _ in range(2):
        with pytest.raises(SpinError, match="holds NaN"):
            require_finite([model / "model.safetensors"], cache)
    assert len(reads) == 2


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_damaged_cache_is_ignored(model: Path, tmp_path: Path, place: int) -> None:
    cache = tmp_path / "weights.json"
    first = fingerprint([str(model)], None, cache)
    content = bytearray(cache.read_bytes())
    content[place % len(content)] ^= 1
    cache.write_bytes(content)
    assert fingerprint([str(model)], None, cache) == first
    require_finite([model / "model.safetensors"], cache)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\n\xff\n", b"1\n2\n3\n"])
def test_file_that_is_no_cache_is_ignored(model: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.json").write_bytes(content)
    assert fingerprint([str(model)], None, tmp_path / "weights.json") == slow_fingerprint(model)


# --- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3", {}),
        ("gemma3_text", {}),
        ("gpt2", {}),
    ],
)
def test_missing_tensor_of_the_architecture_is_named(tmp_path: Path, architecture: str, changes: dict) -> None:
    model = make_model(tmp_path / "model", architecture, **changes)
    require_complete(model, trust_remote_code=False)
    name = next(name for name in sorted(load_file(model / "model.safetensors")) if ".1." in name)
    change(model / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(SpinError, match=r"1 tensors of the architecture are missing|do not fit"):
        require_complete(model, trust_remote_code=False)


def test_tensor_of_another_shape_is_named(model: Path) -> None:
    change(model / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(SpinError, match=r"another shape, model\.norm\.weight"):
        require_complete(model, trust_remote_code=False)


def test_missing_tensor_of_an_adapter_is_named(llama: Path, adapter: Path) -> None:
    require_complete_adapter(adapter, str(llama))
    file = adapter / "adapter_model.safetensors"
    name = sorted(load_file(file))[-1]
    change(file, lambda tensors: tensors.pop(name))
    with pytest.raises(SpinError, match=name.replace(".", r"\.")):
        require_complete_adapter(adapter, str(llama))


def test_tensor_that_only_the_index_names_is_refused(tmp_path: Path, llama: Path) -> None:
    from spin_plugin.run.checkpoint import check_model_dir

    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(model, max_shard_size="100KB")
    shutil.copy(llama / "tokenizer.json", model)
    check_model_dir(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    change(model / file, lambda tensors: tensors.pop(name))
    with pytest.raises(SpinError, match="lacks the tensor"):
        check_model_dir(model)


# --- fingerprint -------------------------------------------------------------------------------


def test_fingerprint_depends_on_content_and_not_on_path(model: Path, llama: Path, adapter: Path) -> None:
    assert fingerprint([str(model)], None) == fingerprint([str(llama)], None)
    assert fingerprint([str(model), str(adapter)], None) != fingerprint([str(model)], None)
    change(model / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(1.0001))
    assert fingerprint([str(model)], None) != fingerprint([str(llama)], None)
    assert fingerprint(["org/model"], "a") != fingerprint(["org/model"], "b")


# --- multimodal models, trained on text only ---------------------------------------------------


def test_multimodal_model_is_checked_with_the_class_axolotl_loads(tmp_path: Path) -> None:
    """transformers has no causal LM for Mistral 3, so Axolotl loads its image-text class even without images."""
    text = {key: value for key, value in SMALL.items() if not key.endswith("_token_id")} | {"model_type": "mistral"}
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 1, "head_dim": 32, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("mistral3", text_config=text, vision_config=vision, image_token_index=5)
    assert model_class(config) is AutoModelForImageTextToText
    assert model_class(AutoConfig.for_model("llama")) is AutoModelForCausalLM
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "model")
    require_complete(tmp_path / "model", trust_remote_code=False)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    require_complete_adapter(tmp_path / "adapter", str(tmp_path / "model"))
