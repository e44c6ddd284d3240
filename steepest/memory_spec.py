"""The part of the job spec about what a worker keeps in memory."""

from __future__ import annotations

from typing import Any

from pydantic import ByteSize, Field, TypeAdapter, field_validator

from steepest.spec_base import NonNegativeInt, SpecModel


class MemorySpec(SpecModel):
    """What is kept in memory, and what is computed again."""

    checkpoint_activations: str = Field(
        default="",
        description="Compute activations again in the backward pass instead of keeping them: sqrt (of n layers in a "
        "sequence, about the square root of n are kept), all (each layer for itself), or modules' name with * and ?.",
        json_schema_extra={"default_text": "none"},
    )
    activation_budget: NonNegativeInt = Field(
        default=0,
        description="Bytes (or 512MB, 2GiB) that the tensors of one micro-batch's pass may take; measured at "
        "submission, where sqrt or all is chosen if one of them keeps within it, or the job is refused; 0: any.",
    )

    @field_validator("activation_budget", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        """Sizes with a unit."""
        return int(TypeAdapter(ByteSize).validate_python(value)) if isinstance(value, str) else value
