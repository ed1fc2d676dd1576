"""Tokenized SFT rows to examples, and synthetic responses to pairs, on real Arrow files."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_plugin.console import SpinError
from spin_plugin.data.examples import (
    IGNORED,
    ExampleCounts,
    choose_prompts,
    find_end_tokens,
    trained_spans,
    write_examples,
)
from spin_plugin.data.initial import with_initial
from spin_plugin.data.pairs import JudgeStats, NewestStats, PairStats, Synthetic, build_pairs, read_stats, write_stats
from spin_plugin.data.table import BLOCK, open_table

END = 2  # the end token of these rows
Turns = Literal["first", "last", "all"]


# --- spans -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ([], []),
        ([IGNORED], []),
        ([IGNORED, IGNORED], []),
        ([7], [(0, 1)]),
        ([7, 8, 9], [(0, 3)]),
        ([IGNORED, 8, 9], [(1, 3)]),
        ([7, 8, IGNORED], [(0, 2)]),
        ([IGNORED, 8, IGNORED], [(1, 2)]),
        ([7, IGNORED, 9], [(0, 1), (2, 3)]),
        ([IGNORED, 7, 8, IGNORED, IGNORED, 3, IGNORED, 4, 5], [(1, 3), (5, 6), (7, 9)]),
        ([IGNORED, 0, IGNORED], [(1, 2)]),
    ],
)
def test_trained_spans_by_hand(labels: list[int], spans: list[tuple[int, int]]) -> None:
    assert trained_spans(labels) == spans


@given(st.lists(st.sampled_from([IGNORED, 0, 5])))
def test_trained_spans_cover_exactly_the_trained_tokens(labels: list[int]) -> None:
    spans = trained_spans(labels)
    covered = [position for start, end in spans for position in range(start, end)]
    assert covered == [position for position, label in enumerate(labels) if label != IGNORED]
    assert all(before[1] < after[0] for before, after in pairwise(spans))


# --- examples ----------------------------------------------------------------------------------


def row(*segments: tuple[bool, Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return input_ids and labels of (trained?, tokens) segments."""
    ids = [token for _, tokens in segments for token in tokens]
    labels = [token if trained else IGNORED for trained, tokens in segments for token in tokens]
    return ids, labels


def sft(*rows: tuple[list[int], list[int]]) -> Dataset:
    """Return rows as tokenized by Axolotl, with a column that SPIN ignores."""
    return Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in rows],
            "attention_mask": [[1] * len(ids) for ids, _ in rows],
            "labels": [labels for _, labels in rows],
        }
    )


TWO_TURNS = row(
    (False, [10, 11]), (True, [20, END]), (False, [3, 12]), (True, [21, 22, END]), (False, [3])
)  # user, assistant, user, assistant, a line break that SFT does not train on


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ("first", [([10, 11], [20, END])]),
        ("last", [([10, 11, 20, END, 3, 12], [21, 22, END])]),
        ("all", [([10, 11], [20, END]), ([10, 11, 20, END, 3, 12], [21, 22, END])]),
    ],
)
def test_prompt_is_everything_before_the_turn(
    tmp_path: Path, turns: Turns, expected: list[tuple[list[int], list[int]]]
) -> None:
    counts = write_examples(sft(TWO_TURNS), tmp_path / "x.arrow", turns=turns, sequence_len=100)
    examples = open_table(tmp_path / "x.arrow")
    assert list(zip(examples["prompt"], examples["real"], strict=True)) == expected
    assert counts == ExampleCounts(rows=1, examples=len(expected), ends=Counter({END: len(expected)}))


def test_rows_without_an_example_are_counted(tmp_path: Path) -> None:
    """With sequence_len 6, only the first of the two turns of the last row fits."""
    rows = sft(
        row((False, [10, 11, 12])),  # no trained response
        row((True, [20, 21, END])),  # no prompt
        row((False, [10, 11, 12]), (True, [20, 21, 22, END])),  # 7 tokens
        row((False, [10, 11, 12]), (True, [20, 21, END])),  # 6 tokens: just fits
        row((False, [10]), (True, [20, END]), (False, [11, 12, 13]), (True, [21, END])),
    )
    counts = write_examples(rows, tmp_path / "x.arrow", turns="all", sequence_len=6)
    assert counts == ExampleCounts(rows=5, examples=2, no_response=1, no_prompt=1, too_long=2, ends=Counter({END: 2}))
    assert open_table(tmp_path / "x.arrow")["prompt"][:] == [[10, 11, 12], [10]]
    summary = counts.summary()
    assert summary.startswith("2 prompts from 5 rows; skipped ")
    for part in ("1 without a trained response", "1 without a prompt", "2 over sequence_len"):
        assert part in summary


def test_first_turn_without_a_prompt_does_not_hide_the_later_ones(tmp_path: Path) -> None:
    rows = sft(row((True, [20, END]), (False, [11]), (True, [21, END])))
    counts = write_examples(rows, tmp_path / "x.arrow", turns="all", sequence_len=50)
    assert (counts.no_prompt, counts.examples) == (1, 1)
    assert open_table(tmp_path / "x.arrow")[0] == {"prompt": [20, END, 11], "real": [21, END], "row": 0}


def test_skipped_rows_are_not_mentioned_if_there_are_none() -> None:
    assert ExampleCounts(rows=1200, examples=1200).summary() == "1,200 prompts from 1,200 rows"


def test_no_rows_yield_an_empty_table(tmp_path: Path) -> None:
    rows = sft(TWO_TURNS).select([])
    assert write_examples(rows, tmp_path / "x.arrow", turns="all", sequence_len=9) == ExampleCounts()
    assert len(open_table(tmp_path / "x.arrow")) == 0


def test_selected_and_shuffled_rows_are_read_in_their_order(tmp_path: Path) -> None:
    """Axolotl splits and shuffles with an indices mapping, so the rows of the file are in another order."""
    rows = sft(*(row((False, [10 + n]), (True, [50 + n, END])) for n in range(6))).select([4, 0, 3])
    write_examples(rows, tmp_path / "x.arrow", turns="all", sequence_len=9)
    assert open_table(tmp_path / "x.arrow")["prompt"][:] == [[14], [10], [13]]


# --- end tokens --------------------------------------------------------------------------------

PERIOD = 46


def ends_of(reals: list[list[int]], special: Sequence[int] = ()) -> list[int]:
    examples = Dataset.from_dict({"prompt": [[1]] * len(reals), "real": reals})
    return find_end_tokens(examples, Counter(real[-1] for real in reals), special)


def test_token_that_only_ends_responses_is_an_end_token() -> None:
    assert ends_of([[20, 21, END], [22, END], [20, END]]) == [END]


def test_special_token_inside_responses_is_still_an_end_token() -> None:
    """A trained span can contain several turns."""
    reals = [[20, END, 21, END], [22, END]]
    assert ends_of(reals, special=[END, 5]) == [END]
    with pytest.raises(SpinError):
        ends_of(reals)


def test_two_datasets_with_different_ends() -> None:
    """The more frequent one comes first."""
    assert ends_of([[20, END]] * 30 + [[21, 7]] * 50) == [7, END]


def test_period_inside_responses_is_not_an_end_token() -> None:
    reals = [[20, PERIOD, 21, END]] * 95 + [[20, PERIOD]] * 5
    assert ends_of(reals) == [END]


def test_end_tokens_must_cover_90_percent() -> None:
    reals = [[20, PERIOD, 21, END]] * 89 + [[20, PERIOD]] * 11
    with pytest.raises(SpinError, match=r"datasets: only 89 of 100 real responses end in an end token") as caught:
        ends_of(reals)
    assert "\n" not in str(caught.value)


def test_responses_without_a_common_end_are_refused() -> None:
    words = list(range(100, 140))
    with pytest.raises(SpinError, match="datasets: "):
        ends_of([[*words[n:], *words[: n + 1]] for n in range(40)])


def test_last_tokens_that_differ_between_rows_are_not_end_tokens() -> None:
    """In ten short responses without an end token, no last token occurs inside a response."""
    with pytest.raises(SpinError, match="datasets: "):
        ends_of([[50, 100 + n] for n in range(10)])


def test_last_token_of_a_truncated_row_is_not_an_end_token() -> None:
    """Otherwise generation would stop at an ordinary word."""
    assert ends_of([[50, 51, END]] * 30 + [[50, 99]]) == [END]


# --- prompts -----------------------------------------------------------------------------------


def test_chosen_prompts_are_sorted_unique_and_reproducible() -> None:
    chosen = choose_prompts(1000, 100, seed=42, sample=0)
    assert len(chosen) == 100
    assert (np.diff(chosen) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < 1000
    assert np.array_equal(chosen, choose_prompts(1000, 100, seed=42, sample=0))


@pytest.mark.parametrize(("seed", "sample"), [(43, 0), (42, 1), (0, 42)])
def test_seed_and_sample_choose_other_prompts(seed: int, sample: int) -> None:
    assert not np.array_equal(
        choose_prompts(1000, 100, seed=42, sample=0), choose_prompts(1000, 100, seed=seed, sample=sample)
    )


@pytest.mark.parametrize("count", [None, 10, 11, 10_000])
def test_all_prompts_are_chosen_if_num_prompts_is_large_or_unset(count: int | None) -> None:
    assert choose_prompts(10, count, seed=1, sample=3).tolist() == list(range(10))


# --- pairs -------------------------------------------------------------------------------------


def generated(example: int, tokens: list[int], *, iteration: int = 0, truncated: bool = False) -> Synthetic:
    return Synthetic(example, iteration, tokens, truncated)


@pytest.fixture
def examples(tmp_path: Path) -> Dataset:
    """Three examples: 1 + 3, 2 + 2 and 3 + 4 tokens."""
    rows = sft(
        row((False, [10]), (True, [20, 21, END])),
        row((False, [11, 12]), (True, [22, END])),
        row((False, [13, 14, 15]), (True, [23, 24, 25, END])),
    )
    write_examples(rows, tmp_path / "real.arrow", turns="all", sequence_len=100)
    return open_table(tmp_path / "real.arrow")


def paired(
    examples: Dataset, synthetic: list[Synthetic], directory: Path, *, sequence_len: int = 100, keep_equal: bool = False
) -> tuple[PairStats, Dataset]:
    path = directory / "pairs.arrow"
    stats = build_pairs(
        examples, iter(synthetic), path, end_tokens=[END, 7], sequence_len=sequence_len, keep_equal=keep_equal
    )
    return stats, open_table(path)


def test_responses_are_joined_with_their_prompts_by_id(examples: Dataset, tmp_path: Path) -> None:
    """Positions do not matter, and an example can occur several times."""
    stats, pairs = paired(
        examples,
        [
            generated(2, [30, END]),
            generated(0, [31, END]),
            generated(0, [32, 33, END]),
            generated(2, [34, END], iteration=1),
        ],
        tmp_path,
    )
    assert pairs.to_list() == [
        {"prompt": [13, 14, 15], "real": [23, 24, 25, END], "synthetic": [30, END],
         "index": 0, "example": 2, "iteration": 0, "length": 9},
        {"prompt": [10], "real": [20, 21, END], "synthetic": [31, END],
         "index": 1, "example": 0, "iteration": 0, "length": 6},
        {"prompt": [10], "real": [20, 21, END], "synthetic": [32, 33, END],
         "index": 2, "example": 0, "iteration": 0, "length": 7},
        {"prompt": [13, 14, 15], "real": [23, 24, 25, END], "synthetic": [34, END],
         "index": 3, "example": 2, "iteration": 1, "length": 9},
    ]  # fmt: skip
    assert (stats.responses, stats.pairs) == (4, 4)


def test_a_response_equal_to_the_real_one_costs_nothing(examples: Dataset, tmp_path: Path) -> None:
    """Its log-prob is that of the real one, which is computed anyway."""
    responses = [generated(0, [20, 21, END]), generated(0, [20, 21, 22, END])]
    _, pairs = paired(examples, responses, tmp_path, keep_equal=True)
    assert pairs["length"][:] == [1 + 3, 1 + 3 + 4]


def test_mixed_responses_keep_their_order(examples: Dataset, tmp_path: Path) -> None:
    newest = [generated(n, [40 + n, END], iteration=3) for n in range(3)]
    older = [generated(n, [50 + n, END], iteration=2) for n in range(3)]
    _, pairs = paired(examples, newest + older, tmp_path)
    assert pairs["iteration"][:] == [3, 3, 3, 2, 2, 2]
    assert pairs["synthetic"][:] == [response.tokens for response in newest + older]


@pytest.mark.parametrize("tokens", [[], [END], [7]])
def test_empty_responses_are_dropped(examples: Dataset, tmp_path: Path, tokens: list[int]) -> None:
    stats, pairs = paired(examples, [generated(0, tokens), generated(1, [30, END])], tmp_path)
    assert (stats.empty, stats.pairs) == (1, 1)
    assert pairs["example"][:] == [1]


def test_response_of_one_ordinary_token_is_not_empty(examples: Dataset, tmp_path: Path) -> None:
    stats, _ = paired(examples, [generated(0, [30], truncated=True)], tmp_path)
    assert (stats.empty, stats.pairs) == (0, 1)


@pytest.mark.parametrize(("sequence_len", "kept"), [(6, 1), (5, 0)])
def test_responses_over_the_length_are_dropped(examples: Dataset, tmp_path: Path, sequence_len: int, kept: int) -> None:
    """The prompt has two tokens, the response four."""
    stats, _ = paired(examples, [generated(1, [30, 31, 32, END])], tmp_path, sequence_len=sequence_len)
    assert (stats.pairs, stats.over_length) == (kept, 1 - kept)


@pytest.mark.parametrize("keep", [True, False])
def test_identical_responses_are_counted_and_dropped_or_kept(examples: Dataset, tmp_path: Path, keep: bool) -> None:
    stats, pairs = paired(
        examples,
        [generated(0, [20, 21, END]), generated(0, [20, 21]), generated(1, [22, END])],
        tmp_path,
        keep_equal=keep,
    )
    assert (stats.equal, stats.pairs, stats.equal_dropped) == (2, 3 if keep else 1, not keep)
    assert pairs["synthetic"][:] == ([[20, 21, END], [20, 21], [22, END]] if keep else [[20, 21]])


def test_truncated_responses_are_counted_and_kept(examples: Dataset, tmp_path: Path) -> None:
    """No end token is appended."""
    stats, pairs = paired(examples, [generated(0, [30, 31], truncated=True), generated(1, [30, END])], tmp_path)
    assert (stats.truncated, stats.pairs) == (1, 2)
    assert pairs["synthetic"][0] == [30, 31]


def test_index_is_consecutive_despite_dropped_pairs(examples: Dataset, tmp_path: Path) -> None:
    """It is the storage index of the opponent's log-probs."""
    responses = [generated(n % 3, [END] if n % 2 else [30, 31 + n, END]) for n in range(20)]
    _, pairs = paired(examples, responses, tmp_path)
    assert pairs["index"][:] == list(range(10))


def test_initial_responses_are_a_column_of_their_own(examples: Dataset, tmp_path: Path) -> None:
    """Those that are missing, empty, too long or equal to the synthetic one are left out; their pairs stay."""
    path = tmp_path / "pairs.arrow"
    initial = [[40, 41, END], [], [END], list(range(40, 50)), [30, END]]
    responses = [generated(0, [30, END])._replace(initial=tokens) for tokens in initial]
    build_pairs(examples, responses, path, end_tokens=[END], sequence_len=10, keep_equal=False, has_initial=True)
    pairs = open_table(path)
    assert pairs["initial"][:] == [[40, 41, END], [], [], [], []]
    assert pairs["length"][:] == [9, 6, 6, 6, 6]


def test_pairs_of_other_losses_have_no_such_column(examples: Dataset, tmp_path: Path) -> None:
    _, pairs = paired(examples, [generated(0, [30, END])], tmp_path)
    assert "initial" not in pairs.column_names


@given(st.data())
def test_initial_responses_are_joined_by_example_and_sample(data: st.DataObject) -> None:
    """Against a dictionary. Prompts can be missing on either side, and the numbers of samples differ."""

    def drawn(iteration: int) -> list[Synthetic]:
        samples = data.draw(st.lists(st.integers(0, 3), max_size=6))
        return [
            generated(example, [iteration, example, sample], iteration=iteration)
            for example, count in enumerate(samples)
            for sample in range(count)
        ]

    now, initial = drawn(2), drawn(0)
    expected = {tuple(response.tokens[1:]): response.tokens for response in initial}
    joined = list(with_initial(iter(now), iter(initial)))
    assert [response._replace(initial=()) for response in joined] == now
    assert [response.initial for response in joined] == [expected.get(tuple(each.tokens[1:]), ()) for each in now]


def test_initial_responses_are_read_side_by_side() -> None:
    """At most one response more than needed is read: neither sequence is ever in memory."""
    read = 0

    def initial() -> Iterator[Synthetic]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield generated(number, [number])

    for number, response in enumerate(with_initial((generated(n, [5]) for n in range(1000)), initial())):
        assert response.initial == [number]
        assert read <= number + 2


def test_statistics_of_the_newest_responses_leave_out_earlier_ones(examples: Dataset, tmp_path: Path) -> None:
    """Of three newest ones, two are the same and one is equal; the older two change nothing."""
    newest = [generated(0, [30]), generated(0, [30], truncated=True), generated(1, [22, END])]
    older = [generated(1, [40, 41], iteration=2, truncated=True), generated(2, [50], iteration=2)]
    stats, _ = paired(examples, [response._replace(iteration=3) for response in newest] + older, tmp_path)
    assert stats.responses == 5
    assert stats.newest == NewestStats(3, 1, 1, (3 + 3 + 2) / 3, 4 / 3, distinct_real=2, distinct_synthetic=2)


def test_statistics_by_hand(examples: Dataset, tmp_path: Path) -> None:
    """Of eight responses, the empty, the identical and the overlong one yield no pair.

    The five pairs have real responses of 3, 3, 2, 4, 4 tokens (mean 3.2; the 95th percentile is at position
    0.95 * 4 = 3.8 of 2 3 3 4 4, so it is 4) and synthetic ones of 2, 3, 4, 1, 10 (mean 4; sorted 1 2 3 4 10,
    at position 3.8: 4 + 0.8 * 6 = 8.8).
    """
    responses = [
        generated(0, [30, END]),
        generated(0, [30, 31, END]),
        generated(1, [END]),
        generated(1, [30, 31, 32, END]),
        generated(1, [22, END]),
        generated(2, [30], truncated=True),
        generated(2, list(range(30, 40)), truncated=True),
        generated(2, list(range(30, 50)), truncated=True),
    ]
    stats, pairs = paired(examples, responses, tmp_path, sequence_len=16)
    assert stats == PairStats(
        responses=8,
        pairs=5,
        empty=1,
        equal=1,
        over_length=1,
        truncated=3,
        equal_dropped=True,
        real_mean=pytest.approx(3.2),
        real_p95=pytest.approx(4),
        synthetic_mean=pytest.approx(4),
        synthetic_p95=pytest.approx(8.8),
        newest=NewestStats(8, 3, 1, 24 / 8, 43 / 8, distinct_real=3, distinct_synthetic=8),
    )
    assert len(pairs) == 5
    assert stats.summary() == (
        "5 pairs from 8 synthetic responses, real 3.2 tokens (p95 4), synthetic 4.0 (p95 9), truncated 37.5%, "
        "equal 12.5% (dropped), empty 12.5%, over sequence_len 12.5%"
    )


@pytest.mark.parametrize("keep_right", [False, True])
def test_right_responses_are_counted_and_dropped_or_kept(examples: Dataset, tmp_path: Path, keep_right: bool) -> None:
    """Of the scores 1, 0.5, 0.25, none and 0.75, two reach 0.75; their mean is 2.5 / 4."""
    scores = [1.0, 0.5, 0.25, None, 0.75]
    responses = [
        generated(number % 3, [30, 31 + number, END])._replace(score=score) for number, score in enumerate(scores)
    ]
    path = tmp_path / "pairs.arrow"
    stats = build_pairs(
        examples, responses, path, end_tokens=[END], sequence_len=100, keep_equal=True, drop_at=0.75,
        keep_right=keep_right,
    )  # fmt: skip
    assert stats.judge == JudgeStats(judged=4, right=2, unjudged=1, mean=0.625)
    assert stats.pairs == (5 if keep_right else 3)
    second = [tokens[1] for tokens in open_table(path)["synthetic"]]
    assert second == ([31, 32, 33, 34, 35] if keep_right else [32, 33, 34])
    assert stats.summary().endswith("judge: right 50.0%, mean score 0.6250, unjudged 1")


def test_statistics_without_a_judge_have_no_trace_of_one() -> None:
    assert "judge" not in PairStats().as_dict()
    assert "judge" not in PairStats(responses=1, equal_dropped=False).summary()


def test_no_responses_yield_an_empty_table_and_statistics(examples: Dataset, tmp_path: Path) -> None:
    stats, pairs = paired(examples, [], tmp_path)
    assert stats == PairStats()
    assert len(pairs) == 0
    assert "0 pairs from 0 synthetic responses" in stats.summary()


def test_statistics_round_trip_through_the_file(tmp_path: Path) -> None:
    held_out = PairStats(judge=JudgeStats(judged=2, mean=0.5))
    stats = {"train": PairStats(responses=3, pairs=2, empty=1, real_mean=1.5), "eval": held_out}
    write_stats(tmp_path / "stats.json", stats)
    assert read_stats(tmp_path / "stats.json") == stats


# --- on disk -----------------------------------------------------------------------------------


def test_more_than_a_block_of_rows_and_responses(tmp_path: Path) -> None:
    """Ids, order and content do not depend on block boundaries."""
    count = 2 * BLOCK + 3
    rows = sft(*(row((False, [n]), (True, [n + 1, n % 7 + 10_000, END])) for n in range(count)))
    write_examples(rows, tmp_path / "real.arrow", turns="all", sequence_len=10)
    examples = open_table(tmp_path / "real.arrow")
    assert examples["prompt"][:] == [[n] for n in range(count)]
    responses = [generated(count - 1 - n, [END] if n % 5 == 0 else [n, END]) for n in range(count)]
    stats, pairs = paired(examples, responses, tmp_path)
    kept = [n for n in range(count) if n % 5]
    assert (stats.responses, stats.pairs, stats.empty) == (count, len(kept), count - len(kept))
    assert pairs["index"][:] == list(range(len(kept)))
    assert pairs["example"][:] == [count - 1 - n for n in kept]
    assert pairs["prompt"][:] == [[count - 1 - n] for n in kept]
    assert pairs["synthetic"][:] == [[n, END] for n in kept]


TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(content=st.lists(st.tuples(TOKENS, TOKENS, TOKENS), min_size=1, max_size=5))
def test_token_ids_round_trip(
    tmp_path_factory: pytest.TempPathFactory, content: list[tuple[list[int], list[int], list[int]]]
) -> None:
    """They are read as plain lists of ints, over the entire range of int32."""
    directory = tmp_path_factory.mktemp("tokens")
    rows = sft(*(row((False, prompt), (True, real)) for prompt, real, _ in content))
    write_examples(rows, directory / "real.arrow", turns="all", sequence_len=50)
    responses = [generated(n, synthetic) for n, (_, _, synthetic) in enumerate(content)]
    path = directory / "pairs.arrow"
    build_pairs(open_table(directory / "real.arrow"), responses, path, end_tokens=[], sequence_len=50, keep_equal=True)
    for found, expected in zip(open_table(path), content, strict=True):
        assert (found["prompt"], found["real"], found["synthetic"]) == expected
        assert all(type(token) is int for token in found["prompt"] + found["real"] + found["synthetic"])


def test_tables_are_memory_mapped(examples: Dataset) -> None:
    assert examples.cache_files
