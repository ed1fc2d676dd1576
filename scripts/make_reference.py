"""Generate docs/reference.md, the option reference, from the typed model.

python scripts/make_reference.py           # write
python scripts/make_reference.py --check   # exit 1 if the file is outdated
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from spin_plugin.args import (
    PLUGIN_VLLM_KEYS,
    RUN_WIDE_KEYS,
    VLLM_SERVER_KEYS,
    Block,
    GenerationArgs,
    JudgeArgs,
    Mark,
    SpinArgs,
    StopArgs,
    VllmArgs,
)
from spin_plugin.config.identity import FIXED_VLLM_KEYS
from spin_plugin.objective.losses import LOSSES
from spin_plugin.objective.metrics import METRICS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
HEAD = """# The `spin:` block

Generated from the options, losses and metrics in the code by `scripts/make_reference.py`; do not edit.

An unknown key raises an error that suggests the closest known one.
"""


def yaml_type(annotation: object) -> str:
    """Return a field's type in YAML terms."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return yaml_type(next(argument for argument in arguments if argument is not type(None)))
    if origin is list:
        return "list of mappings"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return "mapping, below"
    names = {int: "integer", float: "number", str: "text", bool: "true \\| false"}
    return names[annotation]  # type: ignore[index]


def bounds(field: FieldInfo) -> str:
    """Return a field's bounds, like `≥ 0`."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    limits = [(sign, getattr(item, name, None)) for item in field.metadata for name, sign in signs.items()]
    return ", ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is None:
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def choices(field: FieldInfo) -> str:
    """Return a field's allowed values if it has an enum, else its type."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and isinstance(extra.get("enum"), list):
        return " \\| ".join(f"`{value}`" for value in extra["enum"])  # type: ignore[union-attr]
    return yaml_type(field.annotation)


def may_change(block: type[Block], name: str) -> str:
    """Say when an option may change once its run has started."""
    if block is VllmArgs:
        return "never" if name in FIXED_VLLM_KEYS else "on resume"
    if name in block.marked(Mark.FREE):
        return "on resume"
    return "never" if name in block.marked(Mark.RUN_WIDE) else "in `schedule`"


def table(block: type[Block]) -> str:
    lines = ["| key | type | default | bounds | may change | meaning |", "|---|---|---|---|---|---|"]
    for name, field in block.model_fields.items():
        meaning = " ".join((field.description or "").split())
        cells = (f"`{name}`", choices(field), default(field), bounds(field), may_change(block, name), meaning)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reference() -> str:
    def keys(names: frozenset[str]) -> str:
        return ", ".join(f"`{name}`" for name in sorted(names))

    return "\n".join(
        [
            HEAD,
            table(SpinArgs),
            "",
            "Losses. y is the real response, y' the synthetic response, y0 iteration 0's response to the same prompt, "
            "p the policy, p_t the opponent; r = log p(y) - log p_t(y), r' the same for y', and z = beta r - beta r'. "
            "The guide says [how they differ](guide.md#losses).",
            "",
            "| `loss_type` | formula | starts at | when | source |",
            "|---|---|---|---|---|",
            *(
                f"| `{name}` | `{loss.formula}` | {loss.start} | {loss.when} | {loss.source} |"
                for name, loss in LOSSES.items()
            ),
            "",
            f"An entry of `schedule` cannot change Axolotl's {keys(RUN_WIDE_KEYS)}. Changes on resume do not affect "
            "what is already done: `iterations` can be raised, and entries of `schedule` changed for later iterations.",
            "",
            "## `spin.generation`",
            "",
            table(GenerationArgs),
            "",
            f"`vllm_kwargs` accepts neither keys of the `vllm:` block nor those that the plugin sets: "
            f"{keys(PLUGIN_VLLM_KEYS)}.",
            "",
            "## `spin.judge`",
            "",
            table(JudgeArgs),
            "",
            "[The guide](guide.md#a-judge) shows how to use it.",
            "",
            "## `spin.stop`",
            "",
            table(StopArgs),
            "",
            "[The guide](guide.md#when-to-stop-and-which-iteration-to-use) says how iterations are compared.",
            "",
            "## `vllm`",
            "",
            "Axolotl's own top-level block, next to `spin`, which configures vLLM.",
            "",
            table(VllmArgs),
            "",
            f"{keys(VLLM_SERVER_KEYS)} configure a vLLM server, as in a GRPO configuration, and are ignored. "
            "`rl_beta` next to `rl` is read as `spin.beta`.",
            "",
            "## Metrics",
            "",
            "Means over the pairs since the last log; `eval_spin/…` over the held-out pairs. Symbols as for losses.",
            "",
            "| name | formula | meaning |",
            "|---|---|---|",
            *(f"| `spin/{name}` | `{metric.formula}` | {metric.meaning} |" for name, metric in METRICS.items()),
            "| `eval_spin/judge` | `mean score of the held-out y'` | with `spin.judge`, at step 0: how good the "
            "opponent's own responses are |",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    expected = reference()
    if parser.parse_args().check:
        return int(not TARGET.exists() or TARGET.read_text(encoding="utf-8") != expected)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(expected, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
