"""The part of the job spec about what is kept of a job, and what becomes of what the health rules find."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steepest.spec_base import NonNegativeInt, PositiveInt, SpecModel


class TelemetrySpec(SpecModel):
    """What is kept of every step."""

    every: PositiveInt = Field(default=1, description="Keep the record of every so many steps in the history.")
    parameter_norms: bool = Field(default=True, description="Keep the gradient norm of each parameter in the records.")
    signals_every: NonNegativeInt = Field(
        default=20,
        description="Measure magnitudes, zeros, updates and noise of each parameter in the first 20 steps and every so "
        "many steps after them; 0: never.",
    )
    histograms_every: NonNegativeInt = Field(
        default=100,
        description="Count how large the elements of each parameter's gradient are, by powers of four, in every so "
        "many steps; 0: never.",
    )
    profile_start: NonNegativeInt = Field(default=10, description="First step that torch.profiler records.")
    profile_steps: NonNegativeInt = Field(
        default=0, le=1000, description="Steps that torch.profiler records in every worker; 0: none."
    )


Rule = Literal[
    "vanishing", "exploding", "dead_units", "saturated", "initialization", "stalled", "diverging", "update_ratio",
    "update_spike", "nonfinite", "outlier", "overfitting", "straggler", "input_bound",
]  # fmt: skip
Action = Literal["record", "ignore", "pause", "cancel", "rollback"]


class HealthSpec(SpecModel):
    """What becomes of what the health rules find."""

    actions: dict[Rule, Action] = Field(
        default={},
        description="By the name of a rule: record what it finds, ignore it, or also pause or cancel the job at the "
        "next step boundary, or rollback: return to a checkpoint from before, with a smaller learning rate.",
        json_schema_extra={"default_text": "record"},
    )
    rollback_factor: float = Field(
        default=0.5, gt=0.0, le=1.0, description="What a rollback multiplies the learning rate by."
    )
    max_rollbacks: PositiveInt = Field(
        default=3, le=100, description="Rollbacks after which the next one fails the job."
    )
