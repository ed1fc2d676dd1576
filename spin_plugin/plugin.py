"""Axolotl's hooks. Without `rl: spin` they do nothing, because an installed plugin is loaded in every run."""

import sys
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager

from spin_plugin.config.lower import Lowered, asks_for_spin, lower, require_base_model, restore, undo
from spin_plugin.console import SpinError, exit_on_error
from spin_plugin.versions import require_supported_axolotl


class SpinPlugin(BasePlugin):
    """Self-Play Fine-Tuning, enabled by `rl: spin` and a `spin:` block (before Axolotl 0.21 also by `plugins:`)."""

    def __init__(self) -> None:
        super().__init__()
        self.lowered: Lowered | None = None
        """The lowered configuration; None in runs without SPIN."""
        self.iteration: Any = None
        """The `training.iteration.Iteration` that this command runs; None in commands that do not train."""

    @exit_on_error
    def register(self, cfg: Any) -> None:
        """Lower `rl: spin` to a supervised run before Axolotl validates the configuration."""
        self.lowered, self.iteration = None, None
        if asks_for_spin(cfg):
            from axolotl.utils.schemas.config import AxolotlInputConfig

            require_supported_axolotl()
            lowered_before = cfg.get("spin_iteration") is not None
            self.lowered = restore(cfg) if lowered_before else lower(cfg, AxolotlInputConfig.model_fields)
            require_base_model(cfg)

    def on_config_validation_error(self, cfg: Any) -> None:
        """Restore the configuration as the user wrote it."""
        if self.lowered is not None:
            undo(cfg, self.lowered)
            self.lowered = None

    def get_input_args(self) -> str | None:
        return "spin_plugin.args.SpinPluginArgs" if self.lowered else None

    @exit_on_error
    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Generate the opponent's responses and build the pairs. Only `train` and `preprocess` call this hook."""
        if self.lowered is None:
            return None
        from axolotl.common.datasets import TrainDatasetMeta

        from spin_plugin.training.start import start_iteration

        others = [plugin for plugin in PluginManager.get_instance().plugins.values() if plugin is not self]
        self.iteration = start_iteration(cfg, self.lowered, others, for_training=not preprocess)
        return TrainDatasetMeta(self.iteration.pairs.train, self.iteration.evaluated, self.iteration.steps)

    def get_trainer_cls(self, cfg: Any) -> Any:
        return self.iteration and self.iteration.trainer_class()

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        return self.iteration and self.iteration.collator_class_and_arguments()

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return self.iteration.training_arguments() if self.iteration else {}

    def post_model_build(self, cfg: Any, model: Any) -> None:
        if self.iteration:
            self.iteration.record_fp32_tensors(model)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Called before the model is wrapped (FSDP, DDP, …)."""
        if self.iteration:
            self.iteration.keep_masters(model)

    @exit_on_error
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if self.iteration:
            self.iteration.check_trainer(trainer)
        elif self.lowered:
            raise SpinError("plugins: another plugin loaded the dataset in place of SPIN; remove that plugin")

    @exit_on_error
    def post_train_unload(self, cfg: Any) -> None:
        """Finish the iteration: model, tokenizer and metrics are on disk.

        Since 0.20 Axolotl also calls this hook after training failed, when only the report is written, or was
        interrupted.
        """
        error = sys.exc_info()[0]
        if self.iteration and error is None:
            self.iteration.finish()
        elif self.iteration and error is not KeyboardInterrupt:
            self.iteration.report()
