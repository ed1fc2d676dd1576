"""Sampling (`spin.generation`) and Axolotl's `vllm:` block."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from spin_plugin.args.block import Block, Mark

# Arguments of vLLM that belong in Axolotl's `vllm:` block, not in `generation.vllm_kwargs`.
IN_VLLM_BLOCK = frozenset(
    {
        "tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "dtype", "max_model_len",
        "enable_prefix_caching", "enforce_eager",
    }
)  # fmt: skip
# Keys of Axolotl's `vllm:` block that configure a server. SPIN does not start one.
VLLM_SERVER_KEYS = frozenset(
    {"device", "host", "port", "enable_reasoning", "reasoning_parser", "serve_module", "worker_extension_cls"}
)
# Arguments of vLLM that the plugin sets itself.
PLUGIN_VLLM_KEYS = frozenset(
    {
        "model", "tokenizer", "revision", "trust_remote_code", "seed", "generation_config", "enable_lora",
        "max_lora_rank",
    }
)  # fmt: skip


class GenerationArgs(Block):
    """`spin.generation`: how synthetic responses are sampled. Axolotl's `vllm:` block configures how vLLM runs."""

    temperature: float = Field(default=1.0, gt=0.0, le=2.0)
    """Sampling temperature. SPIN assumes samples from the opponent itself, i.e. 1.0; other values log a warning."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling threshold. SPIN assumes 1.0 (no truncation); other values log a warning."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum length of a synthetic response in tokens. Default: 1.5 times the 99th percentile of the real response
    lengths. Prompt plus response never exceed `sequence_len` or `vllm.max_model_len`."""

    num_generations: int = Field(default=1, ge=1, le=64)
    """Synthetic responses per prompt. Each forms a pair with the prompt's real response."""

    seed: int | None = Field(default=None, ge=0)
    """Sampling seed. Default: the top-level `seed`."""

    vllm_python: Annotated[str | None, Mark.FREE] = None
    """Python interpreter of the environment in which vLLM is installed. Default: the environment variable
    `SPIN_VLLM_PYTHON`; otherwise the current interpreter if it can import vLLM; otherwise `.venv-vllm/bin/python` in
    the working directory or in the plugin's checkout."""

    backend: Annotated[Literal["local", "ray"], Mark.FREE] = "local"
    """How vLLM is started: `local` on this machine, `ray` on all machines of a Ray cluster."""

    ray_address: Annotated[str | None, Mark.FREE] = None
    """Address of an existing Ray cluster; requires `backend: ray`. Default: start Ray on this machine."""

    vllm_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Additional arguments of vLLM's `LLM(...)`, passed unchanged. Only for arguments without a key in the `vllm:`
    block."""

    @model_validator(mode="after")
    def ray_address_requires_ray(self) -> "GenerationArgs":
        """Reject an address that would be ignored."""
        if self.ray_address and self.backend != "ray":
            raise ValueError("ray_address requires `backend: ray`; set it or remove ray_address")
        return self

    @model_validator(mode="after")
    def vllm_kwargs_override_nothing(self) -> "GenerationArgs":
        """Reject arguments that the `vllm:` block or the plugin sets."""
        for key in sorted(self.vllm_kwargs):
            if key in IN_VLLM_BLOCK:
                raise ValueError(f"vllm_kwargs.{key}: set it in Axolotl's own block instead, `vllm: {{{key}: …}}`")
            if key == "hf_token":
                raise ValueError(
                    "vllm_kwargs.hf_token: Axolotl logs the configuration; set HF_TOKEN in the environment instead"
                )
            if key in PLUGIN_VLLM_KEYS:
                raise ValueError(f"vllm_kwargs.{key}: set by the plugin; remove it")
        return self


class VllmArgs(Block):
    """Axolotl's `vllm:` block: how vLLM runs. Server keys (`host`, `port`, …) are allowed and ignored."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of GPUs that each copy of the model is split across."""

    data_parallel_size: int | None = Field(default=None, ge=1, le=1024)
    """Number of copies of the model that generate in parallel, each on `tensor_parallel_size` GPUs. Default: as many
    as the visible GPUs (with Ray, the cluster's GPUs) allow; one on CPU."""

    gpu_memory_utilization: float | None = Field(default=None, gt=0.0, le=1.0)
    """Fraction of each GPU's memory (on CPU, of the machine's memory) that vLLM uses. Default: 0.85 on GPU, because the
    training processes occupy the same GPUs; on CPU, enough for 256 full-length responses but at most a quarter of the
    free memory."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the weights in vLLM. `auto` uses the training dtype."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Maximum length of prompt plus response in vLLM, in tokens. Prompts that leave no space for a response are
    skipped. Default: `sequence_len`."""

    enable_prefix_caching: bool | None = None
    """Reuse the KV cache of prompts that share a prefix. Default: vLLM's own."""

    enforce_eager: bool | None = None
    """Disable CUDA graphs and compilation: faster startup, slower generation. Default: vLLM's own."""
