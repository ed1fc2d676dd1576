"""SpinTrainer: forward, log-probs, loss and logging. Everything else is Axolotl's trainer."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.data_loader import DataLoaderShard
from axolotl.core.trainers import AxolotlTrainer
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from spin_plugin.console import exit_on_error, say, warn
from spin_plugin.data.order import Limits, PromptSampler, SeededSampler, Sizes, pair_sizes, pairs_counted
from spin_plugin.data.steps import StepDataset, StepSampler, unchanged
from spin_plugin.model.forward import disable_dropout, install, logps
from spin_plugin.model.select import Layout
from spin_plugin.objective.losses import spin_terms
from spin_plugin.objective.metrics import METRICS, metric_sums
from spin_plugin.objective.watch import LogWatch
from spin_plugin.run.iteration import IterationDir
from spin_plugin.training.decline import HeldOutCheck
from spin_plugin.training.precision import keep_outputs_in_fp32
from spin_plugin.training.rewards import TrainingRewards
from spin_plugin.training.saving import disk_errors, fix_mtimes
from spin_plugin.training.scorer import OpponentScorer
from spin_plugin.training.task import TrainingTask

PREFIX = {"train": "spin/", "eval": "eval_spin/"}  # reporters group metrics by the eval_ prefix


def trainer_for(task: TrainingTask) -> type["SpinTrainer"]:
    """Return the trainer class for this task."""
    return type("SpinTrainer", (SpinTrainer,), {"task": task})


class SpinTrainer(AxolotlTrainer):
    """Trains the main player against stored log-probs of the opponent."""

    task: TrainingTask
    """A class attribute (see `trainer_for`), because Axolotl asks for a class and constructs the trainer itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A single process that sees several GPUs (vLLM needs them) would get torch's DataParallel, which splits a
        # shared-prefix row.
        kwargs["args"]._n_gpu = min(1, kwargs["args"].n_gpu)
        super().__init__(*args, **kwargs)
        keep_outputs_in_fp32(self.accelerator)
        # compute_loss divides by the pairs of the global batch; if transformers also divided by the accumulation steps,
        # a pair's weight would depend on its micro-batch.
        self.model_accepts_loss_kwargs = True
        dropout = max(disable_dropout(module) for module in self.model.modules())
        if dropout and self.is_world_process_zero():
            say(f"dropout of {dropout:g} is disabled: the policy must equal the opponent before its first step")
        install(self.model)  # before anything wraps the model
        self.layout = Layout(shared_prefix=False, own_logits=False)  # replaced once the model is wrapped for training
        self.opponent: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor | None] = dict.fromkeys(PREFIX)
        self._pairs = dict.fromkeys(PREFIX, 0)
        self._eval_batches = 0
        self.pair_keys: dict[str, str] = {}
        """What the stored numbers of each split's pairs depend on (`PairsOnDisk.opponent_key`)."""
        self.rewards = TrainingRewards(self)
        self._tokens: int | Tensor = 0
        self._last_log = time.monotonic()
        stats = {split: value.as_dict() for split, value in self.task.pairs.stats.items()}
        # What the log up to the checkpoint shows was already reported. Steps after it are repeated, and so are theirs.
        self._watch = LogWatch(stats, self.task.directory.read_log())
        for shown in (ProgressCallback, PrinterCallback):  # progress.py replaces them
            self.remove_callback(shown)
        for callback in (*self.task.callbacks, OpponentScorer(self), self.rewards, HeldOutCheck(self)):
            self.add_callback(callback)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write SPIN's card; transformers' says "trained from scratch". Axolotl calls this, and any push to the hub."""
        if self.is_world_process_zero():
            self.task.write_card()

    # --- data --------------------------------------------------------------------------------

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """[R] log-probs of a batch's responses."""
        mask = batch.get("attention_mask")
        self._tokens = self._tokens + (batch["input_ids"].numel() if mask is None else mask.sum())
        return logps(model, batch, own_logits=self.layout.own_logits)

    @property
    def limits(self) -> Limits:
        """How much a micro-batch holds."""
        return Limits(self.args.per_device_train_batch_size, self.task.spin.tokens_per_micro_batch)

    def sizes(self, pairs: Dataset) -> Sizes:
        """Return the sizes of all pairs, grouped as this run groups them."""
        return pair_sizes(pairs, grouped=self.task.pairs.grouped)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the micro-batches of this rank: a random order with steps balanced by tokens, unless the
        configuration sets another order."""
        args, pairs = self.args, self.train_dataset
        sizes = self.sizes(pairs)
        ordered = args.curriculum_sampling or args.train_sampling_strategy != "random"
        seed = args.data_seed if args.data_seed is not None else args.seed
        sampler = StepSampler(
            SeededSampler(self._get_train_sampler(pairs), seed=seed)
            if ordered
            else PromptSampler(sizes.prompts, seed=seed),
            sizes,
            self.limits,
            accumulation=args.gradient_accumulation_steps,
            rank=args.process_index,
            ranks=args.world_size,
            balance=not ordered,
        )
        return DataLoaderShard(
            StepDataset(pairs, self.train_data_collator),
            device=args.device,
            batch_sampler=sampler,
            collate_fn=unchanged,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    # --- loss --------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Return the number of pairs in the step, which divides the sum of their losses."""
        return torch.tensor(batch_samples[0]["step_pairs"], device=device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return sum(super(SpinTrainer, self).floating_point_ops(batch) for batch in inputs["micro_batches"])

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for batch in inputs["micro_batches"]:
            super()._track_num_input_tokens(batch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward of an item's micro-batches; returns their summed loss."""
        loss = torch.zeros((), device=self.args.device)
        *earlier, last = inputs["micro_batches"] or [None]
        # In items that are not the last of a step, transformers has done the same already.
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        local = self._local_gradients if self.accelerator.sync_gradients and not each else lambda _: nullcontext()
        for batch in earlier:
            with local(model):
                loss += super().training_step(model, batch, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch) if last else loss

    @contextmanager
    def _local_gradients(self, model: nn.Module) -> Iterator[None]:
        """Accumulate gradients on each rank, without a sum over all ranks."""
        self.accelerator.sync_gradients = False  # DeepSpeed steps after a backward that synchronizes
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with nullcontext() if deepspeed else self.accelerator.no_sync(model):
            yield
        self.accelerator.sync_gradients = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the summed loss divided by the pairs in the global batch; in evaluation, the mean loss."""
        split = "train" if model.training else "eval"
        policy = self.logps(model, inputs)
        opponent, sides = self.opponent[split][inputs["responses"]], inputs["sides"][:, : inputs["counted"]]
        initial = inputs["initial"][: inputs["counted"]] if "initial" in inputs else None
        objective, lengths = self.task.spin.objective, inputs["lengths"]
        terms = spin_terms(policy, opponent, sides, objective, lengths=lengths, initial=initial)
        sums = metric_sums(terms, policy, lengths, sides, objective)
        kept = self._sums[split]
        self._sums[split] = sums if kept is None else kept + sums
        self._pairs[split] += len(terms.loss)
        if split == "train":
            rewards = torch.stack([terms.reward_real, terms.reward_synthetic], dim=1)
            self.rewards.add(inputs["pairs"][: inputs["counted"]], rewards)
        if split == "eval" or num_items_in_batch is None:
            loss = terms.loss.sum() / max(1, len(terms.loss))
        else:
            # Data parallelism averages gradients over the ranks; this turns the average into a sum.
            loss = terms.loss.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return only the loss: evaluation has no logits to gather."""
        inputs["counted"] = pairs_counted(
            len(self.eval_dataset),
            number=self._eval_batches,
            micro_batch=self.args.per_device_eval_batch_size,
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        self._eval_batches += 1
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # --- saving ------------------------------------------------------------------------------

    @exit_on_error
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            fix_mtimes(IterationDir(Path(self.args.output_dir)).checkpoints())
        with disk_errors(self.args.output_dir):
            self.rewards.save()
            super()._save_checkpoint(*args, **kwargs)

    @exit_on_error
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with disk_errors(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    # --- logging -----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each metric's mean since the last log, over all ranks."""
        entry: dict[str, float | None] = {"step": self.state.global_step, "epoch": self.state.epoch}
        # A rank whose last micro-batches did not count takes part in the sum over all ranks, too.
        if "loss" in logs and self._sums["train"] is not None:
            metrics, entry["pairs"], entry["tokens"] = self._drain("train")
            entry["seconds"] = time.monotonic() - self._last_log
            self.start_clock()
            logs |= metrics
        if self.is_world_process_zero():
            with open(self.task.directory.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry | logs) + "\n")
            for finding in self._watch.add(entry | logs):
                warn(str(finding))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Add the metrics of the held-out pairs; the loss is their mean whatever the batch sizes."""
        self._eval_batches = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics, *_ = self._drain("eval")
        output.metrics.update(metrics, **{f"{metric_key_prefix}_loss": metrics[PREFIX["eval"] + "loss"]})
        return output

    def start_clock(self) -> None:
        """Count seconds and tokens of training from now on."""
        self._last_log, self._tokens = time.monotonic(), 0

    def take_tokens(self) -> int:
        """Return how many tokens, without padding, the model has computed since the last call, over all ranks."""
        tokens = torch.as_tensor(self._tokens, device=self.args.device)
        self._tokens = 0
        return int(self.accelerator.reduce(tokens, "sum"))

    def _drain(self, split: str) -> tuple[dict[str, float], int, int]:
        """Return each metric's mean since the last call, the number of pairs, and that of tokens since `start_clock`,
        over all ranks."""
        sums = self._sums[split]
        assert sums is not None
        tokens = torch.as_tensor(self._tokens, dtype=sums.dtype, device=sums.device)
        packed = torch.cat([sums, sums.new_tensor([self._pairs[split]]), tokens[None]])
        *totals, pairs, tokens = self.accelerator.reduce(
            packed.double() if packed.device.type == "cpu" else packed, "sum"
        ).tolist()
        self._sums[split], self._pairs[split] = None, 0
        means = {PREFIX[split] + name: total / pairs for name, total in zip(METRICS, totals, strict=True)}
        return means, int(pairs), int(tokens)
