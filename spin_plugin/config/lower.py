"""Lower `rl: spin` to the supervised Axolotl run of the next unfinished iteration.

`rl` is a closed enumeration in Axolotl, so the key must be removed before validation. The result is an SFT
configuration: `datasets:` supports all of Axolotl's formats, no reference model is loaded, and the plugin's hooks
provide data, trainer and collator.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_plugin.args import SpinArgs
from spin_plugin.config.identity import same_value
from spin_plugin.config.parse import parse_spin_block, parse_vllm_block
from spin_plugin.config.plain import plain, without_secrets
from spin_plugin.config.refuse import refuse, refuse_unmergeable
from spin_plugin.console import SpinError
from spin_plugin.run.checkpoint import check_model_dir
from spin_plugin.run.directory import RunDir

PLUGIN = "spin_plugin.SpinPlugin"

# Keys that are common in SFT configurations and that SPIN must override.
SFT_ONLY: dict[str, Any] = {
    "sample_packing": False,  # packing would drop and split pairs
    "eval_sample_packing": False,
    "batch_flattening": False,
    "pad_to_sequence_len": False,
    "train_on_inputs": False,  # the labels mark where the prompt ends
    "balance_labels": False,  # a step is a fixed number of pairs, whatever their lengths
    "dataloader_drop_last": False,  # an epoch contains every pair
    "auto_resume_from_checkpoints": True,  # Axolotl then appends to the debug log instead of replacing it
}
# Fused GPU kernels, not yet compared with the plain layers on rows with two responses.
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@dataclass(frozen=True)
class Lowered:
    """The parts of the user's configuration that later hooks need."""

    run: RunDir
    spin: SpinArgs
    iteration: int
    """The next unfinished iteration; `spin.iterations` when all are finished."""
    config: dict[str, Any]
    """The user's configuration without secrets, as stored in run.json."""
    unused_vllm_keys: tuple[str, ...] = ()
    """The server keys in the `vllm:` block."""
    written: dict[str, Any] = field(default_factory=dict, repr=False)
    """The user's configuration unchanged, for `undo`."""

    @property
    def all_finished(self) -> bool:
        return self.iteration >= self.spin.iterations


def lower(cfg: MutableMapping[str, Any], known_axolotl_keys: Iterable[str] = ()) -> Lowered:
    """Rewrite a raw configuration in place.

    Raises:
        SpinError: the configuration contains something SPIN does not support, or is not a SPIN configuration.
    """
    written = plain(cfg)
    _require_spin(cfg)
    _accept_rl_beta(cfg)
    original = without_secrets(plain(cfg))
    spin = parse_spin_block(plain(cfg["spin"]), known_axolotl_keys)
    refuse(cfg)
    if not cfg.get("output_dir"):
        raise SpinError("output_dir: missing; set the directory of the run, for example `output_dir: ./outputs/spin`")
    if cfg.get("use_ray"):  # Ray workers have another working directory
        cfg["output_dir"] = str(Path(cfg["output_dir"]).absolute())
    run = RunDir(Path(cfg["output_dir"]))
    run.require_writable()  # before Axolotl opens its log there
    iteration = run.finished()
    cfg.pop("resume_from_checkpoint", None)  # resuming is automatic
    if cfg.get("adapter"):
        for kernel in LORA_KERNELS:  # Axolotl enables them if `rl` is unset, as it will be here
            cfg.setdefault(kernel, False)
    if cfg.get("lora_modules_to_save") and cfg.get("peft_ensure_weight_tying") is None:
        cfg["peft_ensure_weight_tying"] = True  # keeps tied embedding and head tied in merged models
    # The next opponent is the model at the end of the iteration, unless the user requests the best one.
    cfg["load_best_model_at_end"] = bool(cfg.get("load_best_model_at_end"))
    current = min(iteration, spin.iterations - 1)
    for key, value in spin.axolotl_overrides(current).items():
        cfg[key] = value
    for entry in spin.schedule:  # reject now what later iterations would bring in
        refuse({**cfg, **entry})
    vllm, unused = parse_vllm_block(plain(cfg.get("vllm")) or {})
    refuse_unmergeable(cfg, spin)
    cfg.update(SFT_ONLY)
    _start_from_opponent(cfg, run, iteration, merged=spin.adapter_chain == "merge")
    del cfg["rl"]
    cfg["spin"] = spin.at(current).model_dump(exclude_none=True, exclude={"schedule"})
    cfg["spin_vllm"] = vllm.model_dump(exclude_unset=True)
    cfg["spin_iteration"] = iteration
    cfg["spin_config"] = original
    return Lowered(run, spin, iteration, original, unused, written)


def undo(cfg: MutableMapping[str, Any], lowered: Lowered) -> None:
    """Undo `lower` in place, for a configuration that Axolotl rejects."""
    if lowered.written:
        cfg.clear()
        cfg.update(lowered.written)


def restore(cfg: Mapping[str, Any]) -> Lowered:
    """Reconstruct the result of `lower` from a configuration that another process lowered (in a Ray worker)."""
    if cfg.get("spin_config") is None:
        raise SpinError("spin_iteration: this is the resolved configuration of one iteration; train with the original")
    spin = parse_spin_block(plain(cfg["spin"]))
    return Lowered(RunDir(Path(cfg["output_dir"])), spin, int(cfg["spin_iteration"]), plain(cfg["spin_config"]))


def require_base_model(cfg: Mapping[str, Any]) -> None:
    """Check that a local `base_model` exists, before Axolotl takes its path for a name on the hub.

    Raises:
        SpinError: it does not.
    """
    base = str(cfg.get("base_model") or "")
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().exists():
        raise SpinError(f"base_model: {base} does not exist; train the SFT model first, or correct the path")


def lists_plugin(cfg: Mapping[str, Any]) -> bool:
    """Whether `plugins:` lists this plugin."""
    return any(str(name).replace(":", ".") == PLUGIN for name in cfg.get("plugins") or [])


def asks_for_spin(cfg: Mapping[str, Any]) -> bool:
    """Whether any key of a raw configuration refers to SPIN, even misspelled or incomplete."""
    return lists_plugin(cfg) or "spin" in cfg or str(cfg.get("rl")).strip().lower() == "spin"


def _accept_rl_beta(cfg: MutableMapping[str, Any]) -> None:
    """Move `rl_beta`, Axolotl's key for beta, to `spin.beta`."""
    rl_beta, block = cfg.pop("rl_beta", None), cfg["spin"]
    if rl_beta is None or not isinstance(block, Mapping):
        return
    if block.get("beta") is not None and not same_value(block["beta"], rl_beta):
        raise SpinError(f"rl_beta: {rl_beta} and spin.beta: {block['beta']} differ; remove one")
    cfg["spin"] = {**block, "beta": rl_beta}


def _require_spin(cfg: Mapping[str, Any]) -> None:
    """Reject incomplete SPIN configurations, which Axolotl would otherwise run as something else."""
    rl, block = cfg.get("rl"), cfg.get("spin")
    rl = "spin" if cfg.get("inference") and rl is None else rl  # `axolotl inference` removes `rl` itself
    if rl is None:
        raise SpinError(f"`rl: spin` is missing although {PLUGIN} is loaded; add it, or remove the plugin and `spin:`")
    if rl != "spin" and str(rl).strip().lower() == "spin":
        raise SpinError(f"`rl: {rl}`: write `rl: spin`, in lower case")
    if rl != "spin":
        raise SpinError(
            f"`rl: {rl}` cannot be combined with {PLUGIN}; use `rl: spin`, or remove the plugin and `spin:`"
        )
    if block is None:
        raise SpinError("the `spin:` block is missing; add one, for example `spin: {iterations: 3}`")


def _start_from_opponent(cfg: MutableMapping[str, Any], run: RunDir, iteration: int, *, merged: bool) -> None:
    """Point the configuration at the opponent: the model of iteration t-1, or its base model plus adapter.

    Args:
        cfg: modified in place.
        run: the run directory.
        iteration: t.
        merged: whether every iteration's adapter was merged into its base model.
    """
    state = run.read_state()
    # A base model on the command line (`axolotl inference --base-model …`) takes precedence; training rejects it later.
    if iteration > 0 and state and cfg.get("base_model") == state.config.get("base_model"):
        previous = run.iteration(iteration - 1).path
        check_model_dir(previous, adapter=bool(cfg.get("adapter")))
        if not cfg.get("adapter"):
            _set_base_model(cfg, previous)
        elif not merged:
            cfg["lora_model_dir"] = str(previous)
        elif not (cfg.get("merge_lora") or cfg.get("inference")):
            _set_base_model(cfg, run.iteration(iteration - 1).merged)
            cfg.pop("lora_model_dir", None)  # the adapter that the run started from is already merged
        else:  # these commands need the latest adapter and the base model that it was trained on
            cfg["lora_model_dir"] = str(previous)
            if iteration > 1:
                _set_base_model(cfg, run.iteration(iteration - 2).merged)
    elif cfg.get("adapter") and cfg.get("lora_model_dir"):
        if not Path(cfg["lora_model_dir"]).is_dir():
            raise SpinError(
                f"lora_model_dir: {cfg['lora_model_dir']} is not a local directory; download the adapter first"
            )
        check_model_dir(Path(cfg["lora_model_dir"]), adapter=True)
    base = Path(str(cfg.get("base_model") or ""))
    if base.is_dir():
        check_model_dir(base, tokenizer_elsewhere=bool(cfg.get("tokenizer_config")))


def _set_base_model(cfg: MutableMapping[str, Any], model: Path) -> None:
    cfg["base_model"] = str(model)
    for key in ("base_model_config", "revision_of_model", "tokenizer_config"):
        cfg.pop(key, None)
