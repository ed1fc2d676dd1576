"""What all blocks have in common."""

from enum import Enum, auto

from pydantic import BaseModel, ConfigDict


class Mark(Enum):
    """When an option may change. Without a mark: from iteration to iteration by `schedule`, but not on resume."""

    FREE = auto()
    """On resume, because it does not affect the result."""
    RUN_WIDE = auto()
    """Not by `schedule`."""


class Block(BaseModel):
    """Base class of the blocks. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def marked(cls, mark: Mark) -> set[str]:
        """Return the names of the options that carry a mark."""
        return {name for name, field in cls.model_fields.items() if mark in field.metadata}
