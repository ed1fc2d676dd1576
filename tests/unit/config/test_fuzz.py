"""Random configurations are lowered or rejected with one line; random rows become examples or are counted.

No other error occurs, and no file is written. Together with test_args.py this covers 2,000 random blocks.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_args import BLOCKS, LEAVES

from spin_plugin.config.lower import lower
from spin_plugin.console import SpinError
from spin_plugin.data.examples import write_examples
from spin_plugin.data.table import open_table

ANY = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)  # fmt: skip
DATASETS = st.lists(
    st.one_of(
        LEAVES,
        st.fixed_dictionaries(
            {"path": st.sampled_from(["org/data", "./absent.jsonl", "", "a\0b"])},
            optional={
                "type": st.one_of(LEAVES, st.sampled_from(["chat_template", "alpaca", "completion", "pretrain.x"])),
                "train_on_eos": st.one_of(LEAVES, st.just("all")),
                "ds_type": LEAVES,
            },
        ),
    ),
    max_size=2,
)
OTHER_KEYS = st.dictionaries(
    st.sampled_from(
        ["adapter", "peft", "learning_rate", "test_datasets", "context_parallel_size", "streaming", "seed"]
    ),
    LEAVES,
    max_size=2,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


@settings(ANY, max_examples=1000)
@given(block=BLOCKS, datasets=st.one_of(DATASETS, LEAVES, st.just([{"path": "org/data"}])), others=OTHER_KEYS)
def test_any_configuration_is_lowered_or_rejected_with_one_line(
    directory: Path, block: object, datasets: object, others: dict[str, object]
) -> None:
    cfg = {"rl": "spin", "base_model": "org/model", "output_dir": str(directory / "run"), "datasets": datasets} | others
    cfg["spin"] = block
    try:
        lower(cfg)
    except SpinError as error:
        assert re.fullmatch(r"[^\r\n]+", str(error))
    assert not list(directory.iterdir())


ROWS = st.lists(
    st.integers(0, 30).flatmap(
        lambda size: st.tuples(
            st.lists(st.integers(0, 2**31 - 1), min_size=size, max_size=size),
            st.lists(st.booleans(), min_size=size, max_size=size),
        )
    ),
    max_size=4,
)


@settings(ANY, max_examples=150)
@given(rows=ROWS, turns=st.sampled_from(["first", "last", "all"]), length=st.integers(1, 40))
def test_any_rows_become_examples_or_are_counted(
    directory: Path, rows: list[tuple[list[int], list[bool]]], turns: str, length: int
) -> None:
    """With any tokens and any mask, every span that SFT would train on becomes an example or is counted."""
    labels = [[token if trained else -100 for token, trained in zip(*row, strict=True)] for row in rows]
    kinds = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})
    table = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": labels}, features=kinds)
    if not len(table):
        return
    counts = write_examples(table, directory / "train.arrow", turns=turns, sequence_len=length)
    examples = open_table(directory / "train.arrow")
    assert len(examples) == counts.examples == sum(counts.ends.values())
    spans = [int(np.diff([False, *trained]).astype(bool)[np.array(trained)].sum()) for _, trained in rows if trained]
    chosen = sum(spans) if turns == "all" else sum(span > 0 for span in spans)
    assert counts.examples + counts.no_prompt + counts.too_long == chosen
    for prompt, real in zip(examples["prompt"], examples["real"], strict=True):
        assert prompt and real
        assert len(prompt) + len(real) <= length
