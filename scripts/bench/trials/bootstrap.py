"""The paired bootstrap over seeds and questions."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2_000


def paired_bootstrap(
    differences: Sequence[Sequence[float]], *, shared: bool, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return the mean difference and its 95% interval.

    Seeds are drawn with replacement, and questions: within each drawn seed, or, if all seeds have the same ones, once
    for all of them.

    Args:
        differences: for each seed, the difference of two methods on each question.
        shared: whether all seeds have the same questions.
        resamples: number of resamples.
    """
    generator = np.random.default_rng(0)
    values = [np.asarray(questions, dtype=np.float64) for questions in differences]
    drawn = generator.integers(len(values), size=(resamples, len(values)))

    def shares(count: int, times: int) -> np.ndarray:
        """Draw questions with replacement; returns the share of each [times, count]."""
        return generator.multinomial(count, np.full(count, 1 / count), size=times) / count

    total = np.zeros(resamples)
    common = shares(len(values[0]), resamples) if shared else None
    for place in range(len(values)):
        for number, questions in enumerate(values):
            here = np.flatnonzero(drawn[:, place] == number)
            weights = shares(len(questions), len(here)) if common is None else common[here]
            total[here] += weights @ questions
    low, high = np.percentile(total / len(values), [2.5, 97.5])
    return float(np.mean([questions.mean() for questions in values])), float(low), float(high)
