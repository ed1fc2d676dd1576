"""The hooks by which Axolotl plays SPIN. Each one hands over to the room that knows."""

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin, PluginManager

from spin_plugin.lowering import Lowered, announce, lower, refuse_other_trainers, restore
from spin_plugin.messages import SpinError, exit_in_one_line, say
from spin_plugin.precision import keep_masters
from spin_plugin.processes import rank


class SpinPlugin(BasePlugin):
    """Self-Play Fine-Tuning: `plugins: [spin_plugin.SpinPlugin]`, `rl: spin` and a `spin:` block."""

    def __init__(self) -> None:
        super().__init__()
        self.lowered: Lowered | None = None
        self.game: Any = None
        """The iteration being played (`spin_plugin.game.Game`); None in commands that do not train."""

    @exit_in_one_line
    def register(self, cfg: Any) -> None:
        """Lower `rl: spin` to a supervised run before Axolotl validates the configuration."""
        from axolotl.utils.schemas.config import AxolotlInputConfig

        known = AxolotlInputConfig.model_fields
        self.lowered = restore(cfg) if cfg.get("spin_iteration") is not None else lower(cfg, known)

    def get_input_args(self) -> str:
        return "spin_plugin.args.SpinPluginArgs"

    @exit_in_one_line
    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Draw the opponent's responses and build the pairs; only `train` and `preprocess` get here."""
        from axolotl.common.datasets import TrainDatasetMeta

        from spin_plugin.game import Game

        lowered = self.lowered
        assert lowered is not None
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
            announce(lowered)
        self.game = Game(cfg, lowered)
        self.game.prepare(for_training=not preprocess)
        pairs = self.game.pairs
        return TrainDatasetMeta(pairs.train, pairs.eval, self.game.steps)

    def get_trainer_cls(self, cfg: Any) -> Any:
        if self.game is None:
            return None
        from spin_plugin.trainer import SpinTrainer

        return SpinTrainer

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        if self.game is None:
            return None
        from spin_plugin.layout import PairCollator

        return PairCollator, {}

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Keep the pairs' columns, which no model's forward knows; never wait for the GPU to look for NaN."""
        if self.game is None:
            return {}
        ours = {"remove_unused_columns": False, "label_names": [], "logging_nan_inf_filter": False}
        # transformers allows bf16 without a GPU only where the CPU is asked for by name
        return ours | ({"use_cpu": True} if cfg.bf16 and not torch.accelerator.is_available() else {})

    def post_model_build(self, cfg: Any, model: Any) -> None:
        if self.game is not None:
            self.game.look_at_formats(model)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Nothing has wrapped the model yet."""
        if self.game is not None:
            keep_masters(cfg, model)

    @exit_in_one_line
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if self.game is None:
            raise SpinError("another plugin brought the data, so this is not SPIN; remove it from `plugins`")
        self.game.equip(trainer)

    @exit_in_one_line
    def post_train_unload(self, cfg: Any) -> None:
        """Model, tokenizer and metrics are on disk: the iteration is finished."""
        if self.game is not None:
            self.game.finish()
