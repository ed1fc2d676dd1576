"""The warning while training that real responses become less likely."""

import pytest

from spin_plugin.training.decline import RealRewardWatch


def entries(reward: float, count: int = 20) -> list[dict[str, float]]:
    return [{"epoch": (n + 1) / 10, "pairs": 8, "spin/reward_real": reward - n / 1000} for n in range(count)]


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("spin: warning: ")]


def test_one_warning_names_the_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    watch = RealRewardWatch([])
    for entry in entries(-1.0):
        watch.add(entry)
    (line,) = warnings(capsys)
    assert line.startswith("spin: warning: the mean of spin/reward_real over the last 0.5 epochs is -1.002")
    assert all(name in line for name in ("learning_rate", "loss_type: space", "real_penalty", "sft_weight"))


def test_evaluation_and_the_final_summary_are_not_training(capsys: pytest.CaptureFixture[str]) -> None:
    watch = RealRewardWatch([])
    for entry in entries(1.0):
        watch.add(entry)
        watch.add({"epoch": entry["epoch"], "eval_spin/reward_real": -5.0})
    watch.add({"epoch": 2.0, "train_runtime": 1.0})
    assert not warnings(capsys)


@pytest.mark.parametrize("resumed_at", range(0, 20, 3))
def test_resume_warns_only_if_the_log_before_it_did_not(capsys: pytest.CaptureFixture[str], resumed_at: int) -> None:
    log = entries(-1.0)
    watch = RealRewardWatch(log[:resumed_at])
    for entry in log[resumed_at:]:
        watch.add(entry)
    assert len(warnings(capsys)) == (resumed_at < 5)
