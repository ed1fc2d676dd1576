"""Package layering: imports only go down, contain no cycles, and the lower layers stay lightweight."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "spin_plugin"

# The layers (directories and single files), lowest first: each may import those before it.
LAYERS = [
    "console", "versions", "objective", "args", "run", "config", "data", "model", "generation", "judge", "opponent",
    "report", "export", "training", "doctor", "plugin",
]  # fmt: skip
# Commands must start fast, so they import nothing that loads torch or Axolotl.
IMPORTABLE_BY_COMMANDS = {"console", "versions", "objective", "args", "run", "config", "report", "export"}


def module_name(path: Path) -> str:
    """`generation.job` for generation/job.py, `generation` for generation/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Yield the full names of all modules that a file imports, including imports inside functions."""
    package = ["spin_plugin", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from spin_plugin.run import lock` imports a module, `from spin_plugin.run.lock import x` a name
                full = f"{parent}.{alias.name}"
                yield full if full.removeprefix("spin_plugin.") in MODULES else parent


def own_imports(module: str) -> set[str]:
    """Return the package's modules that a module imports; "" is `spin_plugin` itself."""
    names = {name for name in imported(MODULES[module]) if name.partition(".")[0] == "spin_plugin"}
    return {name.removeprefix("spin_plugin").removeprefix(".") for name in names}


def layer_of(module: str) -> str:
    return module.partition(".")[0]


def outside_imports(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(MODULES[module])} - {"spin_plugin"} - sys.stdlib_module_names


def test_every_module_is_in_a_layer() -> None:
    """A new layer must be added to the list."""
    assert {layer_of(module) for module in MODULES} == {*LAYERS, "cli", ""}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {""}))
def test_imports_go_down_only(module: str) -> None:
    layer = layer_of(module)
    below = IMPORTABLE_BY_COMMANDS if layer == "cli" else set(LAYERS[: LAYERS.index(layer)])
    wrong = {other for other in own_imports(module) if layer_of(other) not in below | {layer, ""}}
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_imports_have_no_cycles() -> None:
    """Not within layers either. Imports of `spin_plugin` itself do not count: it imports the plugin lazily."""
    order = TopologicalSorter({module: own_imports(module) - {""} for module in MODULES}).static_order()
    assert set(order) >= MODULES.keys()


def test_imports_inside_functions_are_found() -> None:
    """The tests above rely on it."""
    assert "training.trainer" in own_imports("training.iteration")
    assert "plugin" in own_imports("")


def test_package_stays_small() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert {module: count for module, count in lines.items() if count > 300} == {}


@pytest.mark.parametrize(("package", "worker"), [("vllm", "generation.vllm_worker"), ("ray", "generation.ray_worker")])
def test_vllm_and_ray_are_imported_only_by_their_workers(package: str, worker: str) -> None:
    assert [module for module in MODULES if package in outside_imports(module)] == [worker]


def test_workers_need_only_their_engine_and_the_standard_library() -> None:
    """vLLM's interpreter can import neither this plugin nor Axolotl."""
    assert outside_imports("generation.vllm_worker") == {"vllm"}
    assert outside_imports("generation.ray_worker") == {"ray", "vllm_worker"}
    assert not own_imports("generation.vllm_worker") | own_imports("generation.ray_worker")


LOWEST = ["args", "console", *(module for module in MODULES if layer_of(module) == "run")]


@pytest.mark.parametrize("module", LOWEST)
def test_lowest_layers_import_no_heavy_package(module: str) -> None:
    allowed = {"pydantic", "pydantic_core", "filelock", "psutil", "rich"}
    if module == "run.processes":  # inside a function: the rendezvous
        allowed |= {"torch"}
    assert outside_imports(module) <= allowed


@pytest.mark.parametrize(
    "module", ["objective.losses", "objective.metrics", "model.layout", "model.logprobs", "opponent.store"]
)
def test_numerical_modules_need_only_torch(module: str) -> None:
    assert outside_imports(module) <= {"torch", "safetensors"}


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages loaded after a statement in a fresh process."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "datasets", "axolotl", "vllm"}


def test_lowest_layers_load_no_torch() -> None:
    assert not loaded_by(f"import {', '.join(f'spin_plugin.{module}' for module in LOWEST)}") & HEAVY


@pytest.mark.parametrize("module", ["spin_plugin", "spin_plugin.cli"])
def test_package_and_its_commands_load_no_torch(module: str) -> None:
    """`axolotl spin status` runs often and must be fast."""
    assert not loaded_by(f"import {module}") & HEAVY


def test_report_loads_no_torch() -> None:
    """Nor does it need a tokenizer's package before it decodes."""
    assert loaded_by("import spin_plugin.report.write") & (HEAVY | {"tokenizers"}) == {"datasets"}


def test_numerical_modules_load_no_axolotl() -> None:
    """Benchmarks run without it. One process for all modules because torch takes seconds to load."""
    loaded = loaded_by("import spin_plugin.objective.metrics, spin_plugin.model.layout, spin_plugin.model.logprobs")
    assert "torch" in loaded
    assert not loaded & (HEAVY - {"torch"})
