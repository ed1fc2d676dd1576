"""The judge's part in preparing an iteration: judge while vLLM generates, and compare with the iteration before."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from spin_plugin.args import JudgeArgs, SpinArgs
from spin_plugin.console import say, warn
from spin_plugin.generation.job import Job
from spin_plugin.generation.shards import Shards
from spin_plugin.judge.judging import Judging
from spin_plugin.judge.pool import Pool
from spin_plugin.judge.texts import Texts
from spin_plugin.judge.verdicts import Scores
from spin_plugin.objective.decline import CHECKS, FEWEST_PROMPTS, compare
from spin_plugin.run.directory import RunDir
from spin_plugin.run.stop import end_if_stopped
from spin_plugin.training.generate import Generation, generate_responses


@dataclass(frozen=True)
class Judged:
    """The scores of an iteration's responses, and of those of earlier iterations that it uses."""

    scores: Mapping[int, Scores]
    """By iteration, in the order of `Shards.responses`."""
    drop_at: float
    before: Scores | None
    """The same judge's scores of the previous iteration's responses; None if they are not stored."""

    @property
    def key(self) -> list[Any]:
        """What the pairs depend on: every score, whoever gave it, and the threshold."""
        return [hashlib.sha256(json.dumps(sorted(self.scores.items())).encode()).hexdigest(), self.drop_at]


def require_loadable(judges: Iterable[JudgeArgs]) -> None:
    """Load every judge of a run once, so that a wrong name or argument is found before anything is generated.

    Raises:
        SpinError: one cannot be loaded.
    """
    for judge in judges:
        with closing(Pool(judge)) as pool:
            pool.load()


def generate_and_judge(generation: Generation, tokenizer: Any, sources: Sequence[int]) -> tuple[Job, Judged | None]:
    """Generate an iteration's responses and judge them meanwhile, with those of earlier iterations that it uses.

    Args:
        generation: the iteration's generation.
        tokenizer: decodes the responses.
        sources: the iterations whose responses are used, the current one last.

    Returns:
        the job, and the scores; None without a judge.

    Raises:
        SpinError: see `generate_responses` and `Judging`.
    """
    judge = generation.spin.judge
    if judge is None:
        return generate_responses(generation), None
    with closing(Judging(judge, generation.run, Texts(tokenizer, generation.real))) as judging:
        judging.begin(sources)
        job = generate_responses(generation, partial(judging.submit, generation.number))
        scores = judging.finish(sources)
        before = judging.stored(generation.number - 1) if generation.number else None
    return job, Judged(scores, judge.drop_at, before)


def compare_with_previous(run: RunDir, number: int, judged: Judged, spin: SpinArgs, *, again: bool) -> None:
    """Compare the opponent's score on held-out prompts with its predecessor's, and store the result in run.json.

    The opponent of iteration t is what iteration t−1 has trained, so the result belongs to that iteration.

    Args:
        run: the run directory.
        number: the iteration, from 1 on.
        judged: its scores.
        spin: its `stop` may end the run here.
        again: compare also if a result is stored.

    Raises:
        SpinError, SystemExit: see `end_if_stopped`.
    """
    state = run.read_state()
    assert state is not None
    entry = state.finished[number - 1]
    previous, current = (Shards(run.iteration(one).synthetic) for one in (number - 1, number))
    if "judge" in entry and not again:
        return
    if judged.before is None or not all(previous.shard(shard).exists() for shard in range(previous.count())):
        return  # another judge, or deleted, as the user may without history_iterations
    before, after = _held_out_means(previous, judged.before), _held_out_means(current, judged.scores[number])
    both = sorted(before.keys() & after.keys())
    if len(both) < FEWEST_PROMPTS:
        return
    found = compare(
        *(torch.tensor([means[example] for example in both], dtype=torch.float64) for means in (before, after))
    )
    entry["judge"] = found.as_dict()
    run.write_state(state)
    check = CHECKS["judge"]
    say(f"iteration {number - 1}, {check.measured}: {found.summary(check.unit)}")
    end_if_stopped(run, spin)
    if found.worse:
        warn(f"{state.worse()}; iteration {number} starts from it all the same")


def _held_out_means(shards: Shards, scores: Scores) -> dict[int, float]:
    """Return the mean score of each held-out prompt's responses, without those that were skipped."""
    known: defaultdict[int, list[float]] = defaultdict(list)
    for response, score in zip(shards.responses(), scores, strict=True):
        if response["split"] == "eval" and score is not None:
            known[response["example"]].append(score)
    return {example: fmean(found) for example, found in known.items()}
