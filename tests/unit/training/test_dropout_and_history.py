"""Missing responses of earlier iterations, and disabled dropout."""

from pathlib import Path

import pytest
import torch
from torch import nn

from spin_plugin.console import SpinError
from spin_plugin.generation.job import SHARD
from spin_plugin.generation.shards import Shards


@pytest.mark.parametrize("missing", ["shard", "directory"])
def test_missing_responses_are_refused(tmp_path: Path, missing: str) -> None:
    shards = Shards(tmp_path / "synthetic")
    shards.directory.mkdir()
    shards.update_manifest(requests=SHARD + 10)
    for number, count in ((0, SHARD), (1, 10)):
        shards.write(number, ({"example": place} for place in range(count)))
    assert len(list(shards.responses())) == SHARD + 10
    shards.shard(1).unlink()
    if missing == "directory":
        shards = Shards(tmp_path / "elsewhere")
    with pytest.raises(SpinError, match="missing"):
        list(shards.responses())


def test_dropout_is_disabled_in_modules_and_attributes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from spin_plugin.model.forward import disable_dropout

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.25, **small)).train()
    model.add_module("extra", nn.Dropout(0.5))
    tokens = torch.arange(16)[None]
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    rates = [disable_dropout(module) for module in model.modules()]
    assert max(rates) == 0.5
    assert min(rates) == 0.0
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert model.extra.p == 0.0
