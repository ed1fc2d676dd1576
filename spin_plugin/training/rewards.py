"""The rewards of every training pair, as last seen in training."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin_plugin.console import exit_on_error
from spin_plugin.opponent.store import RewardStore


class TrainingRewards(TrainerCallback):
    """Collects the rewards on the device, 12 bytes per pair, and stores them with each checkpoint and at the end.

    The trainer stores them before the checkpoint, so a resumed run lacks nothing that the checkpoint has learned. What
    a killed run stored of later steps is replaced when these are repeated.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer  # a SpinTrainer, whose module imports this one

    @exit_on_error
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        pairs = len(trainer.train_dataset)
        self.store = RewardStore(trainer.task.directory.rewards("train"), pairs, trainer.pair_keys["train"])
        stored = torch.full((pairs, 2), torch.nan)
        if state.global_step and trainer.is_world_process_zero():  # one rank only, because the ranks are summed
            stored = self.store.load()
        self.rewards = stored.nan_to_num().to(args.device)
        self.seen = torch.where(stored.isnan().any(1), -1, 0).int().to(args.device)
        """[N] the step in which each pair was seen last; -1: never."""

    def add(self, pairs: Tensor, rewards: Tensor) -> None:
        """Replace the rewards [n, 2] of the pairs with these indices [n], without synchronizing with the device."""
        self.rewards.index_copy_(0, pairs, rewards.detach().float())
        self.seen.index_fill_(0, pairs, self.trainer.state.global_step + 1)

    def save(self) -> None:
        """Merge the ranks' values, the newest of each pair, and store them; all ranks must call it."""
        accelerator, newest = self.trainer.accelerator, self.seen.clone()
        if accelerator.num_processes > 1:
            all_reduce(newest, ReduceOp.MAX)
        own = self.rewards.where((self.seen == newest)[:, None], 0)  # a step counts each pair on one rank only
        merged = accelerator.reduce(own, "sum")
        if accelerator.is_main_process:
            self.store.save(merged.where((newest >= 0)[:, None], torch.nan))

    @exit_on_error
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.save()
