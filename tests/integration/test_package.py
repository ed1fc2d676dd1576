"""The wheel contains every module and file, and works without a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves a build directory whose contents it would reuse."""
    directory, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "spin_plugin", source / "spin_plugin")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(directory), str(source)], check=True, timeout=600)
    return next(directory.glob("spin_plugin-*.whl"))


def test_wheel_contains_the_entire_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("spin_plugin/")}
    files = {path for path in (ROOT / "spin_plugin").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert held == {str(path.relative_to(ROOT)) for path in files}


def test_installed_wheel_writes_a_configuration_and_shows_its_status(wheel: Path, tmp_path: Path) -> None:
    """Installed into its own directory, ahead of the checkout on the path; dependencies come from this environment."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=600)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    where = run("-c", "import spin_plugin; print(spin_plugin.__file__)").strip()
    assert Path(where).is_relative_to(site)
    run("-m", "spin_plugin.cli", "init")
    config = yaml.safe_load((tmp_path / "spin.yml").read_text())
    assert config["rl"] == "spin"
    assert "not started" in run("-m", "spin_plugin.cli", "status", "spin.yml")
