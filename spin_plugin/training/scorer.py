"""Before the first step: choose the layout of the pairs, score the opponent and compare it with vLLM.

`score_pairs` also scores the trained model (decline.py).
"""

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from datasets import Dataset
from rich.progress import track
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin_plugin.console import SpinError, console, exit_on_error, note, say
from spin_plugin.data.pairs import JUDGE_METRIC
from spin_plugin.model.layout import Pair, response_indices, split_into_tokens
from spin_plugin.model.probe import probe
from spin_plugin.model.select import choose_layout
from spin_plugin.opponent.scoring import fill, scoring_rounds, scoring_tokens, unscored
from spin_plugin.opponent.store import OpponentStore
from spin_plugin.training.measured import add_measured
from spin_plugin.training.precision import require_masters


class OpponentScorer(TrainerCallback):
    """Fills `trainer.layout` and `trainer.opponent` once the model is wrapped for training."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer  # a SpinTrainer, whose module imports this one

    @exit_on_error
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, model = self.trainer, self.trainer.model_wrapped
        require_masters(trainer.task.training, kwargs["optimizer"].param_groups)
        self._choose_layout(model)
        self._load_opponent(model)
        if not state.global_step:  # later the policy is no longer the opponent
            self._log_judge()
            trainer.task.check_agreement(partial(self._token_logps, model))
        trainer.start_clock()

    def _log_judge(self) -> None:
        """Log the judge's mean score of the opponent's held-out responses."""
        judge = self.trainer.task.pairs.stats["eval"].judge
        if judge and judge.judged:
            self.trainer.log({JUDGE_METRIC: judge.mean})

    def _choose_layout(self, model: nn.Module) -> None:
        """Choose the layout of the pairs before the first of them is scored."""
        trainer = self.trainer
        pairs, grouped = trainer.train_dataset, trainer.task.pairs.grouped

        def pair(index: int) -> Pair:
            return Pair.of(pairs[index])

        with trainer.compute_loss_context_manager():
            trainer.layout = choose_layout(
                model,
                probe(trainer.sizes(pairs).tokens, pair, trainer.args.max_seq_length, grouped=grouped),
                requested=trainer.task.spin.shared_prefix != "off",
                pad_token_id=trainer.train_data_collator.pad_token_id,
                grouped=grouped,
                device=trainer.args.device,
                gather=lambda found: gather_object([found]),
            )
        if reason := trainer.layout.padded_reason:
            if trainer.task.spin.shared_prefix == "on":
                raise SpinError(f"spin.shared_prefix: cannot be on: {reason}; use auto")
            if trainer.is_world_process_zero():
                say(f"pairs use the padded layout instead of shared prefixes: {reason}")
        for collator in (trainer.train_data_collator, trainer.eval_data_collator):
            collator.shared_prefix = trainer.layout.shared_prefix

    def _load_opponent(self, model: nn.Module) -> None:
        """Load the stored opponent log-probs; compute and store missing ones with the model, still the opponent."""
        trainer, found = self.trainer, self.trainer.task.pairs
        started, scored = time.monotonic(), False
        trainer.take_tokens()  # not those of choosing the layout
        for split, pairs in {"train": trainer.train_dataset, "eval": found.eval}.items():
            if pairs is not None:
                trainer.pair_keys[split] = found.opponent_key(split)
                store = OpponentStore(found.opponent_files[split], 2 * len(pairs), trainer.pair_keys[split])
                trainer.opponent[split] = self._load_stored(store)
                if trainer.opponent[split].isnan().any():
                    scored = True
                    title = f"opponent's log-probs ({split})"
                    score_pairs(trainer, model, pairs, trainer.opponent[split], title=title, store=store)
                    if trainer.is_world_process_zero():
                        said = f"opponent's log-probs of {len(pairs):,} {split} pairs stored"
                        (say if split == "train" else note)(said)
                    trainer.accelerator.wait_for_everyone()
        if scored:
            stage = {"seconds": time.monotonic() - started, "tokens": trainer.take_tokens()}
            if trainer.is_world_process_zero():
                add_measured(trainer.task.directory.measured, "score", stage)

    @torch.no_grad()
    def _token_logps(self, model: nn.Module, pairs: list[dict[str, Any]]) -> list[Tensor]:
        """Token log-probs of each pair's synthetic response; each rank scores all, because the model can be sharded."""
        trainer = self.trainer
        lengths = trainer.sizes(trainer.train_dataset).tokens
        size = max(1, scoring_tokens(lengths, trainer.limits) // int(lengths.max()))
        found, training = [], model.training
        model.eval()
        for start in range(0, len(pairs), size):
            batch = trainer._prepare_inputs(trainer.train_data_collator(pairs[start : start + size]))
            with trainer.compute_loss_context_manager():
                responses = trainer.logps(model, split_into_tokens(batch)).split(batch["lengths"].tolist())
            found += [responses[number] for number in batch["sides"][1].tolist()]
        model.train(training)
        return found

    def _load_stored(self, store: OpponentStore) -> Tensor:
        """Broadcast the values that the main process reads: all ranks must agree on what is left to compute."""
        trainer = self.trainer
        first = trainer.accelerator.is_main_process
        values = store.load() if first else torch.empty(store.responses)
        values = broadcast(values.to(trainer.args.device))
        if trainer.state.global_step and values.isnan().any():
            raise SpinError(
                f"{store.file}: missing, damaged or incomplete, and the policy is no longer the opponent; "
                f"delete the checkpoints in {trainer.args.output_dir} to train this iteration from scratch"
            )
        return values


@torch.no_grad()
def score_pairs(
    trainer: Any,
    model: nn.Module,
    pairs: Dataset,
    values: Tensor,
    *,
    title: str,
    store: OpponentStore | None = None,
) -> None:
    """Compute a model's log-probs of both responses of every pair, each rank its share; all ranks must call it.

    Args:
        trainer: a SpinTrainer whose layout is chosen.
        model: as wrapped for training.
        pairs: N rows of `data.table.PAIR_SCHEMA`.
        values: [2N], filled in place where NaN.
        title: of the progress bar.
        store: where the main process stores the values of the opponent; they must then be finite.
    """
    accelerator, training = trainer.accelerator, model.training
    sizes = trainer.sizes(pairs)
    if "initial" in pairs.column_names:  # no loss compares them with the opponent
        pairs = pairs.remove_columns("initial")

    def score(indices: Tensor) -> tuple[Tensor, Tensor]:
        share = indices[accelerator.process_index]
        batch = trainer._prepare_inputs(trainer.train_data_collator([pairs[index] for index in share.tolist()]))
        with trainer.compute_loss_context_manager():
            scored = trainer.logps(model, batch)[batch["sides"]]  # every pair stores both of its responses
        stored = response_indices(share).to(scored.device)
        responses, gathered = accelerator.gather((stored.flatten(), scored.flatten()))
        return responses, gathered

    lengths = trainer.sizes(trainer.train_dataset).tokens
    tokens = scoring_tokens(lengths, trainer.limits)
    rounds = scoring_rounds(sizes, tokens=tokens, world=accelerator.num_processes)
    tracked = _with_progress(trainer, unscored(rounds, values), title)
    model.eval()
    if store:
        fill(values, store, tracked, score, write=accelerator.is_main_process)
    else:
        for indices in tracked:
            responses, logps = score(indices)
            values[responses] = logps.float()
    model.train(training)


def _with_progress(trainer: Any, rounds: list[Tensor], title: str) -> Iterable[Tensor]:
    shown = console.is_terminal and trainer.accelerator.is_main_process
    return track(rounds, title, total=len(rounds), console=console, transient=True, disable=not shown)
