"""lm-evaluation-harness: commands, scores and checks; tests/integration/test_evaluated_and_tracked.py runs it."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from spin_plugin.config.specs import LmEvalSpec
from spin_plugin.console import SpinError
from spin_plugin.run.directory import RunDir
from spin_plugin.run.scores import shown_scores
from spin_plugin.run.state import RunState
from spin_plugin.training import evaluation
from spin_plugin.training.evaluation import commands, evaluate_finished, read_scores, require_tasks


def spec(*tasks: str, chat_template: bool = False) -> LmEvalSpec:
    return LmEvalSpec(tasks, batch_size=8, chat_template=chat_template, multiturn=chat_template)


def options(command: list[str]) -> dict[str, str]:
    """Return the values of a command's options; switches have none."""
    names = [place for place, word in enumerate(command) if word.startswith("--")]
    return {command[a][2:]: " ".join(command[a + 1 : b]) for a, b in zip(names, [*names[1:], None], strict=True)}


def task_file(directory: Path, name: str, content: str) -> str:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(content)
    return str(directory / name)


def written_results(
    directory: Path, asked: LmEvalSpec, *values: dict[str, Any], higher_is_better: dict[str, Any] | None = None
) -> Path:
    """Write what lm-evaluation-harness writes for tasks of different shots, and return the directory."""
    for command, own in zip(commands(asked, {}, directory / "results"), values, strict=True):
        task, output = options(command)["tasks"], Path(options(command)["output_path"]) / "org__model"
        output.mkdir(parents=True)
        content = {"results": {task: own}, "higher_is_better": {task: higher_is_better or {}}}
        (output / "results_2026-01-01.json").write_text(json.dumps(content))
    return directory / "results"


def finished_run(directory: Path) -> RunDir:
    """Return a run with a finished iteration that was not evaluated."""
    run = RunDir(directory / "run")
    run.iteration(0).path.mkdir(parents=True)
    run.iteration(0).config.write_text("base_model: org/model")
    (run.iteration(0).path / "model.safetensors").touch()
    run.write_state(RunState({}, [{"iteration": 0}]))
    return run


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Run a program in place of lm-evaluation-harness, which needs a model; `output` is its results' directory."""
    start = "import pathlib, sys; output = sys.argv[sys.argv.index('--output_path') + 1]; "
    monkeypatch.setattr(evaluation, "LM_EVAL", f"{start}pathlib.Path(output).mkdir(parents=True); {program}")


def test_tasks_share_a_command_if_they_have_as_many_shots_and_the_same_directory(tmp_path: Path) -> None:
    first = task_file(tmp_path / "own", "a.yaml", "task: alpha\nprocess_docs: !function utils.f")
    second = task_file(tmp_path / "own", "b.yaml", "group: beta\ntask: [alpha]")
    asked = spec("hellaswag", "gsm8k:5", "arc_easy", first, f"{second}", f"{first}:2")
    found = [options(command) for command in commands(asked, {"pretrained": "a,b=c"}, Path("results"))]
    assert [(one["tasks"], one.get("num_fewshot"), one.get("include_path")) for one in found] == [
        ("hellaswag,arc_easy", None, None),
        ("gsm8k", "5", None),
        ("alpha,beta", None, str(tmp_path / "own")),
        ("alpha", "2", str(tmp_path / "own")),
    ]
    assert all(json.loads(one["model_args"]) == {"pretrained": "a,b=c"} for one in found)
    assert all("apply_chat_template" not in one and "wandb_args" not in one for one in found)


def test_chat_template_is_passed_on() -> None:
    [command] = commands(spec("hellaswag", chat_template=True), {}, Path("results"))
    assert {"apply_chat_template", "fewshot_as_multiturn"} <= options(command).keys()


def test_scores_are_read_by_task_metric_and_filter(tmp_path: Path) -> None:
    gsm8k = {
        "alias": "gsm8k", "sample_len": 100,
        "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.04,
        "exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": "N/A",
    }  # fmt: skip
    results = written_results(tmp_path, spec("gsm8k:5", "tiny"), gsm8k, {"acc,none": 1, "acc_stderr,none": 0.0})
    scores = read_scores(results).lm_eval
    assert scores == {
        "gsm8k:5/exact_match/strict-match": 0.25,
        "gsm8k:5/exact_match_stderr/strict-match": 0.04,
        "gsm8k:5/exact_match/flexible-extract": 0.5,
        "tiny/acc": 1.0,
        "tiny/acc_stderr": 0.0,
    }
    assert shown_scores(scores) == {
        "gsm8k:5/exact_match/strict-match": "0.25 ± 0.04",
        "gsm8k:5/exact_match/flexible-extract": "0.5",
        "tiny/acc": "1 ± 0",
    }


def test_task_can_be_listed_with_several_numbers_of_shots(tmp_path: Path) -> None:
    values = [{"acc,none": score} for score in (0.1, 0.2, 0.3)]
    found = read_scores(written_results(tmp_path, spec("tiny", "tiny:0", "tiny:5"), *values))
    assert found.lm_eval == {"tiny/acc": 0.1, "tiny:0/acc": 0.2, "tiny:5/acc": 0.3}


def test_lm_eval_says_which_scores_should_fall(tmp_path: Path) -> None:
    values = {"wer,none": 0.5, "wer_stderr,none": 0.1, "cer,strict": 0.5, "acc,none": 0.5, "mixed,none": 1}
    higher = {"wer": False, "cer": False, "acc": True, "mixed": None}
    found = read_scores(written_results(tmp_path, spec("tiny:5"), values, higher_is_better=higher))
    assert found.lower_is_better == ["tiny:5/wer", "tiny:5/cer/strict"]


def test_scores_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    values = {"f1,none": float("nan"), "perplexity,none": float("inf"), "acc,none": 0.5}
    assert read_scores(written_results(tmp_path, spec("tiny"), values)).lm_eval == {"tiny/acc": 0.5}


@pytest.mark.parametrize(
    ("content", "reason"), [("not JSON", "JSONDecodeError: Expecting value"), ("{}", "KeyError: 'results'")]
)
def test_any_failure_is_a_warning_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    run = finished_run(tmp_path)
    stand_in(monkeypatch, f"pathlib.Path(output, 'results_1.json').write_text({content!r})")
    evaluate_finished(run, spec("tiny"))
    shown = capsys.readouterr().out
    assert f"warning: iteration 0 was not evaluated: {reason}" in shown
    assert reason.partition(":")[0] in run.iteration(0).lm_eval_failure.read_text()
    evaluate_finished(run, spec("tiny"))
    assert capsys.readouterr().out == ""


def test_full_disk_is_no_failed_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluation, "read_scores", full)
    stand_in(monkeypatch, "pass")
    with pytest.raises(OSError, match="No space"):
        evaluate_finished(run, spec("tiny"))
    assert run.unevaluated() == [0]


def test_known_tasks_and_files_are_accepted(tmp_path: Path) -> None:
    require_tasks(spec("hellaswag", "mmlu_*:5", task_file(tmp_path, "own.yaml", "task: own")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.yaml", None, "cannot be read: .*No such file"),
        ("empty.yaml", "metric: acc", "defines no `task`"),
        ("list.yaml", "- a", "defines no `task`"),
        ("broken.yaml", "task: [", "cannot be read"),
        ("nonsense", None, "nonsense not found; `lm-eval ls tasks`"),
    ],
)
def test_unusable_task_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    task = name if "." not in name else str(tmp_path / name) if content is None else task_file(tmp_path, name, content)
    with pytest.raises(SpinError, match=f"lm_eval_tasks: .*{message}"):
        require_tasks(spec(task))
