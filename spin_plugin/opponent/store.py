"""Numbers of every pair, stored beside the pairs: the opponent's log-probs, and the rewards that training reached.

The opponent's log-probs are computed once per iteration by the policy before its first step, then stored. At
that moment the policy *is* the opponent, so no second model is ever in memory. After a resume the stored values are the
only source, because the policy has changed.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spin_plugin.run.atomic import write_atomically

PARTS = 64  # writes of the file while the values are computed
MIN_PART = 1024  # responses; fewer are not worth a write


class KeyedTensor:
    """A float32 tensor in a file of its own, which is always complete: NaN marks missing values."""

    name: str
    """Of the tensor in the file."""

    def __init__(self, file: Path, shape: tuple[int, ...], key: str) -> None:
        """`key` identifies what the values depend on: values stored under another key are never used."""
        self.file, self.shape, self.key = file, shape, key

    def load(self) -> Tensor:
        """Return the stored values; NaN if there are none under this key."""
        missing = torch.full(self.shape, torch.nan)
        try:
            with safe_open(self.file, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") != self.key:
                    return missing
                values = stored.get_tensor(self.name)
        except (SafetensorError, OSError):  # absent or damaged
            return missing
        return values if values.shape == missing.shape else missing

    def save(self, values: Tensor) -> None:
        """Replace the stored values atomically."""
        assert values.shape == self.shape
        write_atomically(self.file, save({self.name: values.cpu().contiguous()}, metadata={"key": self.key}))


class OpponentStore(KeyedTensor):
    """[R] log-probs of every response of one split (`layout.response_indices`) under the opponent."""

    name = "logps"

    def __init__(self, file: Path, responses: int, key: str) -> None:
        super().__init__(file, (responses,), key)
        self.responses = responses

    @property
    def part(self) -> int:
        """Responses scored between two writes: the most that a killed run can lose."""
        return max(MIN_PART, self.responses // PARTS)


class RewardStore(KeyedTensor):
    """[N, 2] rewards beta (log p - log p_t) of every pair of one split: of its real and its synthetic response."""

    name = "rewards"

    def __init__(self, file: Path, pairs: int, key: str) -> None:
        super().__init__(file, (pairs, 2), key)
