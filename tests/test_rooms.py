"""The rooms of the house: imports go down only, and the ground floor stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "spin_plugin"

FLOORS = {
    "args": 0, "versions": 0, "run": 0, "checkpoint": 0, "witness": 0, "flex": 0,
    "space": 1, "processes": 1, "weights": 1, "hub": 1, "precision": 1,
    "merge": 1, "agreement": 3, "loss": 1, "pairs": 1, "layout": 1, "order": 1, "attention": 1,
    "generation.progress": 2, "generation.job": 2, "generation.shards": 2, "generation.interpreter": 2,
    "generation.cause": 2, "generation.devices": 2, "generation.engine": 2, "generation.launcher": 2, "head": 2,
    "generation.vllm_worker": 2, "generation.ray_worker": 2, "opponent": 2, "real": 2, "watch": 2,
    "iteration": 3, "lowering": 3, "select": 3,
    "trainer": 4,
    "game": 5,
    "plugin": 6,
    "cli.config_file": 4, "cli.status": 5, "cli.reset": 5, "cli.train": 5, "cli.init": 5, "cli.setup": 5,
    "cli.schema": 5, "cli.__main__": 7,
}  # fmt: skip
# Everybody may speak to the user.
EVERYWHERE = {"messages"}
# Floor 2 has a flight of stairs of its own; the worker stands beside it, for another interpreter runs it.
STAIRS = ("progress", "job", "shards", "interpreter", "cause", "devices", "engine", "launcher")
GENERATION = [f"generation.{name}" for name in STAIRS]
# The package's front door, which imports the plugin when it is asked for.
FRONT_DOORS = {"", "generation", "cli"}


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
                # `from spin_plugin import loss` names a module, `from spin_plugin.loss import x` a thing in one
                full = f"{parent}.{alias.name}"
                yield full if full.removeprefix("spin_plugin.") in MODULES else parent


def own_imports(path: Path) -> set[str]:
    """The rooms a file imports; "" is the front door."""
    names = {name for name in imported(path) if name.partition(".")[0] == "spin_plugin"}
    return {name.removeprefix("spin_plugin").removeprefix(".") for name in names}


def may_import(room: str, other: str) -> bool:
    if other in EVERYWHERE or other == "":
        return True
    if room.startswith("cli."):
        return other in ("args", "run", "versions", "lowering", "cli", "cli.config_file")
    if room in GENERATION and other in GENERATION:
        return GENERATION.index(other) < GENERATION.index(room)
    return FLOORS[other] < FLOORS[room]


def test_every_module_has_a_floor() -> None:
    """A new room needs a place in the table first."""
    assert MODULES.keys() == FLOORS.keys() | EVERYWHERE | FRONT_DOORS


@pytest.mark.parametrize("room", sorted(FLOORS))
def test_imports_go_down_only(room: str) -> None:
    wrong = {other for other in own_imports(MODULES[room]) if not may_import(room, other)}
    assert not wrong, f"{room} (floor {FLOORS[room]}) imports {sorted(wrong)}"


def test_messages_stand_on_nothing() -> None:
    assert own_imports(MODULES["messages"]) == set()


def test_walk_sees_imports_inside_functions() -> None:
    """Otherwise the test above would prove nothing."""
    assert "trainer" in own_imports(MODULES["game"])
    assert "plugin" in own_imports(MODULES[""])


def outside_imports(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)} - {"spin_plugin"}


def test_vllm_is_imported_by_the_worker_alone() -> None:
    assert [name for name, path in MODULES.items() if "vllm" in outside_imports(path)] == ["generation.vllm_worker"]


def test_ray_is_imported_by_its_worker_alone() -> None:
    assert [name for name, path in MODULES.items() if "ray" in outside_imports(path)] == ["generation.ray_worker"]


def test_ray_worker_needs_nothing_but_ray_and_the_other_worker() -> None:
    worker = MODULES["generation.ray_worker"]
    assert outside_imports(worker) - sys.stdlib_module_names == {"ray", "vllm_worker"}
    assert own_imports(worker) == set()


def test_worker_needs_nothing_but_vllm_and_the_standard_library() -> None:
    """vLLM's interpreter has neither this plugin nor Axolotl."""
    worker = MODULES["generation.vllm_worker"]
    assert outside_imports(worker) - sys.stdlib_module_names == {"vllm"}
    assert own_imports(worker) == set()


@pytest.mark.parametrize("room", ["args", "run", "checkpoint", "messages"])
def test_ground_rooms_do_not_name_heavy_packages(room: str) -> None:
    light = {"pydantic", "pydantic_core", "filelock", "psutil", "rich"}
    assert outside_imports(MODULES[room]) - sys.stdlib_module_names <= light


@pytest.mark.parametrize("room", ["loss", "layout", "opponent"])
def test_numerical_rooms_need_torch_alone(room: str) -> None:
    assert outside_imports(MODULES[room]) - sys.stdlib_module_names <= {"torch", "safetensors"}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in memory after a statement in a fresh process."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("room", ["args", "run", "checkpoint", "messages"])
def test_ground_rooms_load_no_torch(room: str) -> None:
    assert not loaded_by(f"import spin_plugin.{room}") & {"torch", "transformers", "datasets", "axolotl", "vllm"}


def test_package_itself_loads_neither_torch_nor_axolotl() -> None:
    assert not loaded_by("import spin_plugin") & {"torch", "transformers", "datasets", "axolotl", "vllm"}


def test_numerical_rooms_load_no_axolotl() -> None:
    """They are measured on machines without it. One process for both, for torch takes seconds to load."""
    loaded = loaded_by("import spin_plugin.loss, spin_plugin.layout")
    assert "torch" in loaded
    assert not loaded & {"axolotl", "datasets", "vllm", "transformers"}


def test_status_command_loads_no_torch() -> None:
    """`axolotl spin status` is asked often and should answer at once."""
    assert not loaded_by("import spin_plugin.cli") & {"torch", "transformers", "datasets", "axolotl", "vllm"}
