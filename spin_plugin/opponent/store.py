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
FEW = 512  # pairs that are not worth a write of their own


class OpponentStore:
    """[2, N] fp32 log-probabilities of one split's N pairs, row 0 real and row 1 synthetic responses.

    One file, always whole: NaN stands for what has not been computed yet.
    """

    def __init__(self, file: Path, pairs: int, key: str) -> None:
        """`key` is what the values depend on: values stored under another one are never used."""
        self.file, self.pairs, self.key = file, pairs, key

    @property
    def part(self) -> int:
        """How many pairs may be computed without being stored: what can be lost at most when a run is killed."""
        return max(FEW, self.pairs // PARTS)

    def load(self) -> Tensor:
        """The stored values; NaN where there are none of this opponent and these pairs."""
        nothing = torch.full((2, self.pairs), torch.nan)
        try:
            with safe_open(self.file, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") != self.key:
                    return nothing
                values = stored.get_tensor("logps")
        except (SafetensorError, OSError):  # absent or damaged
            return nothing
        return values if values.shape == nothing.shape else nothing

    def save(self, values: Tensor) -> None:
        """Replace the stored values, of shape [2, N], in one step."""
        assert values.shape == (2, self.pairs)
        write_atomically(self.file, save({"logps": values.cpu().contiguous()}, metadata={"key": self.key}))
