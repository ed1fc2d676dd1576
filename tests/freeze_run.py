"""Write the frozen run: one finished iteration of two, by the real command.

    python tests/freeze_run.py tests/data/run-0.2

tests/integration/test_frozen_run.py continues it: every later version with the same `run.state.FORMAT` must be able to.
Rerun this only when that changes, for a new minor version. Paths in it are relative to its directory.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from tiny import chat_rows, make_model, spin_config, write_config, write_jsonl

# As small as vLLM's CPU attention allows.
ONE_HEAD = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
# Not read by a later iteration, and some of them name this machine's paths.
UNUSED = ("checkpoint-*", "*.log", "README.md", "weights.json", "run.lock")


def main(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    make_model(directory / "model", **ONE_HEAD)
    write_jsonl(directory / "chat.jsonl", chat_rows(12))
    changes = {"output_dir": "run", "val_set_size": 4}
    write_config(directory, spin_config(directory, Path("model"), Path("chat.jsonl"), **changes))
    subprocess.run(["axolotl", "train", "config.yml"], cwd=directory, check=True)
    for pattern in UNUSED:
        for path in [*directory.rglob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
