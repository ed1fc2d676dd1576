"""The judge of synthetic responses (`spin.judge`)."""

from typing import Annotated

from pydantic import Field, JsonValue, field_validator

from spin_plugin.args.block import Block, Mark

# The functions that `spin_plugin.judge` provides; in `function` their name is enough.
READY_MADE = ("exact", "number", "sqlite")
# Arguments that every judge receives.
ARGUMENTS = ("prompt", "real", "synthetic")


class JudgeArgs(Block):
    """`spin.judge`: leaves out pairs whose synthetic response is as good as the real one."""

    function: str
    """The judge: `exact`, `number` or `sqlite`, or your own as `module:function`. It is called with the lists `prompt`,
    `real` and `synthetic` and returns one score in 0…1 for each synthetic response; 1 is as good as the real one."""

    drop_at: float = Field(default=1.0, gt=0.0, le=1.0)
    """Pairs with this score or a higher one are left out of training."""

    timeout: Annotated[float, Mark.FREE] = Field(default=10.0, gt=0.0, le=86400.0)
    """Seconds for a batch of 16 responses. A batch that takes longer is judged again one response at a time, each with
    this limit; a response that exceeds it is passed over, and its pair stays in training."""

    processes: Annotated[int, Mark.FREE] = Field(default=2, ge=1, le=256)
    """Number of processes that judge in parallel."""

    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Additional keyword arguments of the function."""

    @field_validator("function")
    @classmethod
    def function_is_named(cls, value: str) -> str:
        """Complete the name of a ready-made judge; require `module:function` otherwise."""
        if value in READY_MADE:
            return f"spin_plugin.judge:{value}"
        module, _, name = value.partition(":")
        if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"{value!r} is neither `module:function` nor one of {', '.join(READY_MADE)}")
        return value

    @field_validator("kwargs")
    @classmethod
    def kwargs_override_nothing(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        """Reject arguments that the plugin passes itself."""
        if taken := sorted(set(ARGUMENTS) & value.keys()):
            raise ValueError(f"{taken[0]} is passed by the plugin; rename it")
        return value
