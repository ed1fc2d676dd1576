"""`axolotl spin export` writes a model that transformers loads, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import byte_tokenizer, make_model, spin_config, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_plugin.cli import spin
from spin_plugin.config.plain import without_secrets
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState
from spin_plugin.training.finish import write_card


def make_run(directory: Path, model: Path, *values: float, **changes: Any) -> RunDir:
    """Write a run whose iterations have these held-out log-probs; its models differ in their seed."""
    config = spin_config(directory, model, directory / "chat.jsonl", **changes)
    write_config(directory, config)
    run, finished = RunDir(directory / "run"), []
    for number, (before, after) in enumerate(zip((-1.0, *values), values, strict=False)):
        iteration = run.iteration(number)
        if config.get("adapter"):
            make_adapter(model, iteration.path, seed=number)
        else:
            make_model(iteration.path, seed=number + 1)
        iteration.config.write_text(yaml.safe_dump(config | {"torch_dtype": "torch.float32"}))
        iteration.metrics.write_text("{}")
        for name in ("synthetic", "pairs", "checkpoint-8"):
            (iteration.path / name).mkdir()
        (iteration.path / "training_args.bin").touch()
        check = {"prompts": 40, "before": before, "after": after, "difference": after - before}
        check["interval"] = [after - before - 0.01, after - before + 0.01]
        finished.append({"iteration": number, "pairs": {}, "metrics": {}, "held_out": check})
    run.write_state(RunState(without_secrets(config), finished, "0"))
    return run


def make_adapter(model: Path, path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    settings = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(base, settings).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def export(run: RunDir, target: str | Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(spin, ["export", str(run.root.with_name("config.yml")), str(target), *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(30)[None]).logits


def names(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*")}


@pytest.mark.parametrize(("options", "number"), [((), 1), (("--iteration", "last"), 2), (("--iteration", "0"), 0)])
def test_chosen_iteration_is_written(tmp_path: Path, llama: Path, options: tuple[str, ...], number: int) -> None:
    run = make_run(tmp_path, llama, -0.9, -0.7, -0.8)
    target = tmp_path / "deep" / "served"
    code, output = export(run, target, *options)
    assert code == 0, output
    assert output.startswith(f"spin: wrote {'the best, ' if not options else ''}iteration {number}")
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names(target) == expected | {"README.md"}
    loaded, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (target, run.iteration(number).path))
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(target)("count").input_ids
    card = (target / "README.md").read_text()
    assert f"| **{number}** |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("merge", [False, True])
def test_adapter_is_written_as_adapter_or_merged(tmp_path: Path, llama: Path, merge: bool) -> None:
    run = make_run(tmp_path, llama, -0.9, -0.8, adapter="lora", lora_r=4)
    target = tmp_path / "served"
    target.mkdir()  # empty
    code, output = export(run, target, *(["--merge"] if merge else []))
    assert code == 0, output
    assert not list(tmp_path.glob(".*"))
    base = AutoModelForCausalLM.from_pretrained(llama)
    expected = logits(PeftModel.from_pretrained(base, run.iteration(1).path))
    if merge:
        found = AutoModelForCausalLM.from_pretrained(target)
        assert not list(target.glob("adapter*"))
    else:
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), target)
        assert not list(target.glob("model*"))
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(target)("count").input_ids
    assert f"library_name: {'transformers' if merge else 'peft'}" in (target / "README.md").read_text()


def test_merge_without_the_base_model_is_one_line(tmp_path: Path, llama: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    run = make_run(tmp_path, base, -0.9, adapter="lora", lora_r=4)
    shutil.rmtree(base)
    code, output = export(run, tmp_path / "served", "--merge")
    assert (code, output.count("\n")) == (1, 1), output
    assert output.startswith(f"spin: error: base_model: {base} is neither a directory nor a model on the hub")


def test_merged_chain_is_written_merged(tmp_path: Path, llama: Path) -> None:
    run = make_run(tmp_path, llama, -0.9, adapter="lora", spin={"iterations": 1, "adapter_chain": "merge"})
    make_model(run.iteration(0).merged, seed=5)
    for options in ([], ["--merge"]):
        target = tmp_path / f"served{len(options)}"
        assert export(run, target, *options)[0] == 0
        found, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (target, run.iteration(0).merged))
        torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=0)
        assert "library_name: transformers" in (target / "README.md").read_text()


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, llama: Path) -> None:
    run = make_run(tmp_path, llama, -0.9, -0.7, -0.8)
    state = run.read_state()
    assert state is not None
    state.finished[1]["removed"] = ["model"]
    run.write_state(state)
    used, file = tmp_path / "used", tmp_path / "file"
    used.mkdir()
    (used / "mine.txt").touch()
    file.touch()
    broken = run.iteration(2).path / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    unmeasured = RunDir(tmp_path / "other" / "run")
    shutil.copytree(run.root, unmeasured.root)
    write_config(tmp_path / "other", yaml.safe_load((tmp_path / "config.yml").read_text()) | {
        "output_dir": str(unmeasured.root)
    })  # fmt: skip
    for entry in state.finished:
        del entry["held_out"]
    unmeasured.write_state(state)
    target = tmp_path / "served"
    for which, to, options, expected in (
        (run, target, [], "--iteration best: `spin.keep` has removed the model of iteration 1; use --iteration 0 or 2"),
        (run, used, ["--iteration", "0"], f"{used}: exists; use a new directory"),
        (run, file, ["--iteration", "0"], f"{file}: exists; use a new directory"),
        (run, target, ["--iteration", "3"], "--iteration 3: use best, last or 0…2; these iterations are finished"),
        (run, target, ["--iteration", "newest"], "--iteration newest: use best, last or 0…2"),
        (run, target, ["--iteration", "0", "--merge"], "--merge: this run trains all weights"),
        (run, target, ["--iteration", "last"], f"{broken} is truncated"),
        (unmeasured, target, [], "--iteration best: no iteration was measured; use --iteration last"),
    ):
        code, output = export(which, to, *options)
        assert (code, output.count("\n")) == (1, 1), output
        assert output.startswith(f"spin: error: {expected}")
        assert not target.exists()
    unmeasured.write_state(RunState({}, [], "0"))
    assert "no iteration is finished yet" in export(unmeasured, target)[1]


def test_copy_that_differs_is_refused(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that returns other bytes than were written."""
    run = make_run(tmp_path, llama, -0.9)
    copy = shutil.copyfile

    def damaged(source: Path, target: Path) -> None:
        copy(source, target)
        if target.suffix == ".safetensors":
            content = bytearray(target.read_bytes())
            content[-1] ^= 1
            target.write_bytes(content)

    monkeypatch.setattr(shutil, "copyfile", damaged)
    code, output = export(run, tmp_path / "served")
    assert code == 1
    assert "differs from" in output
    assert not (tmp_path / "served").exists()


def test_card_of_a_trained_iteration_that_is_not_finished(tmp_path: Path, llama: Path) -> None:
    """It is uploaded before run.json names the iteration."""
    run = make_run(tmp_path, llama, -0.9, -0.8)
    state = run.read_state()
    assert state is not None
    last = state.finished.pop()
    run.write_state(state)
    write_card(run, 1, {}, {"held_out": last["held_out"]})
    card = (run.iteration(1).path / "README.md").read_text()
    assert "| **1** |" in card
    assert "**-0.8000**" in card
    assert "from scratch" not in card
