"""The `spin:` block: every option once, typed, with its bounds, default and meaning.

The reference in docs/reference.md is generated from these classes (`python scripts/make_reference.py`).
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from spin_plugin.objective.losses import LOSSES

# What `generation.vllm_kwargs` may not say, and where it is said instead.
IN_VLLM_BLOCK = frozenset(
    {
        "tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "dtype", "max_model_len",
        "enable_prefix_caching", "enforce_eager",
    }
)  # fmt: skip
# What Axolotl's `vllm:` block says about a server. SPIN needs none.
VLLM_SERVER_KEYS = frozenset(
    {"device", "host", "port", "enable_reasoning", "reasoning_parser", "serve_module", "worker_extension_cls"}
)
SET_BY_THE_PLUGIN = frozenset(
    {
        "model", "tokenizer", "revision", "trust_remote_code", "seed", "generation_config", "enable_lora",
        "max_lora_rank",
    }
)  # fmt: skip

# What an entry of `schedule` may not change: it would make the iterations different runs.
RUN_WIDE_KEYS = frozenset(
    {
        "base_model",
        "output_dir",
        "plugins",
        "rl",
        "spin",
        "datasets",
        "test_datasets",
        "val_set_size",
        "chat_template",
        "iterations",
        "schedule",
        "vllm",
        "adapter",
        "adapter_chain",
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "lora_target_linear",
        "lora_modules_to_save",
        "turns",
        # the data is tokenised, and its prompts are drawn, once for the whole run
        "sequence_len",
        "seed",
        "special_tokens",
        "tokens",
        "added_tokens_overrides",
        "eot_tokens",
        "tokenizer_config",
        "tokenizer_type",
        "chat_template_jinja",
        "default_system_message",
        "revision_of_model",
    }
)


class Block(BaseModel):
    """A part of the `spin:` block. A key that does not exist is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class GenerationArgs(Block):
    """`spin.generation`: how the synthetic responses are sampled. Axolotl's `vllm:` block says how vLLM runs."""

    temperature: float = Field(default=1.0, gt=0.0, le=2.0)
    """Sampling temperature. SPIN's theory wants responses drawn from the opponent itself, which is 1.0."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling. SPIN's theory wants 1.0."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Longest synthetic response in tokens. Default: 1.5 times the 99th percentile of the real responses. Never more
    than `sequence_len` leaves after the prompt."""

    num_generations: int = Field(default=1, ge=1, le=64)
    """Synthetic responses for each prompt; each makes a pair with the prompt's real response."""

    seed: int | None = Field(default=None, ge=0)
    """Seed of the sampling. Default: the configuration's `seed`."""

    vllm_python: str | None = None
    """Interpreter of the environment that holds vLLM. Default: the variable SPIN_VLLM_PYTHON, else the current
    interpreter if it has vLLM, else `.venv-vllm/bin/python` beside the working directory or the plugin."""

    backend: Literal["local", "ray"] = "local"
    """Who starts vLLM: the plugin, on this machine, or Ray, on all machines of its cluster."""

    ray_address: str | None = None
    """Address of an existing Ray cluster, for `backend: ray`. Default: a Ray of its own on this machine."""

    vllm_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's `LLM(...)` that the `vllm:` block does not know, handed on as they are."""

    @model_validator(mode="after")
    def address_belongs_to_ray(self) -> "GenerationArgs":
        """Refuse an address that nobody would look at."""
        if self.ray_address and self.backend != "ray":
            raise ValueError("ray_address is for `backend: ray`; set that or remove the address")
        return self

    @model_validator(mode="after")
    def vllm_kwargs_leave_other_options_alone(self) -> "GenerationArgs":
        """Refuse what the `vllm:` block, or the method itself, decides."""
        for key in sorted(self.vllm_kwargs):
            if key in IN_VLLM_BLOCK:
                raise ValueError(f"vllm_kwargs.{key}: write it in Axolotl's own block, `vllm: {{{key}: …}}`")
            if key == "hf_token":  # Axolotl prints the configuration, and writes it to its log
                raise ValueError("vllm_kwargs.hf_token: set the variable HF_TOKEN instead, which vLLM reads")
            if key in SET_BY_THE_PLUGIN:
                raise ValueError(f"vllm_kwargs.{key} is set by the plugin; remove it")
        return self


class VllmArgs(Block):
    """Axolotl's own `vllm:` block: how vLLM runs. A server's keys (`host`, `port`, …) may stay, unused."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share one copy of the model."""

    data_parallel_size: int | None = Field(default=None, ge=1, le=1024)
    """Copies of the model that generate side by side, each on `tensor_parallel_size` GPUs. Default: as many as the
    visible GPUs hold, with Ray those of the cluster; one without a GPU."""

    gpu_memory_utilization: float | None = Field(default=None, gt=0.0, le=1.0)
    """Share of the GPU's memory that vLLM takes, on a CPU of the machine's. Default: 0.85, as the processes that train
    are on the same GPUs; on a CPU what 256 responses need, at most a quarter of the free memory."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights. `auto`: the one the model is trained in."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus response that vLLM accepts. Default: `sequence_len`."""

    enable_prefix_caching: bool | None = None
    """Whether prompts that begin alike share their beginning. Default: vLLM's own."""

    enforce_eager: bool | None = None
    """Run without CUDA graphs and compilation: a faster start, slower generation. Default: vLLM's own."""


class SpinArgs(Block):
    """`spin`: the self-play game."""

    iterations: int = Field(default=4, ge=1, le=100)
    """Iterations of self-play; each regenerates the synthetic responses and trains on the pairs. The paper plays 4."""

    beta: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    """The paper's lambda: how strongly the main player is held to the opponent. `rl_beta` is taken as this."""

    loss_type: str = Field(default="logistic", json_schema_extra={"enum": [*LOSSES]})
    """The convex decreasing function of the reward margin, below. The paper's runs use the logistic one."""

    history_iterations: int = Field(default=1, ge=0)
    """How many earlier iterations' synthetic responses are mixed in. The paper mixes in one."""

    num_prompts: int | None = Field(default=None, ge=1)
    """Prompts played in an iteration, drawn once with the configuration's `seed`. Default: all. Held-out prompts are
    always all played."""

    resample_prompts: bool = False
    """Draw other prompts in each iteration instead of the same ones."""

    turns: Literal["first", "last", "all"] = "all"
    """Which of the assistant turns that the SFT labels train on are played."""

    equal_pairs: Literal["drop", "keep"] = "keep"
    """What to do with pairs whose synthetic response is the real one. Their gradient is exactly zero, but they count as
    pairs: without them an epoch has fewer steps (docs/measurements.md)."""

    shared_prefix: Literal["auto", "on", "off"] = "auto"
    """Run each pair as one row `prompt | real | synthetic` without padding, so that the prompt is computed once. `auto`
    falls back to padded sequences, and says why, for models that cannot; `on` refuses those; `off` always pads."""

    adapter_chain: Literal["continue", "merge"] = "continue"
    """With `adapter: lora` or `qlora`: `continue` goes on training the adapter of the iteration before; `merge` merges
    it into the base model and starts a fresh one on top, at the price of a whole model on disk in every iteration."""

    schedule: list[dict[str, Any]] = Field(default_factory=list)
    """One entry an iteration, each a mapping of Axolotl keys or `spin` keys that differ in that iteration."""

    generation: GenerationArgs = Field(default_factory=GenerationArgs)
    """How the synthetic responses are sampled."""

    @field_validator("loss_type")
    @classmethod
    def loss_is_known(cls, value: str) -> str:
        """Refuse a loss that `LOSSES` does not hold."""
        if value not in LOSSES:
            raise ValueError(f"there is no such loss; choose one of {', '.join(LOSSES)} (got {value!r})")
        return value

    @field_validator("shared_prefix", mode="before")
    @classmethod
    def yaml_reads_on_and_off_as_booleans(cls, value: object) -> object:
        """`on` and `off` without quotes are true and false in YAML."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def schedule_covers_every_iteration(self) -> "SpinArgs":
        """One entry an iteration, and none that would make the iterations different runs."""
        if self.schedule and len(self.schedule) != self.iterations:
            raise ValueError(f"schedule has {len(self.schedule)} entries for {self.iterations} iterations")
        for number, entry in enumerate(self.schedule):
            if "rl_beta" in entry:
                raise ValueError(f"schedule[{number}].rl_beta: write `beta`")
            if fixed := sorted(RUN_WIDE_KEYS & entry.keys()):
                raise ValueError(f"schedule[{number}].{fixed[0]} cannot change between iterations")
        return self

    def at(self, iteration: int) -> "SpinArgs":
        """The block as it stands in one iteration, the schedule's `spin` keys applied."""
        if not self.schedule:
            return self
        entry = self.schedule[iteration]
        changes = {key: value for key, value in entry.items() if key in SpinArgs.model_fields}
        values = self.model_dump(exclude={"schedule"})
        if isinstance(changes.get("generation"), Mapping):
            changes["generation"] = values["generation"] | dict(changes["generation"])
        return SpinArgs.model_validate(values | changes)

    def axolotl_overrides(self, iteration: int) -> dict[str, Any]:
        """The schedule's Axolotl keys for one iteration."""
        if not self.schedule:
            return {}
        return {key: value for key, value in self.schedule[iteration].items() if key not in SpinArgs.model_fields}


class SpinPluginArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration. Not strict: Axolotl's own class inherits from it."""

    spin: SpinArgs | None = None
    spin_iteration: int | None = Field(default=None, ge=0)
    """Set by the plugin when it lowers `rl: spin`; tells a re-validated configuration (Ray) from a fresh one."""
    spin_vllm: dict[str, Any] | None = None
    """Set by the plugin: what the `vllm:` block says, without the defaults that Axolotl fills in for its server."""
    spin_config: dict[str, Any] | None = None
    """Set by the plugin: the configuration as the user wrote it, for a Ray worker that sees only the lowered one."""
