"""The judge of synthetic responses (`spin.judge`)."""

from typing import Annotated, Any

from pydantic import Field, JsonValue, field_validator

from spin_plugin.args.block import Block, Mark

# The functions that `spin_plugin.judge` provides; in `function` their name is enough.
READY_MADE = ("exact", "number", "sqlite")
# Arguments that every judge receives.
ARGUMENTS = ("prompt", "real", "synthetic")


def full_name(function: Any) -> Any:
    """Return `module:function` for the name of a ready-made judge; anything else unchanged."""
    return f"spin_plugin.judge:{function}" if function in READY_MADE else function


class JudgeArgs(Block):
    """`spin.judge`: leaves out pairs whose synthetic response is as good as the real one."""

    function: str
    """The judge: `exact`, `number` or `sqlite`, or your own as `module:function`. It is called with the lists `prompt`,
    `real` and `synthetic` and returns one score in 0…1 for each synthetic response; 1 is as good as the real one."""

    drop_at: float = Field(default=1.0, gt=0.0, le=1.0)
    """Responses scoring at least this are right: their pairs are left out of training."""

    timeout: Annotated[float, Mark.FREE] = Field(default=10.0, gt=0.0, le=86400.0)
    """Seconds per response. Responses are judged in batches of up to 16; one that takes longer than all its responses
    may is judged again one by one, and a response that exceeds its limit is skipped: its pair stays in training."""

    processes: Annotated[int, Mark.FREE] = Field(default=2, ge=1, le=16)
    """Number of processes that judge in parallel."""

    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Additional keyword arguments of the function."""

    @field_validator("function")
    @classmethod
    def function_is_named(cls, value: str) -> str:
        """Complete the name of a ready-made judge; require `module:function` otherwise."""
        value = full_name(value)
        module, _, name = value.partition(":")
        if module.endswith(".py"):
            raise ValueError(f"write `module:function` instead of {value!r}: a module's name, not its file")
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
