"""Two iterations with the user's commands: real Axolotl, real vLLM, a tiny random model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Finished
from safetensors.torch import load_file
from tiny import chat_rows, spin_config, write_config, write_jsonl
from transformers import AutoModelForCausalLM

from spin_plugin.run.directory import RunDir
from spin_plugin.training.prepare import open_pairs

pytestmark = pytest.mark.slow
Command = Callable[..., Finished]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: Path, command: Command) -> Path:
    """The directory of a finished run: two iterations, two-turn conversations, held-out rows."""
    directory = tmp_path_factory.mktemp("finished")
    data = write_jsonl(directory / "chat.jsonl", chat_rows(20, turns=2))
    config = write_config(
        directory, spin_config(directory, llama, data, val_set_size=4, eval_strategy="epoch", save_steps=3)
    )
    done = command(ROOT / "scripts/iterate.sh", config, directory=directory)
    assert done.code == 0, done.output[-3000:]
    return directory


def test_finished_entry_has_the_means_of_the_last_epoch(finished: Path) -> None:
    entry = json.loads((finished / "run/run.json").read_text())["finished"][0]
    trained = [line for line in logged(finished / "run", 0) if "pairs" in line]
    assert sum(line["pairs"] for line in trained) == entry["pairs"]["train"]["pairs"]
    accuracy = sum(line["spin/accuracy"] * line["pairs"] for line in trained) / sum(line["pairs"] for line in trained)
    assert entry["metrics"]["spin/accuracy"] == pytest.approx(accuracy)


def logged(run: Path, iteration: int) -> list[dict[str, Any]]:
    lines = (run / f"iteration-{iteration}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("iteration", [0, 1])
def test_first_loss_is_ln_2_and_first_margin_is_0(finished: Path, iteration: int) -> None:
    first = next(line for line in logged(finished / "run", iteration) if "spin/loss" in line)
    assert first["step"] == 1
    assert first["spin/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["spin/reward_margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("iteration", [0, 1])
def test_opponent_is_the_model_of_the_previous_iteration(finished: Path, llama: Path, iteration: int) -> None:
    run = RunDir(finished / "run")
    pairs = open_pairs(run.iteration(iteration))
    opponent = AutoModelForCausalLM.from_pretrained(run.iteration(iteration - 1).path if iteration else llama)
    stored = load_file(pairs.opponent_files["train"])["logps"]
    for pair in pairs.train.select(range(6)):
        for row, side in enumerate(("real", "synthetic")):
            tokens = torch.tensor([pair["prompt"] + pair[side]])
            with torch.no_grad():
                logps = opponent(tokens).logits.log_softmax(-1)[0, :-1]
            response = range(len(pair["prompt"]) - 1, tokens.shape[1] - 1)
            expected = sum(logps[place, tokens[0, place + 1]].item() for place in response)
            assert stored[2 * pair["index"] + row].item() == pytest.approx(expected, abs=1e-3)


def test_second_iteration_mixes_in_the_responses_of_the_first(finished: Path) -> None:
    run = RunDir(finished / "run")
    first, second = (open_pairs(run.iteration(number)).train for number in (0, 1))
    assert set(first["iteration"]) == {0}
    old = second.filter(lambda pair: pair["iteration"] == 0)
    assert old["synthetic"] == first["synthetic"]
    assert len(second) > len(old)
    assert list(second["index"]) == list(range(len(second)))


def test_held_out_pairs_are_evaluated(finished: Path) -> None:
    evaluated = [line for line in logged(finished / "run", 0) if "eval_spin/loss" in line]
    assert evaluated[0]["eval_spin/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluated[-1]["eval_spin/loss"] != evaluated[0]["eval_spin/loss"]
    pairs = open_pairs(RunDir(finished / "run").iteration(0))
    trained = {tuple(prompt) for prompt in pairs.train["prompt"]}
    assert pairs.eval is not None
    assert not trained & {tuple(prompt) for prompt in pairs.eval["prompt"]}


def test_truncated_response_has_no_end_token(finished: Path) -> None:
    from spin_plugin.generation.shards import Shards

    stop = json.loads((finished / "run/real/meta.json").read_text())["stop_tokens"]
    responses = list(Shards(finished / "run/iteration-0/synthetic").responses())
    truncated = [response for response in responses if response["finish"] == "length"]
    ended = [response for response in responses if response["finish"] == "stop"]
    assert truncated and ended
    assert all(response["tokens"][-1] not in stop for response in truncated)
    assert all(response["tokens"][-1] == response["stop"] in stop for response in ended)


def test_status_shows_the_run(finished: Path, command: Command) -> None:
    done = command("axolotl", "spin", "status", finished / "config.yml", "--json", directory=finished)
    content = json.loads(done.output.splitlines()[-1])
    assert [entry["state"] for entry in content["iterations"]] == ["finished", "finished"]
    assert content["iterations"][1]["pairs"]["train"]["pairs"] > 0
    assert "spin/loss" in content["iterations"][1]["metrics"]


def test_rerun_of_a_finished_run_reports_it_and_changes_nothing(finished: Path, command: Command) -> None:
    before = (finished / "run/run.json").read_bytes()
    done = command("axolotl", "train", "config.yml", "--launcher", "python", directory=finished)
    assert done.code == 0
    assert "all 2 iterations are finished" in done.output
    done = command(ROOT / "scripts/iterate.sh", "config.yml", directory=finished)
    assert done.code == 0
    assert (finished / "run/run.json").read_bytes() == before


def test_output_dir_links_to_the_newest_model(finished: Path) -> None:
    newest = load_file(finished / "run/iteration-1/model.safetensors")
    linked = load_file(finished / "run/model.safetensors")
    assert all(torch.equal(linked[name], tensor) for name, tensor in newest.items())
    AutoModelForCausalLM.from_pretrained(finished / "run")


def test_evaluate_uses_the_last_finished_iteration(finished: Path, command: Command) -> None:
    done = command("axolotl", "evaluate", "config.yml", "--launcher", "python", directory=finished)
    assert done.code == 0, done.output[-3000:]
    assert "run/iteration-1" in done.output
    assert (finished / "run/eval_summary.csv").exists()


def test_resolved_configuration_is_saved(finished: Path) -> None:
    import yaml

    config = yaml.safe_load((finished / "run/iteration-1/config.yml").read_text())
    assert config["base_model"].endswith("run/iteration-0")
    assert config["spin"]["beta"] == 0.1


def test_accumulation_changes_nothing(
    tmp_path: Path, llama: Path, chat_data: Path, run_jobs: Callable[..., None]
) -> None:
    """1 x 8 = 8 x 1, also in the last, incomplete step of an epoch (23 pairs, 8 per step)."""
    curves, weights = [], []
    for micro, accumulation in ((8, 1), (1, 8)):
        directory = tmp_path / str(micro)
        directory.mkdir()
        spin = {"iterations": 1, "num_prompts": 23, "beta": 1.0, "generation": {"max_tokens": 12}}
        spin["generation"]["vllm_kwargs"] = {"kv_cache_memory_bytes": 64 << 20}
        changes = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "num_epochs": 2}
        run_jobs((write_config(directory, spin_config(directory, llama, chat_data, spin=spin, **changes)), 1))
        curves.append([line["spin/loss"] for line in logged(directory / "run", 0) if "spin/loss" in line])
        weights.append(load_file(directory / "run/iteration-0/model.safetensors"))
    assert len(curves[0]) == 6
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grouped", ["off", "auto"])
def test_shared_prefix_and_padded_runs_follow_the_same_trajectory(
    tmp_path: Path, llama: Path, chat_data: Path, run_jobs: Callable[..., None], grouped: str
) -> None:
    """Two iterations with either layout, with held-out prompts: the same responses, losses and weights.

    Grouped, a prompt has up to four pairs, in rows of one prompt and in padded sequences.
    """
    runs = {}
    for choice in ("on", "off"):
        directory = tmp_path / choice
        directory.mkdir()
        config = spin_config(directory, llama, chat_data, val_set_size=4, eval_strategy="epoch")
        config["spin"] = config["spin"] | {"shared_prefix": choice, "beta": 1.0, "group_prompts": grouped}
        if grouped == "auto":
            config["spin"]["generation"] |= {"num_generations": 2}
        run_jobs(*2 * [(write_config(directory, config), 1)])
        runs[choice] = directory / "run"
    for iteration in (0, 1):
        curves = [
            [line[name] for line in logged(run, iteration) for name in line if name.endswith("spin/loss")]
            for run in runs.values()
        ]
        assert len(curves[0]) > 6
        assert curves[0] == pytest.approx(curves[1], abs=1e-4)
        shared, padded = (load_file(run / f"iteration-{iteration}/model.safetensors") for run in runs.values())
        for name, tensor in padded.items():
            torch.testing.assert_close(shared[name], tensor, atol=1e-4, rtol=1e-3)
