"""Memory of training and generation from a model's size, as docs/guide.md tabulates it. Pure arithmetic."""

from typing import NamedTuple

from spin_plugin.config.specs import TrainingSpec

# Bytes per trained parameter of an optimizer's state; AdamW's two fp32 moments where an optimizer is not listed.
STATE_BYTES = {
    "rmsprop": 4, "sgd": 0, "adafactor": 0, "lion_pytorch": 4, "muon": 4, "adamw_torch_8bit": 2, "adamw_torch_4bit": 1,
    "ao_adamw_fp8": 2, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1,
    "paged_lion_8bit": 1, "optimi_adamw": 6,
}  # fmt: skip
ADAMW = 8
MOMENTUM = 4  # of SGD, if `optim_args` sets it


class ModelSize(NamedTuple):
    """Numbers of parameters, and what the KV cache depends on."""

    parameters: int
    embeddings: int
    """Of these, those of the embedding and of an untied head, which stay unquantized."""
    adapter: int
    """Trained parameters of the adapter; 0 without one."""
    kv_values: int
    """Numbers in the KV cache of one token."""


class Sharing(NamedTuple):
    """How the training processes share a model."""

    processes: int = 1
    fsdp: bool = False
    zero_stage: int = 0
    """0: not DeepSpeed, or stage 0."""
    bits: int = 16
    """Bits of a frozen base model's weights: 4 or 8 if it is quantized, else those of its dtype."""

    @property
    def ddp(self) -> bool:
        """Whether every process holds the whole model, and DDP a second copy of its gradients: the buckets that it
        reduces, since torch's `gradient_as_bucket_view` is off unless set, and neither accelerate nor Axolotl does."""
        return self.processes > 1 and not (self.fsdp or self.zero_stage)


def training_bytes(size: ModelSize, training: TrainingSpec, sharing: Sharing, *, masters: bool) -> int:
    """Return the bytes of weights, gradients and optimizer state on each device, without activations.

    Args:
        size: the model's size.
        training: dtype and optimizer.
        sharing: how the processes share the model.
        masters: whether fp32 masters of a 16-bit model are trained.
    """
    state = STATE_BYTES.get(training.optimizer, ADAMW)
    if training.optimizer == "sgd" and float(training.optim_args.get("momentum", 0)):
        state = MOMENTUM
    if size.adapter:
        frozen = _frozen_bytes(size, sharing) / (sharing.processes if sharing.fsdp or sharing.zero_stage == 3 else 1)
        return round(frozen + size.adapter * (4 + 4 + state + (4 if sharing.ddp else 0)))
    return round(size.parameters * _bytes_per_trained(state, training, sharing, masters=masters))


def _frozen_bytes(size: ModelSize, sharing: Sharing) -> float:
    if sharing.bits >= 16:
        return size.parameters * sharing.bits / 8
    return (size.parameters - size.embeddings) * sharing.bits / 8 + size.embeddings * 4


def _bytes_per_trained(state: int, training: TrainingSpec, sharing: Sharing, *, masters: bool) -> float:
    """Return the bytes of weight, gradient and optimizer state per trained parameter on each device."""
    if sharing.zero_stage:  # DeepSpeed keeps its own masters beside 16-bit weights
        weight, master, gradient = (2, 4, 2) if training.in_16_bits else (4, 0, 4)
        sharded = [master + state, gradient, weight]  # stage 1 shards the optimizer, 2 gradients too, 3 all
        stage = sharing.zero_stage
        return sum(sharded[:stage]) / sharing.processes + sum(sharded[stage:])
    width = 4 if masters or not training.in_16_bits else 2
    copies = 2 if masters else 0  # autocast's 16-bit weights; FSDP2 accumulates unsharded 16-bit gradients instead
    buckets = width if sharing.ddp else 0
    return (width + width + state) / (sharing.processes if sharing.fsdp else 1) + buckets + copies


class Cache(NamedTuple):
    """vLLM's memory on each device."""

    weights: int
    per_token: int
    """Bytes of the KV cache of one token."""

    def sequences(self, memory: float, length: int) -> int:
        """Return how many sequences of `length` tokens fit beside the weights into `memory` bytes; below 0: not even
        the weights fit."""
        return int((memory - self.weights) // (self.per_token * length))


def generation_bytes(size: ModelSize, itemsize: int, engine_devices: int) -> Cache:
    """Return vLLM's memory on each of the devices that one copy of the model is split across.

    Args:
        size: the model's size.
        itemsize: bytes of a weight and of a number in the cache.
        engine_devices: tensor-parallel size times pipeline-parallel size.
    """
    weights = (size.parameters + size.adapter) * itemsize / engine_devices
    return Cache(round(weights), max(1, round(size.kv_values * itemsize / engine_devices)))
