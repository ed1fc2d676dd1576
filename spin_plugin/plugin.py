"""Axolotl's hooks. In a run without `rl: spin` all of them do nothing: an installed plugin is loaded in every run."""

import sys
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager

from spin_plugin.config.announce import announce
from spin_plugin.config.lower import Lowered, concerns_spin, lower, put_back, restore
from spin_plugin.config.refuse import refuse_other_trainers
from spin_plugin.console import SpinError, exit_in_one_line, say


class SpinPlugin(BasePlugin):
    """Self-Play Fine-Tuning: `rl: spin` and a `spin:` block; below Axolotl 0.21 also `plugins:`."""

    def __init__(self) -> None:
        super().__init__()
        self.lowered: Lowered | None = None
        """What `rl: spin` was lowered to; None in a run that is not SPIN."""
        self.iteration: Any = None
        """The iteration that this command runs (`training.iteration.Iteration`); None in commands that do not train."""

    @exit_in_one_line
    def register(self, cfg: Any) -> None:
        """Lower `rl: spin` to a supervised run before Axolotl validates the configuration."""
        self.lowered, self.iteration = None, None
        if not concerns_spin(cfg):
            return
        from axolotl.utils.schemas.config import AxolotlInputConfig

        from spin_plugin.versions import require_supported_axolotl

        require_supported_axolotl()
        known = AxolotlInputConfig.model_fields
        self.lowered = restore(cfg) if cfg.get("spin_iteration") is not None else lower(cfg, known)

    def on_config_validation_error(self, cfg: Any) -> None:
        """Hand the configuration back as the user wrote it."""
        if self.lowered is not None:
            put_back(cfg, self.lowered)
            self.lowered = None

    def get_input_args(self) -> str | None:
        return "spin_plugin.args.SpinPluginArgs" if self.lowered else None

    @exit_in_one_line
    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Draw the opponent's responses and build the pairs; only `train` and `preprocess` get here."""
        lowered = self.lowered
        if lowered is None:
            return None

        from axolotl.common.datasets import TrainDatasetMeta

        from spin_plugin.run.processes import rank
        from spin_plugin.training.iteration import Iteration

        if lowered.all_finished:
            if rank() == 0:
                say(
                    f"nothing is left to play: {lowered.iteration} iterations are finished, spin.iterations is "
                    f"{lowered.spin.iterations}; the model is in {lowered.run.root}"
                )
            raise SystemExit(0)
        others = (plugin for plugin in PluginManager.get_instance().plugins.values() if plugin is not self)
        refuse_other_trainers(cfg, others)
        if rank() == 0:
            announce(cfg, lowered)
        self.iteration = Iteration(cfg, lowered)
        self.iteration.prepare(for_training=not preprocess)
        pairs = self.iteration.pairs
        return TrainDatasetMeta(pairs.train, pairs.eval, self.iteration.steps)

    def get_trainer_cls(self, cfg: Any) -> Any:
        if self.iteration is None:
            return None
        return self.iteration.trainer_class()

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        if self.iteration is None:
            return None
        from spin_plugin.model.layout import PairCollator

        return PairCollator, {}

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Keep the pairs' columns, which no model's forward knows; never wait for the GPU to look for NaN."""
        if self.iteration is None:
            return {}
        import torch

        ours = {"remove_unused_columns": False, "label_names": [], "logging_nan_inf_filter": False}
        # transformers allows bf16 without a GPU only where the CPU is asked for by name
        return ours | ({"use_cpu": True} if cfg.bf16 and not torch.accelerator.is_available() else {})

    def post_model_build(self, cfg: Any, model: Any) -> None:
        if self.iteration is not None:
            self.iteration.note_formats(model)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Nothing has wrapped the model yet."""
        if self.iteration is not None:
            from spin_plugin.training.precision import keep_masters

            keep_masters(cfg, model)

    @exit_in_one_line
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if self.lowered is None:
            return
        if self.iteration is None:
            raise SpinError("another plugin brought the data, so this is not SPIN; remove it from `plugins`")
        self.iteration.check_trainer(trainer)

    @exit_in_one_line
    def post_train_unload(self, cfg: Any) -> None:
        """Model, tokenizer and metrics are on disk: the iteration is finished.

        Since 0.20 Axolotl also calls this when training failed or was interrupted; then nothing is finished.
        """
        if self.iteration is not None and sys.exc_info()[0] is None:
            self.iteration.finish()
