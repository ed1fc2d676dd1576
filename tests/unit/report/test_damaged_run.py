"""Commands that inspect a run whose files are damaged: what can be shown is shown, or one line names the file."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from reported import END, Examples, make_run
from tiny import byte_tokenizer

from spin_plugin.cli import spin as commands
from spin_plugin.run.directory import RunDir

TOKENIZER = byte_tokenizer()
EXAMPLES = Examples([(TOKENIZER.encode(f"count {n}"), TOKENIZER.encode(f"{n}</s>")) for n in range(8)], [])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(
        tmp_path / "run", TOKENIZER, EXAMPLES, lambda *_: [[*TOKENIZER.encode("answer"), END]], iterations=2
    )


def invoke(run: RunDir, command: str) -> Result:
    return CliRunner().invoke(commands, [command, str(run.root.parent / "config.yml")])


def unfinish(run: RunDir) -> None:
    """Make iteration 1 one that is still training."""
    state = run.read_state()
    assert state is not None
    state.finished.pop()
    run.write_state(state)


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize("name", ["run.json", "iteration-1/pairs/stats.json"])
def test_damaged_record_is_named_in_one_line(run: RunDir, name: str, command: str) -> None:
    unfinish(run)
    file = run.root / name
    file.write_bytes(file.read_bytes()[:-5])
    done = invoke(run, command)
    assert done.exit_code == 1
    assert f"{file} is damaged" in done.output
    assert done.output.count("\n") == 1


def test_entry_without_pairs_is_named_in_one_line(run: RunDir) -> None:
    content = json.loads(run.state_file.read_text())
    del content["finished"][0]["pairs"]
    run.state_file.write_text(json.dumps(content))
    for command in ("status", "report"):
        done = invoke(run, command)
        assert done.exit_code == 1
        assert done.output.startswith(f"spin: error: {run.state_file} is damaged")


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_damaged_table_is_named_in_one_line(run: RunDir, cut: int) -> None:
    file = run.real / "train.arrow"
    content = file.read_bytes()
    file.write_bytes((b"", content[:200], b"\0" * 64)[cut])
    done = invoke(run, "report")
    assert done.exit_code == 1
    assert f"{file} is damaged" in done.output
    assert done.output.count("\n") == 1
    assert not run.report.exists()


def test_damaged_details_are_left_out(run: RunDir) -> None:
    here = run.iteration(1)
    (here.path / "tokenizer.json").write_text("{")
    here.config.write_text("{")
    with here.metrics.open("a") as log:
        log.write('5\n"x"\n{"step"')
    done = invoke(run, "report")
    assert done.exit_code == 0
    assert (
        f"the tokenizer {here.path / 'tokenizer.json'} cannot be loaded, so the report shows token ids" in done.output
    )
    assert f"{here.config} is damaged" in done.output
    row = json.loads(run.report.with_suffix(".jsonl").read_text().splitlines()[0])
    assert json.loads(row["real"]) == EXAMPLES.train[row["example"]][1]
    assert invoke(run, "status").exit_code == 0
