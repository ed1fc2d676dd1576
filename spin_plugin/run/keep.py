"""Which models of past iterations `spin.keep` removes. run.json says so before a file is deleted."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from spin_plugin.args import SpinArgs
from spin_plugin.objective.decline import decline
from spin_plugin.run.state import CHECKPOINTS, MODEL
from spin_plugin.run.stop import find_best


def mark_removed(finished: Sequence[MutableMapping[str, Any]], spin: SpinArgs) -> None:
    """Mark in the entries of run.json what of past iterations is to be removed.

    The last iteration keeps everything. With `adapter_chain: merge`, its adapter was trained on the model of the one
    before. If the last iteration made the model worse, its opponent stays, from which it can be trained again. A judge
    finds that out only once the next iteration is prepared; until then the opponent stays, and so does what would be
    best.
    """
    if spin.keep == "all" or not finished:
        return
    last = len(finished) - 1
    needed = {last}
    if spin.adapter_chain == "merge" or spin.judges or decline(finished[-1]):
        needed.add(last - 1)
    if spin.keep == "best":
        found = [find_best(finished, spin.stop), find_best(finished[:-1], spin.stop) if spin.judges else None]
        if not any(found):
            return  # nothing was measured
        needed |= {best.iteration for best in found if best}
    for number, entry in enumerate(finished[:-1]):
        removed = {*entry.get("removed", ()), CHECKPOINTS} | (set() if number in needed else {MODEL})
        entry["removed"] = sorted(removed)
