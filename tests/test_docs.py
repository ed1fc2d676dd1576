"""What stands in README and docs is true: the reference is the model's, and every name in it exists."""

import re
import subprocess
import sys

from conftest import ROOT


def test_reference_is_generated_from_the_model() -> None:
    check = [sys.executable, "scripts/make_reference.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0, "run `python scripts/make_reference.py`"


def test_every_path_the_documents_name_exists() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert len(documents) > 2
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for path in re.findall(r"(?:spin_plugin|scripts|yaml_examples|tests|docs)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_file_map_of_the_readme_is_complete() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = [*(ROOT / "spin_plugin").rglob("*.py"), *(ROOT / "scripts").glob("*.sh"), *ROOT.glob("yaml_examples/*")]
    missing = [path.name for path in modules if path.name != "__init__.py" and path.name not in text]
    assert not missing


def test_every_test_of_the_fault_table_exists() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/faults.md").read_text(encoding="utf-8"))
    tests = {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 20
    assert not set(named) - tests
