"""vLLM's interpreter, as far as it can be checked without starting an engine. Real vLLM: test_doctor.py."""

import sys
from pathlib import Path

import pytest

from spin_plugin.console import RESULT, WARNING, SpinError, collected
from spin_plugin.doctor import machine
from spin_plugin.doctor.machine import Device, VllmProbe


def interpreter(directory: Path, package: str) -> str:
    """Write an interpreter that finds a package named vllm."""
    (directory / "vllm").mkdir()
    (directory / "vllm/__init__.py").write_text(package)
    (directory / "vllm/platforms.py").write_text("from types import SimpleNamespace as S\n" + PLATFORM)
    script = directory / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={directory} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


PLATFORM = "current_platform = S(is_cpu=lambda: False)"
GPU = [Device("GPU", 80_000_000_000, gpu=True)]


def test_interpreter_without_vllm() -> None:
    with pytest.raises(SpinError, match="has no vLLM"):
        VllmProbe(sys.executable)


def test_vllm_that_cannot_be_imported(tmp_path: Path) -> None:
    probe = VllmProbe(interpreter(tmp_path, "raise ImportError('built for another torch')"))
    with pytest.raises(SpinError, match="`import vllm` fails: ImportError: built for another torch"):
        probe.check()
    assert probe.process.poll() is not None


def test_vllm_for_gpus_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "devices", lambda: [Device("CPU", 1, gpu=False)])
    with pytest.raises(SpinError, match="built for a GPU, but none is visible"):
        VllmProbe(interpreter(tmp_path, "__version__ = '0.32.0'")).check()


@pytest.mark.parametrize(("version", "expected"), [("0.32.0", [RESULT]), ("0.99.0", [WARNING, RESULT])])
def test_untested_version_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, expected: list[str]
) -> None:
    monkeypatch.setattr(machine, "devices", lambda: GPU)
    with collected() as messages:
        VllmProbe(interpreter(tmp_path, f"__version__ = '{version}'")).check()
    assert [start for start, _ in messages] == expected
    assert all(version in message for _, message in messages)


def test_probe_that_is_not_needed_ends(tmp_path: Path) -> None:
    probe = VllmProbe(interpreter(tmp_path, "import time; time.sleep(600)"))
    probe.close()
    assert probe.process.poll() is not None
