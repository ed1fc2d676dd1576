"""`axolotl spin doctor`, the command, on the quickstart's configuration."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Finished

pytestmark = [pytest.mark.slow, pytest.mark.oldest]
Command = Callable[..., Finished]
# The quickstart's model and data, with a model trained for two steps instead of a thousand.
MAKE = """
from pathlib import Path
from rich.console import Console
from make import Recipe, make
make(Path("outputs/tiny"), Recipe(steps=2, batch_size=8, heldout_per_domain=4), Console())
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A directory as the quickstart leaves it before self-play."""
    directory = tmp_path_factory.mktemp("quickstart")
    made = command(
        sys.executable, "-c", MAKE, directory=directory, environment={"PYTHONPATH": str(ROOT / "scripts/tiny")}
    )
    assert made.code == 0, made.output
    shutil.copytree(directory / "outputs/tiny/base", directory / "outputs/tiny/sft")
    return directory


def test_healthy_quickstart(quickstart: Path, command: Command, vllm_python: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in quickstart.rglob("*")}
    done = command("axolotl", "spin", "doctor", ROOT / "yaml_examples/spin-tiny.yml", directory=quickstart,
                   environment={"SPIN_VLLM_PYTHON": str(vllm_python)})  # fmt: skip
    assert done.code == 0, done.output
    assert "✗" not in done.output
    assert "1,960 prompts from 1,960 rows" in done.output
    assert "✓ vLLM " in done.output
    assert "651 steps of 64 pairs in 4 iterations" in done.output
    assert "<assistant>" in done.output, "the pair in full"
    assert {path: path.stat().st_mtime_ns for path in quickstart.rglob("*")} == before


def test_json_of_a_faulty_configuration(quickstart: Path, command: Command) -> None:
    config = yaml.safe_load((ROOT / "yaml_examples/spin-tiny.yml").read_text())
    config["spin"]["betta"] = 1
    config["datasets"][0]["path"] = "outputs/nowhere.jsonl"
    file = quickstart / "faulty.yml"
    file.write_text(yaml.safe_dump(config))
    done = command("axolotl", "spin", "doctor", file, "--json", directory=quickstart,
                   environment={"SPIN_VLLM_PYTHON": "/nowhere/python"})  # fmt: skip
    assert done.code == 1
    found = json.loads(done.output.splitlines()[-1])["checks"]
    faults = [one["message"] for one in found if one["verdict"] == "fault"]
    assert len(faults) == 3
    for word in ("spin.betta", "outputs/nowhere.jsonl", "/nowhere/python"):
        assert any(word in fault for fault in faults), faults
    assert "Traceback" not in done.output


def test_configuration_of_something_else_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "sft.yml").write_text("base_model: somewhere\n")
    done = command("axolotl", "spin", "doctor", "sft.yml", directory=tmp_path)
    assert done.code == 1
    assert len(done.errors) == 1
    assert "not a SPIN configuration" in done.errors[0]
