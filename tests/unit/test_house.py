"""The house: imports go down only, nothing runs in a circle, and the lower rooms stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "spin_plugin"

# The rooms, directories and single files, from the ground up: each may import those before it.
ROOMS = [
    "console", "versions", "objective", "args", "run", "config", "data", "model", "generation", "opponent", "training",
    "plugin",
]  # fmt: skip
# Commands answer at once, so they stay away from what loads torch or Axolotl.
OPEN_TO_COMMANDS = {"console", "versions", "objective", "args", "run", "config"}


def module_name(path: Path) -> str:
    """`generation.job` for generation/job.py, `generation` for generation/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, inside functions too, by its full name."""
    package = ["spin_plugin", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from spin_plugin.run import lock` names a module, `from spin_plugin.run.lock import x` a thing in one
                full = f"{parent}.{alias.name}"
                yield full if full.removeprefix("spin_plugin.") in MODULES else parent


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports; "" is the front door."""
    names = {name for name in imported(MODULES[module]) if name.partition(".")[0] == "spin_plugin"}
    return {name.removeprefix("spin_plugin").removeprefix(".") for name in names}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def outside_imports(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(MODULES[module])} - {"spin_plugin"} - sys.stdlib_module_names


def test_every_module_is_in_a_room() -> None:
    """A new room needs a place in the list first."""
    assert {room_of(module) for module in MODULES} == {*ROOMS, "cli", ""}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {""}))
def test_imports_go_down_only(module: str) -> None:
    room = room_of(module)
    below = OPEN_TO_COMMANDS if room == "cli" else set(ROOMS[: ROOMS.index(room)])
    wrong = {other for other in own_imports(module) if room_of(other) not in below | {room, ""}}
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_no_imports_run_in_a_circle() -> None:
    """Inside of the rooms neither. The front door imports the plugin only when it is asked for."""
    order = TopologicalSorter({module: own_imports(module) - {""} for module in MODULES}).static_order()
    assert set(order) >= MODULES.keys()


def test_walk_sees_imports_inside_functions() -> None:
    """Otherwise the tests above would prove nothing."""
    assert "training.trainer" in own_imports("training.iteration")
    assert "plugin" in own_imports("")


def test_house_stays_easy_to_overlook() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert {module: count for module, count in lines.items() if count > 300} == {}


@pytest.mark.parametrize(("package", "worker"), [("vllm", "generation.vllm_worker"), ("ray", "generation.ray_worker")])
def test_vllm_and_ray_are_imported_by_their_workers_alone(package: str, worker: str) -> None:
    assert [module for module in MODULES if package in outside_imports(module)] == [worker]


def test_workers_need_nothing_but_their_engine_and_the_standard_library() -> None:
    """vLLM's interpreter has neither this plugin nor Axolotl."""
    assert outside_imports("generation.vllm_worker") == {"vllm"}
    assert outside_imports("generation.ray_worker") == {"ray", "vllm_worker"}
    assert not own_imports("generation.vllm_worker") | own_imports("generation.ray_worker")


GROUND = ["args", "console", *(module for module in MODULES if room_of(module) == "run")]


@pytest.mark.parametrize("module", GROUND)
def test_ground_floor_names_no_heavy_package(module: str) -> None:
    allowed = {"pydantic", "pydantic_core", "filelock", "psutil", "rich"}
    if module == "run.processes":  # inside of a function: where several processes meet
        allowed |= {"torch"}
    assert outside_imports(module) <= allowed


@pytest.mark.parametrize(
    "module", ["objective.losses", "objective.metrics", "model.layout", "model.logprobs", "opponent.store"]
)
def test_mathematics_needs_torch_alone(module: str) -> None:
    assert outside_imports(module) <= {"torch", "safetensors"}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in memory after a statement in a fresh process."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "datasets", "axolotl", "vllm"}


def test_ground_floor_loads_no_torch() -> None:
    assert not loaded_by(f"import {', '.join(f'spin_plugin.{module}' for module in GROUND)}") & HEAVY


@pytest.mark.parametrize("module", ["spin_plugin", "spin_plugin.cli"])
def test_package_and_its_commands_load_no_torch(module: str) -> None:
    """`axolotl spin status` is asked often and should answer at once."""
    assert not loaded_by(f"import {module}") & HEAVY


def test_mathematics_loads_no_axolotl() -> None:
    """It is measured on machines without it. One process for all, for torch takes seconds to load."""
    loaded = loaded_by("import spin_plugin.objective.metrics, spin_plugin.model.layout, spin_plugin.model.logprobs")
    assert "torch" in loaded
    assert not loaded & (HEAVY - {"torch"})
