"""An Axolotl plugin: SFT and DPO with `bf16: true` without a GPU, which transformers refuses unless it is told so."""

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin


class Bf16OnCpu(BasePlugin):
    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {} if torch.accelerator.is_available() else {"use_cpu": True}
