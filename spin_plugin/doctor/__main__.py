"""Examine a configuration: `python -m spin_plugin.doctor PROCESSES`, run by `axolotl spin doctor`.

Standard input is the configuration as JSON; PROCESSES is a number, 0 for one per GPU. Standard output has one JSON
object per line: `{"result": …}` as soon as it is known, at the end `{"numbers": …}`. A process of its own, because
Axolotl and its dependencies print, log and read their environment when they are imported.
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from spin_plugin.doctor.checkup import Result
from spin_plugin.doctor.examine import examine


def main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as out:
        os.dup2(2, 1)  # only our lines go to standard output

        def write(**content: Any) -> None:
            out.write(json.dumps(content) + "\n")

        def report(result: Result) -> None:
            write(result=asdict(result))

        write(numbers=examine(json.load(sys.stdin), int(sys.argv[1]) or None, report))


if __name__ == "__main__":
    main()
