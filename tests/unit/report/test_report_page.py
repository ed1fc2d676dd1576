"""The page as text: what is embedded, escaped, shortened and tabled. test_report_browser.py opens it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported import END, Examples, add_to_entries, make_run
from tiny import byte_tokenizer

from spin_plugin.args import SpinArgs
from spin_plugin.objective.decline import Comparison
from spin_plugin.report import page
from spin_plugin.report.page import embedded
from spin_plugin.report.write import write_report
from spin_plugin.run.directory import RunDir

TOKENIZER = byte_tokenizer()
REAL = [*TOKENIZER.encode("yes", add_special_tokens=False), END]
TEXT = st.text(st.characters(exclude_categories=()))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    examples = Examples([(REAL, REAL)] * 6, [])
    return make_run(tmp_path / "run", TOKENIZER, examples, lambda *_: [REAL], iterations=2)


@given(st.dictionaries(TEXT, TEXT))
def test_embedded_json_is_plain_text_in_a_script_element_and_returns_what_it_was(value: dict[str, str]) -> None:
    text = str(embedded(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text.encode()) == value


class Text(HTMLParser):
    """Collects what a browser shows, script and style left out."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.shown: list[str] = []
        self.elements: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        if self.lasttag not in ("script", "style"):
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


def shown(run: RunDir) -> Text:
    write_report(run, SpinArgs(iterations=2))
    return Text(run.report.read_text(encoding="utf-8"))


def test_whatever_is_recorded_is_tabled_and_what_is_not_is_left_out(run: RunDir) -> None:
    assert "vLLM" not in shown(run).text
    comparison = {"prompts": 32, "before": -0.05, "after": -0.15, "difference": -0.1, "interval": [-0.12, -0.08]}
    add_to_entries(
        run,
        held_out=comparison,
        held_out_pairs={"reward_real": 0.125, "accuracy": 0.75},
        divergence=0.0625,
        agreement={"mean": 0.0031, "largest": 0.25, "kl": 1e-5},
        stages={"generate": {"seconds": 75, "tokens": 1500}},
        precision="bf16 with fp32 masters",
        versions={"torch": "9.9.9"},
        lm_eval={"gsm8k/exact_match": 0.421},
        findings=[{"name": "equal", "message": "most are `equal`", "advice": "stop <here>"}],
    )
    text = shown(run).text
    for part in (
        "−0.12 … −0.08", "0.125", "0.75", "0.0625", "0.0031", "1.0e−05", "1 min 15 s", "20", "bf16 with fp32 masters",
        "torch 9.9.9", "gsm8k/exact_match", "0.421", "Most are equal .", "Stop <here>.", "made the model worse",
    ):  # fmt: skip
        assert part in text, part


def test_names_and_configuration_are_escaped(run: RunDir) -> None:
    state = run.read_state()
    assert state is not None
    state.config |= {"base_model": "<script>alert(1)</script>\ud800", "wandb_name": "{{ 7 * 7 }}"}
    run.write_state(state)
    found = shown(run)
    assert "<script>alert(1)</script>" in found.text
    assert "{{ 7 * 7 }}" in found.text
    assert found.elements.count("script") == 3


def test_what_a_judge_is_given_is_not_shown(run: RunDir) -> None:
    """It can hold a secret under any name."""
    state = run.read_state()
    assert state is not None
    spin = {"judge": {"function": "own:judge", "kwargs": {"pin": "one-two-three"}}}
    state.config["spin"] |= spin | {"schedule": [spin]}
    run.write_state(state)
    run.iteration(0).config.write_text(json.dumps({"spin": spin}))
    text = shown(run).text
    assert "own:judge" in text
    for name in ("html", "json", "jsonl"):
        assert "one-two-three" not in run.report.with_suffix(f".{name}").read_text()


def test_best_iteration_and_why_the_run_has_stopped_are_named(run: RunDir) -> None:
    found = shown(run).text
    assert "Best:" not in found
    state = run.read_state()
    assert state is not None
    for entry, before, after in zip(state.finished, (-0.4, -0.3), (-0.3, -0.5), strict=True):
        change = Comparison(64, before, after, after - before, (after - before - 0.01, after - before + 0.01))
        entry["held_out"] = change.as_dict()
    run.write_state(state)
    write_report(run, SpinArgs(iterations=3))
    text = Text(run.report.read_text()).text
    assert "Best: iteration 0 (held_out −0.3000)." in text
    assert "Iteration 1 made held-out real responses less likely" in text
    assert "so iteration 2 is not trained; best: iteration 0" in text
    assert json.loads(run.report.with_suffix(".json").read_text())["best"]["iteration"] == 0


def test_long_texts_are_cut_in_the_page_only(tmp_path: Path) -> None:
    long = [65] * 100_000
    examples = Examples([(REAL, [*long, END])], [])
    run = make_run(tmp_path / "run", TOKENIZER, examples, lambda *_: [long], iterations=1)
    write_report(run, SpinArgs(iterations=1))
    assert len(run.report.read_text()) < 200_000
    assert len(json.loads(run.report.with_suffix(".jsonl").read_text())["iterations"]["0"][0]["text"]) == 100_000


def test_a_page_holds_as_many_prompts_as_fit(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run, SpinArgs(iterations=2))
    line = len(run.report.with_suffix(".jsonl").read_text().splitlines()[0])
    monkeypatch.setattr(page, "GRID_BYTES", 3 * line)
    match = re.search(r"(\d+) of 6 prompts: the extremes", shown(run).text)
    assert match
    assert 1 <= int(match[1]) <= 3
