"""`axolotl spin init`: the SPIN configuration that belongs to an SFT configuration."""

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
from spin_plugin.console import SpinError, exit_in_one_line, say, warn
from spin_plugin.versions import discovers_plugins

STARTER = Path(__file__).with_name("starter.yml")
# Of the learning rate that fine-tuned the model. SPIN's is a tenth to a fortieth of it.
SHARE_OF_THE_SFTS = 1 / 20
# What belongs to the SFT run, and would lead SPIN's to its model, its name or its steps.
OF_THE_SFT_RUN = (
    "resume_from_checkpoint", "hub_model_id", "wandb_run_id", "warmup_steps", "max_steps", "revision_of_model",
    "base_model_config", "tokenizer_config", "lora_model_dir",
)  # fmt: skip
# An adapter's base model stays the base model.
OF_THE_BASE_MODEL = {"revision_of_model", "base_model_config", "tokenizer_config"}
BLOCK = {"rl": "spin", "spin": {"iterations": 3}}


@click.command()
@click.argument("sft", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: spin.yml, or SFT's name-spin."
)
@exit_in_one_line
def init(sft: Path | None, output: Path | None) -> None:
    """Write the SPIN configuration that starts from the result of SFT, an Axolotl configuration; without it, one to
    fill in."""
    target = output or (sft.with_name(f"{sft.stem}-spin{sft.suffix}") if sft else Path("spin.yml"))
    if not target.parent.is_dir():
        raise SpinError(f"{target}: there is no directory {target.parent}")
    if target.exists():
        raise SpinError(f"{target} exists; name another file with --output")
    if sft is None:
        target.write_text(_with_plugin_line(STARTER.read_text(encoding="utf-8")), encoding="utf-8")
        say(f"{target} is written: fill in base_model and datasets, then run `axolotl spin train {target}`")
        return
    content = read_yaml(sft)
    changes = spin_changes(content, sft)
    text = edited(sft, content, changes)
    _check(text)
    target.write_text(text, encoding="utf-8")
    say(f"{target} is written; now run `axolotl spin train {target}`")
    result = Path(str(content["output_dir"]))
    if not any(result.glob("*.safetensors*")):
        warn(f"there is no model in {result} yet; run `axolotl train {sft}` first")


def spin_changes(sft: Mapping[str, Any], name: Path) -> dict[str, Any]:
    """What has to be said anew in an SFT configuration; None: left out.

    Raises:
        SpinError: something that SPIN needs is missing.
    """
    for key in ("base_model", "output_dir", "learning_rate", "datasets"):
        if not sft.get(key):
            raise SpinError(f"{name}: {key} is missing, so this is no SFT configuration that trained a model")
    if sft.get("rl"):
        raise SpinError(f"{name}: `rl: {sft['rl']}` is no SFT configuration")
    adapter = bool(sft.get("adapter"))
    leave_out = set(OF_THE_SFT_RUN) - (OF_THE_BASE_MODEL if adapter else set())
    changes: dict[str, Any] = dict.fromkeys(key for key in sft if key in leave_out)
    result = str(sft["output_dir"]).rstrip("/")
    changes |= {"lora_model_dir": result} if adapter else {"base_model": result}
    changes["output_dir"] = f"{result}-spin"
    highest = HIGHEST_LEARNING_RATE["adapter" if adapter else "full"]
    try:
        rate = float(sft["learning_rate"])
    except (TypeError, ValueError):
        raise SpinError(f"{name}: learning_rate: {sft['learning_rate']} is no number") from None
    changes["learning_rate"] = float(f"{min(rate * SHARE_OF_THE_SFTS, highest):.1g}")
    changes["warmup_ratio"] = sft.get("warmup_ratio") or 0.1
    if not discovers_plugins():
        changes["plugins"] = [*(sft.get("plugins") or []), PLUGIN]
    return changes | BLOCK


def edited(sft: Path, content: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The SFT configuration's text with the changes in it.

    Raises:
        SpinError: it is written in a way (aliases, a flow mapping) in which not every change can be made.
    """
    kept = {key: value for key, value in content.items() if key not in changes}
    wanted = kept | {key: value for key, value in changes.items() if value is not None}
    with suppress(yaml.YAMLError):
        text = edit(sft.read_text(encoding="utf-8"), changes)
        if yaml.safe_load(text) == wanted:
            return text
    raise SpinError(
        f"{sft} is written in a way that cannot be edited (aliases, braces); write its keys out, one a line"
    )


def edit(text: str, changes: Mapping[str, Any]) -> str:
    """A configuration's text with other values of its top-level keys; comments and all else stay as they are.

    Args:
        text: YAML whose top level is a mapping.
        changes: new values; None leaves a key out, a new key is added at the end.
    """
    document = yaml.compose(text)
    assert isinstance(document, yaml.MappingNode)
    pairs = document.value
    for key, value in reversed(pairs):
        if key.value not in changes:
            continue
        new = changes[key.value]
        start, end = key.start_mark.index, value.end_mark.index
        if text[end - 1] == "\n":  # a block ends with its last line, a scalar before its comment
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
    """Refuse now what `axolotl train` would refuse."""
    cfg = yaml.safe_load(text)
    refuse(cfg)
    parse_spin_block(cfg["spin"])
