"""Write the data of the task SCAN: all 20,910 commands follow from its grammar (Lake & Baroni 2018).

    python scripts/bench/trials/scan_data.py DIR [--train 600] [--test 1000] [--dev 200]

In-domain are commands without "jump", and "jump" alone; out-of-domain those that use "jump" in any other way (the split
`addprim_jump`). The SFT data is a random part of the in-domain commands that always includes "jump".
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

VERBS = ("walk", "look", "run", "jump")
SIDES = ("left", "right")
REPEATS = {"": 1, " twice": 2, " thrice": 3}
SYSTEM = "Translate the command into actions."

Pair = tuple[str, list[str]]
"""A command and its actions."""


def phrases() -> Iterator[Pair]:
    """Yield the 34 phrases: a verb or "turn", with or without a direction."""
    for verb in VERBS:
        yield verb, [f"I_{verb.upper()}"]
    for verb, side in product((*VERBS, "turn"), SIDES):
        turn = [f"I_TURN_{side.upper()}"]
        act = [] if verb == "turn" else [f"I_{verb.upper()}"]
        yield f"{verb} {side}", turn + act
        yield f"{verb} opposite {side}", 2 * turn + act
        yield f"{verb} around {side}", 4 * (turn + act)


def commands() -> Iterator[Pair]:
    """Yield all commands."""
    repeated = [(phrase + words, times * actions) for phrase, actions in phrases() for words, times in REPEATS.items()]
    yield from repeated
    for (first, before), (second, after) in product(repeated, repeated):
        yield f"{first} and {second}", before + after
        yield f"{first} after {second}", after + before


def write(file: Path, pairs: list[Pair]) -> None:
    chats = (
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": command},
            {"role": "assistant", "content": " ".join(actions)},
        ]
        for command, actions in pairs
    )
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=1000, help="commands of each domain")
    parser.add_argument("--dev", type=int, default=200, help="commands of each domain")
    options = parser.parse_args()
    everything = list(commands())
    random.Random(0).shuffle(everything)
    alone = [pair for pair in everything if pair[0] == "jump"]
    inside = [pair for pair in everything if "jump" not in pair[0]]
    outside = [pair for pair in everything if "jump" in pair[0] and pair not in alone]
    options.directory.mkdir(parents=True, exist_ok=True)
    write(options.directory / "train.jsonl", alone + inside[: options.train - 1])
    for domain, pairs in (("in_domain", inside[options.train - 1 :]), ("out_of_domain", outside)):
        write(options.directory / f"test-{domain}.jsonl", pairs[: options.test])
        write(options.directory / f"dev-{domain}.jsonl", pairs[options.test : options.test + options.dev])


if __name__ == "__main__":
    main()
