"""Checks of model directories: real saved models pass, every kind of damage is reported with its file."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import SMALL, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from spin_plugin.console import SpinError
from spin_plugin.run.checkpoint import check_model_dir, check_safetensors, incomplete_reason


def refused(check: Callable[[], None], *parts: str | Path) -> None:
    """Assert that `check` raises a one-line SpinError containing all `parts`."""
    with pytest.raises(SpinError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of a real saved model, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def sharded_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(path)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


@pytest.fixture
def sharded(sharded_original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_original, tmp_path / "sharded"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter as peft saves it: configuration and weights, no tokenizer."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    save_file(
        {"lora_A.weight": torch.ones(4, 8), "lora_B.weight": torch.zeros(8, 4)}, path / "adapter_model.safetensors"
    )
    return path


# --- intact models -----------------------------------------------------------------------------


def test_saved_models_are_accepted(model: Path, sharded: Path, adapter: Path) -> None:
    check_model_dir(model)
    check_model_dir(sharded)
    check_model_dir(adapter, adapter=True)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"])
def test_other_tokenizer_files_are_accepted(model: Path, name: str) -> None:
    (model / "tokenizer.json").rename(model / name)
    check_model_dir(model)


def test_safetensors_file_without_tensors_is_accepted(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors", metadata={"format": "pt"})
    check_safetensors(tmp_path / "empty.safetensors")


# --- missing files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    refused(lambda: check_model_dir(model), model, name)


def test_directory_that_does_not_exist(tmp_path: Path) -> None:
    refused(lambda: check_model_dir(tmp_path / "absent"), tmp_path / "absent", "config.json")


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(lambda: check_model_dir(model), model, "safetensors", "pickled")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_of_an_adapter_is_named(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    refused(lambda: check_model_dir(adapter, adapter=True), adapter, name)


def test_model_is_not_an_adapter_nor_an_adapter_a_model(model: Path, adapter: Path) -> None:
    refused(lambda: check_model_dir(model, adapter=True), model, "adapter_config.json")
    refused(lambda: check_model_dir(adapter), adapter, "config.json")


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(lambda: check_model_dir(sharded), shard, "is missing")


def test_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(lambda: check_model_dir(sharded), shard, "is truncated")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {}}',
        b"\xff\xfe",
    ],
)
def test_damaged_index_is_named(sharded: Path, content: bytes) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(content)
    refused(lambda: check_model_dir(sharded), index)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("kept", [0, 20])
def test_truncated_file_beside_the_weights_is_named(model: Path, name: str, kept: int) -> None:
    (model / name).write_bytes((model / name).read_bytes()[:kept])
    refused(lambda: check_model_dir(model), model / name, "is damaged")


# --- damaged weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["0", "4", "8", "9", "header - 1", "header", "header + 1", "half", "all - 1"])
def test_truncated_weights_are_named(model: Path, kept: str) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    sizes = {
        "header - 1": header - 1,
        "header": header,
        "header + 1": header + 1,
        "half": len(content) // 2,
        "all - 1": len(content) - 1,
    }
    weights.write_bytes(content[: sizes[kept] if kept in sizes else int(kept)])
    refused(lambda: check_model_dir(model), weights)


def test_truncated_adapter_is_named(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    refused(lambda: check_model_dir(adapter, adapter=True), weights, "is truncated")


def test_weights_that_are_too_long_are_named(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    refused(lambda: check_model_dir(model), weights)


def with_header(path: Path, header: bytes, tail: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + tail)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"", b"\0\0\0\0", b"garbage", b"\xff\xfe\x80", b"null", b"3", b"[]", b'["a"]',
        b'{"a": 3}', b'{"a": null}', b'{"a": {}}', b'{"a": {"data_offsets": null}}', b'{"a": {"data_offsets": []}}',
        b'{"a": {"data_offsets": [0]}}', b'{"a": {"data_offsets": [0, "x"]}}', b'{"a": {"data_offsets": [0, null]}}',
        b'{"a": {"data_offsets": {"1": 0}}}', b'{"a": {"data_offsets": [0, 1e300]}}', b'{"a": {"data_offsets": "ab"}}',
    ],
)  # fmt: skip
def test_header_that_is_garbage_is_named(tmp_path: Path, header: bytes) -> None:
    weights = with_header(tmp_path / "model.safetensors", header, b"1234")
    refused(lambda: check_safetensors(weights), weights)


def test_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(lambda: check_safetensors(weights), weights, "header exceeds")


def test_weights_that_are_a_directory_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    refused(lambda: check_safetensors(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")


# --- resumable checkpoints ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written by transformers."""
    directory = tmp_path_factory.mktemp("training")
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    arguments = TrainingArguments(
        str(directory), max_steps=2, save_steps=2, report_to=[], use_cpu=True, logging_steps=9
    )
    Trainer(LlamaForCausalLM(LlamaConfig(**SMALL)), arguments, train_dataset=[row] * 16).train()
    return directory / "checkpoint-2"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def test_checkpoint_of_transformers_is_complete(checkpoint: Path) -> None:
    assert incomplete_reason(checkpoint) is None
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    assert incomplete_reason(checkpoint) is None, "an adapter's checkpoint"


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"]
)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_checkpoint_with_a_truncated_file_is_incomplete(checkpoint: Path, name: str, kept: float) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(len(content) * kept)])
    assert name in str(incomplete_reason(checkpoint))


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_checkpoint_without_one_of_its_files_is_incomplete(checkpoint: Path, name: str) -> None:
    """Without optimizer state, as `save_only_model` leaves it, a checkpoint cannot be resumed."""
    (checkpoint / name).unlink()
    assert incomplete_reason(checkpoint)


def test_checkpoint_of_another_step_is_incomplete(checkpoint: Path) -> None:
    assert "another step" in str(incomplete_reason(checkpoint.rename(checkpoint.with_name("checkpoint-3"))))


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_sharded_checkpoints_are_complete(checkpoint: Path, kind: str) -> None:
    """Their weights and optimizer states are in subdirectories, and ZeRO-3 saves no model.safetensors."""
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).unlink()
    directories = {"deepspeed": ["global_step2"], "fsdp": ["pytorch_model_fsdp_0", "optimizer_0"]}[kind]
    for directory in directories:
        (checkpoint / directory).mkdir()
        torch.save({}, checkpoint / directory / "rank_0_states.pt")
    assert incomplete_reason(checkpoint) is None
    (checkpoint / directories[-1] / "rank_0_states.pt").write_bytes(b"PK half")
    assert "rank_0_states.pt" in str(incomplete_reason(checkpoint))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 100) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "data_offsets"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=JSON | st.binary(max_size=30), tail=st.binary(max_size=9))
def test_any_content_passes_or_is_refused_by_name(tmp_path: Path, header: object, tail: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    weights = with_header(tmp_path / "model.safetensors", raw, tail)
    try:
        check_safetensors(weights)
    except SpinError as error:
        assert str(weights) in str(error)
