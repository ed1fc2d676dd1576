"""What holds between processes: waiting for the first one, and responses of earlier iterations that are gone."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from spin_plugin.generation.job import SHARD
from spin_plugin.generation.shards import Shards
from spin_plugin.iteration import open_pairs
from spin_plugin.messages import SpinError
from spin_plugin.pairs import PAIR_SCHEMA, PairStats, table_writer, write_stats
from spin_plugin.processes import (
    answer_questions,
    clear_questions,
    tell_saved,
    wait_until_prepared,
    wait_until_saved,
)
from spin_plugin.run import RunDir

WAITER = """
import sys
from pathlib import Path
from spin_plugin.processes import wait_until_prepared
from spin_plugin.run import RunDir
wait_until_prepared(RunDir(Path(sys.argv[1])))
print("goes on")
"""


def write_pairs(run: RunDir, count: int) -> None:
    folder = run.iteration(0).pairs
    folder.mkdir(parents=True, exist_ok=True)
    row = {"prompt": [1], "real": [2], "synthetic": [3], "example": 0, "iteration": 0, "length": 3}
    for split, rows in (("train", count), ("eval", 0)):
        with table_writer(folder / f"{split}.arrow", PAIR_SCHEMA) as write:
            write({name: [row.get(name, 0)] * rows for name in PAIR_SCHEMA.names})
    write_stats(folder / "stats.json", {"train": PairStats()})


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Be one of three processes."""

    def become(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")

    return become


def test_other_processes_wait_for_this_start_and_not_for_an_earlier_one(
    tmp_path: Path, as_rank: Callable[[int], None]
) -> None:
    run = RunDir(tmp_path)
    write_pairs(run, 5)  # left by an earlier start
    run.questions.mkdir()
    (run.questions / "1-of-an-earlier-start").touch()
    waiting = []
    for rank in (1, 2):
        as_rank(rank)
        command = [sys.executable, "-c", WAITER, str(tmp_path)]
        waiting.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    as_rank(0)
    clear_questions(run)
    while len(list(run.questions.glob("*"))) < 2:
        time.sleep(0.05)
        assert all(process.poll() is None for process in waiting), "nobody goes on before the first process says so"
    answer_questions(run)
    assert [process.communicate(timeout=60)[0].strip() for process in waiting] == ["goes on", "goes on"]
    assert len(open_pairs(run.iteration(0)).train) == 5


def test_a_node_that_does_not_share_the_run_directory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_rank: Callable[[int], None]
) -> None:
    monkeypatch.setattr("spin_plugin.processes.SECONDS_UNTIL_SEEN", 0.0)
    as_rank(2)
    with pytest.raises(SpinError, match=r"output_dir .* must lie on a file system that all nodes share"):
        wait_until_prepared(RunDir(tmp_path))


def test_nobody_waits_for_a_first_process_that_was_killed_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_rank: Callable[[int], None]
) -> None:
    """Its name stays where it lies; what ends is its signs of life."""
    monkeypatch.setattr("spin_plugin.run.SECONDS_BETWEEN_SIGNS", 0.05)
    monkeypatch.setattr("spin_plugin.processes.SECONDS_UNTIL_SEEN", 3.0)
    monkeypatch.setattr("spin_plugin.processes.SECONDS_BETWEEN_LOOKS", 0.05)
    as_rank(1)
    run = RunDir(tmp_path)
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(SpinError) as raised:
            wait_until_prepared(run)
        ended.append(str(raised.value))

    with run.locked():
        waiter = threading.Thread(target=wait)
        waiter.start()
        waiter.join(timeout=6.0)
        assert waiter.is_alive(), "as long as it gives signs of life"
        left = run.holder.read_bytes()
    run.holder.write_bytes(left)
    waiter.join(timeout=60.0)
    assert "gives no sign of life any more" in ended[0]


def test_the_first_process_waits_until_the_others_have_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_rank: Callable[[int], None]
) -> None:
    run = RunDir(tmp_path)
    run.questions.mkdir()
    monkeypatch.setattr("spin_plugin.processes.SECONDS_UNTIL_SAVED", 0.0)
    as_rank(1)
    tell_saved(run)
    with pytest.raises(SpinError, match="only 1 of 2 other processes have saved"):
        wait_until_saved(run)
    as_rank(2)
    tell_saved(run)
    wait_until_saved(run)


@pytest.mark.parametrize("gone", ["a shard", "the folder"])
def test_responses_that_are_gone_never_leave_the_mixing_in_silence(tmp_path: Path, gone: str) -> None:
    shards = Shards(tmp_path / "synthetic")
    shards.folder.mkdir()
    shards.note(requests=SHARD + 10)
    for number, count in ((0, SHARD), (1, 10)):
        shards.write(number, ({"example": place} for place in range(count)))
    assert len(list(shards.responses())) == SHARD + 10
    shards.shard(1).unlink()
    if gone == "the folder":
        shards = Shards(tmp_path / "elsewhere")
    with pytest.raises(SpinError, match="missing"):
        list(shards.responses())


def test_dropout_is_silenced_in_modules_and_in_plain_numbers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from spin_plugin.trainer import silence_dropout

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.25, **small)).train()
    model.add_module("extra", nn.Dropout(0.5))
    tokens = torch.arange(16)[None]
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    rates = [silence_dropout(module) for module in model.modules()]
    assert max(rates) == 0.5
    assert min(rates) == 0.0
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert model.extra.p == 0.0
