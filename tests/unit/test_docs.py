"""README and docs are consistent with the code: generated files are current, and referenced paths exist."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT

from spin_plugin.cli.init import STARTER
from spin_plugin.objective.losses import Loss, Objective, Scores, of_margin
from spin_plugin.objective.metrics import Metric

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "script", ["scripts/make_reference.py", "scripts/make_troubleshooting.py", "scripts/make_evidence.py"]
)
def test_generated_file_is_up_to_date(script: str) -> None:
    check = [sys.executable, script, "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0, f"run `python {script}`"


def test_every_path_in_the_documents_exists() -> None:
    assert len(DOCUMENTS) > 6
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for path in re.findall(r"(?:spin_plugin|scripts|yaml_examples|tests|docs)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_every_relative_link_in_the_documents_resolves() -> None:
    """To an existing file and, after `#`, one of its headings."""
    followed = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{document.name}: {link}"
            followed += 1
    assert followed > 20


def test_file_map_of_contributing_is_complete() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = [*(ROOT / "spin_plugin").rglob("*.py"), *(ROOT / "scripts").glob("*.sh"), *ROOT.glob("yaml_examples/*")]
    missing = [path.name for path in modules if path.name != "__init__.py" and path.name not in text]
    assert not missing


def test_readme_shows_the_starter_configuration_unchanged() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks == [STARTER.read_text(encoding="utf-8")]


def test_examples_of_contributing_are_valid_entries() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    entries = [eval(f"{{{block}}}", {"of_margin": of_margin, "Metric": Metric}) for block in blocks]
    assert [type(*entry.values()) for entry in entries] == [Loss, Metric]
    margins = torch.linspace(-3, 3, 25, dtype=torch.float64, requires_grad=True)
    (loss,) = entries[0].values()
    scores = Scores(margins, torch.zeros_like(margins))
    (slope,) = torch.autograd.grad(loss.value(scores, Objective()).sum(), margins)
    torch.testing.assert_close(-slope, loss.slopes(scores, Objective())[0].detach())


def test_judge_of_the_guide_is_a_judge() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    prompt = [{"text": "say a b", "messages": None}] * 2
    assert names["same_words"](prompt, ["a b", "a b"], ["b a", "b"]) == [1.0, 0.0]
