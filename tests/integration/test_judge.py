"""A run with a judge: killed while judging and continued, compared with an undisturbed one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Finished
from safetensors.torch import load_file
from test_resume import kill_when
from tiny import spin_config, write_config

from spin_plugin.data.table import open_table
from spin_plugin.run.directory import RunDir

pytestmark = pytest.mark.slow

FIRST = "run/iteration-0/synthetic/verdicts-00000.json"
# Every response has the score of its length; while the file `slow` exists, only the first shard is judged.
JUDGE = f"""
import os, time

def by_length(prompt, real, synthetic, scale):
    while os.path.exists("slow") and os.path.exists("{FIRST}"):
        time.sleep(0.05)
    assert all(one["messages"][-1]["content"].startswith("count ") for one in prompt)
    assert all(text.endswith(tuple("0123456789")) for text in real)
    return [min(1.0, len(text) / scale) for text in synthetic]
"""


def test_killed_while_judging(tmp_path: Path, llama: Path, chat_data: Path, command: Callable[..., Finished]) -> None:
    generation = {"num_generations": 25, "max_tokens": 100}
    generation["vllm_kwargs"] = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
    judge = {"function": "mine:by_length", "drop_at": 0.5, "timeout": 600, "kwargs": {"scale": 40}}
    spin = {"iterations": 1, "generation": generation, "judge": judge}
    changes = {"val_set_size": 4, "micro_batch_size": 16}
    undisturbed, killed = directories = [tmp_path / name for name in ("undisturbed", "killed")]
    for directory in directories:
        directory.mkdir()
        (directory / "mine.py").write_text(JUDGE)
        write_config(directory, spin_config(directory, llama, chat_data, spin=spin, **changes))
    done = command("axolotl", "train", "config.yml", directory=undisturbed)
    assert done.code == 0, done.output[-3000:]
    assert "600 responses judged by mine:by_length" in done.output

    (killed / "slow").touch()
    first = killed / FIRST
    kill_when(killed, first.exists)
    assert not first.with_name("verdicts-00002.json").exists()
    written = first.stat().st_mtime_ns
    (killed / "slow").unlink()
    done = command("axolotl", "train", "config.yml", directory=killed)
    assert done.code == 0, done.output[-3000:]
    assert first.stat().st_mtime_ns == written

    one, other = (directory / "run/iteration-0" for directory in directories)
    for name in ("synthetic/verdicts-*.json", "pairs/*.arrow", "pairs/stats.json"):
        files, again = sorted(one.glob(name)), sorted(other.glob(name))
        assert files
        assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    weights, again = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())

    stats = json.loads((other / "pairs/stats.json").read_text())
    train, held_out = stats["train"]["judge"], stats["eval"]["judge"]
    assert train["judged"] == 500 and held_out["judged"] == 100
    assert 0 < train["right"] < 500
    assert stats["eval"]["pairs"] > 100 - held_out["right"]  # held-out pairs are not dropped
    assert len(open_table(other / "pairs/train.arrow")) == stats["train"]["pairs"] <= 500 - train["right"]
    logged = [line for line in RunDir(killed / "run").iteration(0).read_log() if "eval_spin/judge" in line]
    assert [(line["step"], line["eval_spin/judge"]) for line in logged] == [(0, held_out["mean"])]
    finished = json.loads((killed / "run/run.json").read_text())["finished"][0]
    assert finished["metrics"]["eval_spin/judge"] == finished["pairs"]["eval"]["judge"]["mean"] == held_out["mean"]
    status = command("axolotl", "spin", "status", "config.yml", directory=killed)
    assert "judge" in status.output
    assert f"{held_out['mean']:.4f}" in status.output


def test_score_that_does_not_improve_ends_the_run_on_every_rank(
    tmp_path: Path, llama: Path, chat_data: Path, run_jobs: Callable[..., None]
) -> None:
    """Once iteration 1's responses are judged, and at once in a rerun; both ranks exit with 0, one says why."""
    (tmp_path / "mine.py").write_text("def constant(prompt, real, synthetic):\n    return [0.5] * len(synthetic)\n")
    config = spin_config(tmp_path, llama, chat_data, val_set_size=10, micro_batch_size=2)
    config["spin"] |= {"judge": {"function": "mine:constant"}, "stop": {"metric": "judge"}}
    path, run = write_config(tmp_path, config), RunDir(tmp_path / "run")
    run_jobs((path, 2), (path, 2), (path, 2))
    assert run.finished() == 1
    assert run.iteration(1).synthetic.exists()
    assert not run.iteration(1).pairs.exists()
    logs = [(tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    reason = "spin: judge has not improved since the start (spin.stop.patience: 1), so iteration 1 is not trained"
    assert [log.count(reason) for log in logs] == [2, 0]
    assert not any("spin: error" in log for log in logs)
