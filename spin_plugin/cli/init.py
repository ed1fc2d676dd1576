"""`axolotl spin init`: derive a SPIN configuration from an SFT configuration."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import yaml

from spin_plugin.cli.config_file import read_yaml
from spin_plugin.config.announce import HIGHEST_LEARNING_RATE
from spin_plugin.config.lower import PLUGIN
from spin_plugin.config.parse import parse_spin_block
from spin_plugin.config.refuse import refuse
from spin_plugin.console import SpinError, exit_on_error, say, warn
from spin_plugin.versions import discovers_plugins

STARTER = Path(__file__).with_name("starter.yml")
# Relative to the SFT learning rate; 1/10 to 1/40 works for SPIN.
LEARNING_RATE_FACTOR = 1 / 20
# Keys that are specific to the SFT run: its starting model, its names, its number of steps.
SFT_RUN_KEYS = (
    "resume_from_checkpoint", "hub_model_id", "wandb_run_id", "wandb_name", "mlflow_run_name", "trackio_run_name",
    "warmup_steps", "max_steps", "revision_of_model",
    "base_model_config", "tokenizer_config", "lora_model_dir",
)  # fmt: skip
# Kept with an adapter, whose base model does not change.
BASE_MODEL_KEYS = {"revision_of_model", "base_model_config", "tokenizer_config"}
# sft_weight keeps real responses likely (docs/measurements.md, "Questions to SQL"); 0 is the paper's loss.
SPIN_KEYS = {"rl": "spin", "spin": {"iterations": 3, "sft_weight": 5.0}}


@click.command()
@click.argument("sft", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write. Default: spin.yml, or SFT's name with -spin appended.",
)
@exit_on_error
def init(sft: Path | None, output: Path | None) -> None:
    """Write a SPIN configuration based on SFT, the Axolotl configuration that trained the model. Without SFT, write a
    template."""
    target = output or (sft.with_name(f"{sft.stem}-spin{sft.suffix}") if sft else Path("spin.yml"))
    if not target.parent.is_dir():
        raise SpinError(f"{target}: directory {target.parent} does not exist; create it")
    if target.exists():
        raise SpinError(f"{target}: already exists; choose another file with --output")
    if sft is None:
        target.write_text(_with_plugin_line(STARTER.read_text(encoding="utf-8")), encoding="utf-8")
        say(f"wrote {target}: fill in base_model and datasets, then run `axolotl spin train {target}`")
        return
    content = read_yaml(sft)
    changes = spin_changes(content, sft)
    text = edited(sft, content, changes)
    _check(text)
    target.write_text(text, encoding="utf-8")
    say(f"wrote {target}; now run `axolotl spin doctor {target}`, then `axolotl spin train {target}`")
    result = Path(str(content["output_dir"]))
    if not any(result.glob("*.safetensors*")):
        warn(f"{result}: contains no model yet; run `axolotl train {sft}` first")


def spin_changes(sft: Mapping[str, Any], name: Path) -> dict[str, Any]:
    """Return the keys that differ from the SFT configuration; None removes a key.

    Args:
        sft: the SFT configuration.
        name: its file, for error messages.

    Raises:
        SpinError: the configuration is not an SFT configuration, or lacks a key that SPIN needs.
    """
    for key in ("base_model", "output_dir", "learning_rate", "datasets"):
        if not sft.get(key):
            raise SpinError(f"{name}: {key} is missing; pass the SFT configuration that trained the model")
    if sft.get("rl"):
        raise SpinError(f"{name}: `rl: {sft['rl']}` is not SFT; pass the SFT configuration that trained the model")
    adapter = bool(sft.get("adapter"))
    leave_out = set(SFT_RUN_KEYS) - (BASE_MODEL_KEYS if adapter else set())
    changes: dict[str, Any] = dict.fromkeys(key for key in sft if key in leave_out)
    result = str(sft["output_dir"]).rstrip("/")
    changes |= {"lora_model_dir": result} if adapter else {"base_model": result}
    changes["output_dir"] = f"{result}-spin"
    highest = HIGHEST_LEARNING_RATE["adapter" if adapter else "full"]
    try:
        rate = float(sft["learning_rate"])
    except (TypeError, ValueError):
        raise SpinError(f"{name}: learning_rate: {sft['learning_rate']} is not a number; correct it") from None
    changes["learning_rate"] = float(f"{min(rate * LEARNING_RATE_FACTOR, highest):.1g}")
    changes["warmup_ratio"] = sft.get("warmup_ratio") or 0.1
    if not discovers_plugins():
        changes["plugins"] = [*(sft.get("plugins") or []), PLUGIN]
    return changes | SPIN_KEYS


def edited(sft: Path, content: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """Return the text of the SFT configuration with the changes applied.

    Raises:
        SpinError: the file's YAML style (aliases, a flow mapping) prevents a change.
    """
    kept = {key: value for key, value in content.items() if key not in changes}
    expected = kept | {key: value for key, value in changes.items() if value is not None}
    with suppress(yaml.YAMLError):
        text = edit(sft.read_text(encoding="utf-8"), changes)
        if yaml.safe_load(text) == expected:
            return text
    raise SpinError(
        f"{sft}: cannot be edited automatically because of YAML aliases or braces; write its keys out, one per line"
    )


def edit(text: str, changes: Mapping[str, Any]) -> str:
    """Change top-level keys in a configuration's text; comments and everything else stay unchanged.

    Args:
        text: YAML whose top level is a mapping.
        changes: new values; None removes a key, new keys are appended.
    """
    document = yaml.compose(text)
    assert isinstance(document, yaml.MappingNode)
    pairs = document.value
    for key, value in reversed(pairs):
        if key.value not in changes:
            continue
        new = changes[key.value]
        start, end = key.start_mark.index, value.end_mark.index
        if text[end - 1] == "\n":  # a block value's end mark includes the newline, a scalar's does not
            end -= 1
        if new is None:
            end = text.find("\n", end) + 1 or len(text)
        text = text[:start] + ("" if new is None else _line(key.value, new)) + text[end:]
    present = {key.value for key, _ in pairs}
    added = [_line(key, value) for key, value in changes.items() if key not in present and value is not None]
    return text.rstrip("\n") + "\n\n" + "\n".join(added) + "\n"


def _line(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, default_flow_style=False).strip()


def _with_plugin_line(text: str) -> str:
    return text if discovers_plugins() else text.replace("rl: spin\n", f"plugins: [{PLUGIN}]\nrl: spin\n")


def _check(text: str) -> None:
    """Reject now what `axolotl train` would reject."""
    cfg = yaml.safe_load(text)
    refuse(cfg)
    parse_spin_block(cfg["spin"])
