"""Check which layout (shared prefix, padded, refused) each causal LM family of transformers gets.

    python scripts/bench/families.py [--json FILE] [FAMILY ...]

Builds a tiny random model of every family whose configuration allows it, and compares the chosen layout with one
sequence at a time (`tests/families.py`). Takes a few minutes on a CPU. Exits with 1 if any result differs.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from families import build, compare_layouts

# Families reject tiny sizes with many kinds of errors; the output shows which.
FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
)
FAILURES += (RuntimeError, StrictDataclassError, TypeError, ValueError)

LABELS = {True: "right", False: "WRONG", None: ""}


def verdict(family: str) -> dict[str, Any]:
    try:
        build(family)(input_ids=torch.arange(3, 40)[None]).logits.sum().backward()
    except FAILURES as error:
        return {"family": family, "chosen": "not built", "right": None, "reason": _short(error)}
    try:
        return compare_layouts(family)._asdict()
    except FAILURES as error:
        return {"family": family, "chosen": "failed", "right": False, "reason": _short(error)}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("families", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    verdicts = []
    for family in options.families:
        found = verdict(family)
        verdicts.append(found)
        numbers = f"{found['nats_per_token']:8.1e} {found['gradient']:8.1e}" if "gradient" in found else ""
        right = LABELS[found["right"]]
        line = f"{family:26} {found['chosen']:10} {right:6} {numbers:18} {found['reason'] or ''}"
        sys.stdout.write(f"{line.rstrip()}\n")
        sys.stdout.flush()
    counts = Counter((found["chosen"], found["right"]) for found in verdicts)
    for (chosen, right), count in counts.most_common():
        sys.stdout.write(f"{count:4} {chosen} {LABELS[right]}\n")
    if options.json:
        options.json.write_text(json.dumps(verdicts, indent=1))
    sys.exit(any(found["right"] is False for found in verdicts))


if __name__ == "__main__":
    main()
