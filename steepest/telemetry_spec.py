"""The part of the job spec about what is kept of a job, and what becomes of what the health rules find."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from steepest.spec_base import NonNegativeInt, PositiveInt, SpecModel


class TelemetrySpec(SpecModel):
    """What is kept of every step."""

    every: PositiveInt = Field(
        default=1,
        description="Keep the record of every so many steps, and of those that stand out, with what was measured in "
        "them; health rules look at what is kept.",
    )
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
    curvature_every: NonNegativeInt = Field(
        default=0,
        description="Measure the sharpness (the largest eigenvalue of the loss's Hessian) and the smallest "
        "eigenvalue in every so many steps; 0: never.",
    )
    profile_start: NonNegativeInt = Field(default=10, description="First step that torch.profiler records.")
    profile_steps: NonNegativeInt = Field(
        default=0, le=1000, description="Steps that torch.profiler records in every worker; 0: none."
    )


Rule = Literal[
    "vanishing", "exploding", "dead_units", "saturated", "initialization", "stalled", "diverging", "update_ratio",
    "update_spike", "nonfinite", "outlier", "overfitting", "straggler", "input_bound", "staleness",
]  # fmt: skip
Action = Literal["record", "ignore", "pause", "cancel", "rollback", "skip"]
SKIPPING = ("exploding", "nonfinite")  # rules that the leader looks at before a step is taken


class HealthSpec(SpecModel):
    """What becomes of what the health rules find."""

    actions: dict[Rule, Action] = Field(
        default={},
        description="By the name of a rule: record what it finds, ignore it, or also pause or cancel the job at the "
        "next step boundary; rollback: return to a checkpoint from before, and leave out the samples to blame, or else "
        "go on with a smaller learning rate; skip (exploding, nonfinite): do not take the step.",
        json_schema_extra={"default_text": "record"},
    )
    rollback_factor: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="What a rollback multiplies the learning rate by, if no samples are to blame.",
    )
    max_rollbacks: PositiveInt = Field(
        default=3, le=100, description="Rollbacks after which the next one fails the job."
    )

    @model_validator(mode="after")
    def _only_what_is_known_in_time(self) -> Self:
        for rule, action in self.actions.items():
            if action == "skip" and rule not in SKIPPING:
                allowed = " and ".join(SKIPPING)
                raise ValueError(
                    f"actions.{rule} = 'skip': it finds what has lasted, and the step is taken by then; skip is "
                    f"allowed for {allowed}"
                )
        return self

    def skips(self, rule: Rule) -> bool:
        """Whether a step in which the rule finds something is not taken."""
        return self.actions.get(rule) == "skip"
