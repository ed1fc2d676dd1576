"""The report of a real run: an iteration that ends well, and one whose training fails."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished
from tiny import chat_rows, spin_config, write_config, write_jsonl

from spin_plugin.data.table import open_table
from spin_plugin.generation.shards import Shards
from spin_plugin.run.directory import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.oldest]


def test_report_is_written_at_the_end_of_an_iteration_and_where_training_fails(
    tmp_path: Path, llama: Path, command: Callable[..., Finished]
) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chat_rows(96))
    config = spin_config(tmp_path, llama, data)
    config["spin"] |= {"schedule": [{}, {"learning_rate": 1e30}], "stop": "off"}
    file, run = write_config(tmp_path, config), RunDir(tmp_path / "run")

    done = command("axolotl", "spin", "train", file, "--iterations", "1", directory=tmp_path)
    assert done.code == 0, done.output[-3000:]
    assert done.output.splitlines()[-1] == f"spin: what self-play did: {run.report}"
    assert "warning: the report" not in done.output
    first = json.loads(run.report.with_suffix(".json").read_text())
    (entry,) = json.loads(run.state_file.read_text())["finished"]
    assert first["iterations"][0]["metrics"] == entry["metrics"]
    assert [one["state"] for one in first["iterations"]] == ["finished", "not started"]
    rows = [json.loads(line) for line in run.report.with_suffix(".jsonl").read_text().splitlines()]
    examples = {split: open_table(run.real / f"{split}.arrow") for split in ("train", "eval")}
    assert len(rows) == sum(map(len, examples.values())) == 96
    responses = {(one["split"], one["example"]): one for one in Shards(run.iteration(0).synthetic).responses()}
    for row in rows:
        stored = responses[row["split"], row["example"]]
        (shown,) = row["iterations"]["0"]
        assert (shown["tokens"], shown["finish"]) == (len(stored["tokens"]), stored["finish"])
        assert row["real_tokens"] == len(examples[row["split"]][row["example"]]["real"])
        assert row["prompt"].startswith("<|im_start|>user\ncount ")
        assert row["real"].endswith("<|im_end|>")

    failed = command("axolotl", "spin", "train", file, directory=tmp_path)
    assert failed.code not in (0, 130)
    assert len(failed.errors) == 1, failed.output[-3000:]
    assert "training diverged" in failed.errors[0]
    second = json.loads(run.report.with_suffix(".json").read_text())
    assert [one["state"].partition(",")[0] for one in second["iterations"]] == ["finished", "training"]
    assert [curve["iteration"] for curve in second["curves"]] == [0, 1]
    rows = [json.loads(line) for line in run.report.with_suffix(".jsonl").read_text().splitlines()]
    assert all(row["iterations"].keys() == {"0", "1"} for row in rows)
