"""Every SFT example of Axolotl becomes a SPIN run by three additions, or is refused with a one-line reason.

Axolotl's wheel lacks the examples, so its source distribution is downloaded once.
"""

import copy
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axolotl
import pytest
import yaml

from spin_plugin.console import console
from spin_plugin.versions import discovers_plugins

# Capabilities of a GPU machine, as the validators expect them.
GPUS = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "n_node": 1, "compute_capability": "sm_90"}


def source() -> Path:
    """Return the directory of the installed Axolotl version's source distribution."""
    directory = Path(sys.prefix) / "axolotl-source"
    name = f"axolotl-{axolotl.__version__}"
    if not (directory / name / "examples").is_dir():
        options = ["--no-deps", "--no-binary", "axolotl", f"axolotl=={axolotl.__version__}"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(directory), *options]
        subprocess.run(command, check=True, timeout=600)
        with tarfile.open(directory / f"{name}.tar.gz") as archive:
            archive.extractall(directory, filter="data")
    return directory / name


@pytest.fixture(scope="module")
def examples() -> dict[str, dict[str, Any]]:
    """The SFT examples (no `rl`) by name."""
    directory = source() / "examples"
    contents = {path: yaml.safe_load(path.read_text()) for path in sorted(directory.rglob("*.y*ml"))}
    return {
        str(path.relative_to(directory)): content
        for path, content in contents.items()
        if isinstance(content, dict) and "base_model" in content and not content.get("rl")
    }


Validate = Callable[[dict[str, Any]], str | None]


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Validate]:
    """Load plugins and validate a configuration like Axolotl; returns the reason for a refusal, or None."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.chdir(source())  # examples name their DeepSpeed files from there

    def run(config: dict[str, Any]) -> str | None:
        PluginManager._instance = None
        cfg = DictDefault(copy.deepcopy(config))
        refusal = None
        with console.capture() as printed:
            try:
                prepare_plugins(cfg)
                validate_config(cfg, capabilities=GPUS, env_capabilities={"torch_version": "2.13.0"})
            except SystemExit as stop:
                assert stop.code == 1
            except (ValueError, ImportError, DeprecationWarning) as error:  # Axolotl's own
                refusal = f"{type(error).__name__}: {error}"
        return refusal or printed.get() or None

    yield run
    PluginManager._instance = None


def with_additions(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Add the three SPIN keys (newer Axolotl versions do not need `plugins`) and an output directory."""
    changes = {"rl": "spin", "spin": {"iterations": 1}, "output_dir": str(directory / "run")}
    if not discovers_plugins():
        changes["plugins"] = [*(config.get("plugins") or []), "spin_plugin.SpinPlugin"]
    return config | changes


def test_every_example_is_accepted_or_refused_in_one_line(
    examples: dict[str, dict[str, Any]], validate: Validate, tmp_path: Path
) -> None:
    assert len(examples) > 200
    accepted, refused = [], {}
    for name in sorted(examples):
        refusal = validate(with_additions(examples[name], tmp_path))
        if refusal is None:
            accepted.append(name)
        elif validate(examples[name]) is None:  # otherwise Axolotl itself refuses the example
            refused[name] = refusal
    assert len(accepted) > 150
    for name, line in refused.items():
        assert line.startswith("spin: error: "), (name, line)
        assert line.count("\n") == 1, (name, line)
        key = line.removeprefix("spin: error: ").partition(":")[0].partition("[")[0].partition(".")[0]
        assert examples[name].get(key), f"{name}: {line} names no key of the example"
    assert not (tmp_path / "run").exists(), "nothing is written before the configuration is valid"


def test_examples_with_unsupported_features_are_refused(
    examples: dict[str, dict[str, Any]], validate: Validate, tmp_path: Path
) -> None:
    """Otherwise the run would silently not be SPIN, or the opponent would differ from the policy."""
    for name, reason in {
        "eaft/eaft-example.yml": "use_eaft",
        "llama-2/loftq.yml": "loftq",
        "llama-2/relora.yml": "relora",
        "llama-3/3b-qat-fsdp2.yaml": "qat",
        **({} if discovers_plugins() else {"mamba/config.yml": "MambaLMHeadModel"}),  # in 0.21 it is an ordinary model
        "qwen2/reward-model.yaml": "reward_model",
        "qwen2/prm.yaml": "process_reward_model",
        "streaming/sft.yaml": "streaming",
        "archived/tiny-llama/pretrain.yml": "pretraining_dataset",
        "distributed-parallel/llama-3_1-8b-hsdp-tp.yaml": "tensor_parallel_size",
    }.items():
        assert reason in (validate(with_additions(examples[name], tmp_path)) or ""), name
