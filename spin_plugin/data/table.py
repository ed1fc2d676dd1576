"""Arrow files of examples and pairs: written a block at a time, memory-mapped when read."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

BLOCK = 1024  # rows handled at a time

TOKENS = pa.list_(pa.int32())
EXAMPLE_SCHEMA = pa.schema({"prompt": TOKENS, "real": TOKENS})
PAIR_SCHEMA = pa.schema(
    {
        "prompt": TOKENS,
        "real": TOKENS,
        "synthetic": TOKENS,
        "index": pa.int64(),  # position among the pairs: where the opponent's log-probabilities are stored
        "example": pa.int64(),  # id of the prompt: its position in `real/`
        "iteration": pa.int32(),  # whose opponent drew the synthetic response
        "length": pa.int32(),  # tokens of prompt, real and synthetic together
    }
)


class table_writer:
    """An Arrow stream file that `datasets` maps into memory, written block by block."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema

    def __enter__(self) -> Any:
        self.file = pa.OSFile(str(self.path), "wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        return lambda columns: self.stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=self.schema))

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.file.close()


def open_table(path: Path) -> Dataset:
    """The rows of a file that this module wrote, memory-mapped."""
    return Dataset.from_file(str(path))


def blocks(rows: Dataset, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Columns of `rows`, a block at a time, as numpy arrays of tokens."""
    selected = rows.select_columns(list(names)).with_format("arrow")
    for start in range(0, len(rows), BLOCK):
        table = selected[start : start + BLOCK]
        yield {name: [row.values.to_numpy() for row in table[name]] for name in names}
