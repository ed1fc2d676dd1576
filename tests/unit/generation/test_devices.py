"""Placement of engines on GPUs and CPU cores, and vLLM's memory settings."""

import importlib.util
import os
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

from spin_plugin.console import SpinError
from spin_plugin.generation import devices
from spin_plugin.generation.devices import placements, visible_gpus


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *names: monkeypatch.setattr(devices, "visible_gpus", lambda: list(names))


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    """The module vllm_worker.py, which imports vllm only inside its functions."""
    path = ROOT / "spin_plugin" / "generation" / "vllm_worker.py"
    spec = importlib.util.spec_from_file_location("vllm_worker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def visible_devices(engines: int | None, each: int) -> list[str]:
    return [placement.environment["CUDA_VISIBLE_DEVICES"] for placement in placements(engines, each)]


def test_default_is_one_engine_per_gpu(gpus: Any) -> None:
    gpus("0", "1", "2")
    assert visible_devices(None, 1) == ["0", "1", "2"]
    assert visible_devices(2, 1) == ["0", "1"]


def test_default_is_one_engine_per_gpu_group(gpus: Any) -> None:
    """A remaining GPU stays idle; names from CUDA_VISIBLE_DEVICES are kept."""
    gpus("4", "5", "GPU-ab", "7", "8")
    assert visible_devices(None, 2) == ["4,5", "GPU-ab,7"]
    assert visible_devices(1, 4) == ["4,5,GPU-ab,7"]


@pytest.mark.parametrize(
    ("engines", "each", "key"), [(3, 1, "data_parallel_size"), (2, 2, "data_parallel_size"), (None, 4, "tensor_para")]
)
def test_too_many_requested_gpus_are_an_error(gpus: Any, engines: int | None, each: int, key: str) -> None:
    gpus("0", "1")
    with pytest.raises(SpinError, match=f"vllm.{key}.*2 GPUs are visible"):
        placements(engines, each)


def test_engines_without_a_gpu_share_the_cores(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 6, 8})
    assert [placement.cores for placement in placements(None, 1)] == [None]
    assert [placement.cores for placement in placements(2, 1)] == [[0, 2], [4, 6]]
    assert placements(2, 1)[1].environment == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "4,6"}
    assert [placement.cores for placement in placements(6, 1)] == [[0], [2], [4], [6], [8], [0]]


def test_gpu_names_come_from_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]


# --- memory ------------------------------------------------------------------------------------

GIB = 1 << 30


def test_cpu_cache_holds_256_full_length_sequences(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    engine = worker.on_cpu({"max_model_len": 1024}, free=100 * GIB, bytes_per_token=16 << 10, engines=1)
    assert 256 * 1024 * (16 << 10) < engine["kv_cache_memory_bytes"] < 6 * GIB
    assert engine["enforce_eager"] is True


def test_cpu_cache_is_at_most_a_quarter_of_free_memory(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    for engines in (1, 2):
        engine = worker.on_cpu({"max_model_len": 1024}, free=8 * GIB, bytes_per_token=128 << 10, engines=engines)
        assert engine["kv_cache_memory_bytes"] == 2 * GIB // engines


@pytest.mark.parametrize("option", [{"gpu_memory_utilization": 0.3}, {"kv_cache_memory_bytes": 5}])
def test_memory_options_override_cpu_defaults(worker: ModuleType, option: dict[str, Any]) -> None:
    given = {"max_model_len": 64, "enforce_eager": False, **option}
    engine = worker.on_cpu(given, free=GIB, bytes_per_token=1, engines=1)
    assert engine == given | {"enable_chunked_prefill": False}


def test_vllm_memory_variable_overrides_cpu_default(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert "kv_cache_memory_bytes" not in worker.on_cpu({"max_model_len": 64}, GIB, 1, 1)


def test_default_gpu_memory_leaves_space_for_training_processes(worker: ModuleType) -> None:
    assert worker.on_gpu({"seed": 1}) == {"seed": 1, "gpu_memory_utilization": 0.85}
    assert worker.on_gpu({"gpu_memory_utilization": 0.95}) == {"gpu_memory_utilization": 0.95}


def test_retry_halves_sequences_and_reduces_memory(worker: ModuleType) -> None:
    assert worker.with_less_memory({}) == {"max_num_seqs": 128, "gpu_memory_utilization": 0.68}
    assert worker.with_less_memory({"max_num_seqs": 1, "kv_cache_memory_bytes": 10}) == {
        "max_num_seqs": 1,
        "kv_cache_memory_bytes": 5,
    }
