"""Measure the startup cost of the installed but unused plugin: Axolotl reads an SFT configuration with and without it.

    python scripts/bench/startup.py --rounds 5

Both sides run alternately in fresh processes; "without" hides the plugin's entry point from Axolotl. Since 0.21 Axolotl
loads every installed plugin; in older versions both sides are equal.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

PROGRAM = """
import importlib.metadata as metadata, json, sys, time
real = metadata.entry_points
def without_us(**asked):
    if asked.get("group") != "axolotl.plugins":
        return real(**asked)
    return metadata.EntryPoints(point for point in real(**asked) if not point.value.startswith("spin_plugin"))
if sys.argv[2] == "without":
    metadata.entry_points = without_us
start = time.perf_counter()
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
imported = time.perf_counter()
PluginManager.get_instance()
plugins = time.perf_counter()
load_cfg(sys.argv[1])
print(json.dumps({"import": imported - start, "plugins": plugins - imported, "all": time.perf_counter() - start}))
"""
CONFIG = {
    "datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "chat_template"}],
    "chat_template": "chatml",
    "sequence_len": 64,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "learning_rate": 1e-4,
    "bf16": False,
    "tf32": False,
}


def once(config: Path, side: str) -> dict[str, float]:
    """Return the seconds of one start."""
    command = [sys.executable, "-c", PROGRAM, str(config), side]
    done = subprocess.run(command, cwd=config.parent, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"import"')]
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--model", type=Path, default=Path("outputs/tiny/base"), help="any model; only its config is read"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.yml"
        config.write_text(
            yaml.safe_dump(CONFIG | {"base_model": str(options.model.resolve()), "output_dir": directory})
        )
        once(config, "with")  # warms the disk cache
        rounds = [{side: once(config, side) for side in ("with", "without")} for _ in range(options.rounds)]
    medians = {
        side: {part: statistics.median(r[side][part] for r in rounds) for part in ("import", "plugins", "all")}
        for side in ("with", "without")
    }
    added = statistics.median(r["with"]["plugins"] - r["without"]["plugins"] for r in rounds)
    sys.stdout.write(f"the plugin adds {added:.2f} s to {medians['without']['all']:.1f} s\n")
    if options.out:
        options.out.write_text(json.dumps({"rounds": rounds, "medians": medians, "added_seconds": added}, indent=1))


if __name__ == "__main__":
    main()
