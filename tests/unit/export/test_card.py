"""The model card: front matter, the run's table, settings without paths or secrets."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from spin_plugin.export.base import hub_name_of, read_base
from spin_plugin.export.card import model_card
from spin_plugin.run.state import RunState

ENTRIES: list[dict[str, Any]] = [
    {
        "iteration": number,
        "pairs": {"train": {"pairs": 1000 * (number + 1), "real_mean": 18.2, "synthetic_mean": 20.5}},
        "metrics": {"spin/reward_margin": 2.1, "spin/accuracy": 0.9},
        "held_out": {
            "prompts": 40, "before": -0.5 + number / 10, "after": -0.4 + number / 10, "difference": 0.1,
            "interval": [0.05, 0.15],
        },
    }
    for number in range(2)
]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run from a local model, with everything in its configuration that must not be published."""
    base = tmp_path / "my-sft"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: llama3\nlicense_name: x\nbase_model: org/llama\n---\n# SFT\n")
    (tmp_path / "chat.jsonl").touch()
    return {
        "base_model": str(base),
        "output_dir": str(tmp_path / "my-spin"),
        "rl": "spin",
        "spin": {
            "iterations": 2,
            "beta": 0.3,
            "generation": {"vllm_python": str(tmp_path / "python"), "max_tokens": 12},
            "judge": {"function": "sqlite", "kwargs": {"database": str(tmp_path / "base.sqlite")}},
            "schedule": [{"learning_rate": 1e-6, "wandb_name": "mine"}, {"beta": 0.5}],
        },
        "datasets": [{"path": str(tmp_path / "chat.jsonl"), "type": "chat_template"}, {"path": "org/data"}],
        "learning_rate": 1e-5,
        "wandb_entity": "me",
        "deepspeed": str(tmp_path / "zero.json"),
    }


def front_matter(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


def test_front_matter_names_base_and_licence(config: dict[str, Any]) -> None:
    found = front_matter(model_card(RunState(config, ENTRIES, "0.2.0"), 1, adapter=False))
    assert found == {
        "base_model": "org/llama", "base_model_relation": "finetune", "license": "llama3", "license_name": "x",
        "datasets": ["org/data"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["spin", "self-play", "axolotl"],
    }  # fmt: skip


def test_paths_are_not_names_on_the_hub(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model's own base, a format with files, and a directory that has been moved since."""
    (Path(config["base_model"]) / "README.md").write_text("---\nbase_model: /home/me/secret/base\n---\n")
    config["datasets"] = [{"path": "json", "data_files": ["secret/chat.json.gz"], "type": "chat_template"}]
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    for base in (config["base_model"], "outputs/sft"):
        card = model_card(RunState(config | {"base_model": base}, ENTRIES, "0.2.0"), 1, adapter=False)
        assert front_matter(card).keys() & {"base_model", "base_model_relation", "datasets"} == set()
        assert "secret" not in card
        assert "huggingface.co" not in card
        assert "trained on `chat.json.gz`" in card
        assert f"`{Path(base).name}`" in card


def test_title_is_the_directory_s_name(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    card = model_card(RunState(config | {"output_dir": "."}, ENTRIES, "0.2.0"), 1, adapter=False)
    assert f"# {tmp_path.name}, iteration 1\n" in card


def test_adapter_is_one(config: dict[str, Any], tmp_path: Path) -> None:
    config |= {"base_model": "org/llama", "lora_model_dir": str(tmp_path / "sft-lora"), "adapter": "lora"}
    card = model_card(RunState(config, ENTRIES, "0.2.0"), 0, adapter=True)
    found = front_matter(card)
    assert (found["base_model_relation"], found["library_name"]) == ("adapter", "peft")
    assert "license" not in found, "the hub cannot be reached"
    assert "[org/llama](https://huggingface.co/org/llama) with the adapter `sft-lora`" in card


def test_card_of_a_base_without_a_card_leaves_unknown_fields_out(config: dict[str, Any]) -> None:
    for content in (None, "no front matter", "---\nlicense: [\n---\n", "---\n- a list\n---\n"):
        card = Path(config["base_model"]) / "README.md"
        card.unlink(missing_ok=True)
        if content is not None:
            card.write_text(content)
        found = front_matter(model_card(RunState(config, ENTRIES, "0.2.0"), 1, adapter=False))
        assert found.keys() & {"base_model", "base_model_relation", "license"} == set()
        assert read_base(config).name == "my-sft"


def test_table_is_the_run(config: dict[str, Any]) -> None:
    entries = [ENTRIES[0], ENTRIES[1] | {"lm_eval": {"gsm8k/acc": 0.35, "gsm8k/acc_stderr": 0.01}}]
    lines = [
        line
        for line in model_card(RunState(config, entries, "0.2.0"), 1, adapter=False).splitlines()
        if line.startswith("|")
    ]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["iteration", "pairs", "real", "synthetic", "margin", "accuracy", "held-out", "gsm8k/acc"],
        ["---"] * 8,
        ["start", "", "", "", "", "", "-0.5000", ""],
        ["0", "1,000", "18.2", "20.5", "2.1000", "0.9000", "-0.4000", ""],
        [f"**{cell}**" for cell in ("1", "2,000", "18.2", "20.5", "2.1000", "0.9000", "-0.3000", "0.35 ± 0.01")],
    ]


def test_settings_are_what_was_done(config: dict[str, Any], tmp_path: Path) -> None:
    card = model_card(RunState(config, ENTRIES, "0.2.0"), 1, adapter=False)
    block = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == {
        "spin": {
            "iterations": 2, "beta": 0.3, "generation": {"max_tokens": 12}, "judge": {"function": "sqlite"},
            "schedule": [{"learning_rate": 1e-6}, {"beta": 0.5}],
        },
        "learning_rate": 1e-5,
    }  # fmt: skip
    assert str(tmp_path) not in card
    assert "chat.jsonl" in card
    assert "spin-plugin 0.2.0" in card
    assert "arxiv.org/abs/2401.01335" in card


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        ("org/model", True), ("gpt2", True), ("./outputs/sft", False), ("/data/model", False), ("a/b/c", False),
        ("data.jsonl", False), ("org/data.jsonl", False), ("s3://bucket/data", False), ("https://x/y", False),
    ],
)  # fmt: skip
def test_names_on_the_hub(name: str, on_hub: bool) -> None:
    assert hub_name_of(name) == (name if on_hub else None)
