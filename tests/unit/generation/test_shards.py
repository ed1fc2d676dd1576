"""Requests of a job, its shards on disk, and the choice of vLLM's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset

from spin_plugin.console import SpinError
from spin_plugin.generation import python as interpreter
from spin_plugin.generation.job import (
    SHARD,
    Job,
    Prompts,
    Request,
    fingerprint_requests,
    request_seed,
    requests_for,
    shards_of,
)
from spin_plugin.generation.python import vllm_python
from spin_plugin.generation.shards import Shards

JOB = Job(
    iteration=1,
    engine={"model": "iteration-0", "gpu_memory_utilization": 0.9},
    adapter=None,
    weights="abc",
    sampling={"temperature": 1.0, "top_p": 1.0, "stop_token_ids": [2, 7]},
    requests=3 * SHARD,
    requests_sha256="def",
)


def responses(number: int, count: int = SHARD) -> list[dict[str, Any]]:
    first = number * SHARD
    return [
        {"split": "train", "example": n, "tokens": [n, n % 11, 2], "finish": "stop", "stop": 2}
        for n in range(first, first + count)
    ]


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """A finished job of three shards."""
    shards = Shards(tmp_path / "synthetic")
    shards.prepare(JOB)
    for number in range(shards_of(JOB.requests)):
        shards.write(number, responses(number))
    return shards


# --- shards ------------------------------------------------------------------------------------


def test_shards_are_read_as_written(shards: Shards) -> None:
    assert shards_of(JOB.requests) == 3
    for number in range(3):
        assert shards.read(number) == responses(number)
    assert list(shards.responses()) == responses(0) + responses(1) + responses(2)
    assert shards.missing(JOB) == []


@pytest.mark.parametrize(("requests", "count"), [(0, 0), (1, 1), (SHARD, 1), (SHARD + 1, 2), (10 * SHARD - 1, 10)])
def test_number_of_shards(requests: int, count: int) -> None:
    assert shards_of(requests) == count


def test_empty_shard_is_valid(shards: Shards) -> None:
    shards.write(0, [])
    assert shards.read(0) == []


def truncate_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_seal(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def drop_seal(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def drop_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def swap_lines(path: Path) -> None:
    first, second, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([second, first, *rest]))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def break_encoding(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x80
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


DAMAGE = [truncate_half, truncate_seal, drop_seal, drop_line, swap_lines, flip_bit, break_encoding, empty, delete]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_only_the_damaged_shard_is_missing(shards: Shards, damage: Callable[[Path], None]) -> None:
    damage(shards.shard(1))
    assert shards.missing(JOB) == [1]
    assert not shards.shard(1).exists()
    assert shards.read(0) == responses(0)
    assert shards.read(2) == responses(2)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_reading_a_damaged_shard_is_an_error(shards: Shards, damage: Callable[[Path], None]) -> None:
    damage(shards.shard(2))
    with pytest.raises(SpinError) as caught:
        list(shards.responses() if shards.shard(2).exists() else shards.read(2))
    assert str(shards.shard(2)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_is_detected_or_harmless(shards: Shards) -> None:
    """A flipped line break can become another character that also ends a line."""
    shards.write(0, responses(0, 2))
    content = shards.shard(0).read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        shards.shard(0).write_bytes(flipped)
        try:
            assert shards.read(0) == responses(0, 2)
            assert content[position] == ord("\n")
        except SpinError:
            pass


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"model": "/elsewhere/iteration-0", "gpu_memory_utilization": 0.4, "tensor_parallel_size": 2}},
        {"adapter": "/elsewhere/iteration-0"},
    ],
)
def test_shards_are_kept_if_only_engine_options_change(shards: Shards, change: dict[str, Any]) -> None:
    shards.update_manifest(vllm="0.25.0")
    shards.prepare(replace(JOB, **change))
    assert shards.missing(JOB) == []


@pytest.mark.parametrize(
    ("change", "description"),
    [
        ({"iteration": 2}, "the iteration"),
        ({"weights": "other"}, "the opponent's weights"),
        ({"weights": "other", "revision": "b" * 40}, "weights (on the hub from commit aaaaaaaaaa to bbbbbbbbbb)"),
        ({"sampling": JOB.sampling | {"temperature": 0.7}}, "the sampling"),
        ({"sampling": JOB.sampling | {"stop_token_ids": [2]}}, "the sampling"),
        ({"requests": 3 * SHARD - 1}, "the number of responses"),
        ({"requests_sha256": "other"}, "the requests"),
    ],
    ids=str,
)
def test_shards_of_another_job_are_set_aside_with_a_warning(
    shards: Shards, change: dict[str, Any], description: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards.update_manifest(revision="a" * 40)
    other, aside = replace(JOB, **change), shards.directory.with_name(".replaced-synthetic")
    for _ in range(2):  # the second call has nothing to set aside
        shards.prepare(other)
        assert shards.missing(other) == [0, 1, 2]
        assert [path.name for path in shards.directory.iterdir()] == ["job.json"]
    assert shards.manifest() == json.loads(json.dumps(other.manifest()))
    assert list(Shards(aside).responses()) == responses(0) + responses(1) + responses(2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("spin: warning: iteration ")
    assert "3 shards" in line
    assert f"because this changed: {description}" in line or f"the opponent's {description}" in line
    assert str(aside) in line


@pytest.mark.parametrize("manifest", [None, b"", b"{", b"[]", b"\xff\xfe\x80", b"{}"], ids=repr)
def test_shards_without_a_valid_manifest_are_set_aside(
    shards: Shards, manifest: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if manifest is None:
        shards.manifest_file.unlink()
    else:
        shards.manifest_file.write_bytes(manifest)
    shards.prepare(JOB)
    assert shards.missing(JOB) == [0, 1, 2]
    assert len(list(shards.directory.with_name(".replaced-synthetic").glob("shard-*"))) == 3
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_only_the_latest_nonempty_shards_set_aside_are_kept(shards: Shards) -> None:
    second, third = replace(JOB, weights="second"), replace(JOB, weights="third")
    shards.prepare(second)
    shards.prepare(third)  # nothing was generated for the second
    aside = Shards(shards.directory.with_name(".replaced-synthetic"))
    assert aside.manifest() == json.loads(json.dumps(JOB.manifest()))
    shards.write(0, responses(0))
    shards.prepare(JOB)
    assert aside.manifest() == json.loads(json.dumps(third.manifest()))
    assert len(list(shards.directory.parent.iterdir())) == 2


def test_note_adds_fields_to_the_manifest(shards: Shards) -> None:
    shards.update_manifest(vllm="0.25.0")
    manifest = shards.manifest()
    assert manifest is not None
    assert (manifest["vllm"], manifest["weights"]) == ("0.25.0", "abc")
    assert JOB.differs_from(manifest) == []


# --- seeds -------------------------------------------------------------------------------------


def test_request_seed_is_stable() -> None:
    """The first four bytes of sha256("42/0/train/0/0"). A change would invalidate unfinished jobs."""
    assert request_seed(42, 0, "train", 0, 0) == 3900211225


def test_request_seed_is_the_same_in_another_process() -> None:
    program = "from spin_plugin.generation.job import request_seed; print(request_seed(7, 3, 'eval', 11, 2))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == request_seed(7, 3, "eval", 11, 2)


def test_request_seeds_are_unique() -> None:
    seeds = [
        request_seed(seed, iteration, split, example, sample)
        for seed, iteration, split, example, sample in product(
            (0, 1, 42), range(3), ("train", "eval"), range(20), range(3)
        )
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


# --- requests ----------------------------------------------------------------------------------

EXAMPLES = Dataset.from_dict({"prompt": [[n] * (n + 1) for n in range(6)], "real": [[1, 2]] * 6})  # prompts of 1..6
HELD_OUT = Dataset.from_dict({"prompt": [[9, 9]], "real": [[2]]})


def make_requests(
    *, samples: int = 1, sequence_len: int = 10, max_tokens: int | None = None, block: int = 1024
) -> list[Request]:
    prompts = [Prompts("train", EXAMPLES, np.array([1, 2, 5])), Prompts("eval", HELD_OUT, np.array([0]))]
    return list(
        requests_for(
            prompts,
            iteration=3,
            seed=42,
            samples=samples,
            sequence_len=sequence_len,
            max_tokens=max_tokens,
            block=block,
        )
    )


def test_requests_are_numbered_across_splits() -> None:
    assert [(r.number, r.split, r.example, r.prompt) for r in make_requests()] == [
        (0, "train", 1, [1, 1]),
        (1, "train", 2, [2, 2, 2]),
        (2, "train", 5, [5] * 6),
        (3, "eval", 0, [9, 9]),
    ]


def test_samples_of_a_prompt_are_consecutive() -> None:
    requests = make_requests(samples=3)
    assert [r.number for r in requests] == list(range(12))
    assert [r.example for r in requests] == [1, 1, 1, 2, 2, 2, 5, 5, 5, 0, 0, 0]
    assert [r.seed for r in requests[:3]] == [request_seed(42, 3, "train", 1, sample) for sample in range(3)]
    assert len({r.seed for r in requests}) == 12


@pytest.mark.parametrize(
    ("max_tokens", "budgets"), [(None, [8, 7, 4, 8]), (100, [8, 7, 4, 8]), (5, [5, 5, 4, 5]), (1, [1, 1, 1, 1])]
)
def test_max_tokens_is_limited_by_sequence_len(max_tokens: int | None, budgets: list[int]) -> None:
    """Prompts of 2, 3, 6 and 2 tokens, sequence_len 10."""
    assert [r.max_tokens for r in make_requests(max_tokens=max_tokens)] == budgets


@pytest.mark.parametrize("sequence_len", [6, 4])
def test_prompts_that_leave_no_space_are_left_out(sequence_len: int) -> None:
    """`vllm.max_model_len` can be shorter than `sequence_len`, and vLLM rejects `max_tokens` below 1."""
    assert all(request.max_tokens >= 1 for request in make_requests(sequence_len=sequence_len))


def test_block_size_does_not_change_requests() -> None:
    assert make_requests(samples=2, block=1) == make_requests(samples=2, block=2) == make_requests(samples=2)


def test_fingerprint_differs_between_different_requests() -> None:
    requests = make_requests()
    count, digest = fingerprint_requests(iter(requests))
    assert count == 4
    assert fingerprint_requests(iter(make_requests())) == (count, digest)
    others = [make_requests(samples=2), make_requests(max_tokens=3), requests[:3], requests[::-1]]
    others += [[requests[0]._replace(seed=1), *requests[1:]], [requests[0]._replace(prompt=[1, 2]), *requests[1:]]]
    assert len({digest, *(fingerprint_requests(iter(other))[1] for other in others)}) == 1 + len(others)


# --- the interpreter ---------------------------------------------------------------------------


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def with_vllm(directory: Path) -> Path:
    """An interpreter that can import an empty package named vllm."""
    package = directory / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return program(
        directory / "bin" / "python", f'#!/bin/sh\nPYTHONPATH="{package.parent}" exec "{sys.executable}" "$@"\n'
    )


@pytest.fixture
def no_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No vLLM in the working directory, the environment or the checkout."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("SPIN_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(interpreter, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(interpreter, "find_spec", lambda name: None)  # in case the tests' interpreter has vLLM
    return tmp_path


def test_configured_interpreter_comes_first(no_vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for_config, for_variable = with_vllm(no_vllm / "config"), with_vllm(no_vllm / "variable")
    with_vllm(no_vllm / "work" / ".venv-vllm")
    monkeypatch.setenv("SPIN_VLLM_PYTHON", str(for_variable))
    assert vllm_python(str(for_config)) == for_config
    assert vllm_python(None) == for_variable


@pytest.mark.parametrize("place", ["work", "checkout"])
def test_environment_in_the_working_directory_or_checkout_is_found(no_vllm: Path, place: str) -> None:
    python = with_vllm(no_vllm / place / ".venv-vllm")
    assert vllm_python(None) == python


def test_this_interpreter_is_used_if_it_has_vllm(no_vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_vllm(no_vllm / "work" / ".venv-vllm")
    with_vllm(no_vllm / "here")
    monkeypatch.syspath_prepend(str(no_vllm / "here" / "packages"))
    monkeypatch.setattr(interpreter, "find_spec", importlib.util.find_spec)
    assert vllm_python(None) == Path(sys.executable)


def test_working_directory_comes_before_the_checkout(no_vllm: Path) -> None:
    with_vllm(no_vllm / "checkout" / ".venv-vllm")
    python = with_vllm(no_vllm / "work" / ".venv-vllm")
    assert vllm_python(None) == python


def test_home_directory_is_expanded(no_vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = with_vllm(no_vllm / "home")
    monkeypatch.setenv("HOME", str(no_vllm / "home"))
    assert vllm_python("~/bin/python") == python


@pytest.mark.parametrize("key", ["spin.generation.vllm_python", "SPIN_VLLM_PYTHON"])
@pytest.mark.parametrize("kind", ["absent", "directory", "not executable", "no program", "no interpreter", "no vllm"])
def test_unusable_interpreter_is_refused_by_its_key(
    no_vllm: Path, monkeypatch: pytest.MonkeyPatch, key: str, kind: str
) -> None:
    python = no_vllm / "python"
    if kind == "directory":
        python.mkdir()
    elif kind == "not executable":
        python.write_text("#!/bin/sh\nexit 0\n")
    elif kind == "no program":
        program(python, "just some text\n")
    elif kind == "no interpreter":
        program(python, "#!/nowhere/at/all\n")
    elif kind == "no vllm":
        program(python, f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    if key == "SPIN_VLLM_PYTHON":
        monkeypatch.setenv(key, str(python))
    with pytest.raises(SpinError) as caught:
        vllm_python(str(python) if key == "spin.generation.vllm_python" else None)
    assert str(caught.value).startswith(f"{key}: {python} ")
    assert "\n" not in str(caught.value)


def test_environment_without_vllm_is_an_error(no_vllm: Path) -> None:
    """A `.venv-vllm` without vLLM is not skipped."""
    python = program(
        no_vllm / "work" / ".venv-vllm" / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n'
    )
    with pytest.raises(SpinError, match=f"{python} has no vLLM"):
        vllm_python(None)


def test_error_without_vllm_lists_every_remedy(no_vllm: Path) -> None:
    with pytest.raises(SpinError) as caught:
        vllm_python(None)
    for remedy in ("scripts/setup.sh", "axolotl spin setup", "spin.generation.vllm_python", "SPIN_VLLM_PYTHON"):
        assert remedy in str(caught.value)
