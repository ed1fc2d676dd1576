"""The judge's processes with functions of all kinds, on hand-made shards: no model, no vLLM."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Children
from datasets import Dataset
from tiny import byte_tokenizer

from spin_plugin.args import JudgeArgs
from spin_plugin.console import SpinError
from spin_plugin.data.real import Real
from spin_plugin.generation.job import Job, shards_of
from spin_plugin.generation.shards import Shards
from spin_plugin.judge.judging import Judging
from spin_plugin.judge.process import ENVIRONMENT, FIXED_ENVIRONMENT
from spin_plugin.judge.texts import Texts
from spin_plugin.judge.worker import scores
from spin_plugin.run.directory import RunDir

TOTAL = 300  # one full shard and a short one
TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
# A judge that records each of its calls, for the tests to count them.
RECORDS = """
import json, os, sys, time
def note(synthetic):
    with open("calls", "a") as file:
        file.write(json.dumps(synthetic) + "\\n")
"""


def tokens(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def texts(count: int = TOTAL) -> Texts:
    """Prompt n is `question n`, its real answer `answer n`; both splits are alike."""
    rows = {
        "prompt": [tokens(f"question {n}") for n in range(count)],
        "real": [[*tokens(f"answer {n}"), END] for n in range(count)],
    }
    return Texts(TOKENIZER, Real(Dataset.from_dict(rows), Dataset.from_dict(rows), [END]))


def make_run(directory: Path, iteration: int = 0, total: int = TOTAL, answer: str = "answer") -> RunDir:
    """Write the shards of one iteration; every third response is right, and the last ten are held out."""
    run = RunDir(directory / "run")
    shards = Shards(run.iteration(iteration).synthetic)
    shards.prepare(Job(iteration, {}, None, "weights", {}, total, "requests"))
    for shard in range(shards_of(total)):
        shards.write(
            shard,
            (
                {
                    "split": "train" if n < total - 10 else "eval",
                    "example": n,
                    "tokens": [*tokens(f"{answer if n % 3 == 0 else 'wrong'} {n}"), END],
                    "finish": "stop",
                    "stop": END,
                }
                for n in range(shard * 256, min(total, (shard + 1) * 256))
            ),
        )
    return run


EXPECTED = [float(n % 3 == 0) for n in range(TOTAL)]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where the user's modules are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_judge(body: str, *, when_tried: bool = False) -> str:
    """Write a module with a judge and return `module:function`.

    When it is tried on real responses, it finds them right without a trace, unless `when_tried`.
    """
    body = body if when_tried else f"if real == synthetic: return [1.0] * len(real)\n{body.strip()}"
    lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    Path("mine.py").write_text(f"{RECORDS}\ndef judge(prompt, real, synthetic, **kwargs):\n{lines}\n")
    return "mine:judge"


RIGHT = "return [float(r == s) for r, s in zip(real, synthetic)]"


@contextmanager
def judging(run: RunDir, function: str, **options: Any) -> Iterator[Judging]:
    with closing(Judging(JudgeArgs(function=function, **options), run, texts())) as started:
        yield started


def judge_all(run: RunDir, function: str, iterations: tuple[int, ...] = (0,), **options: Any) -> list[float | None]:
    """Judge a run and return the scores of its last iteration."""
    with judging(run, function, **options) as started:
        started.finish(iterations)
        return list(started.stored(iterations[-1]) or [])


def calls() -> list[Any]:
    """Return every response that was judged, in the order of the calls."""
    file = Path("calls")
    return [text for line in file.read_text().splitlines() for text in json.loads(line)] if file.exists() else []


# --- what the function gets and returns ------------------------------------------------------------


def test_every_response_gets_its_score(directory: Path, children: Children) -> None:
    assert judge_all(make_run(directory), write_judge(RIGHT)) == EXPECTED
    assert children() == []


def test_function_gets_texts_without_special_tokens(directory: Path) -> None:
    function = write_judge(
        """
note([prompt, real, synthetic, kwargs])
return [0.5] * len(real)
"""
    )
    assert judge_all(make_run(directory), function, processes=1, kwargs={"level": [1, {"a": None}]})[0] == 0.5
    prompt, real, synthetic, kwargs = json.loads(Path("calls").read_text().splitlines()[0])
    assert prompt[1] == {"text": "question 1", "messages": None}
    assert (real[1], synthetic[1], synthetic[3]) == ("answer 1", "wrong 1", "answer 3")
    assert kwargs == {"level": [1, {"a": None}]}


@pytest.mark.parametrize("returned", [[0, 1, 0.5], (True, False, True), iter([1.0, 0.0, 0.25])])
def test_any_numbers_between_0_and_1_are_scores(returned: Any) -> None:
    found = scores(returned, 3)
    assert all(type(score) is float for score in found)
    assert len(found) == 3


def test_scores_of_numpy_and_torch_are_numbers() -> None:
    import numpy as np
    import torch

    assert scores(np.array([0.5, 1.0], dtype=np.float32), 2) == [0.5, 1.0]
    assert scores(torch.tensor([0.25, 0.0]), 2) == [0.25, 0.0]


def test_ready_made_judge_needs_only_its_name(directory: Path) -> None:
    assert judge_all(make_run(directory), "exact") == EXPECTED
    assert judge_all(make_run(directory), "number") == [1.0] * TOTAL


# --- functions that fail -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('no such column')", "KeyError: 'no such column'"),
        ("if 'wrong 4' in synthetic: raise ValueError('two\\nlines')\n" + RIGHT, "lines"),
        ("return [float('nan')] * len(real)", "score nan is not in 0…1"),
        ("return ['1'] * len(real)", "score '1' is not a number"),
        ("return [None] * len(real)", "score None is not a number"),
        ("return [1.5] * len(real)", "score 1.5 is not in 0…1"),
        ("return [-0.1] * len(real)", "score -0.1 is not in 0…1"),
        ("return [1.0]", "1 scores returned for 16 responses (in a batch of 16, not alone)"),
        ("return 0.5", "TypeError: 'float' object is not iterable"),
        ("raise ExceptionGroup('many', [OSError()])", "ExceptionGroup: many (1 sub-exception)"),
    ],
)
def test_failing_function_ends_in_one_line_and_is_named(directory: Path, body: str, reason: str) -> None:
    run = make_run(directory)
    with pytest.raises(SpinError) as caught:
        judge_all(run, write_judge(body))
    assert str(caught.value).startswith("spin.judge: mine:judge failed on iteration 0, the response '")
    assert reason in str(caught.value)
    assert "rerun the same command" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(list(Shards(run.iteration(0).synthetic).responses())) == TOTAL


def test_the_response_that_raises_is_named(directory: Path) -> None:
    function = write_judge("if 'wrong 4' in synthetic: raise ValueError('bad')\n" + RIGHT)
    with pytest.raises(SpinError, match=r"the response 'wrong 4' to 'question 4': ValueError: bad;"):
        judge_all(make_run(directory), function)


def test_messages_are_escaped_and_shortened(directory: Path) -> None:
    function = write_judge("raise ValueError('\\x1b[31m' + 1000 * 'long')")
    with pytest.raises(SpinError) as caught:
        judge_all(make_run(directory, answer="a\x1b[2J\n" + 200 * "b"), function)
    assert "'a\\x1b[2J\\nbbb" in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("absent:judge", "No module named 'absent'"),
        ("mine:absent", "has no attribute 'absent'"),
        ("broken:judge", "SyntaxError"),
        ("json:decoder", "it is not a function: module"),
    ],
)
def test_function_that_cannot_be_used_is_reported_before_anything_is_judged(
    directory: Path, function: str, reason: str, children: Children
) -> None:
    write_judge(RIGHT)
    Path("broken.py").write_text("def judge(:")
    with pytest.raises(SpinError, match=reason), judging(make_run(directory), function) as started:
        started.begin([0])
    assert children() == []


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"ignore": True}, "spin.judge.kwargs: spin_plugin.judge:exact: got an unexpected keyword argument 'ignore'"),
        ({"database": 1, "max": 2}, "spin.judge.kwargs: spin_plugin.judge:exact: "),
    ],
)
def test_wrong_kwargs_are_reported_by_name(directory: Path, kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpinError, match=re.escape(reason)):
        judge_all(make_run(directory), "spin_plugin.judge:exact", kwargs=kwargs)


def test_missing_kwargs_are_reported(directory: Path) -> None:
    with pytest.raises(SpinError, match=r"spin.judge.kwargs: .*missing a required argument: 'database'"):
        judge_all(make_run(directory), "spin_plugin.judge:sqlite")


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os; os.write(2, b'libgone.so: cannot open\\n'); os._exit(1)", "code 1: libgone.so: cannot open"),
        ("import sys; sys.excepthook = lambda *_: None\nraise ImportError('hidden?')", "ImportError: hidden?"),
        (
            "def judge(real, synthetic): pass",
            "cannot be loaded: TypeError: got an unexpected keyword argument 'prompt'",
        ),
    ],
)
def test_module_that_cannot_be_imported_is_reported_with_the_reason(directory: Path, start: str, reason: str) -> None:
    Path("mine.py").write_text(start)
    with pytest.raises(SpinError, match=re.escape(reason)):
        judge_all(make_run(directory), "mine:judge")


def test_trial_on_one_response_ends_at_the_time_limit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spin_plugin.judge.pool.START_TIMEOUT", 0.5)
    function = write_judge("note(synthetic)\ntime.sleep(3600)", when_tried=True)
    with pytest.raises(SpinError, match=r"'answer 0' to 'question 0': it took longer than 0.6 s \(spin.judge.timeout"):
        judge_all(make_run(directory), function, timeout=0.1)
    assert calls() == ["answer 0"]


def test_first_call_of_a_process_may_load_a_model(directory: Path) -> None:
    """Also in a process that is started after another one has died."""
    function = write_judge(
        f"""
if not hasattr(sys, "model"):
    time.sleep(1)
    sys.model = True
if 'wrong 4' in synthetic: os._exit(1)
{RIGHT}
""",
        when_tried=True,
    )
    found = judge_all(make_run(directory, total=20), function, timeout=0.2, processes=1)
    assert found == [None if n == 4 else score for n, score in enumerate(EXPECTED[:20])]


def test_replaced_excepthook_hides_no_error(directory: Path) -> None:
    function = write_judge("sys.excepthook = lambda *_: None\nraise KeyError('column')")
    with pytest.raises(SpinError, match="KeyError: 'column'"):
        judge_all(make_run(directory), function)


def test_forked_children_do_not_answer(directory: Path) -> None:
    """They return from the function as their parent does, or raise."""
    function = write_judge(f"if os.fork() == 0 and len(synthetic) % 2: raise OSError\n{RIGHT}")
    assert judge_all(make_run(directory), function) == EXPECTED


def test_judge_leaves_the_processor_to_vllm(directory: Path) -> None:
    judge_all(make_run(directory, total=20), write_judge(f"note([os.nice(0)])\n{RIGHT}"), processes=1)
    assert calls()[0] == min(19, os.nice(0) + 10)


def test_real_response_that_is_not_right_is_a_warning(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(directory)
    judge_all(run, write_judge("return [0.25] * len(real)", when_tried=True))
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if "warning" in line)
    assert "16 of 16 real responses, compared with themselves, do not reach drop_at: 1 (the first one: 0.25)" in warning
    judge_all(run, write_judge(RIGHT))
    assert "warning" not in capsys.readouterr().out


# --- functions that do not come back -----------------------------------------------------------


SKIPPED = [
    ("while True: pass", "it took longer than 0."),
    ("import subprocess; subprocess.run(['sleep', '3600'])", "it took longer than 0."),
    ("[bytes(1 << 30) for _ in range(5)]", "it needed more than 4 GiB of memory"),
    ("os.kill(os.getpid(), 11)", "it was killed by signal 11"),
    ("os._exit(3)", "it exited with code 3"),
    ("sys.stderr.write('first\\n\\nout of luck\\n'); sys.stderr.flush(); os._exit(3)", "code 3: out of luck"),
    ('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', "it needed more than 4 GiB of memory"),
    ("raise OSError(12, 'Cannot allocate memory')", "it needed more than 4 GiB of memory"),
    ("os.write(int(sys.argv[2]), b'nonsense\\n')", "its reply was garbled"),
    ("os.write(int(sys.argv[2]), b'[' * 5000 + b'\\n')", "its reply was garbled"),
    ('os.write(int(sys.argv[2]), b\'{"number": 0, "scores": []}\\n\')', "its reply was garbled"),
    ("sys.exit()", "it exited with code 0"),
]


@pytest.mark.parametrize(("fault", "reason"), SKIPPED, ids=[fault[:20] for fault, _ in SKIPPED])
def test_response_that_ends_the_process_is_skipped(
    directory: Path, fault: str, reason: str, children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    function = write_judge(f"if 'wrong 4' in synthetic:\n    {fault}\n{RIGHT}")
    found = judge_all(make_run(directory), function, timeout=0.3)
    assert found == [None if n == 4 else score for n, score in enumerate(EXPECTED)]
    output = capsys.readouterr().out
    assert "the response 'wrong 4' to 'question 4' is skipped: " in output
    assert reason in output
    assert "1 skipped" in output
    assert children() == []


def test_slow_function_is_judged_one_by_one(directory: Path) -> None:
    """A batch of 16 hangs, a response alone does not: none is skipped."""
    function = write_judge(f"if len(real) > 8: time.sleep(3600)\n{RIGHT}")
    assert judge_all(make_run(directory, total=20), function, timeout=0.3) == EXPECTED[:20]


def test_too_many_skipped_is_an_error(directory: Path) -> None:
    function = write_judge("if any('wrong' in text for text in synthetic): os._exit(1)\n" + RIGHT)
    with pytest.raises(SpinError, match="could not judge too many responses of iteration 0"):
        judge_all(make_run(directory), function)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_flood_of_output_is_discarded(directory: Path, stream: str) -> None:
    before = psutil.Process().memory_info().rss
    flood = f"for _ in range(100): sys.{stream}.write('x' * (1 << 20))"
    function = write_judge(f"if 'wrong 4' in synthetic:\n    {flood}\n{RIGHT}")
    assert judge_all(make_run(directory), function, processes=1) == EXPECTED
    assert psutil.Process().memory_info().rss - before < 50 << 20
    assert sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) < 1 << 20


def test_function_can_read_no_requests_from_stdin(directory: Path) -> None:
    assert judge_all(make_run(directory), write_judge(f"assert sys.stdin.read() == ''\n{RIGHT}")) == EXPECTED


# --- isolation ---------------------------------------------------------------------------------


def test_environment_holds_no_secrets(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DATABASE_URL"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    judge_all(make_run(directory, total=20), write_judge(f"note([dict(os.environ)])\n{RIGHT}"), processes=1)
    seen = json.loads(Path("calls").read_text().splitlines()[0])[0]
    assert seen["LC_ALL"] == "C.UTF-8"
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    added_by_python = {"LC_CTYPE"}
    assert seen.keys() - added_by_python <= {*ENVIRONMENT, *FIXED_ENVIRONMENT, "LC_ALL"}
    assert "secret" not in seen.values()


def test_processes_end_with_a_killed_parent(directory: Path) -> None:
    """At once, with what they have started, also if the function holds the interpreter's lock."""
    write_judge(
        "import re, subprocess, signal\nsignal.alarm(9999)\nchild = subprocess.Popen(['sleep', '3600'])\n"
        "note([child.pid])\nre.match('(a*)*b', 'a' * 99)",
        when_tried=True,
    )
    program = """
from spin_plugin.judge.process import JudgeProcess, Question
process = JudgeProcess()
process.load("mine:judge", {})
idle = JudgeProcess()
idle.load("mine:judge", {})
print(process._process.pid, idle._process.pid, flush=True)
process.scores([Question({"text": "", "messages": None}, "", "")], 3600.0)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        wait_until(lambda: bool(calls()))
        parent.kill()
    wait_until(lambda: not any(map(running, [*pids, *calls()])))


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- stored verdicts ---------------------------------------------------------------------------


def test_nothing_is_judged_twice(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, function = make_run(directory), write_judge(f"note(synthetic)\n{RIGHT}")
    judge_all(run, function)
    assert sorted(calls()) == sorted(f"{'answer' if n % 3 == 0 else 'wrong'} {n}" for n in range(TOTAL))
    assert re.search("300 responses judged by mine:judge in [0-9]+ s, 0 skipped", capsys.readouterr().out)
    assert judge_all(run, function, timeout=99, processes=1) == EXPECTED
    assert len(calls()) == TOTAL
    assert capsys.readouterr().out == ""


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def alter(path: Path) -> None:
    path.write_text(path.read_text().replace("1.0", "0.0", 1))


def replace_content(path: Path) -> None:
    path.write_text("[1]")


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, alter, replace_content, delete])
def test_damaged_verdicts_are_judged_again(directory: Path, damage: Callable[[Path], None]) -> None:
    run, function = make_run(directory), write_judge(f"note(synthetic)\n{RIGHT}")
    judge_all(run, function)
    damage(run.iteration(0).synthetic / "verdicts-00001.json")
    assert judge_all(run, function) == EXPECTED
    assert len(calls()) == TOTAL + TOTAL - 256


def test_verdicts_of_other_responses_or_another_judge_are_judged_again(directory: Path) -> None:
    run, function = make_run(directory), write_judge(f"note(synthetic)\n{RIGHT}")
    judge_all(run, function)
    judge_all(run, function, kwargs={"level": 2})
    assert len(calls()) == 2 * TOTAL
    write_judge(f"note(synthetic)\n# edited\n{RIGHT}")
    judge_all(run, function, kwargs={"level": 2})
    assert len(calls()) == 3 * TOTAL
    shards = Shards(run.iteration(0).synthetic)
    shards.write(1, [response | {"tokens": [65, END]} for response in shards.read(1)])
    assert judge_all(run, function, kwargs={"level": 2}) == EXPECTED[:256] + [0.0] * (TOTAL - 256)
    assert len(calls()) == 3 * TOTAL + TOTAL - 256


def test_complete_verdicts_need_no_judge(directory: Path) -> None:
    """The function is not even imported, but its file is known: a change is found."""
    run, function = make_run(directory), write_judge(RIGHT)
    source = Path("mine.py").read_text()
    Path("mine.py").write_text(f"import pathlib\nassert not pathlib.Path('gone').exists()\n{source}")
    judge_all(run, function)
    Path("gone").touch()
    with judging(run, function) as started:
        started.begin([0])
        assert started.finish([0]) == {0: EXPECTED}
    Path("mine.py").write_text(source + "# edited")
    assert judge_all(run, function) == EXPECTED


def test_missing_shard_is_no_error_if_its_verdict_is_there(directory: Path) -> None:
    run, function = make_run(directory), write_judge(RIGHT)
    judge_all(run, function)
    shards = Shards(run.iteration(0).synthetic)
    shards.shard(1).unlink()
    assert judge_all(run, function) == EXPECTED
    (shards.directory / "verdicts-00001.json").unlink()
    with pytest.raises(SpinError, match="is missing"):
        judge_all(run, function)


@pytest.mark.parametrize(
    "definition",
    [
        "from other import judge",
        "import functools, other\njudge = functools.wraps(other.judge)(lambda **k: other.judge(**k))",
    ],
)
def test_changes_in_either_module_of_a_function_are_found(directory: Path, definition: str) -> None:
    """The one that it is found in, and the one that defines it."""
    run = make_run(directory, total=20)
    write_judge(f"note(synthetic)\n{RIGHT}")
    Path("mine.py").rename("other.py")
    Path("mine.py").write_text(definition)
    judge_all(run, "mine:judge")
    assert len(calls()) == 20
    for number, file in enumerate(("mine.py", "other.py")):
        Path(file).write_text(Path(file).read_text() + "\n# edited\n")
        judge_all(run, "mine:judge")
        assert len(calls()) == 40 + 20 * number


def test_a_longer_time_limit_judges_again_what_was_skipped(directory: Path) -> None:
    run = make_run(directory)
    function = write_judge(f"while 'wrong 4' in synthetic and not os.path.exists('go'): time.sleep(0.01)\n{RIGHT}")
    assert judge_all(run, function, timeout=0.1)[4] is None
    assert judge_all(run, function, timeout=0.05)[4] is None
    Path("go").touch()
    assert judge_all(run, function, timeout=0.1)[4] is None
    assert judge_all(run, function, timeout=60) == EXPECTED


def test_failure_keeps_the_finished_verdicts(directory: Path) -> None:
    run = make_run(directory)
    function = write_judge(
        f"note(synthetic)\nif 'answer 270' in synthetic and not os.path.exists('go'): raise OSError\n{RIGHT}"
    )
    with pytest.raises(SpinError):
        judge_all(run, function)
    assert set(calls()) >= {"answer 0", "wrong 1"}
    Path("calls").unlink()
    Path("go").touch()
    assert judge_all(run, function) == EXPECTED
    assert len(calls()) == TOTAL - 256


def test_killed_while_judging_and_continued(directory: Path) -> None:
    """Killed in the second shard: the first one is not judged again, and no process is left."""
    run = make_run(directory)
    function = write_judge(
        f"note(synthetic)\nwhile 'answer 270' in synthetic and not os.path.exists('go'): time.sleep(0.05)\n{RIGHT}"
    )
    program = f"from test_judging import *; judge_all(RunDir(Path({str(run.root)!r})), {function!r}, timeout=2)"
    paths = os.pathsep.join([*map(str, (ROOT / "tests", ROOT / "tests/unit/judge")), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as parent:
        wait_until(lambda: "answer 270" in calls())
        started = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    Path("go").touch()
    wait_until(lambda: not any(child.is_running() for child in started))
    first = len(calls())
    assert judge_all(run, function) == EXPECTED
    assert len(calls()) - first == TOTAL - 256


# --- in the background -------------------------------------------------------------------------


def test_shards_are_judged_as_they_are_submitted(directory: Path) -> None:
    run = make_run(directory)
    with judging(run, write_judge(f"note(synthetic)\n{RIGHT}")) as started:
        started.submit(0, 1)
        wait_until(started.verdicts(0).file(1).exists)
        assert len(calls()) == TOTAL - 256
        started.submit(0, 0)
        started.finish([0])
        assert started.stored(0) == EXPECTED
    assert len(calls()) == TOTAL


def test_nothing_is_judged_after_a_failure_and_the_end_reports_it(directory: Path) -> None:
    """Generating goes on: `submit` does not raise."""
    with judging(make_run(directory), write_judge("note(synthetic)\nraise OSError")) as started:
        started.submit(0, 0)
        wait_until(started._shards[0, 0].done)
        started.submit(0, 1)
        with pytest.raises(SpinError, match="OSError"):
            started.finish([0])
        assert "answer 270" not in calls(), "a response of the second shard"


def test_closing_does_not_wait_for_the_function(directory: Path, children: Children) -> None:
    function = write_judge("note(synthetic)\ntime.sleep(3600)")
    with judging(make_run(directory), function, timeout=3600) as started:
        started.submit(0, 0)
        wait_until(lambda: bool(calls()))
    assert children() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("judg")]


def test_earlier_iterations_are_judged_where_verdicts_are_missing(directory: Path) -> None:
    run, function = make_run(directory), write_judge(f"note(synthetic)\n{RIGHT}")
    judge_all(run, function)
    make_run(directory, 1, total=20)
    assert judge_all(run, function, (0, 1)) == EXPECTED[:20]
    assert len(calls()) == TOTAL + 20


def test_function_that_changes_while_judging_is_refused(directory: Path) -> None:
    run = make_run(directory)
    function = write_judge("if 'wrong 4' in synthetic: os._exit(0)\n" + RIGHT)
    with judging(run, function) as started:
        started.begin([0])
        write_judge(RIGHT)
        with pytest.raises(SpinError, match="changed during the run"):
            started.finish([0])
