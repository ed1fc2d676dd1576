"""Diagnosis: every rule with numbers worked by hand, beside a healthy counterpart that finds nothing."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from spin_plugin.objective import watch as watch_module
from spin_plugin.objective.diagnosis import diagnose, diagnose_pairs, diagnose_result
from spin_plugin.objective.finding import Finding, as_dicts
from spin_plugin.objective.watch import CHECKS_PER_EPOCH, LogWatch, accuracy_limit, negative_real_reward

Entry = dict[str, Any]
# The pairs of the healthy tiny run: 2,000 responses of iteration 0, 58% of them equal.
HEALTHY = {
    "responses": 2000,
    "truncated": 1,
    "equal": 1152,
    "real_mean": 9.0,
    "synthetic_mean": 8.99,
    "distinct_real": 2000,
    "distinct_synthetic": 2000,
}


def pairs(**newest: float) -> dict[str, Any]:
    """Return the statistics of the healthy run's pairs, with changes to those of its own responses."""
    train = {"responses": 2000, "pairs": 2000, "equal": 0, "equal_dropped": False}
    return {"train": train | {"newest": HEALTHY | newest}}


def names(findings: Iterable[Finding]) -> list[str]:
    return [finding.name for finding in findings]


def trained(epoch: float, *, pairs: int = 32, **metrics: float) -> Entry:
    """Return an entry of the log of training."""
    usual = {"reward_real": 0.1, "reward_margin": 0.2, "accuracy": 0.8, "saturated": 0.0}
    return {"epoch": epoch, "pairs": pairs} | {f"spin/{name}": value for name, value in (usual | metrics).items()}


def evaluated(epoch: float, margin: float) -> Entry:
    return {"epoch": epoch, "eval_spin/reward_margin": margin, "eval_spin/reward_real": -5.0}


# --- the pairs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"truncated": 499}, []),  # 25% of 2,000 are 500
        ({"truncated": 500}, ["truncated"]),
        ({"truncated": 1520, "synthetic_mean": 100.0}, ["truncated"]),  # their length is that of the limit
        ({"equal": 1799}, []),
        ({"equal": 1800}, ["converged"]),
        ({"distinct_synthetic": 1000}, []),
        ({"distinct_synthetic": 999}, ["collapse"]),
        ({"distinct_real": 9, "distinct_synthetic": 1}, []),  # classes
        ({"synthetic_mean": 18.0}, []),
        ({"synthetic_mean": 18.1}, ["lengths"]),
        ({"synthetic_mean": 4.4}, ["lengths"]),
        ({"synthetic_mean": 0.0}, ["lengths"]),
        ({"responses": 31, "truncated": 31, "equal": 31, "distinct_synthetic": 1, "synthetic_mean": 90.0}, []),
    ],
)
def test_pairs(changes: dict[str, float], found: list[str]) -> None:
    assert names(diagnose_pairs(pairs(**changes))) == found


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ((9.0, 9.0), (9.0, 13.5), []),
        ((9.0, 9.0), (9.0, 13.6), ["lengths"]),
        ((9.0, 9.0), (18.0, 18.0), []),  # other prompts
        ((9.0, 13.0), (9.0, 8.0), ["lengths"]),
    ],
)
def test_lengths_are_compared_with_the_iteration_before(
    before: tuple[float, float], now: tuple[float, float], found: list[str]
) -> None:
    earlier, current = (pairs(real_mean=real, synthetic_mean=synthetic) for real, synthetic in (before, now))
    assert names(diagnose_pairs(current, earlier)) == found


def test_message_has_the_numbers_and_the_advice_a_key() -> None:
    (finding,) = diagnose_pairs(pairs(truncated=1520))
    assert finding.message == "76% of the synthetic responses reach the length limit without an end"
    assert "spin.generation.max_tokens" in finding.advice
    assert str(finding) == f"{finding.message}; {finding.advice}"
    assert as_dicts([finding]) == [{"name": "truncated", "message": finding.message, "advice": finding.advice}]


def test_runs_without_these_statistics_have_no_findings() -> None:
    train = {"responses": 100, "pairs": 100, "equal": 0, "equal_dropped": False, "truncated": 100}
    assert diagnose_pairs({"train": train}) == []
    assert diagnose_pairs(pairs(synthetic_mean=9.0), {"train": train}) == []


def test_accuracy_limit_by_hand() -> None:
    """1,152 of 1,999 pairs are equal."""
    train = {"pairs": 1999, "equal": 1152, "equal_dropped": False}
    assert accuracy_limit({"train": train}) == pytest.approx(847 / 1999)
    assert accuracy_limit({"train": train | {"equal_dropped": True}}) == 1
    assert accuracy_limit({"train": train | {"judge": {}}}) == 1


# --- saturated ---------------------------------------------------------------------------------


def first_epoch(saturated: float) -> list[Entry]:
    """Return a log of two epochs of 10 entries; pairs are saturated from the middle of the first one on."""
    places = [(place + 1) / 10 for place in range(20)]
    return [trained(at, saturated=saturated * (at > 0.5), accuracy=0.95) for at in places]


@pytest.mark.parametrize(("share", "equal", "found"), [(0.49, 0, []), (0.5, 0, ["saturated"]), (0.24, 1000, []),
                                                       (0.25, 1000, ["saturated"]), (0.05, 1900, [])])  # fmt: skip
def test_saturated(share: float, equal: int, found: list[str]) -> None:
    """As a share of the pairs that can be: if half of them are equal, a quarter is half."""
    stats = pairs()
    stats["train"] |= {"equal": equal}
    assert names(LogWatch(stats, first_epoch(share)).findings.values()) == found


def test_saturated_is_known_at_the_end_of_the_first_epoch_and_never_later() -> None:
    log = first_epoch(1.0)
    assert not LogWatch(pairs(), log[:9]).findings
    assert names(LogWatch(pairs(), log[:9]).add(log[9])) == ["saturated"]
    late = [trained((place + 1) / 10, saturated=float(place >= 10)) for place in range(20)]
    assert not LogWatch(pairs(), late).findings


def test_saturated_is_known_when_training_ends_although_its_last_step_is_not_logged() -> None:
    log = [entry for entry in first_epoch(1.0) if entry["epoch"] < 1]
    summary = {"epoch": 1.0, "train_runtime": 9.0}
    assert not LogWatch(pairs(), log).findings
    assert names(LogWatch(pairs(), log).add(summary)) == ["saturated"]
    assert not LogWatch(pairs(), log[:3]).add(summary), "nothing of the second half is known"
    assert not LogWatch(pairs(), log).add(summary | {"epoch": 0.95}), "max_steps"
    assert not LogWatch(pairs()).add(summary)


# --- overfitting -------------------------------------------------------------------------------


def with_evaluations(*margins: tuple[float, float]) -> list[Entry]:
    """Return a log with margins of training and of held-out pairs, an evaluation each half epoch."""
    log = []
    for place, (margin, held_out) in enumerate(margins):
        log += [trained(place / 2 + part, reward_margin=margin) for part in (0.25, 0.5)]
        log.append(evaluated(place / 2 + 0.5, held_out))
    return log


@pytest.mark.parametrize(
    ("margins", "found"),
    [
        ([(0.1, 0.1), (0.5, 0.4), (0.9, 0.5), (1.2, 0.5)], []),
        ([(0.5, 1.0), (1.0, 0.79), (1.5, 0.78)], ["overfitting"]),
        ([(0.5, 1.0), (1.0, 0.81), (1.5, 0.70)], []),  # one evaluation only
        ([(0.5, 1.0), (0.4, 0.70), (0.3, 0.60)], []),  # training falls, too
        ([(0.5, -1.0), (1.0, -2.0), (1.5, -3.0)], []),  # it never rose
        ([(0.5, 1.0), (1.0, 0.5)], []),
    ],
)
def test_overfitting_in_an_iteration(margins: list[tuple[float, float]], found: list[str]) -> None:
    assert names(LogWatch(pairs(), with_evaluations(*margins)).findings.values()) == found


def result(trained: float, held_out: float | None, error: float = 0.03, **more: float) -> Entry:
    held = {} if held_out is None else {"held_out_pairs": {"reward_margin": held_out, "margin_error": error}}
    return {"metrics": {"spin/reward_margin": trained}} | held | more


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (result(1.0, 0.9), result(2.0, 0.8), ["overfitting"]),  # twice the error of a difference is 0.085
        (result(1.0, 0.9), result(2.0, 0.82), []),
        (result(1.0, 0.9), result(2.0, 0.8, error=0.1), []),
        (result(1.0, 0.9), result(1.7, 0.8), []),  # 0.86, two errors above, is half of the training margin
        (result(2.0, 0.9), result(1.9, 0.2), []),  # training did not rise
        (result(0.150, 0.180, 0.033), result(0.303, 0.175, 0.150), []),  # the healthy tiny run
        (result(1.0, None), result(2.0, 0.1), []),
        (result(1.0, 0.9), result(2.0, None), []),
        (None, result(2.0, 0.1), []),
        (None, result(1.0, 0.9, divergence=0.49), []),
        (None, result(1.0, 0.9, divergence=0.5), ["divergence"]),
    ],
)
def test_result(before: Entry | None, now: Entry, found: list[str]) -> None:
    assert names(diagnose_result(now, before)) == found


@pytest.mark.parametrize("selecting", [{"equal_dropped": True}, {"judge": {"right": 700}}])
def test_margins_over_different_pairs_are_not_compared(selecting: dict[str, Any]) -> None:
    """Of pairs that differ both margins are .30, then .31; 30%, then 70% of the held-out responses are equal."""
    earlier, now = result(0.30, 0.7 * 0.30, 0.005), result(0.31, 0.3 * 0.31, 0.005)
    assert names(diagnose_result(now, earlier)) == ["overfitting"]
    training = pairs()["train"] | selecting
    assert not diagnose_result(now | {"pairs": {"train": training}}, earlier | {"pairs": pairs()})
    assert not diagnose_result(now | {"pairs": pairs()}, earlier | {"pairs": {"train": training}})


# --- real responses become less likely ---------------------------------------------------------


def log(reward: Callable[[float], float], steps: int = 40, epochs: float = 2.0, seed: int = 0) -> list[Entry]:
    """Return a log of `steps` entries with a reward as a function of the epoch, and noise of 0.05."""
    draw = random.Random(seed)
    places = [epochs * (step + 1) / steps for step in range(steps)]
    return [trained(at, pairs=64, reward_real=reward(at) + draw.gauss(0, 0.05)) for at in places]


def first_alarm(entries: list[Entry]) -> float | None:
    """Return the epoch at which the rule first applies, like a trainer that logs one entry after another."""
    for count in range(len(entries) + 1):
        if negative_real_reward(entries[:count]) is not None:
            return entries[count - 1]["epoch"]
    return None


def test_mean_is_weighted_by_pairs() -> None:
    """The window is the last half epoch, six entries of 1/12; the first, of 1000 pairs, is before it."""
    rewards = [(5.0, 1000), (-1.0, 10), (-1.1, 10), (-1.2, 10), (-1.0, 10), (-1.0, 10), (-0.8, 30)]
    entries = [
        trained((place + 1) / 12, pairs=count, reward_real=reward) for place, (reward, count) in enumerate(rewards)
    ]
    assert negative_real_reward(entries) == pytest.approx(-(10 + 11 + 12 + 10 + 10 + 24) / 80)
    assert negative_real_reward(entries[:-1]) is None


def test_falling_reward_is_found_once_half_an_epoch_is_over() -> None:
    assert first_alarm(log(lambda at: -0.5)) == pytest.approx(0.5)
    assert first_alarm(log(lambda at: -at)) == pytest.approx(0.5)


def test_fall_late_in_training_is_found() -> None:
    found = first_alarm(log(lambda at: 0.2 if at <= 1 else -0.5))
    assert found is not None
    assert 1.1 < found <= 1.5


@pytest.mark.parametrize("seed", range(20))
def test_rising_reward_and_a_short_dip_are_not_found(seed: int) -> None:
    assert first_alarm(log(lambda at: at, seed=seed)) is None
    assert first_alarm(log(lambda at: -0.2 if at < 0.15 else 0.3, seed=seed)) is None


def test_noise_around_0_is_rarely_found() -> None:
    """Over two epochs of 20 entries; the mean of half of these runs is below 0."""
    assert sum(first_alarm(log(lambda at: 0.0, seed=seed)) is not None for seed in range(200)) <= 10


def test_few_entries_decide_nothing() -> None:
    """Logged every two epochs: six entries are needed to estimate the noise."""
    entries = [trained(2.0 * (place + 1), reward_real=-1.0 - place / 10) for place in range(6)]
    assert [negative_real_reward(entries[:count]) is None for count in range(7)] == [True] * 6 + [False]


# --- the watch ---------------------------------------------------------------------------------


def falling() -> list[Entry]:
    """Return a log of two epochs in which the mean of the last half epoch falls below 0 at once."""
    return [trained((n + 1) / 10, reward_real=-1.0 - n / 1000) for n in range(20)]


def test_finding_is_made_once_and_names_the_remedies() -> None:
    watch = LogWatch(pairs())
    (finding,) = [finding for entry in falling() for finding in watch.add(entry)]
    assert finding.message.startswith("the mean of spin/reward_real over the last 0.5 epochs is -1.002")
    assert all(name in finding.advice for name in ("learning_rate", "loss_type: space", "real_penalty", "sft_weight"))


def test_evaluation_and_the_final_summary_are_not_training() -> None:
    log = [entry for place in range(20) for entry in (trained(place / 10), evaluated(place / 10, 0.5))]
    assert not LogWatch(pairs(), [*log, {"epoch": 2.0, "train_runtime": 1.0}]).findings


@pytest.mark.parametrize("resumed_at", range(0, 20, 3))
def test_resumed_watch_finds_only_what_the_log_before_it_did_not_show(resumed_at: int) -> None:
    log = falling()
    watch = LogWatch(pairs(), log[:resumed_at])
    new = [finding for entry in log[resumed_at:] for finding in watch.add(entry)]
    assert len(new) == (resumed_at < 6)
    assert names(watch.findings.values()) == ["real_falls"]


def test_long_logs_are_checked_a_few_times_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(watch_module, "_real_falls", lambda entries: seen.append(entries[-1]["epoch"]))
    LogWatch(pairs(), (trained((n + 1) / 1000) for n in range(2000)))
    assert len(seen) == 2 * CHECKS_PER_EPOCH


def test_all_that_is_known_before_the_end() -> None:
    assert names(diagnose(pairs(equal=1900), falling(), {"pairs": pairs(), "metrics": {}})) == [
        "converged",
        "real_falls",
    ]
    assert diagnose(pairs(), [trained(n / 10) for n in range(1, 21)], None) == []
