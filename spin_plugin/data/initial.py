"""Attach iteration 0's responses to later ones, for losses that compare with them (T-SPIN's y0)."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from spin_plugin.data.pairs import Synthetic


def with_initial(responses: Iterable[Synthetic], initial: Iterable[Synthetic]) -> Iterator[Synthetic]:
    """Yield each response with iteration 0's response to the same prompt that has the same sample number.

    Iteration 0 may have used other prompts or drawn fewer samples; such a response gets none.

    Args:
        responses: of one iteration and split, ordered by example; the k-th of an example is sample k.
        initial: those of iteration 0, ordered in the same way. Both are read once, side by side, so that neither is
            ever in memory.
    """
    candidates = _numbered(initial)
    candidate = next(candidates, None)
    for place, response in _numbered(responses):
        while candidate is not None and candidate[0] < place:
            candidate = next(candidates, None)
        if candidate is not None and candidate[0] == place:
            yield response._replace(initial=candidate[1].tokens)
        else:
            yield response


def _numbered(responses: Iterable[Synthetic]) -> Iterator[tuple[tuple[int, int], Synthetic]]:
    """Yield each response after its example and sample number."""
    for example, samples in groupby(responses, key=lambda response: response.example):
        for sample, response in enumerate(samples):
            yield (example, sample), response
