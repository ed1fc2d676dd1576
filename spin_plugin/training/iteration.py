"""The iteration that this command runs, from locking the run directory to the closing message."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from spin_plugin import __version__
from spin_plugin.config.announce import warn_of_warmup
from spin_plugin.config.claim import require_own
from spin_plugin.config.lower import Lowered
from spin_plugin.config.specs import LmEvalSpec, read_opponent, read_training
from spin_plugin.console import SpinError, say, warn
from spin_plugin.data.steps import optimizer_steps
from spin_plugin.generation.shards import Shards
from spin_plugin.model.layout import PairCollator
from spin_plugin.opponent.agreement import comparable, distance, require_agreement
from spin_plugin.opponent.hub import pin
from spin_plugin.opponent.merge import merge
from spin_plugin.opponent.weights import require_finite
from spin_plugin.report.write import try_report
from spin_plugin.run.atomic import flush, remove_atomically, write_atomically
from spin_plugin.run.checkpoint import check_model_dir, incomplete_reason
from spin_plugin.run.iteration import IterationDir
from spin_plugin.run.processes import Ranks, exit_with_launcher, rank, shared_start_id
from spin_plugin.run.state import RunState
from spin_plugin.run.stop import end_if_stopped, read_stop
from spin_plugin.training.finish import announce_finished, complete_finished, finish_iteration, write_card
from spin_plugin.training.judged import require_loadable
from spin_plugin.training.measured import add_measured, measured
from spin_plugin.training.precision import (
    keep_4bit_weights_trainable,
    keep_masters,
    needs_no_masters,
    require_no_lost_updates,
)
from spin_plugin.training.prepare import PairsOnDisk, open_pairs, prepare_iteration
from spin_plugin.training.saving import store_in_16_bits
from spin_plugin.training.trackers import Trackers


class Iteration:
    """State that the plugin's hooks share while one iteration is prepared, trained and finished."""

    def __init__(self, cfg: Any, lowered: Lowered, lm_eval: LmEvalSpec | None, trackers: Trackers) -> None:
        self.cfg, self.lowered, self.first = cfg, lowered, rank() == 0
        self.lm_eval, self.trackers = lm_eval, trackers
        self.spin = lowered.spin.at(lowered.iteration)
        self.training = read_training(cfg)
        self.directory: IterationDir = lowered.run.iteration(lowered.iteration)
        self.pairs: PairsOnDisk
        self.ranks: Ranks
        self.lock = ExitStack()
        self.fp32_tensors: list[str] = []
        """Names of tensors that the architecture keeps in fp32 whatever the model's dtype."""
        self.outcome: dict[str, Any] = {}
        """What training and its checks add to the iteration's entry in run.json."""

    # --- before training ---------------------------------------------------------------------

    def prepare(self, *, for_training: bool) -> None:
        """Lock the run directory, build the pairs and point Axolotl at the iteration's directory.

        Raises:
            SpinError: the directory is in use or belongs to another configuration, or the data is unusable.
        """
        run, number = self.lowered.run, self.lowered.iteration
        require_no_lost_updates(self.training)
        exit_with_launcher()
        self.ranks = Ranks(run, shared_start_id())
        self.ranks.join()
        if self.first:
            self.lock.enter_context(run.locked())
            self._claim()
            self.ranks.remove_earlier_starts()
            complete_finished(run, self.lm_eval, self.trackers)
            with self._released_at_the_end_of_the_run():
                end_if_stopped(run, self.spin)  # by scores that were added just now
            if not run.holds_responses():
                require_loadable(self.lowered.spin.judges)
            with self._released_at_the_end_of_the_run():
                self.pairs = prepare_iteration(self.cfg, run, self.spin, number)
            if for_training:
                self._remove_incomplete_checkpoints()  # before the other ranks look for a checkpoint
            self.ranks.signal_prepared()
        else:
            self.ranks.wait_for_prepared()
            with self._released_at_the_end_of_the_run():
                end_if_stopped(run, self.spin)
            self.pairs = open_pairs(self.directory)
            pin(self.cfg, self.pairs.revision)
        self.cfg.output_dir = str(self.directory.path)
        if self.pairs.eval is None:
            self.cfg.val_set_size, self.cfg.test_datasets = 0, None
        if for_training:
            self._resume()
        else:
            self.ranks.leave()
            self.lock.close()

    @contextmanager
    def _released_at_the_end_of_the_run(self) -> Iterator[None]:
        """Let every rank exit by itself where new scores have ended the run, and show them."""
        try:
            yield
        except (SpinError, SystemExit):
            if read_stop(self.lowered.run, self.spin):
                self.ranks.signal_prepared()
                self.ranks.leave()
                if self.first:
                    self.trackers.send_results()
                self.report()
            raise

    def _claim(self) -> None:
        """Write run.json on the first start; refuse another configuration on later ones."""
        run = self.lowered.run
        state = require_own(run, self.lowered.config, self.lowered.iteration)
        if state is None:
            run.write_state(RunState(self.lowered.config, [], __version__))
            return
        if not state.finished and not run.holds_responses():
            remove_atomically(run.real)  # no responses yet, so configuration and data may change
        run.write_state(RunState(self.lowered.config, state.finished, state.version))

    def _remove_incomplete_checkpoints(self) -> None:
        """Remove checkpoints whose save was interrupted, so that training can resume from every remaining one."""
        for checkpoint in self.directory.checkpoints():
            if reason := incomplete_reason(checkpoint):
                warn(f"{checkpoint.name}: incomplete, so it is removed: {reason}")
                remove_atomically(checkpoint)

    def _resume(self) -> None:
        """Resume from the newest checkpoint and drop what was logged after it."""
        checkpoint = next(reversed(self.directory.checkpoints()), None)
        self.cfg.auto_resume_from_checkpoints = False
        self.cfg.resume_from_checkpoint = str(checkpoint) if checkpoint else None
        if not self.first:
            return
        self.trackers.begin(self.lowered.iteration)
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
        # Training writes its summary again at the end.
        kept = [entry for entry in self.directory.read_log() if entry["step"] <= step and "train_runtime" not in entry]
        write_atomically(self.directory.metrics, "".join(json.dumps(entry) + "\n" for entry in kept))
        if checkpoint:
            say(f"iteration {self.lowered.iteration}: resuming at step {step}")

    @property
    def evaluated(self) -> Dataset | None:
        """The pairs that Axolotl evaluates; those held out by `spin.held_out` are only for our check after training."""
        return self.pairs.eval if self.cfg.val_set_size or self.cfg.test_datasets else None

    @property
    def steps(self) -> int:
        """Optimizer steps in the iteration."""
        return optimizer_steps(self.training, len(self.pairs.train))

    # --- training ----------------------------------------------------------------------------

    def record_fp32_tensors(self, model: Any) -> None:
        """Record which tensors of a 16-bit model are fp32, before Axolotl and the masters change dtypes."""
        if self.training.in_16_bits and not self.training.deepspeed:
            self.fp32_tensors = [name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32]

    def keep_masters(self, model: Any) -> None:
        """Convert the trained weights to fp32 and keep 4-bit ones trainable, before anything wraps the model."""
        keep_masters(self.training, model)
        keep_4bit_weights_trainable(model)

    def collator_class_and_arguments(self) -> tuple[type[PairCollator], dict[str, Any]]:
        return PairCollator, {"grouped": self.pairs.grouped}

    def training_arguments(self) -> dict[str, Any]:
        """Keep the pairs' columns, which no model's forward takes; skip the NaN filter, which syncs with the GPU."""
        ours: dict[str, Any] = {"remove_unused_columns": False, "label_names": [], "logging_nan_inf_filter": False}
        # without a GPU transformers allows bf16 only if the CPU is requested explicitly
        ours |= self.trackers.training_arguments(self.lowered.iteration)
        return ours | ({"use_cpu": True} if self.cfg.bf16 and not torch.accelerator.is_available() else {})

    def trainer_class(self) -> type[Any]:
        """Return the trainer class for this iteration."""
        from spin_plugin.training.precision import SyncRoundingNoise
        from spin_plugin.training.progress import TrainingProgress
        from spin_plugin.training.rounding import RoundMasters
        from spin_plugin.training.task import TrainingTask
        from spin_plugin.training.trainer import trainer_for

        callbacks: list[Any] = [TrainingProgress(self.lowered.iteration)]
        if self.training.dtype == "bfloat16":
            callbacks.append(
                RoundMasters(
                    self.fp32_tensors,
                    everywhere=bool(self.training.fsdp or self.training.deepspeed),
                    iteration=self.lowered.iteration,
                    adapter=bool(self.training.adapter),
                )
            )
        if needs_no_masters(self.training):
            callbacks.append(SyncRoundingNoise())
        task = TrainingTask(
            self.spin,
            self.training,
            self.pairs,
            self.lowered.run,
            self.lowered.iteration,
            self._check_agreement,
            self.outcome.__setitem__,
            partial(write_card, self.lowered.run, self.lowered.iteration, self.pairs.stats, self.outcome),
            tuple(callbacks),
        )
        return trainer_for(task)

    def check_trainer(self, trainer: Any) -> None:
        """Check the trainer that Axolotl has constructed."""
        if self.first:
            self.trackers.attach(trainer, self.lowered.iteration)
            warn_of_warmup(trainer.args.get_warmup_steps(self.steps), self.steps, self.training.learning_rate)

    def _check_agreement(self, policy: Callable[[list[dict[str, Any]]], list[Tensor]]) -> None:
        """Compare the policy's token log-probs of some responses, before its first step, with vLLM's.

        Every rank must call it: it calls `policy` with the same pairs on all of them.
        """
        number, shards = self.lowered.iteration, Shards(self.directory.synthetic)
        pairs, vllm_logps = comparable(shards.responses(), self.pairs.train, number)
        logps = policy(pairs)
        precision = {(shards.manifest() or {}).get("engine", {}).get("dtype"), self.training.dtype}
        opponent = read_opponent(self.cfg)
        if self.first:
            found = distance(vllm_logps, logps)
            require_agreement(
                found,
                number,
                # on a GPU fp32 can mean TF32, here or in vLLM
                exact={name.removeprefix("torch.") for name in precision if name} == {"float32"}
                and not any(values.is_cuda for values in logps),
                quantized=opponent.quantized or opponent.fp8,
            )
            if found:
                add_measured(self.directory.measured, "agreement", found._asdict())

    # --- after training ----------------------------------------------------------------------

    def finish(self) -> None:
        """Check the saved model, then mark the iteration as finished in run.json, which is written last."""
        run, number = self.lowered.run, self.lowered.iteration
        if not self.first:
            self.ranks.signal_saved()
            return self.ranks.leave()
        self.ranks.wait_for_saved()
        self.ranks.leave()
        self._require_no_watchdog()
        files = check_model_dir(self.directory.path, adapter=self.training.adapter)
        if self.training.full_in_16_bits:
            store_in_16_bits(self.directory.path, files, getattr(torch, self.training.dtype), self.fp32_tensors)
        require_finite(files, run.weights)
        flush(self.directory.path.iterdir())
        if self.training.adapter and self.spin.adapter_chain == "merge":
            merge(read_opponent(self.cfg), self.directory.path, self.directory.merged, tokenizer=self.directory.path)
        how = measured(self.directory, self.training, read_opponent(self.cfg))
        findings = finish_iteration(run, number, self.lowered.spin, self.pairs.stats, how | self.outcome)
        complete_finished(run, self.lm_eval, self.trackers)
        self.lock.close()
        announce_finished(run, number, self.lowered.spin)
        for finding in findings:
            warn(str(finding))
        self.report()

    def report(self) -> None:
        """Write the report of the run as it is."""
        if self.first:
            try_report(self.lowered.run, self.lowered.spin)

    def _require_no_watchdog(self) -> None:
        """Refuse training that Axolotl's loss watchdog stopped, which otherwise looks complete."""
        step = max((entry["step"] for entry in self.directory.read_log()), default=0)
        if self.training.loss_watchdog and step < self.steps:
            raise SpinError(
                f"loss_watchdog_threshold: training stopped at step {step} of {self.steps}; lower the learning_rate "
                "in spin.schedule and remove the iteration with `axolotl spin reset`"
            )
