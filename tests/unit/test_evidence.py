"""The evidence's arithmetic: intervals, counted compute, the join of two sweeps, figures, and SCAN's grammar."""

import importlib
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from spin_plugin.data.table import PAIR_SCHEMA, open_table, table_writer
from spin_plugin.generation.shards import Shards
from spin_plugin.run.directory import RunDir

FROZEN = RunDir(ROOT / "tests/data/run-0.2/run")


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the modules of scripts/bench/trials importable."""
    monkeypatch.syspath_prepend(ROOT / "scripts/bench")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return "trials"


@pytest.fixture
def bootstrap(trials: str) -> ModuleType:
    return importlib.import_module(f"{trials}.bootstrap")


@pytest.fixture
def methods(trials: str) -> ModuleType:
    return importlib.import_module(f"{trials}.methods")


def slow_bootstrap(differences: list[list[float]], resamples: int, *, shared: bool) -> list[float]:
    draw = random.Random(1)
    means = []
    for _ in range(resamples):
        common = draw.choices(range(len(differences[0])), k=len(differences[0]))
        chosen = []
        for questions in draw.choices(differences, k=len(differences)):
            places = common if shared else draw.choices(range(len(questions)), k=len(questions))
            chosen.append(fmean(questions[place] for place in places))
        means.append(fmean(chosen))
    return sorted(means)


@pytest.mark.parametrize("shared", [True, False])
def test_bootstrap_agrees_with_drawing_one_by_one(bootstrap: ModuleType, shared: bool) -> None:
    draw = random.Random(0)
    hard = [draw.gauss(0, 1) for _ in range(40)]  # what a question has in all seeds
    differences = [[seed / 10 + question + draw.gauss(0, 1) for question in hard] for seed in range(4)]
    slow = slow_bootstrap(differences, 4000, shared=shared)
    mean, low, high = bootstrap.paired_bootstrap(differences, shared=shared, resamples=8000)
    assert mean == pytest.approx(fmean(map(fmean, differences)))
    assert (low, high) == pytest.approx((slow[100], slow[3900]), abs=0.03)


def test_bootstrap_without_differences_has_no_width(bootstrap: ModuleType) -> None:
    assert bootstrap.paired_bootstrap([[0.25] * 5, [0.25] * 7], shared=False) == pytest.approx((0.25, 0.25, 0.25))


def test_compute_of_an_iteration_is_that_of_its_tokens_one_by_one(methods: ModuleType) -> None:
    iteration = FROZEN.iteration(0)
    real = {split: list(open_table(FROZEN.real / f"{split}.arrow")) for split in ("train", "eval")}
    expected = 0
    for response in Shards(iteration.synthetic).responses():
        expected += len(real[response["split"]][response["example"]]["prompt"])  # prefilled
        expected += len(response["tokens"])  # generated
    for split, passes in (("train", 1), ("eval", 2)):  # scored; scored before and after
        seen = set()
        for pair in open_table(iteration.pairs / f"{split}.arrow"):
            tokens = len(pair["synthetic"])
            if pair["example"] not in seen:
                tokens += len(pair["prompt"]) + len(pair["real"])
            seen.add(pair["example"])
            expected += passes * tokens
    assert methods.spin_compute(FROZEN, 0, 1000) == expected + 3 * 1000


def test_a_prompt_with_several_responses_is_counted_once(methods: ModuleType, tmp_path: Path) -> None:
    columns = {"prompt": [[1, 2, 3]] * 3, "real": [[4, 5]] * 3, "synthetic": [[6], [6, 7], [6, 7, 8]]}
    numbers = {"index": [0, 1, 2], "example": [0, 0, 1], "iteration": [0, 1, 1], "length": [6, 7, 8]}
    with table_writer(tmp_path / "pairs.arrow", PAIR_SCHEMA) as write:
        write(columns | numbers)
    assert methods.row_tokens(tmp_path / "pairs.arrow") == 2 * (3 + 2) + 1 + 2 + 3


def test_dpo_is_counted_as_two_sequences_with_a_reference(methods: ModuleType) -> None:
    pairs = [{"prompt": [1, 2], "real": [3], "synthetic": [4, 5]}, {"prompt": [6], "real": [7, 8], "synthetic": [9]}]
    trained_and_scored = sum(len(pair["prompt"] + pair[side]) for pair in pairs for side in ("real", "synthetic"))
    assert methods.dpo_epoch(pairs) == (3 + 1) * trained_and_scored


def test_figure_shows_every_curve_in_every_panel(trials: str) -> None:
    figures = importlib.import_module(f"{trials}.figure")
    curves = [
        figures.Curve("SPIN", "spin", [[(0, 10.0), (1, 30.0)], [(0, 20.0), (1, 40.0)]]),
        figures.Curve("more SFT", "sft", [[(0, 10.0), (1, 20.0)], [(0, 20.0), (1, 22.0)]]),
    ]
    root = ElementTree.fromstring(figures.figure({"one": curves, "another": curves}))
    tags = [element.tag.rpartition("}")[2] for element in root]
    assert tags.count("polyline") == tags.count("polygon") == 4
    texts = [element.text for element in root if element.tag.endswith("text")]
    assert {"SPIN", "more SFT", "one, %", "another, %"} <= set(texts)


def test_scan_has_its_commands(trials: str) -> None:
    """The sizes of the splits, and two examples, are those of the paper."""
    scan = dict(importlib.import_module(f"{trials}.scan_data").commands())
    assert len(scan) == 20_910
    assert sum("jump" not in command for command in scan) == 13_203
    assert sum(len(actions) <= 22 for actions in scan.values()) == 16_990
    assert " ".join(scan["jump opposite left and walk thrice"]) == "I_TURN_LEFT I_TURN_LEFT I_JUMP I_WALK I_WALK I_WALK"
    assert scan["turn left after jump twice"] == ["I_JUMP", "I_JUMP", "I_TURN_LEFT"]


def test_two_sweeps_are_joined_by_the_dev_split_at_every_budget(trials: str) -> None:
    joins = importlib.import_module("make_evidence")

    def sweep(*points: tuple[int, float, float]) -> dict[str, Any]:
        """A sweep of one score from its candidates' compute, dev and test."""
        candidates = [{"compute": compute, "dev": {"a": dev}, "test": test} for compute, dev, test in points]

        def best(budget: float) -> dict[str, Any]:
            return max((one for one in candidates if one["compute"] <= budget), key=lambda one: one["dev"]["a"])

        curve = [{"compute": budget, "scores": {"a": best(budget)["test"]}} for budget in (1, 2, 3)]
        found = {"candidates": candidates, "best": {"a": best(3)}, "curve": curve, "limit": 3}
        return found | {"questions": {"a": [best(3)["test"]]}, "other": {"chat": best(3)["test"]}}

    one, other = [(1, 0.2, 20.0), (2, 0.3, 31.0)], [(1, 0.1, 90.0), (2, 0.2, 91.0), (3, 0.6, 55.0)]
    joined = joins.stronger(sweep(*one), sweep(*other))
    assert joined["curve"] == sweep(*one, *other)["curve"]
    assert joined["best"]["a"]["compute"] == 3
    assert joined["questions"] == {"a": [55.0]}
    assert joined["other"] == {"chat": 55.0}


def test_settings_fixed_on_other_seeds(trials: str) -> None:
    """Of two runs, each seed gets the one that was better on the two other seeds."""
    joins = importlib.import_module("make_evidence")
    devs = {1: (50.0, 60.0), 2: (51.0, 40.0), 3: (52.0, 48.0)}  # of both runs

    def sweep(*scores: float) -> dict[str, Any]:
        runs = [{"compute": 9, "learning_rate": 1e-5 * run, "epochs": 1, "step": 5} for run in (1, 2)]
        found = [run | {"dev": {"a": score}} for run, score in zip(runs, scores, strict=True)]
        return {"best": {"a": {}}, "candidates": [{"compute": 0, "dev": {"a": 99.0}}, *found]}

    spin = {seed: {"curve": [{"dev": {"a": 1.0}}, {"dev": {"a": float(seed)}}]} for seed in devs}
    found = joins.fixed_elsewhere({"spin": spin, "sft": {seed: sweep(*scores) for seed, scores in devs.items()}})
    # seed 1: run 1 (51.5 > 44); seed 2: run 2 (51 < 54); seed 3: run 1 (50.5 > 50)
    assert found == {"spin": {"a": 2.0}, "sft": {"a": round((50 + 40 + 52) / 3, 2)}}


def test_a_row_of_the_table_is_one_model(trials: str) -> None:
    """Of a sweep, which has a checkpoint for each compared score, every score of the same one."""
    joins = importlib.import_module("make_evidence")
    out = {"out_of_domain": 60.0, "greedy_out_of_domain": 70.0, "in_domain": 80.0}
    inside = {"out_of_domain": 10.0, "greedy_out_of_domain": 20.0, "in_domain": 100.0}
    spin = {"scores": out, "compute": 400, "questions": {"out_of_domain": [0.6], "in_domain": [0.8]}}
    best = {"out_of_domain": {"test": out, "compute": 100}, "in_domain": {"test": inside, "compute": 300}}
    sft = {"best": best, "questions": {"out_of_domain": [0.6], "in_domain": [1.0]}}
    found = joins.summary("tiny", {"spin": {1: spin}, "sft": {1: sft}}, {1: sft})
    rows = [line.split(" | ") for line in joins.table("tiny", found).splitlines()[2:]]
    assert rows == [
        ["| SPIN", "60.0", "70.0", "80.0", "+0.0 (+0.0 to +0.0)", "1.00 |"],
        ["| more SFT, chosen by its out-of-domain score", "60.0", "70.0", "80.0", "", "0.25 |"],
        ["| more SFT, chosen by its in-domain score", "10.0", "20.0", "100.0", "", "0.75 |"],
    ]


def test_the_longest_run_costs_no_more_than_allowed(trials: str) -> None:
    sweep = importlib.import_module(f"{trials}.sweep")
    assert sweep.affordable(epoch=10, before=5, limit=190) == [3, 18]
    assert sweep.affordable(epoch=10, before=5, limit=45) == [1, 4]
    assert sweep.affordable(epoch=10, before=0, limit=9) == [1]  # its checkpoints may still be affordable


def test_a_command_that_was_interrupted_has_not_finished(trials: str, tmp_path: Path) -> None:
    """`axolotl train` exits with 0 after SIGINT; an earlier attempt's words do not count."""
    unit = importlib.import_module(f"{trials}.unit")
    log = tmp_path / "log"
    unit.run(["echo", "Training completed!"], log, "Training completed!")
    with pytest.raises(SystemExit, match="failed, see"):
        unit.run(["echo", "interrupted"], log, "Training completed!")
    assert log.read_text().splitlines() == ["Training completed!", "interrupted"]


def test_what_two_want_is_done_once(trials: str, tmp_path: Path) -> None:
    unit = importlib.import_module(f"{trials}.unit")
    done = []

    def make(number: int) -> None:
        with unit.once(tmp_path / "made", "settings") as needed:
            if needed:
                time.sleep(0.2)
                done.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(4)))
    assert len(done) == 1
    with pytest.raises(SystemExit, match="other settings"), unit.once(tmp_path / "made", "others"):
        pass


@pytest.fixture
def evidence(trials: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | str | None]:
    """Run evidence.py with options; returns what it exits with."""
    program = importlib.import_module("evidence")

    def method(task: Any, unit: Any) -> dict[str, Any]:
        if task.seed == 1:
            raise SystemExit("evidence: seed 1 failed")
        return {"scores": {"greedy": 50.0}, "compute": 0}

    monkeypatch.setitem(program.METHODS, "start", method)

    def run(*options: str) -> int | str | None:
        places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
        monkeypatch.setattr("sys.argv", ["evidence.py", *options, *places])
        with pytest.raises(SystemExit) as stopped:
            program.main()
        return stopped.value.code

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task sql", "--inputs is missing"),
        ("--task sql --inputs /nowhere", "/nowhere lacks base, train.jsonl, dev.jsonl, test.jsonl, geography.sqlite"),
        ("--task tiny --seeds 0", "must be at least 1"),
        ("--task tiny --methods spin sdft", "sdft: no use on tiny"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_runs(
    evidence: Callable[..., int], options: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert evidence(*options.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_seed_is_reported_and_the_others_go_on(
    evidence: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert evidence("--task", "tiny", "--seeds", "3", "--methods", "start")
    said = capsys.readouterr()
    assert said.err == "evidence: seed 1 failed\n"
    assert said.out.splitlines() == [f"tiny, start, seed {seed}: greedy 50.0; compute 0" for seed in (2, 3)]
    assert {file.name for file in (tmp_path / "results").iterdir()} == {"tiny-start-2.json", "tiny-start-3.json"}
