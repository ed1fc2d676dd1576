"""In runs other than SPIN, the plugin, which Axolotl always loads, changes, prints and imports nothing."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from conftest import ROOT
from tiny import spin_config, write_config

from spin_plugin import SpinPlugin
from spin_plugin.versions import SUPPORTED, discovers_plugins, require_supported_axolotl

OTHERS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"rl": "dpo", "rl_beta": 0.1},
    "grpo": {"rl": "grpo", "vllm": {"host": "0.0.0.0", "port": 8000}, "trl": {"use_vllm": True}},
}


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest, tmp_path: Path, llama: Path, chat_data: Path) -> dict[str, Any]:
    """A configuration for another method."""
    changes = dict.fromkeys(("rl", "spin", "plugins", "vllm")) | OTHERS[request.param]
    return spin_config(tmp_path, llama, chat_data, **changes)


def test_every_hook_behaves_like_the_base_class(other: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(json.dumps(other))
    cfg, ours, plain = DictDefault(other), SpinPlugin(), BasePlugin()
    hooks = [name for name in vars(SpinPlugin) if not name.startswith("_")]
    assert {"register", "load_datasets", "get_trainer_cls", "post_trainer_create", "post_train_unload"} <= set(hooks)
    for name in hooks:
        with_model = name in ("post_model_build", "post_model_load", "post_trainer_create")
        arguments = () if name == "get_input_args" else (cfg, object()) if with_model else (cfg,)
        assert (getattr(ours, name)(*arguments) or None) == (getattr(plain, name)(*arguments) or None), name
    assert json.loads(json.dumps(cfg)) == before
    assert capsys.readouterr() == ("", "")


HIDE = """
import importlib.metadata as metadata
real = metadata.entry_points
def without_us(**asked):
    if asked.get("group") != "axolotl.plugins":
        return real(**asked)
    return metadata.EntryPoints(point for point in real(**asked) if not point.value.startswith("spin_plugin"))
metadata.entry_points = without_us
"""
READ = """
import json, sys
from axolotl.cli.config import load_cfg
cfg = load_cfg(sys.argv[1])
with open(sys.argv[2], "w") as file:
    modules = sorted(name for name in sys.modules if name.startswith("spin_plugin"))
    heavy = sorted({"vllm", "ray", "matplotlib"} & set(sys.modules))
    json.dump({"cfg": json.loads(json.dumps(dict(cfg), default=str)), "modules": modules, "heavy": heavy}, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_configuration_is_read_as_without_the_plugin(method: str, tmp_path: Path, llama: Path, chat_data: Path) -> None:
    """Read by Axolotl, with and without the plugin's entry point."""
    changes = dict.fromkeys(("rl", "spin", "plugins", "vllm")) | OTHERS[method]
    config = write_config(tmp_path, spin_config(tmp_path, llama, chat_data, **changes))
    found = {}
    for name, program in (("with", READ), ("without", HIDE + READ)):
        result = tmp_path / f"{name}.json"
        command = [sys.executable, "-c", program, str(config), str(result)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "spin: " not in done.stdout + done.stderr
        found[name] = json.loads(result.read_text())
    assert found["with"]["cfg"] == found["without"]["cfg"]
    assert found["without"]["modules"] == []
    assert not any(name.startswith("spin_plugin.training") for name in found["with"]["modules"])
    assert ("spin_plugin.plugin" in found["with"]["modules"]) is discovers_plugins()
    assert found["with"]["heavy"] == found["without"]["heavy"]


def test_failed_training_does_not_finish_the_iteration() -> None:
    """Since 0.20 Axolotl calls the last hook in a `finally`. An interruption must end at once, without a report."""
    finished, reported = [], []
    plugin = SpinPlugin()
    hooks = {"finish": lambda self: finished.append(1), "report": lambda self: reported.append(1)}
    plugin.iteration = type("Iteration", (), hooks)()
    for error in (RuntimeError, SystemExit, KeyboardInterrupt):
        with suppress(error):
            try:
                raise error
            finally:
                plugin.post_train_unload({})
    assert not finished
    assert len(reported) == 2
    plugin.post_train_unload({})
    assert finished


def test_unsupported_axolotl_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import spin_plugin.versions

    for version in ("0.18.0", "0.22.0", "0.22.0.dev1", "1.0"):
        monkeypatch.setattr(spin_plugin.versions, "version", lambda name, version=version: version)
        with pytest.raises(ValueError, match=f"axolotl {version} is not supported .* pip install"):
            require_supported_axolotl()
    for version in ("0.19.0", "0.20.1", "0.21.0", "0.21.0.dev0"):
        monkeypatch.setattr(spin_plugin.versions, "version", lambda name, version=version: version)
        require_supported_axolotl()


def test_supported_versions_match_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [line for line in project["dependencies"] if line.startswith("axolotl")]
    assert requirement.removeprefix("axolotl").split(",") == [">=0.19", "<0.22"]
    assert {str(part) for part in SUPPORTED} == {">=0.19", "<0.22"}


def test_setup_installed_the_axolotl_for_this_python() -> None:
    """A Python that fails to start must not silently lead to an older Axolotl."""
    from importlib.metadata import version

    assert version("axolotl").startswith("0.21." if sys.version_info >= (3, 12) else "0.19.")
