"""The opponent's log-probabilities: computed once an iteration by the policy before its first step, then stored.

At that moment the policy *is* the opponent, so no second model is ever in memory; after a resume the
stored values are the only source, because the policy has moved on.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spin_plugin.run.atomic import write_atomically

PARTS = 64  # the file is written so often while the values are computed
FEW = 1024  # responses that are not worth a write of their own


class OpponentStore:
    """[R] fp32 log-probabilities of every response of one split (`layout.response_numbers`).

    One file, always whole: NaN stands for what has not been computed yet.
    """

    def __init__(self, file: Path, responses: int, key: str) -> None:
        """`key` is what the values depend on: values stored under another one are never used."""
        self.file, self.responses, self.key = file, responses, key

    @property
    def part(self) -> int:
        """How many responses may be scored without being stored: what can be lost at most when a run is killed."""
        return max(FEW, self.responses // PARTS)

    def load(self) -> Tensor:
        """The stored values; NaN where there are none of this opponent and these pairs."""
        nothing = torch.full((self.responses,), torch.nan)
        try:
            with safe_open(self.file, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") != self.key:
                    return nothing
                values = stored.get_tensor("logps")
        except (SafetensorError, OSError):  # absent or damaged
            return nothing
        return values if values.shape == nothing.shape else nothing

    def save(self, values: Tensor) -> None:
        """Replace the stored values [R] in one step."""
        assert values.shape == (self.responses,)
        write_atomically(self.file, save({"logps": values.cpu().contiguous()}, metadata={"key": self.key}))
