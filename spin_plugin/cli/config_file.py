"""Read a command's configuration file without importing Axolotl."""

from pathlib import Path
from typing import Any

import click
import yaml

from spin_plugin.args import SpinArgs
from spin_plugin.config.lower import lists_plugin
from spin_plugin.config.parse import parse_spin_block
from spin_plugin.console import SpinError
from spin_plugin.run.directory import RunDir
from spin_plugin.versions import discovers_plugins

CONFIG = click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))


def read_yaml(config: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        SpinError: the file is not YAML or not a mapping.
    """
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SpinError(f"{config}: invalid YAML: {error}") from None
    except UnicodeDecodeError:
        raise SpinError(f"{config}: not a text file; pass an Axolotl configuration (YAML)") from None
    if not isinstance(content, dict):
        raise SpinError(f"{config}: not a mapping of keys; pass an Axolotl configuration (YAML)")
    return content


def read_config(config: Path) -> tuple[SpinArgs, RunDir]:
    """Read the `spin:` block and the run directory of a configuration file.

    Raises:
        SpinError: the file is not a SPIN configuration.
    """
    cfg = read_yaml(config)
    if cfg.get("rl") != "spin" or not cfg.get("output_dir"):
        raise SpinError(
            f"{config}: not a SPIN configuration; it needs `rl: spin` (in lower case), a `spin:` block and `output_dir`"
        )
    if not (lists_plugin(cfg) or discovers_plugins()):
        raise SpinError(f"{config}: does not load the plugin; add `plugins: [spin_plugin.SpinPlugin]`")
    return parse_spin_block(cfg.get("spin")), RunDir(Path(cfg["output_dir"]))
