"""What an iteration passes to its trainer, which Axolotl constructs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from spin_plugin.args import SpinArgs
from spin_plugin.config.specs import TrainingSpec
from spin_plugin.run.directory import RunDir
from spin_plugin.run.iteration import IterationDir
from spin_plugin.training.prepare import PairsOnDisk


@dataclass(frozen=True)
class TrainingTask:
    """What an iteration passes to its trainer."""

    spin: SpinArgs
    """The `spin:` block for this iteration."""
    training: TrainingSpec
    pairs: PairsOnDisk
    run: RunDir
    number: int
    """The iteration."""
    check_agreement: Callable[[Callable[[list[dict[str, Any]]], list[Tensor]]], None]
    """Compares token log-probs of the policy, computed by the given function, with vLLM's."""
    record: Callable[[str, Any], None]
    """Adds a result, by name, to the iteration's entry in run.json; called on every rank."""
    write_card: Callable[[], None]
    """Writes the model card, once the model is trained."""
    callbacks: tuple[TrainerCallback, ...] = ()

    @property
    def directory(self) -> IterationDir:
        """The iteration's directory."""
        return self.run.iteration(self.number)
