"""Bad input gives one line with the key or file and the fix, exits with 1, and destroys nothing."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Jobs
from safetensors.torch import load_file, save_file
from tiny import chat_rows, spin_config, write_config, write_jsonl

from spin_plugin.versions import discovers_plugins

Preprocess = Callable[[Path], str]


@pytest.fixture
def preprocess(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Preprocess]:
    """Run `axolotl preprocess` in this process and return its error line; asserts exit code 1."""
    from axolotl.cli.preprocess import do_cli
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.tee import close_debug_log

    monkeypatch.setattr(sys, "argv", ["axolotl"])

    def run(config: Path) -> str:
        PluginManager._instance = None
        with pytest.raises(SystemExit) as stopped:
            do_cli(config=str(config))
        assert stopped.value.code == 1
        errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("spin: error: ")]
        assert len(errors) == 1
        return errors[0]

    yield run
    close_debug_log()
    PluginManager._instance = None


def config(directory: Path, llama: Path, data: Path, **changes: Any) -> Path:
    return write_config(directory, spin_config(directory, llama, data, **changes))


@pytest.mark.parametrize(
    ("spin", "words"),
    [
        ({"betta": 0.2}, ("spin.betta", "`beta`")),
        ({"beta": -1}, ("spin.beta", "greater than 0", "-1")),
        ({"generation": {"temprature": 0.7}}, ("spin.generation.temprature", "`temperature`")),
        ({"loss_type": "dpo"}, ("spin.loss_type", "logistic")),
        (
            {"iterations": 2, "schedule": [{"learning_rat": 1}, {}]},
            ("spin.schedule[0].learning_rat", "`learning_rate`"),
        ),
    ],
)
def test_wrong_value_in_the_block(
    tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess, spin: dict[str, Any], words: tuple[str, ...]
) -> None:
    error = preprocess(config(tmp_path, llama, chat_data, spin=spin))
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_missing_dataset(tmp_path: Path, llama: Path, preprocess: Preprocess) -> None:
    error = preprocess(config(tmp_path, llama, tmp_path / "nowhere.jsonl"))
    assert "datasets[0].path" in error
    assert "nowhere.jsonl does not exist" in error


def test_empty_dataset(tmp_path: Path, llama: Path, preprocess: Preprocess) -> None:
    error = preprocess(config(tmp_path, llama, write_jsonl(tmp_path / "empty.jsonl", [])))
    assert "empty.jsonl" in error


def test_damaged_row_is_reported_with_its_cause(tmp_path: Path, llama: Path, preprocess: Preprocess) -> None:
    data = write_jsonl(tmp_path / "damaged.jsonl", chat_rows(8))
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:5], lines[5][:20], *lines[6:]]))
    error = preprocess(config(tmp_path, llama, data))
    assert "damaged.jsonl" in error
    assert "DatasetGenerationError" not in error, "the cause, not its wrapper"


def test_dataset_without_an_assistant_turn(tmp_path: Path, llama: Path, preprocess: Preprocess) -> None:
    rows = [{"messages": [{"role": "user", "content": f"hello {number}"}]} for number in range(8)]
    error = preprocess(config(tmp_path, llama, write_jsonl(tmp_path / "users.jsonl", rows)))
    assert "datasets" in error
    assert "assistant" in error or "response" in error, error


def test_every_prompt_too_long(tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess) -> None:
    error = preprocess(config(tmp_path, llama, chat_data, sequence_len=16))
    assert "sequence_len (16)" in error


def test_no_end_token_in_the_labels(tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess) -> None:
    rows = [
        {"segments": [{"label": False, "text": f"q{n} "}, {"label": True, "text": f"answer {n}"}]} for n in range(40)
    ]
    data = write_jsonl(tmp_path / "segments.jsonl", rows)
    datasets = [{"path": str(data), "ds_type": "json", "type": "input_output"}]
    error = preprocess(config(tmp_path, llama, chat_data, datasets=datasets, chat_template=None, eot_tokens=None))
    assert "end token" in error


def test_model_without_tokenizer(tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "no tokenizer" in preprocess(config(tmp_path, model, chat_data))


def test_truncated_weights(tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = preprocess(config(tmp_path, model, chat_data))
    assert "model.safetensors is truncated" in error


@pytest.mark.parametrize("damage", ["NaN", "missing"])
def test_damaged_weights_that_vllm_would_load_are_refused_before_it_starts(
    tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess, vllm_python: Path, damage: str
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    broken = tensors.pop("model.layers.1.mlp.up_proj.weight")
    if damage == "NaN":
        tensors["model.layers.1.mlp.up_proj.weight"] = broken * torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    error = preprocess(config(tmp_path, model, chat_data))
    assert "model.layers.1.mlp.up_proj.weight" in error
    assert damage in error
    assert not (tmp_path / "run/iteration-0/synthetic/vllm.log").exists()


def test_tokens_outside_the_vocabulary(tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess) -> None:
    from tiny import make_model

    model = make_model(tmp_path / "model", vocab_size=258, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert "outside the vocabulary" in preprocess(config(tmp_path, model, chat_data))


def test_no_vllm(tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess) -> None:
    spin = {"iterations": 1, "generation": {"vllm_python": sys.executable}}
    error = preprocess(config(tmp_path, llama, chat_data, spin=spin))
    assert "spin.generation.vllm_python" in error
    assert "scripts/setup.sh" in error


def test_spin_block_without_rl(tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess) -> None:
    assert "`rl: spin` is missing" in preprocess(config(tmp_path, llama, chat_data, rl=None))


@pytest.mark.parametrize(
    ("content", "expected"), [(b"\x00\xff\xfe\x93model", "text file"), (b"rl: SPIN\noutput_dir: x\n", "lower case")]
)
def test_status_of_a_file_that_is_not_a_configuration(tmp_path: Path, content: bytes, expected: str) -> None:
    from click.testing import CliRunner

    from spin_plugin.cli import spin

    (tmp_path / "file").write_bytes(content)
    done = CliRunner().invoke(spin, ["status", str(tmp_path / "file")])
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith(f"spin: error: {tmp_path / 'file'}: not a ")
    assert expected in line


def test_output_dir_of_another_config(tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess) -> None:
    from spin_plugin.run.directory import RunDir
    from spin_plugin.run.state import RunState

    run = tmp_path / "run"
    first = spin_config(tmp_path, llama, chat_data)
    shard = run / "iteration-0/synthetic/shard-00000.jsonl"
    shard.parent.mkdir(parents=True)
    shard.write_text("generated\n")
    RunDir(run).write_state(RunState(first))
    before = (run / "run.json").read_bytes()
    error = preprocess(config(tmp_path, llama, chat_data, learning_rate=5e-4))
    assert "learning_rate" in error
    assert "another output_dir" in error
    assert (run / "run.json").read_bytes() == before
    assert shard.read_text() == "generated\n"


def test_iteration_with_only_warmup_steps_is_warned_about(
    tmp_path: Path, llama: Path, chat_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from axolotl.utils.dict import DictDefault

    from spin_plugin.config.lower import lower
    from spin_plugin.training.iteration import Iteration
    from spin_plugin.training.trackers import Trackers

    cfg = DictDefault(spin_config(tmp_path, llama, chat_data, max_steps=4, world_size=1))
    lowered = lower(cfg)
    iteration = Iteration(cfg, lowered, None, Trackers(cfg, lowered.config, lowered.run))
    iteration.pairs = SimpleNamespace(train=range(100))  # type: ignore[assignment]
    for warmup in (0, 3, 4):
        assert capsys.readouterr().out == ""
        iteration.check_trainer(SimpleNamespace(args=SimpleNamespace(get_warmup_steps=lambda _steps, w=warmup: w)))
    assert "all 4 steps of the iteration are warm-up" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(discovers_plugins(), reason="Axolotl discovers the plugin: test_other_runs.py")
def test_plugin_missing_from_the_list(tmp_path: Path, llama: Path, chat_data: Path, exit_codes: Jobs) -> None:
    """Without the plugin, Axolotl itself refuses `rl: spin`."""
    refused = str(config(tmp_path, llama, chat_data, plugins=None))
    assert refused in exit_codes([{"config": refused, "processes": 1}])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_vllm_refuses_to_start(
    tmp_path: Path, llama: Path, chat_data: Path, preprocess: Preprocess, vllm_python: Path
) -> None:
    spin = {"iterations": 1, "generation": {"vllm_kwargs": {"quantization": "nonsense"}}}
    error = preprocess(config(tmp_path, llama, chat_data, spin=spin))
    assert "nonsense" in error
    assert "vllm.log" in error


@pytest.mark.slow
def test_multi_turn_conversations_need_not_fit_entirely(
    tmp_path: Path, llama: Path, run_jobs: Callable[..., None], vllm_python: Path
) -> None:
    """Prompts that are too long are left out and counted; the others are used."""
    rows = [*chat_rows(4), *chat_rows(2, turns=8)]
    data = write_jsonl(tmp_path / "chat.jsonl", rows)
    run_jobs((config(tmp_path, llama, data), 1), command="preprocess")
    assert "over sequence_len" in (tmp_path / "rank-0.log").read_text()
