"""The values of an iteration in the table: what each is called, where run.json has it, what it means."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from spin_plugin.objective.decline import CHECKS, CONFIDENCE
from spin_plugin.objective.metrics import METRICS
from spin_plugin.report.chart import number
from spin_plugin.run.overview import newest_stats

NBSP = "\u00a0"

Value = float | str | None
Entry = Mapping[str, Any]


class Measure(NamedTuple):
    """A row of the table."""

    name: str
    meaning: str
    value: Callable[[Entry], Value]
    """Reads it from an iteration's entry; None if it is unknown there."""
    show: Callable[[float], str] = number


def look_up(entry: Entry, *path: str) -> Any:
    """Return a nested value of an entry; None if any part of its path is missing."""
    value: Any = entry
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def at(*path: str) -> Callable[[Entry], Value]:
    """Return a function that looks up a value."""
    return lambda entry: look_up(entry, *path)


def _train(*path: str) -> Callable[[Entry], Value]:
    """Return a function that looks up a statistic of the training pairs."""
    return at("pairs", "train", *path)


def _own(name: str) -> Callable[[Entry], Value]:
    """Return a function that looks up a statistic of the iteration's own responses."""
    return lambda entry: newest_stats(entry).get(name)


def _share(name: str) -> Callable[[Entry], Value]:
    """Return a function that divides a count of the iteration's own responses by their number."""

    def share(entry: Entry) -> Value:
        newest = newest_stats(entry)
        return newest[name] / newest["responses"] if name in newest and newest["responses"] else None

    return share


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _interval(check: str) -> Callable[[Entry], Value]:
    def interval(entry: Entry) -> Value:
        ends = look_up(entry, check, "interval")
        return f"{number(ends[0])}{NBSP}…{NBSP}{number(ends[1])}" if ends else None

    return interval


def _speed(stage: str) -> Callable[[Entry], Value]:
    def speed(entry: Entry) -> Value:
        seconds, tokens = (look_up(entry, "stages", stage, name) for name in ("seconds", "tokens"))
        return tokens / seconds if seconds and tokens is not None else None

    return speed


def _seconds(stage: str) -> Callable[[Entry], Value]:
    def seconds(entry: Entry) -> Value:
        stored = look_up(entry, "stages", stage, "seconds")
        # before 0.2 stored the stages, the log already had training's time
        return look_up(entry, "metrics", "train_runtime") if stored is None and stage == "train" else stored

    return seconds


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours}{NBSP}h {minutes:02d}{NBSP}min"
    return f"{minutes}{NBSP}min {left:02d}{NBSP}s" if minutes else f"{seconds:.1f}{NBSP}s"


def _of_check(name: str) -> list[Measure]:
    """Return the rows of a comparison of opponent and trained model on held-out prompts."""
    check = CHECKS[name]
    return [
        Measure(f"{check.measured}, before", f"{check.unit}, under the opponent", at(name, "before")),
        Measure(f"{check.measured}, after", f"{check.unit}, under the trained model", at(name, "after")),
        Measure(f"{check.measured}, change", "above 0: better", at(name, "difference")),
        Measure(
            f"{check.measured}, interval of the change",
            f"{CONFIDENCE:.0%} confidence; entirely below 0: this iteration {check.worse}",
            _interval(name),
        ),
    ]


STAGES = {"generate": "generate responses", "score": "score them under the opponent", "train": "train"}

GROUPS: dict[str, list[Measure]] = {
    "Training, mean over the last epoch": [
        Measure(name, metric.meaning, at("metrics", f"spin/{name}")) for name, metric in METRICS.items()
    ],
    "Responses": [
        Measure("pairs", "pairs that were trained on, with those of earlier iterations", _train("pairs")),
        Measure("real tokens", "mean length of the real responses", _own("real_mean")),
        Measure(
            "synthetic tokens",
            "mean length of the opponent's responses; it should stay near that of the real ones",
            _own("synthetic_mean"),
        ),
        Measure(
            "truncated",
            "cut off at max_tokens; if most are, the opponent does not stop as the data does",
            _share("truncated"),
            _percent,
        ),
        Measure("equal", "equal to the real response; near 100%, nothing is left to learn", _share("equal"), _percent),
        Measure(
            "distinct",
            "different from each other; few of them: the model collapses",
            _share("distinct_synthetic"),
            _percent,
        ),
        Measure("empty", "responses without a word; their pairs are left out", _train("empty")),
        Measure("over length", "responses longer than sequence_len; their pairs are left out", _train("over_length")),
        Measure("judge, training", "mean score of the responses to training prompts", _train("judge", "mean")),
        Measure(
            "judge, held-out", "mean score of the opponent's held-out responses", at("pairs", "eval", "judge", "mean")
        ),
    ],
    "Held-out prompts": [
        *_of_check("held_out"),
        *_of_check("judge"),
        *(
            Measure(f"{name}, held-out", METRICS[name].meaning, at("held_out_pairs", name))
            for name in ("reward_real", "reward_synthetic", "reward_margin", "accuracy")
        ),
    ],
    "Distance and precision": [
        Measure(
            "divergence from p₀",
            "KL in nats per token from the run's first opponent; it grows as the model moves away from its start",
            at("divergence"),
        ),
        Measure(
            "vLLM: mean difference",
            "of its token log-probs from the trainer's, in nats; both must use the same model",
            at("agreement", "mean"),
        ),
        Measure("vLLM: largest difference", "the same, of the worst token", at("agreement", "largest")),
        Measure("vLLM: KL", "the same, as a KL in nats per token", at("agreement", "kl")),
        Measure("precision", "of weights and computation", at("precision")),
    ],
    "Time": [
        *(Measure(title, "time", _seconds(stage), _duration) for stage, title in STAGES.items()),
        *(Measure(f"{title}, speed", "tokens per second", _speed(stage)) for stage, title in STAGES.items()),
    ],
}


def lm_eval_measures(entries: list[dict[str, Any]]) -> list[Measure]:
    """Return a row for each benchmark that any iteration has a score of."""
    names = dict.fromkeys(name for entry in entries for name in entry.get("lm_eval") or {})
    return [Measure(name, "lm-evaluation-harness", at("lm_eval", name)) for name in names]
