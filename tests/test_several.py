"""What holds between processes: waiting for the first one, and responses of earlier iterations that are gone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from spin_plugin.generation.job import SHARD
from spin_plugin.generation.shards import Shards
from spin_plugin.iteration import answer_questions, clear_questions, tell_saved, wait_for_iteration, wait_until_saved
from spin_plugin.messages import SpinError
from spin_plugin.pairs import PAIR_SCHEMA, PairStats, table_writer, write_stats
from spin_plugin.run import RunDir

WAITER = """
import sys
from pathlib import Path
from spin_plugin.iteration import wait_for_iteration
from spin_plugin.run import RunDir
pairs = wait_for_iteration(RunDir(Path(sys.argv[1])), 0, rank=int(sys.argv[2]))
print(len(pairs.train))
"""


def write_pairs(run: RunDir, count: int) -> None:
    folder = run.iteration(0).pairs
    folder.mkdir(parents=True, exist_ok=True)
    row = {"prompt": [1], "real": [2], "synthetic": [3], "example": 0, "iteration": 0, "length": 3}
    for split, rows in (("train", count), ("eval", 0)):
        with table_writer(folder / f"{split}.arrow", PAIR_SCHEMA) as write:
            write({name: [row.get(name, 0)] * rows for name in PAIR_SCHEMA.names})
    write_stats(folder / "stats.json", {"train": PairStats()})


def test_other_processes_wait_for_this_start_and_not_for_an_earlier_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_pairs(run, 5)  # left by an earlier start
    run.questions.mkdir()
    (run.questions / "1-of-an-earlier-start").touch()
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", WAITER, tmp_path, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for rank in (1, 2)
    ]
    clear_questions(run)
    while len(list(run.questions.glob("*"))) < 2:
        time.sleep(0.05)
        assert all(process.poll() is None for process in waiting), "nobody goes on before the first process says so"
    write_pairs(run, 7)
    answer_questions(run, 2)
    assert [process.communicate(timeout=60)[0].strip() for process in waiting] == ["7", "7"]


def test_a_node_that_does_not_share_the_run_directory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spin_plugin.iteration.SECONDS_UNTIL_SEEN", 0.0)
    with pytest.raises(SpinError, match=r"output_dir .* must lie on a file system that all nodes share"):
        wait_for_iteration(RunDir(tmp_path), 0, rank=8)


def test_the_first_process_waits_until_the_others_have_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    run.questions.mkdir()
    monkeypatch.setattr("spin_plugin.iteration.SECONDS_UNTIL_SAVED", 0.0)
    tell_saved(run, rank=1)
    with pytest.raises(SpinError, match="only 1 of 2 other processes have saved"):
        wait_until_saved(run, 2)
    tell_saved(run, rank=2)
    wait_until_saved(run, 2)


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
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.5, **small)).train()
    model.add_module("extra", nn.Dropout(0.5))
    tokens = torch.arange(16)[None]
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    for module in model.modules():
        silence_dropout(module)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert model.extra.p == 0.0
