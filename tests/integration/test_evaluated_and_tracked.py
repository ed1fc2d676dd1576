"""Every iteration is evaluated once on its own model and is one run in every tracker, also after a kill.

Real Axolotl, vLLM, lm-evaluation-harness, W&B (offline), Trackio and TensorBoard.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished
from test_adapters import merged
from test_resume import kill_when
from tiny import LORA, VOCABULARY, make_model, spin_config, write_config, write_jsonl

from spin_plugin.config.specs import LmEvalSpec
from spin_plugin.run.directory import RunDir
from spin_plugin.training.evaluation import evaluate_finished
from spin_plugin.training.trackers import TrackedRun

pytestmark = pytest.mark.slow
Command = Callable[..., Finished]
TASK = """
task: tiny_count
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "count {{{{number}}}}"
doc_to_target: "{{{{number}}}} comes"
metric_list: [{{metric: perplexity, aggregation: perplexity}}, {{metric: acc}}]
"""
SCORE = "tiny_count/perplexity"


def local_task(directory: Path) -> Path:
    """Write a task of lm-evaluation-harness that needs no network."""
    (directory / "tasks").mkdir()
    data = write_jsonl(directory / "tasks/count.jsonl", ({"number": n} for n in range(12)))
    task = directory / "tasks/count.yaml"
    task.write_text(TASK.format(data=data))
    return task


def evaluated(directory: Path, model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Return a configuration whose iterations are evaluated on a local task."""
    local_task(directory)
    plugins = ["spin_plugin.SpinPlugin", "axolotl.integrations.lm_eval.LMEvalPlugin"]
    # `axolotl lm-eval` would evaluate the start model
    lm_eval = {"lm_eval_tasks": ["tasks/count.yaml"], "lm_eval_model": str(model), "lm_eval_batch_size": 4}
    return spin_config(directory, model, data, plugins=plugins, **lm_eval | changes)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, llama: Path, chat_data: Path, command: Command) -> Path:
    """The directory of two iterations, the first killed while training, the second while it is evaluated."""
    directory = tmp_path_factory.mktemp("tracked")
    trackers = {"wandb_project": "tiny", "wandb_mode": "offline", "trackio_project_name": "tiny"}
    # long enough for W&B and Trackio, which hold entries for up to a second, to have sent some before the kill
    slow = {"num_epochs": 40, "save_steps": 50, "learning_rate": 1e-4}
    config = evaluated(directory, llama, chat_data, use_tensorboard=True, **slow, **trackers)
    write_config(directory, config)
    environment = {"TRACKIO_DIR": str(directory / "trackio"), "WANDB_DIR": str(directory)}
    run = RunDir(directory / "run")
    kill_when(directory, lambda: len(run.iteration(0).read_log()) >= 150, **environment)
    done = command("axolotl", "train", "config.yml", directory=directory, environment=environment)
    assert done.code == 0, done.output[-3000:]
    assert "resuming at step" in done.output
    log = run.iteration(1).lm_eval_log
    kill_when(directory, lambda: log.exists() and log.stat().st_size > 0, **environment)
    assert run.unevaluated() == [1]
    done = command("axolotl", "spin", "train", "config.yml", directory=directory, environment=environment)
    assert done.code == 0, done.output[-3000:]
    (directory / "output.log").write_text(done.output)
    return directory


def finished(directory: Path) -> list[dict[str, Any]]:
    state = RunDir(directory / "run").read_state()
    assert state is not None
    return state.finished


def perplexity(directory: Path, model: Path) -> float:
    """Evaluate a model by lm-evaluation-harness itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(model), "dtype": "float32"}
    tasks = TaskManager(include_path=str(directory / "tasks"))
    found = simple_evaluate("hf", arguments, ["tiny_count"], device="cpu", task_manager=tasks, bootstrap_iters=0)
    assert found is not None
    return found["results"]["tiny_count"]["perplexity,none"]


def test_scores_are_those_of_the_iterations_models(tracked: Path, llama: Path) -> None:
    """Not of `lm_eval_model`."""
    start = perplexity(tracked, llama)
    for number, entry in enumerate(finished(tracked)):
        scores = entry["lm_eval"]
        assert scores.keys() == {
            f"tiny_count/{name}" for name in ("acc", "acc_stderr", "perplexity", "perplexity_stderr")
        }
        assert scores[SCORE] == pytest.approx(perplexity(tracked, tracked / f"run/iteration-{number}"))
        assert abs(scores[SCORE] / start - 1) > 0.01, "another model would be detected"


def test_interrupted_evaluation_is_made_up_and_shown(tracked: Path, command: Command) -> None:
    assert "iteration 1: tiny_count/" in (tracked / "output.log").read_text()
    done = command("axolotl", "spin", "status", "config.yml", directory=tracked)
    score = finished(tracked)[1]["lm_eval"][SCORE]
    assert any(line.split()[0] == SCORE and f"{score:.4g}" in line for line in done.output.splitlines() if line.strip())
    again = command("axolotl", "spin", "train", "config.yml", directory=tracked)
    assert "all 2 iterations are finished" in again.output


def steps_logged(directory: Path, number: int) -> list[int]:
    log = RunDir(directory / "run").iteration(number).read_log()
    return [int(entry["step"]) for entry in log if "loss" in entry]


def assert_continued(steps: list[int], directory: Path, number: int) -> None:
    """No step is there twice, and at most the last ones before a kill are missing."""
    tracked_run = TrackedRun.read(RunDir(directory / "run").iteration(number))
    assert tracked_run is not None
    assert steps == sorted(set(steps))
    missing = sorted(set(steps_logged(directory, number)) - set(steps))
    assert missing == list(range(missing[0], tracked_run.sent["loss"] + 1) if missing else [])
    assert steps[0] == 1


def expected_results(directory: Path, number: int) -> dict[str, float]:
    score = finished(directory)[number]["lm_eval"]["tiny_count/acc"]
    return {
        "lm_eval/tiny_count/acc": score,
        "pairs/train/pairs": finished(directory)[number]["pairs"]["train"]["pairs"],
    }


def test_tensorboard_has_one_run_per_iteration(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for number in (0, 1):
        events = EventAccumulator(str(tracked / f"run/iteration-{number}/tensorboard"))
        events.Reload()
        assert_continued([event.step for event in events.Scalars("train/spin/loss")], tracked, number)
        for name, value in expected_results(tracked, number).items():
            assert [event.value for event in events.Scalars(name)] == pytest.approx([value])


def test_trackio_has_one_run_per_iteration(tracked: Path) -> None:
    """Read in a process of its own, because Trackio reads TRACKIO_DIR once."""
    program = """if True:
        import json, sqlite3, sys
        from pathlib import Path
        [file] = Path(sys.argv[1]).glob("tiny*.db")
        rows = sqlite3.connect(file).execute("select run_name, metrics from metrics order by id").fetchall()
        configs = sqlite3.connect(file).execute("select run_name, config from configs").fetchall()
        print(json.dumps([[name, json.loads(text)] for name, text in rows]))
        print(json.dumps([[name, json.loads(text)] for name, text in configs]))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, tracked / "trackio"], capture_output=True, text=True, check=True
    )
    rows, configs = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    names = sorted({name for name, _ in rows})
    assert [name.rpartition("-")[0] for name in names] == ["run-iteration-0", "run-iteration-1"]
    assert {config["_Group"] for _, config in configs} == {"run"}
    for number, name in enumerate(names):
        own = [metrics for run, metrics in rows if run == name]
        steps = [entry["train/global_step"] for entry in own if "train/spin/loss" in entry]
        assert_continued(steps, tracked, number)
        for key, value in expected_results(tracked, number).items():
            assert [entry[key] for entry in own if key in entry] == pytest.approx([value])
        assert sum("samples" in entry for entry in own) == 1


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of an offline run, which are protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the end of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_has_one_run_per_iteration(tracked: Path) -> None:
    """One per iteration once `wandb sync --append` has joined the parts of each id."""
    runs: dict[str, list[dict[str, Any]]] = {}
    names = {}
    for file in sorted((tracked / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.run.run_id:
                names[record.run.run_id] = (record.run.display_name, record.run.run_group)
            if record.history.item:
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                runs.setdefault(file.stem.rpartition("-")[2], []).append(
                    {key: json.loads(value) for key, value in items.items()}
                )
    assert sorted(names.values()) == [(name, "run") for name in sorted(name for name, _ in names.values())]
    by_name = {names[number][0].rpartition("-")[0]: entries for number, entries in runs.items()}
    assert sorted(by_name) == ["run-iteration-0", "run-iteration-1"]
    for number in (0, 1):
        own = by_name[f"run-iteration-{number}"]
        steps = [entry["train/global_step"] for entry in own if "train/spin/loss" in entry]
        assert_continued(steps, tracked, number)
        for key, value in expected_results(tracked, number).items():
            assert [entry[key] for entry in own if key in entry] == pytest.approx([value])
        assert sum("samples/nrows" in entry for entry in own) == 1


HEAD = ["embed_tokens", "lm_head"]
KINDS = {"two_processes": 2, "head": 1}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, chat_data: Path, run_jobs: Callable[..., None]) -> Path:
    """A directory with runs of one iteration: LoRA on two processes, and an adapter with a saved LM head."""
    directory = tmp_path_factory.mktemp("adapted")
    for name, processes in KINDS.items():
        own = directory / name
        # lm-evaluation-harness cuts an adapter's base model to the tokenizer's vocabulary
        model = make_model(own / "model", vocab_size=320 if name == "head" else VOCABULARY)
        config = evaluated(own, model, chat_data, **LORA | ({"lora_modules_to_save": HEAD} if name == "head" else {}))
        config["spin"]["iterations"] = 1
        run_jobs((write_config(own, config), processes))
    return directory


@pytest.mark.parametrize("name", KINDS)
def test_adapters_are_evaluated_on_their_base_model_once(adapted: Path, tmp_path: Path, name: str) -> None:
    own = adapted / name
    full = merged(own / "model", own / "run/iteration-0", tmp_path / "full")
    assert finished(own)[0]["lm_eval"][SCORE] == pytest.approx(perplexity(own, full), rel=1e-4)
    assert abs(perplexity(own, own / "model") / perplexity(own, full) - 1) > 0.01
    assert len(list((own / "run").rglob("results_*.json"))) == 1
    assert not list((own / "run/iteration-0").glob(".lm_eval*"))


def test_failed_evaluation_is_a_warning_and_repeated_on_request(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(adapted / "head/run", run.root, symlinks=True)
    state = run.read_state()
    assert state is not None
    del state.finished[0]["lm_eval"]
    run.write_state(state)
    task = tmp_path / "missing.yaml"
    task.write_text(TASK.format(data=tmp_path / "missing.jsonl"))
    spec = LmEvalSpec((str(task),), batch_size=4, chat_template=False, multiturn=False)
    evaluate_finished(run, spec)
    output = capsys.readouterr().out
    assert "warning: iteration 0 was not evaluated: lm_eval ended with exit code 1: " in output
    assert "missing.jsonl" in output
    assert str(run.iteration(0).lm_eval_failure) in output
    evaluate_finished(run, spec)
    assert capsys.readouterr().out == ""
    run.iteration(0).lm_eval_failure.unlink()
    assert run.unevaluated() == [0]


def test_unknown_task_is_refused_before_any_work(
    tmp_path: Path, llama: Path, chat_data: Path, command: Command
) -> None:
    write_config(tmp_path, evaluated(tmp_path, llama, chat_data, lm_eval_tasks=["hellaswag", "nonsense:5"]))
    done = command("axolotl", "train", "config.yml", directory=tmp_path)
    assert done.code != 0
    [error] = done.errors
    assert error.startswith("spin: error: lm_eval_tasks: nonsense not found")
    assert not (tmp_path / "run/iteration-0/synthetic").exists()
