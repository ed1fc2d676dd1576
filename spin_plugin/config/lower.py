"""`rl: spin` becomes the supervised Axolotl run that plays the next unfinished iteration.

`rl` is a closed enumeration in Axolotl, so the key is gone before validation. What stays is an SFT
configuration: `datasets:` keep every format Axolotl knows, no reference model is loaded, and the plugin's
hooks provide data, trainer and collator.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_plugin.args import SpinArgs
from spin_plugin.config.identity import same_value
from spin_plugin.config.parse import parse_spin_block, parse_vllm_block
from spin_plugin.config.plain import plain, without_secrets
from spin_plugin.config.refuse import refuse, refuse_what_cannot_be_merged
from spin_plugin.console import SpinError
from spin_plugin.run.checkpoint import check_model_dir
from spin_plugin.run.directory import RunDir

PLUGIN = "spin_plugin.SpinPlugin"

# What an SFT configuration may well say and SPIN has to answer differently.
SFT_ONLY: dict[str, Any] = {
    "sample_packing": False,  # a pair is one unit; packing would drop and split rows
    "eval_sample_packing": False,
    "batch_flattening": False,
    "pad_to_sequence_len": False,
    "train_on_inputs": False,  # the labels tell where the prompt ends
    "balance_labels": False,  # a step holds so many pairs, whatever their lengths
    "dataloader_drop_last": False,  # an epoch plays every pair
    "auto_resume_from_checkpoints": True,  # the debug log of one run goes on
}
# Fused kernels for GPUs; nobody has compared them with the plain layers under SPIN's two responses a row yet.
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@dataclass(frozen=True)
class Lowered:
    """What the later hooks need to know of the configuration as the user wrote it."""

    run: RunDir
    spin: SpinArgs
    iteration: int
    """The next unfinished iteration; `spin.iterations` when all are finished."""
    config: dict[str, Any]
    """The user's configuration without secrets, as run.json keeps it."""
    unused_vllm_keys: tuple[str, ...] = ()
    """What the `vllm:` block says about a server."""
    written: dict[str, Any] = field(default_factory=dict, repr=False)
    """The user's configuration as it was, until Axolotl has validated the lowered one."""

    @property
    def all_finished(self) -> bool:
        return self.iteration >= self.spin.iterations


def lower(cfg: MutableMapping[str, Any], known_axolotl_keys: Iterable[str] = ()) -> Lowered:
    """Rewrite a raw configuration in place.

    Raises:
        SpinError: the configuration asks for something SPIN cannot do, or is not a SPIN configuration at all.
    """
    written = plain(cfg)
    _require_spin(cfg)
    _take_rl_beta(cfg)
    original = without_secrets(plain(cfg))
    spin = parse_spin_block(plain(cfg["spin"]), known_axolotl_keys)
    refuse(cfg)
    if not cfg.get("output_dir"):
        raise SpinError("output_dir: name the directory of the run, for example `output_dir: ./outputs/spin`")
    if cfg.get("use_ray"):  # its workers work elsewhere
        cfg["output_dir"] = str(Path(cfg["output_dir"]).absolute())
    run = RunDir(Path(cfg["output_dir"]))
    run.require_writable()  # Axolotl opens its log there next
    iteration = run.finished()
    cfg.pop("resume_from_checkpoint", None)  # resuming needs no key
    if cfg.get("adapter"):
        for kernel in LORA_KERNELS:  # Axolotl switches them on where no `rl` is set, and ours is gone by then
            cfg.setdefault(kernel, False)
    if cfg.get("lora_modules_to_save") and cfg.get("peft_ensure_weight_tying") is None:
        cfg["peft_ensure_weight_tying"] = True  # an embedding that is also the head stays one, in whatever is merged
    # The next opponent is the model at the end of the iteration, unless the user asks for the best one.
    cfg["load_best_model_at_end"] = bool(cfg.get("load_best_model_at_end"))
    current = min(iteration, spin.iterations - 1)
    for key, value in spin.axolotl_overrides(current).items():
        cfg[key] = value
    for entry in spin.schedule:  # what it brings in later is refused now
        refuse({**cfg, **entry})
    vllm, unused = parse_vllm_block(plain(cfg.get("vllm")) or {})
    refuse_what_cannot_be_merged(cfg, spin)
    cfg.update(SFT_ONLY)
    _start_from_opponent(cfg, run, iteration, merged=spin.adapter_chain == "merge")
    del cfg["rl"]
    cfg["spin"] = spin.at(current).model_dump(exclude_none=True, exclude={"schedule"})
    cfg["spin_vllm"] = vllm.model_dump(exclude_unset=True)
    cfg["spin_iteration"] = iteration
    cfg["spin_config"] = original
    return Lowered(run, spin, iteration, original, unused, written)


def put_back(cfg: MutableMapping[str, Any], lowered: Lowered) -> None:
    """Undo `lower`: Axolotl refuses the configuration, and whoever reads it next finds what the user wrote."""
    if lowered.written:
        cfg.clear()
        cfg.update(lowered.written)


def restore(cfg: Mapping[str, Any]) -> Lowered:
    """The same for a configuration that was lowered in another process (a Ray worker)."""
    if cfg.get("spin_config") is None:
        raise SpinError("this is the resolved configuration of one iteration; train with the one that you wrote")
    spin = parse_spin_block(plain(cfg["spin"]))
    return Lowered(RunDir(Path(cfg["output_dir"])), spin, int(cfg["spin_iteration"]), plain(cfg["spin_config"]))


def names_the_plugin(cfg: Mapping[str, Any]) -> bool:
    """Whether `plugins:` lists ours."""
    return any(str(name).replace(":", ".") == PLUGIN for name in cfg.get("plugins") or [])


def concerns_spin(cfg: Mapping[str, Any]) -> bool:
    """Whether a raw configuration asks for SPIN, by any of the keys that somebody who wants it writes."""
    return names_the_plugin(cfg) or "spin" in cfg or str(cfg.get("rl")).strip().lower() == "spin"


def _take_rl_beta(cfg: MutableMapping[str, Any]) -> None:
    """Axolotl's and TRL's word for the strength of the hold; two that differ cannot both be meant."""
    rl_beta, block = cfg.pop("rl_beta", None), cfg["spin"]
    if rl_beta is None or not isinstance(block, Mapping):
        return
    if block.get("beta") is not None and not same_value(block["beta"], rl_beta):
        raise SpinError(f"rl_beta: {rl_beta} and spin.beta: {block['beta']} differ; remove one of them")
    cfg["spin"] = {**block, "beta": rl_beta}


def _require_spin(cfg: Mapping[str, Any]) -> None:
    """A run must never silently be something else than SPIN."""
    rl, block = cfg.get("rl"), cfg.get("spin")
    rl = "spin" if cfg.get("inference") and rl is None else rl  # `axolotl inference` takes `rl` away itself
    if rl is None:
        raise SpinError(f"`rl: spin` is missing though {PLUGIN} is loaded; add it, or remove the plugin and `spin:`")
    if rl != "spin" and str(rl).strip().lower() == "spin":
        raise SpinError(f"`rl: {rl}`: write `rl: spin`, in lower case")
    if rl != "spin":
        raise SpinError(
            f"`rl: {rl}` cannot be combined with {PLUGIN}; use `rl: spin`, or remove the plugin and `spin:`"
        )
    if block is None:
        raise SpinError("the `spin:` block is missing; add one, for example `spin: {iterations: 3}`")


def _start_from_opponent(cfg: MutableMapping[str, Any], run: RunDir, iteration: int, *, merged: bool) -> None:
    """The model of iteration t-1 is base and opponent of iteration t; with an adapter, base plus adapter is.

    Args:
        merged: the adapter of every iteration was merged into its base model.
    """
    state = run.read_state()
    # Another base model on the command line (`axolotl inference --base-model …`) is meant; training refuses it later.
    if iteration > 0 and state and cfg.get("base_model") == state.config.get("base_model"):
        previous = run.iteration(iteration - 1).path
        check_model_dir(previous, adapter=bool(cfg.get("adapter")))
        if not cfg.get("adapter"):
            _take_base(cfg, previous)
        elif not merged:
            cfg["lora_model_dir"] = str(previous)
        elif not (cfg.get("merge_lora") or cfg.get("inference")):
            _take_base(cfg, run.iteration(iteration - 1).merged)
            cfg.pop("lora_model_dir", None)  # an adapter that the run started from is merged, too
        else:  # they want the newest adapter and the base that it was trained on
            cfg["lora_model_dir"] = str(previous)
            if iteration > 1:
                _take_base(cfg, run.iteration(iteration - 2).merged)
    elif cfg.get("adapter") and cfg.get("lora_model_dir"):
        if not Path(cfg["lora_model_dir"]).is_dir():
            raise SpinError(f"lora_model_dir: {cfg['lora_model_dir']} is no directory here; download the adapter first")
        check_model_dir(Path(cfg["lora_model_dir"]), adapter=True)
    base = Path(str(cfg.get("base_model") or ""))
    if base.is_dir():
        check_model_dir(base, tokenizer_elsewhere=bool(cfg.get("tokenizer_config")))


def _take_base(cfg: MutableMapping[str, Any], model: Path) -> None:
    cfg["base_model"] = str(model)
    for key in ("base_model_config", "revision_of_model", "tokenizer_config"):
        cfg.pop(key, None)
