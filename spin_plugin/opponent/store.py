"""The opponent's log-probs: computed once per iteration by the policy before its first step, then stored.

At that moment the policy *is* the opponent, so no second model is ever in memory. After a resume the stored values are
the only source, because the policy has changed.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spin_plugin.run.atomic import write_atomically

PARTS = 64  # writes of the file while the values are computed
MIN_PART = 1024  # responses; fewer are not worth a write


class OpponentStore:
    """[R] fp32 log-probs of every response of one split (`layout.response_indices`).

    One file, always complete: NaN marks values that are not computed yet.
    """

    def __init__(self, file: Path, responses: int, key: str) -> None:
        """`key` identifies what the values depend on: values stored under another key are never used."""
        self.file, self.responses, self.key = file, responses, key

    @property
    def part(self) -> int:
        """Responses scored between two writes: the most that a killed run can lose."""
        return max(MIN_PART, self.responses // PARTS)

    def load(self) -> Tensor:
        """Return the stored values; NaN if there are none of this opponent and these pairs."""
        missing = torch.full((self.responses,), torch.nan)
        try:
            with safe_open(self.file, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") != self.key:
                    return missing
                values = stored.get_tensor("logps")
        except (SafetensorError, OSError):  # absent or damaged
            return missing
        return values if values.shape == missing.shape else missing

    def save(self, values: Tensor) -> None:
        """Replace the stored values [R] atomically."""
        assert values.shape == (self.responses,)
        write_atomically(self.file, save({"logps": values.cpu().contiguous()}, metadata={"key": self.key}))
