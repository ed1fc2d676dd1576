"""Messages at the start of an iteration."""

from spin_plugin.config.lower import Lowered
from spin_plugin.config.specs import OpponentSpec, TrainingSpec
from spin_plugin.console import note, say, warn

# Higher values log a warning. The paper's full fine-tune of a 7B model uses 5e-7.
HIGHEST_LEARNING_RATE = {"full": 5e-6, "adapter": 1e-4}


def announce(lowered: Lowered, opponent: OpponentSpec, training: TrainingSpec) -> None:
    """Print the iteration, its opponent, and anything about the configuration that may be unexpected."""
    number, spin = lowered.iteration, lowered.spin
    adapter = f" with the adapter {opponent.adapter}" if opponent.adapter else ""
    model = f"{lowered.config['base_model']}{adapter}" if number == 0 else f"the model of iteration {number - 1}"
    note(f"iteration {number} of 0…{spin.iterations - 1}, opponent: {model}")
    if number == 0 and (mixed := min(spin.history_iterations, spin.iterations - 1)):
        note(
            f"later iterations also train on the responses of up to {mixed} previous iterations and take up to "
            f"{1 + mixed} times as long (spin.history_iterations: {spin.history_iterations}; 0 disables this)"
        )
    if lowered.unused_vllm_keys:
        keys = ", ".join(f"vllm.{key}" for key in lowered.unused_vllm_keys)
        say(f"ignored: {keys}: SPIN runs vLLM itself and needs no server")
    if number == 0 or "learning_rate" in spin.axolotl_overrides(number):
        warn_of_learning_rate(training.learning_rate, adapter=training.adapter)


def warn_of_learning_rate(learning_rate: float, *, adapter: bool) -> None:
    """Warn of a learning rate with which most runs collapse."""
    highest = HIGHEST_LEARNING_RATE["adapter" if adapter else "full"]
    if learning_rate > highest:
        warn(
            f"learning_rate: {learning_rate:g} is high for SPIN; most runs collapse above {highest:g} "
            f"({'with an adapter' if adapter else 'full fine-tune'}); use 1/40 to 1/10 of SFT's learning rate"
        )


def warn_of_warmup(warmup: int, steps: int, learning_rate: float) -> None:
    """Warn if every step of an iteration is warm-up: schedules start at 0, so the model would barely train."""
    if 0 < warmup >= steps:
        warn(
            f"all {steps} steps of the iteration are warm-up, so the learning rate never reaches {learning_rate}; "
            "lower warmup_steps or warmup_ratio, or use smaller batches or more epochs"
        )
