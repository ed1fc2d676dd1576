"""The tiny task on which self-play shows: five deterministic operations on eight letters.

A prompt is an operation and eight distinct letters (`>abcdefgh`), its answer the transformed
letters (`hgfedcba`); one character is one token. The SFT data covers the two in-domain operations
only, so the three others tell how much of what the base model knew a training method forgets.

Pure standard library: `make.py`, `evaluate.py` and the tests share it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random
from typing import NamedTuple

LETTERS = "abcdefghijklmnop"
WIDTH = 8
MAX_EDITS = 3
IN_DOMAIN = "<>"
OUT_OF_DOMAIN = "^*~"


def _swap_neighbours(letters: str) -> str:
    return "".join(letters[i + 1] + letters[i] for i in range(0, len(letters), 2))


_OPERATIONS: dict[str, Callable[[str], str]] = {
    "<": lambda letters: letters,
    ">": lambda letters: letters[::-1],
    "^": lambda letters: "".join(sorted(letters)),
    "*": lambda letters: letters[2:] + letters[:2],
    "~": _swap_neighbours,
}
OPERATIONS = "".join(_OPERATIONS)


class Item(NamedTuple):
    """One prompt (`op` followed by the letters) and its only right answer."""

    op: str
    prompt: str
    answer: str


def answer(op: str, letters: str) -> str:
    """The right answer to `op` on `letters`; a KeyError for an unknown operation."""
    return _OPERATIONS[op](letters)


def damaged(text: str, rng: Random) -> str:
    """`text` with one to three of its letters replaced by others.

    Only replaced, because wrong answers that also differ in length drown the lesson: self-play then
    learns lengths, and the out-of-domain operations collapse.
    """
    letters = list(text)
    for position in rng.sample(range(len(letters)), rng.randint(1, MAX_EDITS)):
        letters[position] = rng.choice(LETTERS.replace(letters[position], ""))
    return "".join(letters)


def sample_item(ops: str, rng: Random) -> Item:
    """An item with an operation drawn from `ops` and letters drawn without replacement."""
    op = rng.choice(ops)
    letters = "".join(rng.sample(LETTERS, WIDTH))
    return Item(op, op + letters, answer(op, letters))


def sample_items(ops: str, count: int, rng: Random, excluded: Collection[str] = ()) -> list[Item]:
    """`count` items with distinct prompts, none of them in `excluded` (the held-out prompts)."""
    items: dict[str, Item] = {}
    while len(items) < count:
        item = sample_item(ops, rng)
        if item.prompt not in excluded:
            items[item.prompt] = item
    return list(items.values())


def sample_heldout(per_domain: int, rng: Random) -> list[Item]:
    """`per_domain` in-domain items, then as many out-of-domain ones; exclude them from training."""
    return sample_items(IN_DOMAIN, per_domain, rng) + sample_items(OUT_OF_DOMAIN, per_domain, rng)
