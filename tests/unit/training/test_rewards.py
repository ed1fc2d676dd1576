"""The rewards of each training pair: the newest of all ranks, and complete after a resume."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator

from spin_plugin.opponent.store import RewardStore
from spin_plugin.run.directory import RunDir
from spin_plugin.training.rewards import TrainingRewards

PAIRS = 6


def trainer(root: Path, step: int) -> Any:
    """Return what the callback uses of a trainer."""
    accelerator = Accelerator(cpu=True)
    (root / "iteration-0/pairs").mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(
        accelerator=accelerator,
        is_world_process_zero=lambda: accelerator.is_main_process,
        train_dataset=range(PAIRS),
        task=SimpleNamespace(directory=RunDir(root).iteration(0)),
        pair_keys={"train": "key"},
        state=SimpleNamespace(global_step=step),
    )


def begun(root: Path, step: int = 0) -> TrainingRewards:
    made = trainer(root, step)
    rewards = TrainingRewards(made)
    rewards.on_train_begin(SimpleNamespace(device=torch.device("cpu")), made.state, SimpleNamespace())  # type: ignore[arg-type]
    return rewards


def learn(rewards: TrainingRewards, step: int, pairs: list[int]) -> None:
    """Let a step see these pairs; rewards name the pair and the step."""
    rewards.trainer.state.global_step = step - 1
    rewards.add(torch.tensor(pairs, dtype=torch.long), expected(step, pairs))


def expected(step: int, pairs: list[int]) -> torch.Tensor:
    return torch.tensor([[pair + step / 100, -pair - step / 100] for pair in pairs]).view(-1, 2)


def stored(root: Path) -> torch.Tensor:
    return RewardStore(RunDir(root).iteration(0).rewards("train"), PAIRS, "key").load()


def test_last_value_of_each_pair_is_stored_and_unseen_pairs_are_nan(tmp_path: Path) -> None:
    rewards = begun(tmp_path)
    learn(rewards, 1, [0, 3])
    learn(rewards, 2, [])  # a micro-batch that only fills up a rank
    learn(rewards, 3, [3, 1])
    rewards.save()
    values = stored(tmp_path)
    torch.testing.assert_close(values[[0, 3, 1]], torch.cat([expected(1, [0]), expected(3, [3, 1])]))
    assert values[[2, 4, 5]].isnan().all()


def test_resumed_training_goes_on_from_what_the_checkpoint_stored(tmp_path: Path) -> None:
    first = begun(tmp_path)
    learn(first, 1, [0, 1, 2])
    first.save()
    resumed = begun(tmp_path, step=1)
    learn(resumed, 2, [2, 3])
    resumed.save()
    torch.testing.assert_close(stored(tmp_path)[:4], torch.cat([expected(1, [0, 1]), expected(2, [2, 3])]))
    again = begun(tmp_path)  # from scratch: what an earlier start has stored does not count
    learn(again, 1, [5])
    again.save()
    assert stored(tmp_path)[:5].isnan().all()


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_damaged_values_are_unknown(tmp_path: Path, content: bytes) -> None:
    rewards = begun(tmp_path)
    RunDir(tmp_path).iteration(0).rewards("train").write_bytes(content)
    resumed = begun(tmp_path, step=4)
    learn(resumed, 5, [1])
    resumed.save()
    assert stored(tmp_path).isnan().any(1).tolist() == [True, False, True, True, True, True]
    assert rewards.rewards.shape == (PAIRS, 2)


def ranks(rank: int, root: Path, port: int) -> None:
    """Two epochs; each epoch, the ranks see other pairs. The second start resumes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    rewards = begun(root)
    learn(rewards, 1, [[0, 1], [2, 3]][rank])
    learn(rewards, 2, [[2], [0]][rank])
    rewards.save()
    resumed = begun(root, step=2)
    learn(resumed, 3, [[3], [4]][rank])
    resumed.save()
    torch.distributed.destroy_process_group()


def test_two_ranks_store_the_newest_of_each_pair(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(ranks, (tmp_path, port), nprocs=2)  # type: ignore[no-untyped-call]
    values = stored(tmp_path)
    torch.testing.assert_close(
        values[[1, 2, 0, 3, 4]], torch.cat([expected(1, [1]), expected(2, [2, 0]), expected(3, [3, 4])])
    )
    assert values[5].isnan().all()
