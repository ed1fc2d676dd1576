"""`axolotl spin train`, `init`, `setup` and `config-schema`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import ROOT
from tiny import chat_rows, spin_config, write_config, write_jsonl

from spin_plugin.args import GenerationArgs, SpinArgs
from spin_plugin.cli import spin
from spin_plugin.cli.config_file import read_config
from spin_plugin.cli.init import edit, spin_changes
from spin_plugin.config.lower import lower
from spin_plugin.objective.decline import Comparison
from spin_plugin.run.lock import ALL_ITERATIONS, locked
from spin_plugin.versions import discovers_plugins

train_module = sys.modules["spin_plugin.cli.train"]  # `spin_plugin.cli.train` itself is the command


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(spin, [str(argument) for argument in arguments])


# --- train -------------------------------------------------------------------------------------

# Replaces `axolotl train`, which only the slow tests run: logs its arguments, then acts according to `behavior`.
STAND_IN = """#!{python}
import json, os, subprocess, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState
directory = Path({directory!r})
with open(directory / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
behavior = (directory / "behavior").read_text()
if behavior == "wait":  # like accelerate's launcher, which does not forward signals
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (directory / "pids").write_text(json.dumps([os.getpid(), child.pid]))
    sys.exit(child.wait())
if behavior == "fail":
    print("loading\\nTraceback: out of luck", file=sys.stderr)
    sys.exit(3)
if behavior == "interrupt":
    sys.exit(130)
if behavior == "refuse":
    print("loading\\nspin: error: beta: too high")
    sys.exit(1)
if behavior == "finish":
    print("loading\\nspin: iteration finished")
if behavior == "finish":
    run = RunDir(directory / "run")
    run.root.mkdir(exist_ok=True)
    state = run.read_state() or RunState({{}}, [], "0")
    checked = directory / f"held-out-{{len(state.finished)}}"
    held_out = {{"held_out": json.loads(checked.read_text())}} if checked.exists() else {{}}
    state.finished.append({{"iteration": len(state.finished), "pairs": {{}}, "metrics": {{}}}} | held_out)
    run.write_state(state)
"""
WORSE = Comparison(64, -0.4, -0.6, -0.2, (-0.3, -0.1))
UNCLEAR = Comparison(64, -0.4, -0.41, -0.01, (-0.1, 0.08))


@pytest.fixture
def config(tmp_path: Path, llama: Path, chat_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three iterations; each call of its `axolotl train`, a stand-in, finishes one."""
    stand_in = tmp_path / "axolotl"
    stand_in.write_text(STAND_IN.format(python=sys.executable, paths=[str(ROOT)], directory=str(tmp_path)))
    stand_in.chmod(0o755)
    (tmp_path / "behavior").write_text("finish")
    monkeypatch.setattr(train_module, "_axolotl", lambda: str(stand_in))
    return write_config(tmp_path, spin_config(tmp_path, llama, chat_data, spin={"iterations": 3}))


def calls(config: Path) -> list[list[str]]:
    file = config.with_name("calls")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_each_iteration_is_trained_by_its_own_command(config: Path) -> None:
    assert invoke("train", config).exit_code == 0
    assert calls(config) == [["train", str(config), "--", "--quiet"]] * 3
    done = invoke("train", config)
    assert done.exit_code == 0
    assert "all 3 iterations" in done.output
    assert len(calls(config)) == 3


def test_iterations_option_limits_the_number_of_iterations(config: Path) -> None:
    assert invoke("train", config, "--iterations", "2").exit_code == 0
    assert len(calls(config)) == 2
    assert invoke("train", config, "--iterations", "7").exit_code == 0
    assert len(calls(config)) == 3
    assert invoke("train", config, "--iterations", "0").exit_code == 2


@pytest.mark.parametrize(
    "arguments", [["--num_processes", "8"], ["--launcher", "torchrun", "--", "--nproc_per_node=8"], ["--use-ray"]]
)
def test_launcher_arguments_are_passed_on(config: Path, arguments: list[str]) -> None:
    assert invoke("train", config, "--iterations", "1", "--", *arguments).exit_code == 0
    assert calls(config) == [["train", str(config), *arguments]]


def test_iteration_after_a_worse_one_is_not_started(config: Path) -> None:
    """Iteration 0 is within noise, 1 is worse: a good end. A rerun says why, and a looser option goes on."""
    for number, result in enumerate((UNCLEAR, WORSE)):
        config.with_name(f"held-out-{number}").write_text(json.dumps(result.as_dict()))
    assert invoke("train", config).exit_code == 0  # the replaced `axolotl train` does not say why
    done = invoke("train", config)
    assert done.exit_code == 0
    *_, line = done.output.splitlines()
    assert line.startswith(
        "spin: iteration 1 made held-out real responses less likely, −0.4000 → −0.6000 nats per token (−0.2000, 95% "
        "interval −0.3000…−0.1000, 64 prompts), so iteration 2 is not trained; best: iteration 0 (held_out −0.4100), "
        "which `axolotl spin export CONFIG DIR` writes; "
    )
    assert "set `spin.stop: off`" in line
    assert "`axolotl spin reset CONFIG --iteration 1`" in line
    assert all(name in line for name in ("learning_rate", "loss_type: space", "real_penalty", "sft_weight"))
    assert len(calls(config)) == 2

    settings = yaml.safe_load(config.read_text())
    settings["spin"]["stop"] = "off"
    write_config(config.parent, settings)
    assert invoke("train", config).exit_code == 0
    assert len(calls(config)) == 3


def test_run_that_its_first_iteration_made_worse_is_an_error(config: Path) -> None:
    config.with_name("held-out-0").write_text(json.dumps(WORSE.as_dict()))
    for _ in range(2):
        done = invoke("train", config)
        assert done.exit_code == 1
        *_, line = done.output.splitlines()
        assert line.startswith("spin: error: iteration 0 made held-out real responses less likely")
        assert "no iteration is better than the model that the run started from" in line
        assert len(calls(config)) == 1


def test_ruined_model_is_an_error_also_if_no_further_iteration_was_asked_for(config: Path) -> None:
    config.with_name("held-out-0").write_text(json.dumps(WORSE.as_dict()))
    done = invoke("train", config, "--iterations", "1")
    assert done.exit_code == 1
    assert "spin: error: iteration 0 made held-out real responses less likely" in done.output


def test_stopped_run_is_evaluated_by_axolotl_train(config: Path) -> None:
    """A kill has interrupted the evaluation of the iteration after which the run stops."""
    for number, result in enumerate((UNCLEAR, WORSE)):
        config.with_name(f"held-out-{number}").write_text(json.dumps(result.as_dict()))
    settings = yaml.safe_load(config.read_text())
    settings["plugins"].append("axolotl.integrations.lm_eval.LMEvalPlugin")
    write_config(config.parent, settings | {"lm_eval_tasks": ["tiny"]})
    assert invoke("train", config).exit_code == 0
    assert len(calls(config)) == 2
    config.with_name("behavior").write_text("nothing")
    _, run = read_config(config)
    run.iteration(1).path.mkdir(parents=True)
    (run.iteration(1).path / "model.safetensors").touch()
    assert invoke("train", config).exit_code == 0
    assert len(calls(config)) == 3
    run.iteration(1).lm_eval_failure.touch()
    assert invoke("train", config).exit_code == 0
    assert len(calls(config)) == 3


def test_second_command_is_refused_at_once_also_between_two_iterations(config: Path) -> None:
    _, run = read_config(config)
    run.root.mkdir()
    with locked(run.root, ALL_ITERATIONS):
        done = invoke("train", config)
    assert done.exit_code == 1
    assert f"spin: error: output_dir: {run.root} is in use by process {os.getpid()} on " in done.output
    assert not run.started()
    assert invoke("train", config).exit_code == 0


def test_run_without_improvement_for_patience_iterations_ends(config: Path) -> None:
    for number, after in enumerate((-0.3, -0.305)):
        before = -0.4 if not number else -0.3
        result = Comparison(64, before, after, after - before, (after - before - 0.05, after - before + 0.05))
        config.with_name(f"held-out-{number}").write_text(json.dumps(result.as_dict()))
    settings = yaml.safe_load(config.read_text())
    settings["spin"]["stop"] = {"metric": "held_out"}
    write_config(config.parent, settings)
    for _ in range(2):
        done = invoke("train", config)
        assert done.exit_code == 0
        assert len(calls(config)) == 2
    assert "held_out has not improved since iteration 0 (spin.stop.patience: 1), so iteration 2" in done.output
    assert "best: iteration 0 (held_out −0.3000)" in done.output
    assert "a larger `spin.stop.patience`" in done.output


@pytest.mark.parametrize(("scores", "trained"), [({"gsm8k/f1": 0.5}, 1), (None, 2)])
def test_metric_that_was_not_measured_is_an_error(config: Path, scores: dict[str, float] | None, trained: int) -> None:
    """An evaluation that is missing as a whole may have been interrupted, so that only the one before counts."""
    config.with_name("held-out-0").write_text(json.dumps(UNCLEAR.as_dict()))
    settings = yaml.safe_load(config.read_text())
    settings["spin"]["stop"] = {"metric": "gsm8k/acc"}
    write_config(config.parent, settings)
    assert invoke("train", config, "--iterations", "1").exit_code == 0
    _, run = read_config(config)
    state = run.read_state()
    assert state is not None
    state.finished[0] |= {"lm_eval": scores} if scores else {}
    run.write_state(state)
    done = invoke("train", config)
    assert done.exit_code == 1
    known = "gsm8k/f1 or held_out" if scores else "held_out"
    assert f"spin.stop.metric: gsm8k/acc was not measured in iteration 0; use {known}, or `spin.s" in done.output
    assert len(calls(config)) == trained


def test_iteration_with_a_lower_score_of_the_judge_is_handled_alike(config: Path) -> None:
    """The next iteration's preparation stores the comparison; until the mark is removed, nothing is trained."""
    assert invoke("train", config, "--iterations", "2").exit_code == 0
    _, run = read_config(config)
    state = run.read_state()
    assert state is not None
    state.finished[1]["judge"] = Comparison(40, 0.6, 0.4, -0.2, (-0.3, -0.1)).as_dict()
    run.write_state(state)
    done = invoke("train", config)
    assert done.exit_code == 0
    assert "iteration 1 lowered the judge's score of held-out responses, +0.6000 → +0.4000 mean score (" in done.output
    assert "so iteration 2 is not trained; best: iteration 0 (judge 0.6000)" in done.output
    content = json.loads(invoke("status", config, "--json").output)
    assert [entry["state"] for entry in content["iterations"]] == ["finished", "finished, worse", "not started"]
    assert content["best"] == {"iteration": 0, "metric": "judge", "value": 0.6, "worse_than_start": False}
    assert content["stopped"] in done.output
    run.iteration(0).path.mkdir(parents=True, exist_ok=True)  # the replaced `axolotl train` makes none
    assert invoke("reset", config, "--iteration", "1", "--yes").exit_code == 0
    assert invoke("train", config).exit_code == 0
    assert len(calls(config)) == 4


def test_worse_last_iteration_ends_the_run_normally(config: Path) -> None:
    config.with_name("held-out-2").write_text(json.dumps(WORSE.as_dict()))
    assert invoke("train", config).exit_code == 0
    assert invoke("train", config).exit_code == 0
    assert len(calls(config)) == 3


def test_reset_of_a_worse_iteration_lets_the_run_go_on(config: Path) -> None:
    config.with_name("held-out-0").write_text(json.dumps(WORSE.as_dict()))
    assert invoke("train", config).exit_code == 1
    config.with_name("held-out-0").unlink()
    assert invoke("reset", config, "--iteration", "0", "--yes").exit_code == 0
    assert invoke("train", config).exit_code == 0
    assert len(calls(config)) == 4


def test_status_marks_worse_iterations(config: Path) -> None:
    """Also in JSON; the entries of earlier versions have no check."""
    for number, result in enumerate((WORSE, UNCLEAR)):
        config.with_name(f"held-out-{number}").write_text(json.dumps(result.as_dict()))
    settings = yaml.safe_load(config.read_text())
    settings["spin"]["stop"] = "off"
    write_config(config.parent, settings)
    assert invoke("train", config).exit_code == 0
    content = json.loads(invoke("status", config, "--json").output)
    assert [entry["state"] for entry in content["iterations"]] == ["finished, worse", "finished", "finished"]
    assert content["iterations"][0]["held_out"] == json.loads(json.dumps(WORSE.as_dict()))
    assert "held_out" not in content["iterations"][2]
    rows = [line.split("  ") for line in invoke("status", config).output.splitlines() if "finished" in line]
    assert [row[1].strip() for row in rows] == ["finished, worse", "finished", "finished"]


def test_first_failure_stops_with_its_exit_code(config: Path) -> None:
    config.with_name("behavior").write_text("fail")
    assert invoke("train", config).exit_code == 3
    assert len(calls(config)) == 1


def test_report_is_written_where_training_fails_and_at_no_other_end(config: Path) -> None:
    """By this process, when all ranks have ended; not before training, and not where the user waits for the end."""
    assert invoke("train", config, "--iterations", "1").exit_code == 0
    run, behavior = read_config(config)[1], config.with_name("behavior")
    behavior.write_text("fail")
    done = invoke("train", config)
    assert done.exit_code == 3
    assert not run.report.exists()
    state = run.read_state()
    assert state is not None
    state.config["base_model"] = "model"
    run.write_state(state)
    run.iteration(1).path.mkdir()
    run.iteration(1).metrics.write_text("")
    behavior.write_text("interrupt")
    assert invoke("train", config).exit_code == 130
    assert not run.report.exists()
    behavior.write_text("fail")
    done = invoke("train", config)
    assert done.exit_code == 3
    assert done.output.splitlines()[-1] == f"spin: what self-play did: {run.report}"
    assert run.report.exists()


def test_unfinished_iteration_is_an_error_despite_exit_code_0(config: Path) -> None:
    config.with_name("behavior").write_text("nothing")
    done = invoke("train", config)
    assert done.exit_code == 1
    assert "iteration 0 was not finished" in done.output
    assert len(calls(config)) == 1


@pytest.mark.parametrize(
    ("behavior", "shown", "hidden"),
    [
        ("finish", ["spin: iteration finished"], "loading"),
        ("refuse", ["spin: error: beta: too high"], "loading"),
        ("fail", ["loading", "Traceback: out of luck", "spin: the end of "], "spin: error"),
    ],
)
def test_only_what_matters_is_shown_and_all_is_logged(
    config: Path, behavior: str, shown: list[str], hidden: str
) -> None:
    config.with_name("behavior").write_text(behavior)
    done = invoke("train", config, "--iterations", "1")
    assert all(line in done.output for line in shown), done.output
    assert hidden not in done.output
    (log,) = (config.parent / "run/logs").glob("iteration-0-*.log")
    assert log.read_text().startswith("loading\n")


def test_verbose_writes_no_log(config: Path) -> None:
    config.with_name("behavior").write_text("fail")
    assert invoke("train", config, "--verbose").exit_code == 3
    assert not (config.parent / "run/logs").exists()


def test_sigterm_stops_training(config: Path) -> None:
    """Docker and Slurm signal only the first process, and the launcher does not forward it."""
    config.with_name("behavior").write_text("wait")
    program = (
        "import sys; from spin_plugin.cli import spin; module = sys.modules['spin_plugin.cli.train'];"
        f"module._axolotl = lambda: {str(config.with_name('axolotl'))!r}; spin(['train', {str(config)!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        pids = config.with_name("pids")
        while not (pids.exists() and pids.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        shown, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert "the end of" not in shown, "the user knows why"
    assert not [pid for pid in json.loads(pids.read_text()) if psutil.pid_exists(pid)]
    assert len(calls(config)) == 1


# --- init --------------------------------------------------------------------------------------


@pytest.fixture
def sft(tmp_path: Path) -> dict[str, Any]:
    data = write_jsonl(tmp_path / "chat.jsonl", chat_rows(2))
    return {
        "base_model": "org/base",
        "output_dir": "./outputs/sft",
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template"}],
        "learning_rate": 2e-5,
        "micro_batch_size": 2,
    }


def written(directory: Path, sft: dict[str, Any], text: str | None = None) -> tuple[Result, dict[str, Any]]:
    config = directory / "sft.yml"
    config.write_text(text or yaml.safe_dump(sft))
    done = invoke("init", config)
    target = directory / "sft-spin.yml"
    return done, yaml.safe_load(target.read_text()) if target.exists() else {}


def test_full_fine_tune_starts_from_the_sft_model(tmp_path: Path, sft: dict[str, Any]) -> None:
    done, config = written(tmp_path, sft | {"warmup_steps": 100, "hub_model_id": "me/sft", "revision_of_model": "abc"})
    assert done.exit_code == 0, done.output
    assert (config["base_model"], config["output_dir"]) == ("./outputs/sft", "./outputs/sft-spin")
    assert config["learning_rate"] == pytest.approx(1e-6)
    assert config["warmup_ratio"] == 0.1
    assert not config.keys() & {"warmup_steps", "hub_model_id", "revision_of_model", "lora_model_dir"}
    assert (config["rl"], config["spin"]) == ("spin", {"iterations": 3, "sft_weight": 5.0})
    assert ("plugins" in config) is not discovers_plugins()
    assert config["datasets"] == sft["datasets"]
    assert "outputs/sft: contains no model yet" in done.output


def test_adapter_run_starts_from_the_sft_adapter(tmp_path: Path, sft: dict[str, Any]) -> None:
    lora = {"adapter": "lora", "lora_r": 8, "learning_rate": 2e-4, "revision_of_model": "abc", "warmup_ratio": 0.03}
    _, config = written(tmp_path, sft | lora)
    assert (config["base_model"], config["lora_model_dir"]) == ("org/base", "./outputs/sft")
    assert (config["adapter"], config["lora_r"], config["revision_of_model"]) == ("lora", 8, "abc")
    assert config["learning_rate"] == pytest.approx(1e-5)
    assert config["warmup_ratio"] == 0.03


@pytest.mark.parametrize(("rate", "adapter", "expected"), [(1e-3, None, 5e-6), (1e-2, "lora", 1e-4)])
def test_learning_rate_never_exceeds_the_warning_threshold(
    tmp_path: Path, sft: dict[str, Any], rate: float, adapter: str | None, expected: float
) -> None:
    changes = spin_changes(sft | {"learning_rate": rate, "adapter": adapter}, tmp_path)
    assert changes["learning_rate"] == pytest.approx(expected)


COMMENTED = """# our SFT
base_model: org/base  # the base
learning_rate: 2e-5 # tuned
warmup_steps: 10 # removed
datasets:
  # the good ones
  - path: {data}
    ds_type: json
    type: chat_template
output_dir: outputs/sft
"""


def test_comments_and_order_are_kept(tmp_path: Path, sft: dict[str, Any]) -> None:
    text = COMMENTED.format(data=sft["datasets"][0]["path"])
    done, _ = written(tmp_path, {}, text)
    assert done.exit_code == 0, done.output
    changed = (tmp_path / "sft-spin.yml").read_text()
    assert changed.startswith("# our SFT\nbase_model: outputs/sft  # the base\nlearning_rate: 1.0e-06 # tuned\n")
    assert "  # the good ones\n" in changed
    assert "warmup_steps" not in changed


def test_edit_values_that_span_lines() -> None:
    text = "a:\n  - 1\n  - 2\nb: {c: 1}\n\n# about d\nd: |\n  x\n  y\ne: 5"
    changes = {"a": 3, "b": None, "d": [1], "f": {"g": 1}, "h": None}
    assert yaml.safe_load(edit(text, changes)) == {"a": 3, "d": [1], "e": 5, "f": {"g": 1}}
    assert "# about d" in edit(text, changes)


@pytest.mark.parametrize(
    "text",
    [
        "rate: &rate 2e-4\nbase_model: b\noutput_dir: o\nlearning_rate: *rate\ndatasets: [{path: d}]\n",
        "base_model: &b x\nname: *b\noutput_dir: o\nlearning_rate: 1e-5\ndatasets: [{path: d}]\n",
        "{base_model: b, output_dir: o, learning_rate: 1e-5, datasets: [{path: d}]}\n",
        "x: &x {warmup_steps: 3}\n<<: *x\nbase_model: b\noutput_dir: o\nlearning_rate: 1e-5\ndatasets: [{path: d}]\n",
    ],
)
def test_yaml_that_cannot_be_edited_is_rejected_and_nothing_is_written(tmp_path: Path, text: str) -> None:
    done, config = written(tmp_path, {}, text)
    assert done.exit_code == 1
    assert "cannot be edited" in done.output
    assert not config


def test_missing_output_directory_is_reported(tmp_path: Path, sft: dict[str, Any]) -> None:
    config = tmp_path / "sft.yml"
    config.write_text(yaml.safe_dump(sft))
    for command in (["init", config], ["config-schema"]):
        done = invoke(*command, "--output", tmp_path / "nowhere/spin.yml")
        assert done.exit_code == 1
        assert "nowhere does not exist" in done.output


def test_written_file_is_a_spin_configuration(tmp_path: Path, sft: dict[str, Any]) -> None:
    _, config = written(tmp_path, sft | {"output_dir": str(tmp_path / "sft")})
    assert lower(config).spin.iterations == 3


def test_existing_file_is_not_overwritten(tmp_path: Path, sft: dict[str, Any]) -> None:
    (tmp_path / "sft-spin.yml").write_text("mine")
    done, _ = written(tmp_path, sft)
    assert done.exit_code == 1
    assert "sft-spin.yml: already exists" in done.output
    assert (tmp_path / "sft-spin.yml").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dir": None}, "output_dir is missing"),
        ({"rl": "dpo"}, "`rl: dpo` is not SFT"),
        ({"learning_rate": "fast"}, "learning_rate: fast is not a number"),
        ({"reward_model": True}, "reward_model: cannot be used"),
        ({"datasets": [{"path": "nowhere.jsonl", "type": "alpaca"}]}, "nowhere.jsonl does not exist"),
    ],
)
def test_unsuitable_sft_configuration_is_rejected(
    tmp_path: Path, sft: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    done, config = written(tmp_path, sft | change)
    assert done.exit_code == 1
    assert message in done.output
    assert not config


def test_template_is_a_complete_configuration(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, chat_data: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("init").exit_code == 0
    config = yaml.safe_load((tmp_path / "spin.yml").read_text())
    assert ("plugins" in config) is not discovers_plugins()
    config["datasets"][0]["path"] = str(chat_data)
    config["base_model"] = str(llama)
    assert lower(config).spin.iterations == 3


# --- setup -------------------------------------------------------------------------------------


def test_foreign_environment_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env/precious").touch()
    done = invoke("setup", "--path", tmp_path / "env")
    assert done.exit_code == 1
    assert "was not created by this command" in done.output
    assert (tmp_path / "env/precious").exists()


def test_complete_environment_is_not_recreated(vllm_python: Path) -> None:
    """The checkout's environment includes Ray, so it is complete with and without `--ray`."""
    directory = vllm_python.parents[1]
    before = (directory / "made-from").stat().st_mtime_ns
    for options in ([], ["--ray"]):
        done = invoke("setup", "--path", directory, *options)
        assert done.exit_code == 0, done.output
        assert "is ready" in done.output
    assert (directory / "made-from").stat().st_mtime_ns == before


# --- config-schema -----------------------------------------------------------------------------


def test_schema_has_the_keys_of_axolotl_and_spin(tmp_path: Path) -> None:
    assert invoke("config-schema", "--output", tmp_path / "schema.json").exit_code == 0
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert {"base_model", "datasets", "vllm", "rl", "spin"} <= schema["properties"].keys()
    block, generation = schema["$defs"]["SpinArgs"], schema["$defs"]["GenerationArgs"]
    assert block["properties"].keys() == SpinArgs.model_fields.keys()
    assert generation["properties"].keys() == GenerationArgs.model_fields.keys()
    assert all(field["description"] for field in block["properties"].values())
    assert {"const": "spin"} in schema["properties"]["rl"]["anyOf"]


def test_schema_of_one_key() -> None:
    done = invoke("config-schema", "--field", "spin")
    assert "SpinArgs" in json.loads(done.output)["properties"]["spin"]["anyOf"][0]["$ref"]
    assert invoke("config-schema", "--field", "spinn").exit_code == 1
