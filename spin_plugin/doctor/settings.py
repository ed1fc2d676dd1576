"""The configuration as `axolotl train` would see it, and everything that it would refuse."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spin_plugin.args import SpinArgs, VllmArgs
from spin_plugin.config.claim import require_own
from spin_plugin.config.lower import PLUGIN, Lowered, lists_plugin, lower
from spin_plugin.config.parse import parse_spin_block, parse_vllm_block
from spin_plugin.config.plain import plain
from spin_plugin.config.refuse import refusals, refuse_other_trainers
from spin_plugin.config.specs import (
    DataSpec,
    OpponentSpec,
    TrainingSpec,
    read_data,
    read_opponent,
    read_training,
    read_vllm,
)
from spin_plugin.console import SpinError, report_error, say, warn
from spin_plugin.doctor.checkup import brief, unreachable
from spin_plugin.doctor.machine import devices
from spin_plugin.generation.devices import placements, visible_gpus
from spin_plugin.run.checkpoint import check_model_dir
from spin_plugin.run.lock import holder
from spin_plugin.run.stop import find_stop
from spin_plugin.training.precision import require_no_lost_updates
from spin_plugin.versions import discovers_plugins

OWN_KEYS = ("rl", "rl_beta", "spin", "vllm")


@dataclass(frozen=True)
class Settings:
    """A configuration that `axolotl train` accepts."""

    cfg: Any
    """Axolotl's validated configuration of the next iteration; the checks give it a temporary output_dir."""
    lowered: Lowered
    reachable: bool
    """Whether the base model's configuration could be read."""

    @property
    def number(self) -> int:
        """The next iteration; the last one if all are finished."""
        return min(self.lowered.iteration, self.lowered.spin.iterations - 1)

    @property
    def spin(self) -> SpinArgs:
        """The `spin:` block of the next iteration."""
        return self.lowered.spin.at(self.number)

    @property
    def training(self) -> TrainingSpec:
        return read_training(self.cfg)

    @property
    def opponent(self) -> OpponentSpec:
        return read_opponent(self.cfg)

    @property
    def data(self) -> DataSpec:
        return read_data(self.cfg)

    @property
    def vllm(self) -> VllmArgs:
        return read_vllm(self.cfg)


def read_settings(raw: dict[str, Any], processes: int) -> Settings | None:
    """Validate a configuration and report every line that `axolotl train` would refuse it with, not only the first.

    Args:
        raw: the content of the YAML file.
        processes: the number of training processes.

    Returns:
        None if it is refused.
    """
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = set(AxolotlInputConfig.model_fields)
    refused = list(dict.fromkeys(_refused(raw, known)))
    for reason in refused:
        report_error(reason)
    if refused:  # without SPIN's keys Axolotl can still say what it refuses
        _validated(DictDefault(_without_spin(raw)), raw, processes)
        return None
    cfg = DictDefault(copy.deepcopy(raw))
    lowered = lower(cfg, known)
    valid = _validated(cfg, raw, processes)
    if valid is None:
        return None
    settings = Settings(valid, lowered, _normalized(valid, processes))
    spin = lowered.spin
    say(
        f"accepted; next: iteration {lowered.iteration} of 0…{spin.iterations - 1}"
        if not lowered.all_finished
        else f"accepted; all {spin.iterations} iterations are finished"
    )
    return settings


def _refused(raw: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    """Yield every reason for which `lower` refuses a configuration."""
    if not (lists_plugin(raw) or discovers_plugins()):
        yield f"plugins: does not list the plugin; add `plugins: [{PLUGIN}]`"
    parts: list[Callable[[], Any]] = [
        lambda: parse_spin_block(plain(raw.get("spin") or {}), known),
        lambda: parse_vllm_block(plain(raw.get("vllm")) or {}),
    ]
    if (base := Path(str(raw.get("base_model") or ""))).is_dir():
        parts.append(lambda: check_model_dir(base, tokenizer_elsewhere=bool(raw.get("tokenizer_config"))))
    yield from refusals(raw)
    for part in (*parts, lambda: lower(copy.deepcopy(dict(raw)), known)):
        try:
            part()
        except SpinError as error:
            yield str(error)


def _without_spin(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the supervised configuration that remains of a configuration."""
    remaining = {key: value for key, value in copy.deepcopy(dict(raw)).items() if key not in (*OWN_KEYS, "plugins")}
    others = [name for name in raw.get("plugins") or [] if not lists_plugin({"plugins": [name]})]
    return remaining | ({"plugins": others} if others else {})


def _validated(cfg: Any, raw: Mapping[str, Any], processes: int) -> Any:
    """Return Axolotl's validated configuration; None, after a line for each invalid key, if it is refused.

    Args:
        cfg: the lowered configuration.
        raw: the user's, for keys that Axolotl does not know.
        processes: the number of training processes.
    """
    from axolotl.cli.config import gpu_capabilities, prepare_plugins
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.config import validate_config

    capabilities, environment = gpu_capabilities()
    try:
        prepare_plugins(cfg)
        _warn_of_unknown_keys(raw, merge_input_args()[1])
        return validate_config(cfg, capabilities | {"n_gpu": processes}, environment)
    except ValidationError as error:
        for detail in error.errors():
            name = ".".join(str(part) for part in detail["loc"]) or "Axolotl"
            report_error(f"{name}: {detail['msg'].removeprefix('Value error, ')}")
    except (ValueError, TypeError, ImportError) as error:
        report_error(f"Axolotl refuses the configuration: {error}")
    return None


def _warn_of_unknown_keys(raw: Mapping[str, Any], schema: Any) -> None:
    """Warn of keys that neither Axolotl nor a plugin knows, and that Axolotl would silently ignore."""
    names = {name for key, field in schema.model_fields.items() for name in (key, field.alias) if name} | {*OWN_KEYS}
    for key in raw.keys() - names:
        near = get_close_matches(str(key), names, n=1)
        warn(f"{key}: unknown to Axolotl, which ignores it" + (f"; did you mean `{near[0]}`?" if near else ""))


def _normalized(cfg: Any, processes: int) -> bool:
    """Derive Axolotl's further settings; return False if the base model's configuration is out of reach.

    Raises:
        SpinError: it is damaged, or the hub has no such model.
    """
    from axolotl.utils.config import normalize_cfg_datasets, normalize_config

    reachable = True
    try:
        normalize_config(cfg)
    except (OSError, ValueError, RuntimeError) as error:
        if not unreachable(error):
            raise SpinError(f"base_model: {cfg.base_model}: {brief(error)}") from None
        reachable = False  # what follows needs only what was derived before
    normalize_cfg_datasets(cfg)
    cfg.world_size = processes
    return reachable


def check_own_keys(settings: Settings) -> None:
    """What is checked between Axolotl's validation and vLLM's start."""
    from axolotl.integrations.base import PluginManager

    others = [
        plugin for name, plugin in PluginManager.get_instance().plugins.items() if not name.startswith("spin_plugin")
    ]
    refuse_other_trainers(settings.cfg, others)
    require_no_lost_updates(settings.training)
    training = settings.training
    if (training.fsdp or training.deepspeed) and not devices()[0].gpu:
        warn("FSDP and DeepSpeed need GPUs, and none is visible; what follows is about this machine")
    say(
        f"trains {'an adapter' if training.adapter else 'all weights'} in {training.dtype} with {training.optimizer}, "
        f"{training.world_size} process{'es' if training.world_size > 1 else ''}"
    )


def check_output_dir(settings: Settings) -> None:
    """Whether the run directory is this configuration's; nothing in it is changed or locked."""
    lowered = settings.lowered
    run, spin = lowered.run, lowered.spin
    state = require_own(run, lowered.config, lowered.iteration)
    if state is None:
        return say(f"{run.root}: a new run")
    say(f"{run.root}: {len(state.finished)} of {spin.iterations} iterations are finished")
    if owner := holder(run.root):
        say(f"{run.root}: in use by {owner}")
    if stopped := find_stop(state.finished, spin):
        if stopped.failed:
            raise SpinError(stopped.message)
        say(stopped.message)
    return None


def check_engines(settings: Settings) -> None:
    """Whether the GPUs suffice for the copies of the model that generate."""
    if settings.spin.generation.backend == "ray":
        return say("Ray starts the engines on its cluster")
    vllm, kwargs = settings.vllm, settings.spin.generation.vllm_kwargs
    each = vllm.tensor_parallel_size * kwargs.get("pipeline_parallel_size", 1)
    placed = placements(vllm.data_parallel_size, each)
    copies = "1 copy of the model generates" if len(placed) == 1 else f"{len(placed)} copies of the model generate"
    kind = "GPUs" if visible_gpus() else "CPU processes"
    return say(copies + (f", each on {each} {kind}" if each > 1 else ""))
