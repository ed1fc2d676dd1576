"""The iterations as they will be run: pairs, steps, learning rate and tokens of each."""

from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

from spin_plugin.args import SpinArgs
from spin_plugin.config.announce import warn_of_learning_rate, warn_of_warmup
from spin_plugin.config.specs import TrainingSpec
from spin_plugin.console import say
from spin_plugin.data.steps import optimizer_steps
from spin_plugin.doctor.data import Lengths
from spin_plugin.doctor.settings import Settings


@dataclass(frozen=True)
class Planned:
    """One iteration."""

    iteration: int
    pairs: int
    """At most: pairs that cannot teach are dropped."""
    steps: int
    warmup_steps: int
    learning_rate: float
    beta: float
    loss: str
    generated: int
    """Tokens of the responses."""
    scored: int
    """Tokens of the opponent's pass."""
    trained: int
    """Tokens of all steps."""
    overrides: dict[str, Any]
    """The schedule's entry."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(settings: Settings, found: Lengths, synthetic: float) -> list[Planned]:
    """Return every iteration of the run as it will be, and warn of what is unusual.

    Args:
        settings: the configuration.
        found: prompts and real responses.
        synthetic: the mean length of synthetic responses in tokens.
    """
    spin = settings.lowered.spin
    planned = [_planned(settings, found, synthetic, number) for number in range(spin.iterations)]
    before = None
    for one in planned:
        if one.learning_rate != before:
            warn_of_learning_rate(one.learning_rate, adapter=settings.training.adapter)
        before = one.learning_rate
        warn_of_warmup(one.warmup_steps, one.steps, one.learning_rate)
    left = planned[settings.lowered.iteration :]
    generated, trained = (sum(getattr(one, name) for one in left) for name in ("generated", "trained"))
    say(
        f"{sum(one.steps for one in left):,} steps of {_pairs_per_step(settings.training)} pairs in "
        f"{iterations(len(left))}; about {generated:,} tokens to generate and {trained:,} to train"
    )
    return planned


def iterations(number: int) -> str:
    """Return a number of iterations in words."""
    return f"{number} iteration{'' if number == 1 else 's'}"


def tokens_per_epoch(prompt: float, real: float, synthetic: float, pairs: int, *, grouped: bool) -> float:
    """Return the tokens that an epoch computes for one prompt (docs/guide.md, "What an iteration costs").

    Args:
        prompt, real, synthetic: lengths in tokens.
        pairs: pairs of the prompt.
        grouped: prompt and real response are computed once per prompt, not once per pair.
    """
    return prompt + real + pairs * synthetic if grouped else pairs * (prompt + real + synthetic)


def warmup_steps(steps: int, warmup: float | None, ratio: float | None) -> int:
    """Return the warm-up steps as Axolotl and transformers derive them.

    Args:
        steps: optimizer steps of the iteration.
        warmup: `warmup_steps`.
        ratio: `warmup_ratio`.
    """
    from axolotl.core.builders.base import TrainerBuilderBase
    from transformers import TrainingArguments

    own: Any = SimpleNamespace(cfg=SimpleNamespace(warmup_steps=warmup, warmup_ratio=ratio, logging_steps=1))
    arguments: dict[str, Any] = {}
    TrainerBuilderBase._configure_warmup_and_logging(own, steps, arguments)
    steps_of: Any = TrainingArguments.get_warmup_steps
    return int(steps_of(SimpleNamespace(**arguments), steps))


def _pairs_per_step(training: TrainingSpec) -> int:
    return training.micro_batch_size * training.gradient_accumulation_steps * training.world_size


def _planned(settings: Settings, found: Lengths, synthetic: float, number: int) -> Planned:
    whole, spin = settings.lowered.spin, settings.lowered.spin.at(number)

    def value(key: str) -> Any:
        """The value of a key of Axolotl in this iteration; the validated one is the next iteration's."""
        written = whole.axolotl_overrides(number).get(key, settings.lowered.config.get(key))
        return settings.cfg.get(key) if written is None else written

    training = replace(
        settings.training,
        micro_batch_size=int(value("micro_batch_size")),
        gradient_accumulation_steps=int(value("gradient_accumulation_steps")),
        num_epochs=float(value("num_epochs")),
        max_steps=int(value("max_steps") or 0) or None,
        learning_rate=float(value("learning_rate")),
    )
    prompts = min(found.prompts, spin.num_prompts or found.prompts)
    per_prompt = sum(_samples(whole, source) for source in range(max(0, number - spin.history_iterations), number + 1))
    pairs = prompts * per_prompt
    steps = optimizer_steps(training, pairs)
    means, grouped = (float(found.prompt.mean()), float(found.real.mean())), spin.group_prompts == "auto"
    epoch = prompts * tokens_per_epoch(*means, synthetic, per_prompt, grouped=grouped)
    warmup, ratio = value("warmup_steps"), value("warmup_ratio")
    return Planned(
        iteration=number,
        pairs=pairs,
        steps=steps,
        warmup_steps=warmup_steps(steps, *(None if one is None else float(one) for one in (warmup, ratio))),
        learning_rate=training.learning_rate,
        beta=spin.beta,
        loss=spin.loss_type,
        generated=round((prompts + found.held_out) * _samples(whole, number) * synthetic),
        scored=round(epoch),
        trained=round(epoch * steps * _pairs_per_step(training) / max(1, pairs)),
        overrides=whole.schedule[number] if whole.schedule else {},
    )


def _samples(spin: SpinArgs, number: int) -> int:
    return spin.at(number).generation.num_generations
