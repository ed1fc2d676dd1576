"""Every iteration is checked on held-out real responses, and no worse model is handed on in silence.

The commands are those of users: real Axolotl, real vLLM, a tiny random model, with `spin.held_out` at its default.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Finished
from references import naive_logp
from safetensors.torch import load_file
from tiny import chat_rows, spin_config, write_config, write_jsonl
from transformers import AutoModelForCausalLM

from spin_plugin.data.table import open_table
from spin_plugin.generation.dispatcher import generate
from spin_plugin.generation.job import Job, Request
from spin_plugin.generation.shards import Shards
from spin_plugin.objective.decline import compare, read_check
from spin_plugin.run.directory import RunDir

pytestmark = pytest.mark.slow
Command = Callable[..., Finished]
ROWS, HELD_OUT = 96, 32


def configured(directory: Path, llama: Path, **changes: Any) -> tuple[Path, RunDir]:
    """Write the configuration of two iterations, with rows enough for a held-out split, two responses per prompt."""
    data = write_jsonl(directory / "chat.jsonl", chat_rows(ROWS))
    config = spin_config(directory, llama, data, save_strategy="epoch", **changes)
    config["spin"]["generation"]["num_generations"] = 2
    return write_config(directory, config), RunDir(directory / "run")


def lines(done: Finished, start: str) -> list[str]:
    """Return the plugin's lines; while training, the progress bar can stand before one."""
    return [line for line in done.output.splitlines() if f"spin: {start}" in line]


def warnings_of_length(done: Finished) -> list[str]:
    return [line for line in lines(done, "warning: ") if "reach the length limit" in line]


def names(entry: dict[str, Any]) -> list[str]:
    return [finding["name"] for finding in entry["findings"]]


def finished(run: RunDir) -> list[dict[str, Any]]:
    state = run.read_state()
    assert state is not None
    return state.finished


def test_healthy_run_is_checked_and_goes_on(tmp_path: Path, llama: Path, command: Command) -> None:
    """The stored numbers are those of the saved models, each prompt once; Axolotl evaluates nothing while training."""
    config, run = configured(tmp_path, llama)
    done = command("axolotl", "spin", "train", config, directory=tmp_path)
    assert done.code == 0, done.output[-3000:]
    said = "".join(log.read_text() for log in (run.root / "logs").glob("*.log"))
    assert said.count("spin: note: held-out split: 32 prompts from 32 rows, to check every iteration") == 1
    assert len(lines(done, "held-out real responses: ")) == 2
    assert not lines(done, "warning: iteration")
    # a random model does not know when to stop, and learns so much that it is soon far from its start
    assert [names(entry) for entry in finished(run)] == [["truncated"], ["truncated", "divergence"]]
    assert len(warnings_of_length(done)) == 2
    held_out, trained = (open_table(run.real / f"{split}.arrow") for split in ("eval", "train"))
    assert (len(held_out), len(trained)) == (HELD_OUT, ROWS - HELD_OUT)
    for number in (0, 1):
        assert not [entry for entry in run.iteration(number).read_log() if "eval_loss" in entry]
    models = [llama, run.iteration(0).path, run.iteration(1).path]
    with torch.no_grad():
        logps = [
            torch.tensor([naive_logp(model, row["prompt"], row["real"]) for row in held_out])
            for model in map(AutoModelForCausalLM.from_pretrained, models)
        ]
    tokens = torch.tensor([len(row["real"]) for row in held_out])
    for number in (0, 1):
        expected = compare(logps[number] / tokens, logps[number + 1] / tokens)
        found = read_check(finished(run)[number], "held_out")
        assert found is not None
        assert found.prompts == HELD_OUT
        assert (found.before, found.after) == pytest.approx((expected.before, expected.after), abs=1e-4)
        assert (found.difference, *found.interval) == pytest.approx((expected.difference, *expected.interval), abs=1e-4)
    check_records(run, models)

    # killed between the end of training and that of the iteration: no step is left, and the check is repeated
    state = run.read_state()
    assert state is not None
    stored = state.finished.pop()
    run.write_state(state)
    done = command("axolotl", "train", config, directory=tmp_path)
    assert done.code == 0, done.output[-3000:]
    assert "resuming at step" in done.output
    for name in ("held_out", "held_out_pairs", "divergence", "findings", "agreement"):
        assert finished(run)[1][name] == stored[name], name
    assert finished(run)[1]["stages"]["train"]["tokens"] == stored["stages"]["train"]["tokens"]
    assert not warnings_of_length(done), "said when the pairs were built"


def check_records(run: RunDir, models: list[Path]) -> None:
    """Rewards, divergence and stages are those of the saved models and stored pairs."""
    first, *_, last = map(AutoModelForCausalLM.from_pretrained, models)
    opponent = AutoModelForCausalLM.from_pretrained(models[1])
    entries, pairs = finished(run), [open_table(run.iteration(number).pairs / "eval.arrow") for number in (0, 1)]
    with torch.no_grad():
        apart = sum(
            naive_logp(first, row["prompt"], row["synthetic"]) - naive_logp(last, row["prompt"], row["synthetic"])
            for row in pairs[0]
        )
        few = [
            [
                0.1 * (naive_logp(last, row["prompt"], row[side]) - naive_logp(opponent, row["prompt"], row[side]))
                for side in ("real", "synthetic")
            ]
            for row in pairs[1].select(range(4))
        ]
    tokens = sum(len(row["synthetic"]) for row in pairs[0])
    assert entries[1]["divergence"] == pytest.approx(float(apart) / tokens, abs=1e-4)
    rewards = load_file(run.iteration(1).rewards("eval"))["rewards"]
    torch.testing.assert_close(rewards[:4], torch.tensor(few), atol=1e-4, rtol=0)
    real, synthetic = rewards.double().mean(0).tolist()
    margins = (rewards[:, 0] - rewards[:, 1]).double()
    rows, of_row = open_table(run.real / "eval.arrow")["row"], defaultdict(list)
    for example, margin in zip(pairs[1]["example"], margins.tolist(), strict=True):
        of_row[rows[example]].append(margin)
    means = [statistics.mean(each) for each in of_row.values()]
    assert entries[1]["held_out_pairs"] == pytest.approx(
        {
            "reward_real": real,
            "reward_synthetic": synthetic,
            "reward_margin": real - synthetic,
            "accuracy": float((margins > 0).double().mean()),
            "margin_error": statistics.stdev(means) / len(means) ** 0.5,
        },
        abs=1e-6,
    )
    for number, entry in enumerate(entries):
        # one epoch: the log has every pair once, at the same moment
        seen = load_file(run.iteration(number).rewards("train"))["rewards"].double().mean(0).tolist()
        metrics = entry["metrics"]
        assert seen == pytest.approx([metrics["spin/reward_real"], metrics["spin/reward_synthetic"]], abs=1e-5)
        assert entry["stages"].keys() == {"generate", "score", "train"}
        assert all(stage["seconds"] > 0 for stage in entry["stages"].values())
        responses = list(Shards(run.iteration(number).synthetic).responses())
        assert entry["stages"]["generate"]["tokens"] == sum(len(response["tokens"]) for response in responses)
        # a row of a prompt holds the prompt and the real response once, unless a step ends between its pairs
        train = open_table(run.iteration(number).pairs / "train.arrow")
        prompts = {row["example"]: len(row["prompt"]) + len(row["real"]) for row in train}
        exact = sum(prompts.values()) + sum(len(row["synthetic"]) for row in train if row["synthetic"] != row["real"])
        assert exact <= entry["stages"]["train"]["tokens"] < sum(row["length"] for row in train)
        assert entry["agreement"]["mean"] < 1e-4
        assert entry["precision"] == "float32; vLLM float32"
        assert entry["versions"].keys() >= {"axolotl", "torch", "transformers", "vllm"}


def test_run_stops_after_a_worse_iteration(tmp_path: Path, llama: Path, command: Command) -> None:
    """A learning rate that is far too high: the run fails, fails again at once, and goes on when told to."""
    config, run = configured(tmp_path, llama, learning_rate=0.1, num_epochs=2)
    done = command("axolotl", "spin", "train", config, directory=tmp_path)
    assert done.code == 1, done.output[-3000:]
    assert len(lines(done, "warning: iteration 0 made held-out real responses less likely")) == 1
    assert len(lines(done, "warning: the mean of spin/reward_real over")) == 1
    (error,) = done.errors
    assert "so iteration 1 is not trained; no iteration is better than the model that the run started from" in error
    assert finished(run)[0]["held_out"]["worse"] is True
    assert {"truncated", "real_falls", "divergence"} <= set(names(finished(run)[0]))
    assert len(lines(done, "warning: the model is ")) == 1
    assert not run.iteration(1).path.exists()

    for start in (["spin", "train"], ["train"]):
        again = command("axolotl", *start, config, directory=tmp_path)
        assert (again.code, again.errors) == (1, [error])
    assert not run.iteration(1).path.exists()
    status = command("axolotl", "spin", "status", config, "--json", directory=tmp_path)
    assert json.loads(status.output.splitlines()[-1])["iterations"][0]["state"] == "finished, worse"

    text = config.read_text()
    config.write_text(text.replace("iterations: 2", "iterations: 2\n  stop: off"))
    done = command("axolotl", "spin", "train", config, directory=tmp_path)
    assert done.code == 0, done.output[-3000:]
    assert len(lines(done, "warning: iteration 0 made held-out real responses less likely")) == 1
    assert len(finished(run)) == 2


def test_run_ends_at_its_best_iteration(tmp_path: Path, llama: Path, command: Command, vllm_python: Path) -> None:
    """Iteration 1 makes worse what 0 has improved: a good end. The best iteration stays, and can be served."""
    config, run = configured(tmp_path, llama, num_epochs=2)
    content = yaml.safe_load(config.read_text())
    content["spin"] |= {"iterations": 3, "sft_weight": 5, "stop": {"metric": "held_out"}, "keep": "best"}
    content["spin"]["schedule"] = [{}, {"learning_rate": 0.1}, {}]
    write_config(tmp_path, content)
    done = command("axolotl", "spin", "train", config, directory=tmp_path)
    assert done.code == 0, done.output[-3000:]
    reason = (
        "held_out has not improved since iteration 0 (spin.stop.patience: 1), so iteration 2 is not trained; best: "
    )
    (line,) = lines(done, reason)
    assert "best: iteration 0 (held_out " in line
    assert not done.errors
    for start in (["spin", "train"], ["train"]):
        again = command("axolotl", *start, config, directory=tmp_path)
        assert (again.code, lines(again, reason)) == (0, [line])
    assert len(finished(run)) == 2
    assert not run.iteration(2).path.exists()
    assert [bool(run.iteration(number).checkpoints()) for number in (0, 1)] == [False, True]
    status = json.loads(
        command("axolotl", "spin", "status", config, "--json", directory=tmp_path).output.splitlines()[-1]
    )
    assert status["best"]["iteration"] == 0
    assert status["stopped"] in line

    best = finished(run)[0]["held_out"]
    for card in (run.iteration(0).path / "README.md", tmp_path / "served" / "README.md"):
        if card.parent.name == "served":
            exported = command("axolotl", "spin", "export", config, card.parent, directory=tmp_path)
            assert exported.code == 0, exported.output
        assert f"**{best['after']:.4f}**" in card.read_text()
        assert "from scratch" not in card.read_text()
    assert_served(tmp_path, tmp_path / "served", run.iteration(0).path, vllm_python)


def assert_served(directory: Path, exported: Path, trained: Path, vllm_python: Path) -> None:
    """vLLM generates from the exported model what transformers generates from the trained one."""
    prompts = [[257, *(10 + number, 20)] for number in range(8)]
    requests = [Request(number, "train", number, prompt, 12, number) for number, prompt in enumerate(prompts)]
    engine = {"model": str(exported), "dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 64 << 20}
    sampling = {"temperature": 0.0, "top_p": 1.0, "stop_token_ids": [258]}
    job = Job(0, engine | {"generation_config": "vllm"}, None, "weights", sampling, len(requests), "requests")
    shards = Shards(directory / "generated")
    generate(job, shards, lambda: requests, lambda: vllm_python)
    model = AutoModelForCausalLM.from_pretrained(trained)
    for prompt, response in zip(prompts, shards.responses(), strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=258)
        assert response["tokens"] == expected[0, len(prompt) :].tolist()
