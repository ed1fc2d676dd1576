"""`axolotl spin report` as a command: its files, its one line, its errors."""

import shutil
from pathlib import Path

import yaml
from click.testing import CliRunner, Result
from conftest import ROOT

from spin_plugin.cli import spin


def report(config: Path, *options: str) -> Result:
    return CliRunner().invoke(spin, ["report", str(config), *options])


def configured(directory: Path) -> Path:
    """Return the configuration of a frozen run that was moved."""
    copy = shutil.copytree(ROOT / "tests/data/run-0.2", directory / "moved")
    config = yaml.safe_load((copy / "config.yml").read_text()) | {"output_dir": str(copy / "run")}
    (copy / "config.yml").write_text(yaml.safe_dump(config))
    return copy / "config.yml"


def test_writes_three_files_and_names_them(tmp_path: Path) -> None:
    config = configured(tmp_path)
    done = report(config, "--prompts", "5")
    assert done.exit_code == 0, done.output
    page = config.parent / "run/report.html"
    assert done.output.splitlines() == [
        f"spin: report: {page}; its numbers are in {page.with_suffix('.json')}, "
        f"its prompts in {page.with_suffix('.jsonl')}"
    ]
    assert len(page.with_suffix(".jsonl").read_text().splitlines()) == 5
    assert "1 of 2 iterations finished" in page.read_text()


def test_a_run_that_has_not_started_is_one_line(tmp_path: Path) -> None:
    config = configured(tmp_path)
    shutil.rmtree(config.parent / "run")
    done = report(config)
    assert done.exit_code == 1
    assert done.output.startswith("spin: error: output_dir: ")
    assert len(done.output.splitlines()) == 1
    assert not (config.parent / "run").exists()


def test_a_damaged_run_is_one_line(tmp_path: Path) -> None:
    config = configured(tmp_path)
    (config.parent / "run/run.json").write_text("{")
    done = report(config)
    assert done.exit_code == 1
    assert "run.json is damaged" in done.output
    assert len(done.output.splitlines()) == 1
