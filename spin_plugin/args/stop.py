"""The `spin.stop` block."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from spin_plugin.args.block import Block, Mark

AUTO, OFF = "auto", "off"


def or_off(schema: dict[str, Any]) -> None:
    """Make the JSON schema of a block accept `off`, which YAML 1.1 parses as false."""
    schema["anyOf"] = [{"$ref": schema.pop("$ref")}, {"enum": [OFF, False]}]


class StopArgs(Block):
    """The `spin.stop` block: when a run ends before its last iteration."""

    metric: Annotated[str, Mark.FREE, Mark.RUN_WIDE] = Field(default=AUTO, examples=[AUTO, OFF, "held_out", "judge"])
    """What decides, by its name in run.json: `held_out` (real responses of held-out prompts), `judge`, or `task/metric`
    of lm-eval. `auto`: the run stops after an iteration that made `held_out` or `judge` worse, beyond noise; `off`
    only warns then."""

    patience: Annotated[int, Mark.FREE, Mark.RUN_WIDE] = Field(default=1, ge=1, le=100)
    """Number of iterations in a row without an improvement of `metric`, beyond noise where it is known, after which the
    run stops. Requires a `metric`."""

    @field_validator("metric", mode="before")
    @classmethod
    def accept_yaml_boolean(cls, value: object) -> object:
        """Map false back to `off`, which YAML parses so when unquoted."""
        return OFF if value is False else value

    @field_validator("metric")
    @classmethod
    def metric_can_be_compared(cls, value: str) -> str:
        """Reject what does not rank the iterations of a run."""
        if value not in (AUTO, OFF, "held_out", "judge") and not all(value.partition("/")):
            raise ValueError(f"{value!r} is not auto, off, held_out, judge or `task/metric` of lm-eval")
        return value

    @model_validator(mode="after")
    def patience_has_a_metric(self) -> "StopArgs":
        """Reject a patience that nothing would use."""
        if self.metric in (AUTO, OFF) and self.patience != 1:
            raise ValueError(f"patience requires a metric, such as `metric: held_out` (got metric: {self.metric})")
        return self
