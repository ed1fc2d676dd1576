"""Arrow files of examples and pairs: written block by block, memory-mapped for reading."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from spin_plugin.console import SpinError

BLOCK = 1024  # rows in memory at a time

TOKENS = pa.list_(pa.int32())
EXAMPLE_SCHEMA = pa.schema({"prompt": TOKENS, "real": TOKENS, "row": pa.int64()})  # row: number of the SFT row
PAIR_SCHEMA = pa.schema(
    {
        "prompt": TOKENS,
        "real": TOKENS,
        "synthetic": TOKENS,
        "index": pa.int64(),  # position among the pairs, and in the opponent's log-probs
        "example": pa.int64(),  # id of the prompt: its position in `real/`
        "iteration": pa.int32(),  # whose opponent generated the synthetic response
        "length": pa.int32(),  # tokens of the prompt and all responses that are computed: equal ones once
    }
)
INITIAL = pa.field("initial", TOKENS)  # iteration 0's response, if the loss uses it; empty without one


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open an Arrow stream file for writing; yields a function that appends a block of columns.

    `datasets` has a writer of its own, but that one ignores an error on closing, which may be a full disk.
    """
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        yield lambda columns: stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))


def open_table(path: Path) -> Dataset:
    """Map a file written by `table_writer` into memory.

    Raises:
        SpinError: it is damaged.
    """
    try:
        return Dataset.from_file(str(path))
    except pa.ArrowInvalid as error:
        raise SpinError(
            f"{path} is damaged ({str(error).strip()}); remove {path.parent}, which the next start builds again"
        ) from None


def blocks(rows: Dataset, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the named columns of `rows` block by block, each row a numpy array of tokens."""
    selected = rows.select_columns(list(names)).with_format("arrow")
    for start in range(0, len(rows), BLOCK):
        table = selected[start : start + BLOCK]
        yield {name: [row.values.to_numpy() for row in table[name]] for name in names}
