"""The tiny task that demonstrates self-play: five deterministic operations on eight letters.

A prompt is an operation and eight distinct letters (`>abcdefgh`), its answer the transformed letters (`hgfedcba`); one
character is one token. The SFT data covers only the two in-domain operations, so the other three measure forgetting.

Uses only the standard library; shared by `make.py`, `evaluate.py` and the tests.
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


def _swap_neighbors(letters: str) -> str:
    return "".join(letters[i + 1] + letters[i] for i in range(0, len(letters), 2))


_OPERATIONS: dict[str, Callable[[str], str]] = {
    "<": lambda letters: letters,
    ">": lambda letters: letters[::-1],
    "^": lambda letters: "".join(sorted(letters)),
    "*": lambda letters: letters[2:] + letters[:2],
    "~": _swap_neighbors,
}
OPERATIONS = "".join(_OPERATIONS)


class Item(NamedTuple):
    """One prompt (`op` followed by the letters) and its only right answer."""

    op: str
    prompt: str
    answer: str


def answer(op: str, letters: str) -> str:
    """Return the right answer to `op` on `letters`; raises KeyError for an unknown operation."""
    return _OPERATIONS[op](letters)


def damaged(text: str, rng: Random) -> str:
    """Return `text` with one to three letters replaced by others.

    The length stays the same, because otherwise self-play mostly learns lengths, and the out-of-domain operations
    collapse.
    """
    letters = list(text)
    for position in rng.sample(range(len(letters)), rng.randint(1, MAX_EDITS)):
        letters[position] = rng.choice(LETTERS.replace(letters[position], ""))
    return "".join(letters)


def sample_item(ops: str, rng: Random) -> Item:
    """Sample an item: an operation from `ops`, and letters without replacement."""
    op = rng.choice(ops)
    letters = "".join(rng.sample(LETTERS, WIDTH))
    return Item(op, op + letters, answer(op, letters))


def sample_items(ops: str, count: int, rng: Random, excluded: Collection[str] = ()) -> list[Item]:
    """Sample `count` items with distinct prompts, none of them in `excluded` (the held-out prompts)."""
    items: dict[str, Item] = {}
    while len(items) < count:
        item = sample_item(ops, rng)
        if item.prompt not in excluded:
            items[item.prompt] = item
    return list(items.values())


def sample_heldout(per_domain: int, rng: Random) -> list[Item]:
    """Sample `per_domain` in-domain items, then as many out-of-domain ones; exclude them from training."""
    return sample_items(IN_DOMAIN, per_domain, rng) + sample_items(OUT_OF_DOMAIN, per_domain, rng)
