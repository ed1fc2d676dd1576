"""When the pairs on disk are built again."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from spin_plugin.run.iteration import IterationDir
from spin_plugin.training.prepare import _why_rebuild

KEY = json.loads((ROOT / "tests/data/run-0.2/run/iteration-0/pairs/key").read_text())
JUDGE = {"spin.judge": ["digest", 1.0]}


@pytest.mark.parametrize(
    ("stored", "now", "reason"),
    [
        (KEY, KEY, None),
        (KEY | {"grouped": True}, KEY, None),
        (KEY | JUDGE, KEY | JUDGE, None),
        (KEY, KEY | JUDGE, "this changed: spin.judge"),
        (KEY | JUDGE, KEY, "this changed: spin.judge"),
        (KEY | JUDGE, KEY | {"spin.judge": ["digest", 0.5]}, "this changed: spin.judge"),
        (KEY, KEY | {"spin.equal_pairs": "drop"}, "this changed: spin.equal_pairs"),
        (None, KEY, "the pairs it was trained on are missing"),
    ],
)
def test_pairs_are_rebuilt_if_their_key_differs(
    tmp_path: Path, stored: dict[str, Any] | None, now: dict[str, Any], reason: str | None
) -> None:
    directory = IterationDir(tmp_path)
    directory.pairs.mkdir()
    if stored is not None:
        (directory.pairs / "key").write_text(json.dumps(stored))
    assert _why_rebuild(directory, now) == reason
