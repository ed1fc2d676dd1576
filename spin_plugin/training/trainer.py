"""SpinTrainer: forward, log-probs, loss and logging. Everything else is Axolotl's trainer."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from axolotl.core.trainers import AxolotlTrainer
from datasets import Dataset
from rich.progress import track
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from spin_plugin.console import SpinError, console, exit_on_error, say, warn
from spin_plugin.data.order import BalancedSampler, Sizes, pair_sizes, pairs_counted, steps_in_epoch
from spin_plugin.model.forward import disable_dropout, install, logps
from spin_plugin.model.layout import Pair, response_indices, split_into_tokens
from spin_plugin.model.probe import probe
from spin_plugin.model.select import Layout, choose_layout
from spin_plugin.objective.losses import spin_terms
from spin_plugin.objective.metrics import METRICS, metric_sums
from spin_plugin.opponent.scoring import fill, scoring_rounds, scoring_tokens, unscored
from spin_plugin.opponent.store import OpponentStore
from spin_plugin.run.directory import IterationDir
from spin_plugin.training.precision import keep_outputs_in_fp32, require_masters
from spin_plugin.training.saving import disk_errors, fix_mtimes
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
        for callback in (_ScoreBeforeFirstStep(self), *self.task.callbacks):
            self.add_callback(callback)

    # --- log-probs ---------------------------------------------------------------------------

    def choose_layout(self, model: nn.Module) -> None:
        """Choose the layout of the pairs before the first of them is scored."""

        def pair(index: int) -> Pair:
            row = self.train_dataset[index]
            return Pair(row["prompt"], row["real"], row["synthetic"])

        grouped = self.task.pairs.grouped
        with self.compute_loss_context_manager():
            self.layout = choose_layout(
                model,
                probe(self._sizes(self.train_dataset).tokens, pair, self.args.max_seq_length, grouped=grouped),
                requested=self.task.spin.shared_prefix != "off",
                pad_token_id=self.train_data_collator.pad_token_id,
                grouped=grouped,
                device=self.args.device,
                gather=lambda found: gather_object([found]),
            )
        if reason := self.layout.padded_reason:
            if self.task.spin.shared_prefix == "on":
                raise SpinError(f"spin.shared_prefix: cannot be on: {reason}; use auto")
            if self.is_world_process_zero():
                say(f"pairs use the padded layout instead of shared prefixes: {reason}")
        for collator in (self.train_data_collator, self.eval_data_collator):
            collator.shared_prefix = self.layout.shared_prefix

    def _logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """[R] log-probs of a batch's responses."""
        return logps(model, batch, own_logits=self.layout.own_logits)

    def load_opponent(self, model: nn.Module) -> None:
        """Load the stored opponent log-probs; compute and store missing ones with the model, still the opponent."""
        self.choose_layout(model)
        splits = {"train": self.train_dataset, "eval": self.eval_dataset}
        for split, pairs in splits.items():
            if pairs is not None:
                store = OpponentStore(
                    self.task.pairs.opponent_files[split], 2 * len(pairs), self.task.pairs.opponent_key(split)
                )
                self.opponent[split] = self._load_stored(store)
                if self.opponent[split].isnan().any():
                    self._score(model, pairs, split, store)
        if not self.state.global_step:  # later the policy is no longer the opponent
            self.task.check_agreement(partial(self._token_logps, model))

    @torch.no_grad()
    def _token_logps(self, model: nn.Module, pairs: list[dict[str, Any]]) -> list[Tensor]:
        """Token log-probs of each pair's synthetic response; each rank scores all, because the model can be sharded."""
        found, training = [], model.training
        size = self.args.per_device_train_batch_size
        model.eval()
        for start in range(0, len(pairs), size):
            batch = self._prepare_inputs(self.train_data_collator(pairs[start : start + size]))
            with self.compute_loss_context_manager():
                responses = self._logps(model, split_into_tokens(batch)).split(batch["lengths"].tolist())
            found += [responses[number] for number in batch["sides"][1].tolist()]
        model.train(training)
        return found

    def _load_stored(self, store: OpponentStore) -> Tensor:
        """Broadcast the values that the main process reads: all ranks must agree on what is left to compute."""
        first = self.accelerator.is_main_process
        values = store.load() if first else torch.empty(store.responses)
        values = broadcast(values.to(self.args.device))
        if self.state.global_step and values.isnan().any():
            raise SpinError(
                f"{store.file}: missing, damaged or incomplete, and the policy is no longer the opponent; "
                f"delete the checkpoints in {self.args.output_dir} to train this iteration from scratch"
            )
        return values

    @torch.no_grad()
    def _score(self, model: nn.Module, pairs: Dataset, split: str, store: OpponentStore) -> None:
        """Compute and store the missing log-probs, each rank its share."""
        accelerator, training = self.accelerator, model.training

        def score(indices: Tensor) -> tuple[Tensor, Tensor]:
            share = indices[accelerator.process_index]
            batch = self._prepare_inputs(self.train_data_collator([pairs[index] for index in share.tolist()]))
            with self.compute_loss_context_manager():
                values = self._logps(model, batch)[batch["sides"]]  # every pair stores both of its responses
            stored = response_indices(share).to(values.device)
            responses, gathered = accelerator.gather((stored.flatten(), values.flatten()))
            return responses, gathered

        train = self._sizes(self.train_dataset).tokens
        tokens = scoring_tokens(train, micro_batch=self.args.per_device_train_batch_size)
        rounds = scoring_rounds(self._sizes(pairs), tokens=tokens, world=accelerator.num_processes)
        left = unscored(rounds, self.opponent[split])
        model.eval()
        tracked = self._with_progress(left, f"opponent's log-probs ({split})")
        fill(self.opponent[split], store, tracked, score, write=accelerator.is_main_process)
        model.train(training)
        if accelerator.is_main_process:
            say(f"opponent's log-probs of {len(pairs):,} {split} pairs stored")
        accelerator.wait_for_everyone()

    def _sizes(self, pairs: Dataset) -> Sizes:
        return pair_sizes(pairs, grouped=self.task.pairs.grouped)

    def _with_progress(self, rounds: list[Tensor], title: str) -> Iterable[Tensor]:
        shown = console.is_terminal and self.accelerator.is_main_process
        return track(rounds, title, total=len(rounds), console=console, transient=True, disable=not shown)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Random order with steps balanced by tokens, unless the configuration sets another order."""
        pairs = self.train_dataset if train_dataset is None else train_dataset
        if self.args.curriculum_sampling or self.args.train_sampling_strategy != "random":
            if self.task.pairs.grouped and self.is_world_process_zero():
                warn("spin.group_prompts: has no effect in this order; remove curriculum_sampling or group_by_length")
            return super()._get_train_sampler(pairs)
        return BalancedSampler(
            self._sizes(pairs),
            micro_batch=self.args.per_device_train_batch_size,
            groups=self.args.gradient_accumulation_steps * self.args.world_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    # --- loss --------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Return the number of pairs in the global batch, which divides the sum of their losses."""
        args, total = self.args, len(self.train_dataset)
        batch = {"micro_batch": args.per_device_train_batch_size, "ranks": args.world_size}
        accumulation = args.gradient_accumulation_steps
        first = self.state.global_step % steps_in_epoch(total, accumulation=accumulation, **batch) * accumulation
        for number, inputs in enumerate(batch_samples, first):
            inputs["counted"] = pairs_counted(total, number=number, rank=args.process_index, **batch)
        pairs = torch.tensor(sum(inputs["counted"] for inputs in batch_samples), device=device)
        return self.accelerator.reduce(pairs, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the summed loss divided by the pairs in the global batch; in evaluation, the mean loss."""
        split = "train" if model.training else "eval"
        policy = self._logps(model, inputs)
        opponent, sides = self.opponent[split][inputs["responses"]], inputs["sides"][:, : inputs["counted"]]
        terms = spin_terms(policy, opponent, sides, beta=self.task.spin.beta, loss=self.task.spin.loss_type)
        sums = metric_sums(terms, policy, inputs["lengths"], sides, loss=self.task.spin.loss_type)
        kept = self._sums[split]
        self._sums[split] = sums if kept is None else kept + sums
        self._pairs[split] += len(terms.loss)
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
            super()._save_checkpoint(*args, **kwargs)

    @exit_on_error
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with disk_errors(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    # --- logging -----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each metric's mean since the last log, over all ranks."""
        entry: dict[str, float | None] = {"step": self.state.global_step, "epoch": self.state.epoch}
        # A rank whose last micro-batches only held repeated pairs takes part in the sum over all ranks, too.
        if "loss" in logs and self._sums["train"] is not None:
            metrics, entry["pairs"] = self._drain("train")
            logs |= metrics
        if self.is_world_process_zero():
            with open(self.task.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry | logs) + "\n")
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Add the metrics of the held-out pairs; the loss is their mean whatever the batch sizes."""
        self._eval_batches = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics, _ = self._drain("eval")
        output.metrics.update(metrics, **{f"{metric_key_prefix}_loss": metrics[PREFIX["eval"] + "loss"]})
        return output

    def _drain(self, split: str) -> tuple[dict[str, float], int]:
        """Return each metric's mean since the last call and the number of pairs, over all ranks."""
        sums = self._sums[split]
        assert sums is not None
        packed = torch.cat([sums, sums.new_tensor([self._pairs[split]])])
        *totals, pairs = self.accelerator.reduce(
            packed.double() if packed.device.type == "cpu" else packed, "sum"
        ).tolist()
        self._sums[split], self._pairs[split] = None, 0
        return {PREFIX[split] + name: total / pairs for name, total in zip(METRICS, totals, strict=True)}, int(pairs)


class _ScoreBeforeFirstStep(TrainerCallback):
    """Scores the pairs after the model is wrapped for training and before its first step."""

    def __init__(self, trainer: SpinTrainer) -> None:
        self.trainer = trainer

    @exit_on_error
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_masters(self.trainer.task.training, kwargs["optimizer"].param_groups)
        self.trainer.load_opponent(self.trainer.model_wrapped)
