"""The `spin:` block."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from spin_plugin.args.block import Block, Mark
from spin_plugin.args.generation import GenerationArgs
from spin_plugin.args.judge import JudgeArgs, full_name
from spin_plugin.args.stop import OFF, StopArgs, or_off
from spin_plugin.objective.losses import LOSSES, Objective

# Keys of Axolotl that `schedule` cannot override, because they define the run as a whole.
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
        "vllm",
        "adapter",
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "lora_target_linear",
        "lora_modules_to_save",
        # the data is tokenized, and its prompts are sampled, once per run
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

# Options that only one loss has, and that loss.
LOSS_OPTIONS = {option: name for name, loss in LOSSES.items() for option in loss.options}


class SpinArgs(Block):
    """The `spin:` block."""

    iterations: Annotated[int, Mark.FREE, Mark.RUN_WIDE] = Field(default=4, ge=1, le=100)
    """Number of self-play iterations. Each generates synthetic responses with the latest model, then trains on the
    pairs. The paper runs 4."""

    beta: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    """Scale of the log-prob ratios in the loss (λ in the paper). Larger values keep the model closer to the opponent.
    The top-level key `rl_beta` is an alias."""

    loss_type: str = Field(default="logistic", json_schema_extra={"enum": [*LOSSES]})
    """Loss. The paper's experiments use `logistic`; the table below says when to choose another."""

    space_mu: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """μ of `loss_type: space`: the weight of the synthetic responses, and the shift ln μ of both rewards."""

    t_spin_weight: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    """Weight of the second term of `loss_type: t_spin`, which compares with iteration 0's responses."""

    real_penalty: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Penalty λ on real responses that are less likely than under the opponent (DPO-Positive): λ · max(0, −β r) is
    subtracted from the margin, with `space` from the reward in its first term. Works with every loss."""

    sft_weight: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Weight of SFT's own loss, the negative log-likelihood per token of the real response, which is added to the loss
    of each pair. Works with every loss."""

    history_iterations: int = Field(default=1, ge=0)
    """Number of previous iterations whose synthetic responses are added to the current ones for training. The paper
    uses 1."""

    num_prompts: int | None = Field(default=None, ge=1)
    """Number of training prompts per iteration, sampled once with the top-level `seed`; every assistant turn counts as
    one prompt. Default: all. Held-out prompts are always used in full."""

    held_out: Annotated[float, Mark.RUN_WIDE] = Field(default=0.02, ge=0.0, lt=1.0)
    """Fraction of the rows (of `num_prompts`, if fewer), at least 32 rows, whose prompts are held out where neither
    `val_set_size` nor `test_datasets` is set. After each iteration their real responses show whether the model became
    worse. With fewer than 64 rows none is held out; 0 disables this."""

    stop: Annotated[StopArgs, Mark.FREE, Mark.RUN_WIDE] = Field(default_factory=StopArgs, json_schema_extra=or_off)
    """When to stop before the last iteration. Default: after one that made the model worse; `off` only warns."""

    keep: Annotated[Literal["all", "best", "last"], Mark.FREE, Mark.RUN_WIDE] = "all"
    """Which finished iterations keep their model. `best` removes the weights of all but the last one and the best by
    `stop.metric`, `last` of all but the last one, each with the checkpoints of past iterations. Responses and pairs
    stay, and a model that is still needed does, too."""

    resample_prompts: bool = False
    """Sample a new set of `num_prompts` prompts in each iteration instead of reusing the first one."""

    turns: Annotated[Literal["first", "last", "all"], Mark.RUN_WIDE] = "all"
    """Which assistant turns to generate and train on, among those that SFT would train on. Each turn's prompt is the
    real conversation before it."""

    equal_pairs: Literal["drop", "keep"] = "keep"
    """Whether to keep pairs whose two responses are identical. The paper's loss has no gradient there, but dropping
    them makes an epoch shorter (see docs/measurements.md); `sft_weight` and `real_penalty` learn from their real
    responses."""

    shared_prefix: Annotated[Literal["auto", "on", "off"], Mark.FREE] = "auto"
    """Whether to run each pair as one unpadded row (prompt, real response, synthetic response), which computes the
    prompt once. `auto` falls back to the padded layout, and logs the reason, for models that do not support it; `on`
    rejects those models; `off` always pads."""

    group_prompts: Literal["auto", "off"] = "auto"
    """Whether the pairs of a prompt, from `num_generations` and `history_iterations`, stand together in training and
    share their prompt and real response in one row, so that these are computed once. The order is then random over
    prompts instead of pairs; `auto` does so where prompts have several pairs (see docs/measurements.md)."""

    tokens_per_micro_batch: Annotated[int | None, Mark.FREE] = Field(default=None, ge=1)
    """Number of tokens that a micro-batch holds, instead of `micro_batch_size` pairs; a longer pair has one to itself.
    Memory then depends on this number; it is higher in the padded layout, which repeats prompts and pads. A step keeps
    its micro_batch_size × gradient_accumulation_steps pairs per process. Default: `micro_batch_size` pairs, rounded up
    to whole prompts."""

    adapter_chain: Annotated[Literal["continue", "merge"], Mark.RUN_WIDE] = "continue"
    """How iterations build on each other with `adapter: lora` or `qlora`. `continue` keeps training the previous
    iteration's adapter; `merge` merges it into the base model and trains a new one, at the cost of a full model on disk
    per iteration."""

    schedule: Annotated[list[dict[str, Any]], Mark.FREE, Mark.RUN_WIDE] = Field(default_factory=list)
    """Overrides per iteration: one mapping of Axolotl or `spin` keys for each iteration; `{}` overrides nothing."""

    generation: GenerationArgs = Field(default_factory=GenerationArgs)
    """How synthetic responses are sampled."""

    judge: JudgeArgs | None = None
    """Judges every synthetic response, so that pairs whose synthetic response is right are left out. Default: none."""

    @field_validator("loss_type")
    @classmethod
    def loss_is_known(cls, value: str) -> str:
        """Reject a loss that is not in `LOSSES`."""
        if value not in LOSSES:
            raise ValueError(f"unknown loss {value!r}; use one of {', '.join(LOSSES)}")
        return value

    @model_validator(mode="after")
    def options_belong_to_the_loss(self) -> "SpinArgs":
        """Reject an option of a loss that no iteration uses."""
        used = [self.loss_type, *(entry.get("loss_type") for entry in self.schedule)]
        for name, loss in LOSS_OPTIONS.items():
            if loss not in used and getattr(self, name) != SpinArgs.model_fields[name].default:
                raise ValueError(f"{name} requires `loss_type: {loss}`; set it or remove {name}")
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def accept_off(cls, value: object) -> object:
        """Map `off`, which YAML parses as false when unquoted, to the metric that never stops a run."""
        return {"metric": OFF} if value is False or value == OFF else value

    @model_validator(mode="after")
    def judge_that_stops_exists(self) -> "SpinArgs":
        """Reject `stop.metric: judge` without a judge."""
        if self.stop.metric == "judge" and not self.judge:
            raise ValueError("stop.metric: judge requires `judge`; set it or use another metric")
        return self

    @field_validator("shared_prefix", "group_prompts", mode="before")
    @classmethod
    def accept_yaml_booleans(cls, value: object) -> object:
        """Map booleans back to `on` and `off`, which YAML parses as true and false when unquoted."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def schedule_covers_every_iteration(self) -> "SpinArgs":
        """Require one entry per iteration, without run-wide keys."""
        if self.schedule and len(self.schedule) != self.iterations:
            raise ValueError(
                f"schedule has {len(self.schedule)} entries for {self.iterations} iterations; write one per iteration"
            )
        for number, entry in enumerate(self.schedule):
            if "rl_beta" in entry:
                raise ValueError(f"schedule[{number}].rl_beta: write `beta` instead")
            if fixed := sorted((RUN_WIDE_KEYS | SpinArgs.marked(Mark.RUN_WIDE)) & entry.keys()):
                raise ValueError(f"schedule[{number}].{fixed[0]} cannot change between iterations; remove it")
        return self

    def at(self, iteration: int) -> "SpinArgs":
        """Return the block for one iteration, with the schedule's `spin` keys applied."""
        if not self.schedule:
            return self
        entry = self.schedule[iteration]
        changes = {key: value for key, value in entry.items() if key in SpinArgs.model_fields}
        values = self.model_dump(exclude={"schedule"})
        for block in ("generation", "judge"):
            if isinstance(changes.get(block), Mapping):
                changes[block] = (values[block] or {}) | dict(changes[block])
        judge = changes.get("judge")
        if self.judge and isinstance(judge, Mapping) and full_name(judge.get("function")) != self.judge.function:
            changes["judge"]["kwargs"] = entry["judge"].get("kwargs", {})  # the other function's are not for this one
        loss = changes.get("loss_type", self.loss_type)
        others = [name for name, owner in LOSS_OPTIONS.items() if owner != loss]  # this iteration has no use for them
        return SpinArgs.model_validate({key: value for key, value in values.items() if key not in others} | changes)

    @property
    def judges(self) -> list[JudgeArgs]:
        """The judges of all iterations, each once."""
        used = [judge for number in range(self.iterations) if (judge := self.at(number).judge)]
        return list({json.dumps([judge.function, judge.kwargs], sort_keys=True): judge for judge in used}.values())

    @property
    def objective(self) -> Objective:
        """The loss and its options."""
        return Objective(
            self.loss_type, self.beta, self.space_mu, self.t_spin_weight, self.real_penalty, self.sft_weight
        )

    def axolotl_overrides(self, iteration: int) -> dict[str, Any]:
        """Return the schedule's Axolotl keys for one iteration."""
        if not self.schedule:
            return {}
        return {key: value for key, value in self.schedule[iteration].items() if key not in SpinArgs.model_fields}


class SpinPluginArgs(BaseModel):
    """The fields that the plugin adds to Axolotl's configuration. Not a `Block`, because Axolotl's own configuration
    class inherits from it."""

    spin: SpinArgs | None = None
    spin_iteration: int | None = Field(default=None, ge=0)
    """Set by the plugin when it lowers `rl: spin`; distinguishes an already lowered configuration (in a Ray worker)
    from a new one."""
    spin_vllm: dict[str, Any] | None = None
    """Set by the plugin: the user's `vllm:` block, without the server defaults that Axolotl fills in."""
    spin_config: dict[str, Any] | None = None
    """Set by the plugin: the user's configuration, for Ray workers, which receive only the lowered one."""
