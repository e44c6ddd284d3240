"""What is done otherwise from some step on: what health rules have changed in a job, and what a user asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

from steepest.spec_base import NonNegativeInt, PositiveFloat, SpecModel

MAX_CHANGES = 1000


class ChangeSpec(SpecModel):
    """From a step on: another learning rate, or samples that are left out. Changes add up."""

    step: NonNegativeInt = Field(default=0, description="The first step, from 0, that it is for.")
    lr_scale: PositiveFloat = Field(default=1.0, description="What the learning rate is multiplied by from there on.")
    skip_samples: Annotated[tuple[NonNegativeInt, ...], Field(max_length=100_000)] = Field(
        default=(),
        description="Samples of the training data that are left out from there on, by their numbers.",
        json_schema_extra={"default_text": "none"},
    )


Changes = Annotated[tuple[ChangeSpec, ...], Field(max_length=MAX_CHANGES)]


def lr_scale_at(changes: Iterable[ChangeSpec], step: int) -> float:
    """What all changes together multiply the learning rate of a step by."""
    scale = 1.0
    for change in changes:
        if change.step <= step:
            scale *= change.lr_scale
    return scale


def samples_left_out(changes: Iterable[ChangeSpec]) -> set[int]:
    """By any of the changes."""
    return {sample for change in changes for sample in change.skip_samples}


def with_change(changes: Sequence[ChangeSpec], change: ChangeSpec) -> tuple[ChangeSpec, ...]:
    """With one more, of a job that has gone back to its step: what began after that step begins there now."""
    earlier = (c if c.step <= change.step else c.model_copy(update={"step": change.step}) for c in changes)
    return (*earlier, change)
