"""lm-evaluation-harness: commands, scores and checks; tests/integration/test_evaluated_and_tracked.py runs it."""

import json
from pathlib import Path

import pytest

from spin_plugin.config.specs import LmEvalSpec
from spin_plugin.console import SpinError
from spin_plugin.run.scores import shown_scores
from spin_plugin.training.evaluation import commands, read_scores, require_tasks


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
    results = {
        "gsm8k": {
            "alias": "gsm8k", "sample_len": 100,
            "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.04,
            "exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": "N/A",
        }
    }  # fmt: skip
    for name, content in (("1", results), ("2", {"tiny": {"acc,none": 1, "acc_stderr,none": 0.0}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results_x.json").write_text(json.dumps({"results": content}))
    scores = read_scores(tmp_path)
    assert scores == {
        "gsm8k/exact_match/strict-match": 0.25,
        "gsm8k/exact_match_stderr/strict-match": 0.04,
        "gsm8k/exact_match/flexible-extract": 0.5,
        "tiny/acc": 1.0,
        "tiny/acc_stderr": 0.0,
    }
    assert shown_scores(scores) == {
        "gsm8k/exact_match/strict-match": "0.25 ± 0.04",
        "gsm8k/exact_match/flexible-extract": "0.5",
        "tiny/acc": "1 ± 0",
    }


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
