"""docs/troubleshooting.md has the messages that users see; test_docs.py checks that it is up to date."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from scripts.make_troubleshooting import STAGES, UNKNOWN, messages, stage_of
from spin_plugin.cli.config_file import read_config
from spin_plugin.config.parse import parse_spin_block, parse_vllm_block
from spin_plugin.console import SpinError
from spin_plugin.generation.python import vllm_python
from spin_plugin.opponent.agreement import Distance, require_agreement
from spin_plugin.run.checkpoint import check_weights


def on_the_page(message: str) -> list[str]:
    """Return the page's entries that stand for a message."""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- (?:Warning: )?`` (.*?) ``", text, re.MULTILINE)
    return [entry for entry in entries if re.search(".*".join(map(re.escape, entry.split(UNKNOWN))), message)]


PROVOKED: dict[str, Callable[[Path], Any]] = {
    "text": lambda _: parse_spin_block([]),
    "function that returns the text": lambda _: parse_vllm_block({"tensor_parallel": 2}),
    "pydantic's": lambda _: parse_spin_block({"iterations": 2, "schedule": [{}]}),
    "several strings": lambda path: read_config(path / "empty.yml"),
    "constant": lambda path: vllm_python(str(path / "python")),
    "variable": lambda _: require_agreement(Distance(1.0, 1.0, 1.0, 9, 1), 0, exact=True, quantized=False),
    "file": lambda path: check_weights(path, "model"),
}


@pytest.mark.parametrize("provoke", PROVOKED.values(), ids=PROVOKED)
def test_a_message_is_found_as_the_user_sees_it(provoke: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "empty.yml").write_text("{}")
    with pytest.raises(SpinError) as caught:
        provoke(tmp_path)
    assert on_the_page(str(caught.value)), caught.value


def test_other_text_is_not_found() -> None:
    assert not on_the_page("iteration 0 finished, last epoch: loss 0.6277; model in run/iteration-0")


def test_every_raised_error_is_a_message_or_built_from_one() -> None:
    """The reading of the source misses hardly any: those that only pass on another function's text."""
    raised = [
        f"{path}:{number}"
        for path in (ROOT / "spin_plugin").rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines())
        if re.search(r"raise SpinError\((?!_describe|reason)", line)
    ]
    assert len([message for message in messages() if not message.warning]) > 0.8 * len(raised) > 80


def test_stage_is_that_of_the_longest_path() -> None:
    assert stage_of("run/processes.py") == "Several processes"
    assert stage_of("run/disk.py") == "The run and its directory"
    assert stage_of("something/new.py") == "Everything else"
    assert set(map(stage_of, (message.module for message in messages()))) <= set(STAGES)
