"""`spin.keep` removes models of past iterations, never one that is needed, whenever the command is killed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import write_config

import spin_plugin.run.directory as directory_module
import spin_plugin.run.iteration as iteration_module
from spin_plugin.args import SpinArgs, StopArgs
from spin_plugin.cli import spin as commands
from spin_plugin.data.pairs import PairStats
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState, has_model
from spin_plugin.run.stop import EXPORT, find_stop
from spin_plugin.training.finish import announce_finished, finish_iteration

STATS = {"train": PairStats(responses=4, pairs=4)}


def write_iteration(run: RunDir, number: int) -> None:
    """Write the files of a trained model in two shards, its merged copy and a checkpoint."""
    iteration = run.iteration(number)
    for place in (iteration.path, iteration.merged, iteration.path / "checkpoint-8"):
        place.mkdir(parents=True)
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            (place / name).write_text(f"weights {number}")
        (place / "model.safetensors.index.json").write_text("{}")
        (place / "config.json").write_text("{}")
    iteration.synthetic.mkdir()
    (iteration.synthetic / "shard-00000.jsonl").write_text("{}")


def check(before: float, after: float) -> dict[str, Any]:
    change = after - before
    interval = [change - 0.01, change + 0.01]
    return {"prompts": 40, "before": before, "after": after, "difference": change, "interval": interval}


def finish(run: RunDir, spin: SpinArgs, *values: float, judge: dict[int, dict[str, Any]] | None = None) -> None:
    """Finish iterations with these held-out log-probs, from −1 on."""
    run.root.mkdir(exist_ok=True)
    run.write_state(RunState({"rl": "spin"}, [], "0"))
    for number, (before, after) in enumerate(zip((-1.0, *values), values, strict=False)):
        write_iteration(run, number)
        state = run.read_state()
        assert state is not None
        for judged, found in (judge or {}).items():
            if judged < number:
                state.finished[judged]["judge"] = found
        run.write_state(state)
        finish_iteration(run, number, spin, STATS, {"held_out": check(before, after)})


def models(run: RunDir) -> list[int]:
    """Return the iterations that have weights; checks that status, run.json and the disk agree."""
    state = run.read_state()
    assert state is not None
    found = []
    for entry in state.finished:
        iteration = run.iteration(entry["iteration"])
        weights = [*iteration.path.glob("*.safetensors*"), *iteration.path.glob("merged/*.safetensors*")]
        assert len(weights) in (0, 6)
        assert bool(weights) == has_model(entry)
        assert (iteration.path / "config.json").exists()
        assert (iteration.synthetic / "shard-00000.jsonl").exists()
        found += [entry["iteration"]] if weights else []
    return found


def checkpoints(run: RunDir) -> list[int]:
    return [number for number in run.started() if run.iteration(number).checkpoints()]


def test_iteration_whose_model_is_to_be_removed_is_not_evaluated(tmp_path: Path) -> None:
    """Also if a kill has left its files."""
    run = RunDir(tmp_path / "run")
    finish(run, SpinArgs(keep="last", stop=StopArgs(metric="off")), -0.9, -0.8)
    (run.iteration(0).path / "model.safetensors").touch()
    assert run.unevaluated() == [1]


@pytest.mark.parametrize(
    ("spin", "kept", "with_checkpoints"),
    [
        ({}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"keep": "last", "stop": "off"}, [3], [3]),
        ({"keep": "last", "judge": {"function": "exact"}}, [2, 3], [3]),
        ({"keep": "best"}, [1, 3], [3]),
        ({"keep": "last", "adapter_chain": "merge"}, [2, 3], [3]),
        ({"keep": "best", "adapter_chain": "merge"}, [1, 2, 3], [3]),
        # what a metric says that nobody measured is unknown, so nothing is removed
        ({"keep": "best", "stop": {"metric": "task/acc"}}, [0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_models_that_are_kept(tmp_path: Path, spin: Any, kept: list[int], with_checkpoints: list[int]) -> None:
    run = RunDir(tmp_path / "run")
    finish(run, SpinArgs.model_validate(spin), -0.9, -0.7, -0.8, -0.75)
    assert models(run) == kept
    assert checkpoints(run) == with_checkpoints
    assert os.readlink(run.root / "model.safetensors.index.json") == "iteration-3/model.safetensors.index.json"
    for link in run.root.iterdir():
        assert link.exists(), "no dangling link"


def test_opponent_of_an_iteration_that_stops_the_run_stays(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    finish(run, SpinArgs(keep="last"), -0.9, -0.7, -0.8)
    assert models(run) == [1, 2]


def test_stopped_run_can_be_reset_as_its_message_says(tmp_path: Path) -> None:
    """The opponent of a worse iteration stays although another one is best; elsewhere an earlier one is named."""
    for spin, values, kept, named in (
        (SpinArgs(keep="best", iterations=9), (-0.9, -0.7, -0.702, -0.9), [1, 2, 3], 3),
        (stop_by_metric("best", 2), (-0.9, -0.7, -0.704, -0.703), [1, 3], 2),
        (stop_by_metric("last", 2), (-0.9, -0.899, -0.898), [2], 0),
    ):
        run = RunDir(tmp_path / str(named))
        finish(run, spin, *values)
        assert models(run) == kept
        state = run.read_state()
        assert state is not None
        stopped = find_stop(state.finished, spin)
        assert stopped is not None
        assert (
            f"to train iteration {named} again, run `axolotl spin reset CONFIG --iteration {named}`" in stopped.message
        )
        run.require_opponent_of(named)


def stop_by_metric(keep: Any, patience: int) -> SpinArgs:
    return SpinArgs(keep=keep, iterations=9, stop=StopArgs(metric="held_out", patience=patience))


def test_message_says_that_the_best_model_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, spin = RunDir(tmp_path / "run"), stop_by_metric("last", 1)
    finish(run, spin, -0.9, -0.901)
    state = run.read_state()
    assert state is not None
    gone = "best: iteration 0 (held_out −0.9000), whose model `spin.keep` has removed"
    stopped = find_stop(state.finished, spin)
    assert stopped is not None
    assert gone in stopped.message
    announce_finished(run, 1, spin.model_copy(update={"iterations": 2}))
    assert gone in capsys.readouterr().out.splitlines()[0]


def test_best_before_the_last_stays_until_the_last_is_judged(tmp_path: Path) -> None:
    """The last iteration is best by its held-out responses; if the judge then finds it worse, the best before it is."""
    run = RunDir(tmp_path / "run")
    spin = SpinArgs.model_validate({"keep": "best", "judge": {"function": "exact"}})
    fine = {"prompts": 40, "before": 0.5, "after": 0.6, "difference": 0.1, "interval": [0.05, 0.15]}
    finish(run, spin, -0.9, -0.8, -0.7, judge={0: fine, 1: fine})
    assert models(run) == [1, 2]


@pytest.mark.parametrize("removal", range(6))
def test_kill_while_removing_leaves_a_consistent_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removal: int
) -> None:
    """run.json comes first; whatever is left is removed by the next command that locks the run."""
    run, count = RunDir(tmp_path / "run"), 0

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        nonlocal count
        count += 1
        if count > removal:
            raise Killed

    unlink, remove = Path.unlink, directory_module.remove_atomically
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: (killed(), unlink(*args, **kwargs)))
    for module in (directory_module, iteration_module):
        monkeypatch.setattr(module, "remove_atomically", lambda path: (killed(), remove(path)))
    write_iteration(run, 0)
    write_iteration(run, 1)
    run.write_state(RunState({"rl": "spin"}, [{"iteration": 0, "pairs": {}, "metrics": {}}], "0"))
    try:
        finish_iteration(run, 1, SpinArgs(keep="last"), STATS, {})
    except Killed:
        pass
    else:
        assert removal == 5, "that many removals are fewer than there are"
    monkeypatch.undo()
    state = run.read_state()
    assert state is not None
    assert [has_model(entry) for entry in state.finished] == [False, True]
    with run.locked():
        assert models(run) == [1]
        assert checkpoints(run) == [1]


def test_reset_to_an_iteration_without_its_opponent_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    finish(run, SpinArgs(keep="best"), -0.9, -0.7, -0.8, -0.75)
    config = write_config(
        tmp_path, {"rl": "spin", "spin": {}, "plugins": ["spin_plugin.SpinPlugin"], "output_dir": str(run.root)}
    )

    def reset(number: int) -> str:
        return CliRunner().invoke(commands, ["reset", str(config), "--iteration", str(number), "--yes"]).output

    for number, before in ((1, 0), (3, 2)):
        assert f"--iteration {number}: starts from the model of iteration {before}, which `spin.keep`" in reset(number)
        assert models(run) == [1, 3]
    assert reset(3).rstrip().endswith("use --iteration 0 or 2")
    assert "removed iteration 2" in reset(2)
    assert models(run) == [1]
    status = CliRunner().invoke(commands, ["status", str(config), "--json"])
    content = json.loads(status.output)
    assert [entry["state"] for entry in content["iterations"][:2]] == ["finished, model removed", "finished"]
    assert content["best"] == {"iteration": 1, "metric": "held_out", "value": -0.7, "worse_than_start": False}


def test_last_message_names_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, spin = RunDir(tmp_path / "run"), SpinArgs(iterations=2)
    finish(run, spin, -0.7, -0.8)
    announce_finished(run, 1, spin)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith(f"that was the last one; best: iteration 0 (held_out −0.7000), which `{EXPORT}` writes")
    announce_finished(run, 1, SpinArgs(iterations=4))
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("spin: iteration 1 made held-out real responses less likely")
    assert "so iteration 2 is not trained" in last


def test_best_of_iterations_that_are_all_worse_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, spin = RunDir(tmp_path / "run"), SpinArgs(iterations=2, stop="off")
    finish(run, spin, -1.3, -1.2)
    announce_finished(run, 1, spin)
    first, *_ = capsys.readouterr().out.splitlines()
    assert f"best: iteration 1 (held_out −1.2000, worse than the start), which `{EXPORT}` writes" in first
