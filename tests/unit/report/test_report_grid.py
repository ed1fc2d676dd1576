"""The grid of prompts and iterations, and the three files, from the files of a run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from reported import END, Examples, Tokens, make_run, reward_of, write_rewards
from tiny import byte_tokenizer

from spin_plugin.args import SpinArgs
from spin_plugin.console import SpinError
from spin_plugin.generation.shards import Shards
from spin_plugin.report.write import try_report, write_report
from spin_plugin.run.directory import RunDir

TOKENIZER = byte_tokenizer()


def tokens(text: str) -> Tokens:
    return TOKENIZER.encode(text, add_special_tokens=False)


EXAMPLES = Examples(
    [(tokens(f"count {number}"), tokens(f"{number} comes first</s>")) for number in range(12)],
    [(tokens(f"held out {number}"), tokens(f"{number}</s>")) for number in range(3)],
)


def answer(split: str, example: int, iteration: int) -> list[Tokens]:
    """The second of two responses is the real one; prompt 1 has a truncated one, prompt 2 none."""
    if (split, example) == ("train", 2):
        return []
    first = tokens(f"answer {iteration} to {example}")
    return [first if example == 1 else [*first, END], getattr(EXAMPLES, split)[example][1]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run", TOKENIZER, EXAMPLES, answer, iterations=2)


def rows(run: RunDir, **options: Any) -> dict[tuple[str, int], dict[str, Any]]:
    write_report(run, SpinArgs(iterations=2), **options)
    lines = run.report.with_suffix(".jsonl").read_text().splitlines()
    return {(row["split"], row["example"]): row for row in map(json.loads, lines)}


def test_each_response_has_its_text_its_facts_and_its_rewards(run: RunDir) -> None:
    found = rows(run)
    assert found.keys() == {("train", n) for n in range(12) if n != 2} | {("eval", n) for n in range(3)}
    row = found["train", 1]
    assert (row["prompt"], row["real"], row["real_tokens"]) == ("count 1", "1 comes first</s>", 14)
    first, second = row["iterations"]["1"]
    assert first["text"] == "answer 1 to 1"
    assert (first["tokens"], first["finish"], first["equal"]) == (13, "length", False)
    assert (second["finish"], second["equal"], second["judge"]) == ("stop", True, None)
    # pairs are numbered in the order of the responses: two for each prompt
    assert [first["reward_real"], first["reward_synthetic"]] == pytest.approx(reward_of(2, 1))
    assert [second["reward_real"], second["reward_synthetic"]] == pytest.approx(reward_of(3, 1))
    every = [reward_of(index, iteration) for index in (2, 3) for iteration in (0, 1)]
    assert row["lowest_real"] == pytest.approx(min(real for real, _ in every))
    assert row["lowest_margin"] == pytest.approx(min(real - synthetic for real, synthetic in every))
    assert row["longest"] == 14


def test_unknown_rewards_are_left_out(run: RunDir) -> None:
    known = np.full((22, 2), np.nan)
    known[0] = 1.0, -1.0
    write_rewards(run.iteration(0), "train", known)
    (run.iteration(1).pairs / "rewards-train.safetensors").unlink()
    (run.iteration(0).pairs / "rewards-eval.safetensors").write_bytes(b"damaged")
    write_rewards(run.iteration(1), "eval", np.zeros((1, 2)))  # of other pairs
    found = rows(run)
    first, second = found["train", 0]["iterations"]["0"]
    assert (first["reward_real"], second["reward_real"]) == (1.0, None)
    assert found["train", 0]["lowest_margin"] == 2.0
    assert found["train", 5]["lowest_real"] is None
    assert all(found["eval", number]["lowest_real"] is None for number in range(3))


def test_judges_scores_stand_beside_their_responses(run: RunDir) -> None:
    shard = run.iteration(0).synthetic / "verdicts-00000.json"
    shard.write_text(json.dumps({"scores": [0.25, None] * 14}))
    (run.iteration(1).synthetic / "verdicts-00000.json").write_text(json.dumps({"scores": [1.0]}))  # of other responses
    found = rows(run)["train", 0]["iterations"]
    assert [one["judge"] for one in found["0"]] == [0.25, None]
    assert [one["judge"] for one in found["1"]] == [None, None]


def test_only_as_many_prompts_as_asked_for(run: RunDir) -> None:
    assert len(rows(run, prompts=4)) == 4
    content = json.loads(run.report.with_suffix(".json").read_text())
    assert content["prompts"] == {"shown": 4, "all": 15}


def test_chosen_prompts_have_all_their_responses_wherever_these_are(tmp_path: Path) -> None:
    """Three to a prompt, so that some prompts begin in one shard and end in the next; a slow reading finds the same."""
    number = 400
    examples = Examples(
        [(tokens(f"count {n}"), tokens(f"{n}</s>")) for n in range(number)],
        [(tokens(f"held out {n}"), tokens(f"{n}</s>")) for n in range(40)],
    )

    def three(split: str, example: int, iteration: int) -> list[Tokens]:
        return [[*tokens(f"{split} {example} {iteration} {sample}"), END] for sample in range(3)]

    run = make_run(tmp_path / "run", TOKENIZER, examples, three, iterations=2)
    shards = Shards(run.iteration(1).synthetic)
    assert shards.count() > 4
    for count in (1, 7, 60, 440):
        found = rows(run, prompts=count)
        assert len(found) == count
        for (split, example), row in found.items():
            texts = [[one["text"] for one in row["iterations"][str(iteration)]] for iteration in range(2)]
            assert texts == [[TOKENIZER.decode(one) for one in three(split, example, t)] for t in range(2)]
    shards.shard(2).write_text("no response")
    after = rows(run, prompts=440)
    lost = {key for key, row in after.items() if len(row["iterations"].get("1", ())) < 3}
    assert lost == {("train", example) for example in range(512 // 3, 768 // 3)}, "of the requests 512 to 767"


def test_first_responses_are_shown_before_there_are_pairs(run: RunDir) -> None:
    for number in range(2):
        shutil.rmtree(run.iteration(number).pairs)
    assert len(rows(run)) == 14


def test_damaged_shard_is_left_out_and_named(run: RunDir) -> None:
    shard = run.iteration(1).synthetic / "shard-00000.jsonl"
    shard.write_text(shard.read_text()[:-40])
    assert "1" not in rows(run)["train", 0]["iterations"]
    assert json.loads(run.report.with_suffix(".json").read_text())["notes"] == [
        f"{shard} is missing or damaged, so its responses are left out"
    ]
    assert "is missing or damaged" in run.report.read_text()


def test_run_that_is_half_finished(run: RunDir) -> None:
    """Iteration 1 has responses and a log, but no pairs yet, and a second line that is being written."""
    state = run.read_state()
    assert state is not None
    state.finished.pop()
    run.write_state(state)
    shutil.rmtree(run.iteration(1).pairs)
    with open(run.iteration(1).metrics, "a") as log:
        log.write('{"step": 101, "pairs"')
    found = rows(run)
    assert found["train", 0]["iterations"].keys() == {"0", "1"}
    content = json.loads(run.report.with_suffix(".json").read_text())
    assert [entry["state"] for entry in content["iterations"]] == ["finished", "training, step 100"]
    assert [curve["iteration"] for curve in content["curves"]] == [0, 1]
    assert content["curves"][1]["points"][0]["step"] > 100


def test_run_that_diverged(run: RunDir) -> None:
    nothing = {"step": 101, "epoch": 1.01, "pairs": 64, "spin/loss": float("nan"), "spin/reward_real": float("-inf")}
    for number in (0, 1):
        with open(run.iteration(number).metrics, "a") as log:
            log.write(json.dumps(nothing) + "\n")
    state = run.read_state()
    assert state is not None
    state.finished = [entry | {"metrics": run.iteration(0).last_metrics()} for entry in state.finished[:1]]
    run.write_state(state)
    write_report(run, SpinArgs(iterations=2))
    text = run.report.with_suffix(".json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [entry["metrics"]["spin/loss"] for entry in json.loads(text)["iterations"]] == [None, None]
    assert not {"nan", "inf"} & set(re.findall(r"\w+", run.report.read_text().partition("<script")[0]))


def test_reading_takes_no_lock_and_changes_nothing_else(run: RunDir) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.is_file()}
    with run.locked():
        write_report(run, SpinArgs(iterations=2))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_moved_run_of_an_older_version(tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(ROOT / "tests/data/run-0.2/run", tmp_path / "moved"))
    found = rows(run)
    assert len(found) == 12
    assert found["train", 0]["prompt"].startswith("<|im_start|>user\ncount ")
    assert found["train", 0]["real"].endswith("<|im_end|>")
    assert found["train", 0]["lowest_real"] is None


def test_tokens_are_shown_without_a_tokenizer(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    for file in run.root.glob("iteration-*/tokenizer.json"):
        file.unlink()
    assert rows(run)["train", 0]["real"] == json.dumps(EXAMPLES.train[0][1])
    assert "the tokenizer model cannot be loaded" in capsys.readouterr().out


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpinError, match="holds no run yet; start it with"):
        write_report(RunDir(tmp_path), SpinArgs(iterations=1))


def test_a_report_that_fails_is_one_warning(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.report.mkdir()  # so it cannot be replaced by a file
    try_report(run, SpinArgs(iterations=2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("spin: warning: the report was not written (")


def test_reset_removes_the_report(run: RunDir) -> None:
    write_report(run, SpinArgs(iterations=2))
    with run.locked():
        run.reset(1)
    assert not list(run.root.glob("report.*"))
