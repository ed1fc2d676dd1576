"""`axolotl spin reset` deletes iterations, run.json first, and touches nothing else."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from test_directory import content, finished_iteration, other_process_holds

import spin_plugin.run.directory
from spin_plugin.cli import spin
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two finished iterations and an unfinished third, with the configuration beside the run."""
    run = RunDir(tmp_path / "run")
    for number in range(3):
        finished_iteration(run, number)
        (run.iteration(number).path / "synthetic").mkdir()
        (run.iteration(number).path / "synthetic" / "shard-00000.jsonl").write_text(f"generated in {number}")
    run.real.mkdir()
    (run.real / "meta.json").write_text("{}")
    run.write_state(RunState({"rl": "spin"}, [{"iteration": 0}, {"iteration": 1}], "0.1.0"))
    run.link_newest(1)
    config = {"rl": "spin", "spin": {}, "plugins": ["spin_plugin.SpinPlugin"], "output_dir": str(run.root)}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    return run


def reset(run: RunDir, iteration: int, *options: str, answer: str = "") -> Result:
    config = str(run.root.with_name("config.yml"))
    return CliRunner().invoke(spin, ["reset", config, "--iteration", str(iteration), *options], input=answer)


def without_lock(run: RunDir) -> dict[str, str]:
    return {name: text for name, text in content(run.root).items() if not name.startswith("run.lock")}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_iteration_and_later_ones_are_deleted_and_earlier_ones_untouched(run: RunDir, number: int) -> None:
    before = {name: text for name, text in content(run.root).items() if name.startswith("iteration-")}
    done = reset(run, number, "--yes")
    assert done.exit_code == 0, done.output
    assert run.finished() == min(number, 2)
    assert run.started() == list(range(number))
    after = {name: text for name, text in content(run.root).items() if name.startswith("iteration-")}
    assert after == {name: text for name, text in before.items() if int(name[len("iteration-")]) < number}
    linked = run.root / "model.safetensors"
    assert linked.exists() == (number > 0)
    if number:
        assert linked.read_text() == f"model.safetensors of {number - 1}"
    assert (run.real / "meta.json").exists()


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_reset_asks_first_and_names_what_it_would_delete(run: RunDir, answer: str) -> None:
    before = content(run.root)
    done = reset(run, 1, answer=answer)
    assert done.exit_code == 1
    assert "iteration-1" in done.output
    assert "iteration-2" in done.output
    assert without_lock(run) == before


def test_answering_yes_resets(run: RunDir) -> None:
    assert reset(run, 1, answer="y\n").exit_code == 0
    assert run.started() == [0]


def test_run_in_use_is_not_touched(run: RunDir) -> None:
    before = content(run.root)
    with other_process_holds(run.root) as holder:
        done = reset(run, 0, "--yes")
        assert done.exit_code == 1
    assert f"in use by process {holder.pid}" in done.output
    assert without_lock(run) == before


def test_iteration_that_was_never_started_is_refused(run: RunDir) -> None:
    before = content(run.root)
    assert reset(run, 3, "--yes").exit_code == 1
    assert content(run.root) == before


@pytest.mark.parametrize("directories", [0, 1, 2])
def test_run_can_resume_after_a_reset_killed_midway(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, directories: int
) -> None:
    """run.json is updated first; then directories are deleted from newest to oldest, each atomically."""
    removed: list[Path] = []
    remove = spin_plugin.run.directory.remove_atomically

    def killed(path: Path) -> None:
        if len(removed) == directories:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    with monkeypatch.context() as patched:
        patched.setattr(spin_plugin.run.directory, "remove_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            run.reset(0)
    assert run.finished() == 0
    assert run.started() == list(range(3 - directories))
    run.reset(0)
    assert run.started() == []


def test_leftovers_of_a_killed_removal_are_deleted_on_the_next_start(run: RunDir) -> None:
    trash = run.root / ".removed-iteration-1"
    trash.mkdir()
    (trash / "model.safetensors").write_text("old")
    with run.locked():
        assert not trash.exists()
