"""How a step is made of a gradient: schedule, clipping, averages; and which evaluation is the best."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from steepest.spec_base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, SpecModel

LOOKAHEAD_STEPS = 5
SCHEDULE_NAMES = ("constant", "linear", "cosine", "step", "exponential")


class ScheduleSpec(SpecModel):
    """How the learning rate moves over the steps."""

    name: Literal["constant", "linear", "cosine", "step", "exponential"] = Field(
        default="constant", description="Schedule: constant, linear, cosine, step or exponential."
    )
    warmup_steps: NonNegativeInt = Field(default=0, description="Steps of linear warm-up from 0, before the schedule.")
    final_factor: NonNegativeFloat = Field(
        default=0.0, description="Share of the learning rate left at the last step, for linear and cosine."
    )
    step_size: PositiveInt = Field(default=100, description="Steps between two decays, for step.")
    gamma: PositiveFloat = Field(
        default=0.1, description="Factor of one decay: every step_size steps for step, every step for exponential."
    )


class AutoClipSpec(SpecModel):
    """A largest norm that follows the gradient's own: a percentile of the last norms (Seetharaman et al. 2020)."""

    percentile: float = Field(
        default=10.0, gt=0.0, le=100.0, description="Of the last norms, this step's among them: the largest norm."
    )
    window: PositiveInt = Field(default=1000, le=100_000, description="How many norms are looked back on.")


class ZClipSpec(SpecModel):
    """Scale down what sticks out: norms far above their running mean (Kumar et al. 2025, arXiv 2504.02507)."""

    threshold: PositiveFloat = Field(
        default=2.5, description="Standard deviations above the mean from which a norm is scaled down."
    )
    decay: float = Field(default=0.97, gt=0.0, lt=1.0, description="Of the running mean and variance, a step.")
    warmup_steps: int = Field(
        default=25, ge=2, le=10_000, description="Steps whose norms give the first mean and variance; none is clipped."
    )


class AdaGcSpec(SpecModel):
    """Scale down a parameter's gradient where it is far above its own running norm (Wang et al. 2025)."""

    relative: PositiveFloat = Field(
        default=1.05, description="Largest norm of a parameter's gradient, times the running mean of its norms."
    )
    absolute: PositiveFloat = Field(default=1.0, description="Largest global norm during the warm-up.")
    decay: float = Field(default=0.98, gt=0.0, lt=1.0, description="Of the running means, a step.")
    warmup_steps: PositiveInt = Field(
        default=100,
        le=100_000,
        description="Steps with a global clip; a parameter's least norm begins its mean.",
    )


class AgcSpec(SpecModel):
    """Scale down a unit's gradient where it is large against the unit's weights (Brock et al. 2021)."""

    clipping: PositiveFloat = Field(
        default=0.01, description="Largest norm of a unit's gradient, times the norm of its weights."
    )
    eps: PositiveFloat = Field(default=1e-3, description="Weights of a smaller norm count as of this norm.")
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Names of parameters that are left alone, with * and ?, as the last layer's.",
        json_schema_extra={"default_text": "none"},
    )


class ClipSpec(SpecModel):
    """Clipping of the aggregated gradient: at most one of these."""

    norm: PositiveFloat | None = Field(
        default=None, description="Largest global L2 norm of the gradient; a longer one is scaled down."
    )
    value: PositiveFloat | None = Field(
        default=None, description="Largest magnitude of a gradient element; others are set to it."
    )

    parameter_norm: PositiveFloat | None = Field(
        default=None, description="Largest L2 norm of each parameter's gradient; a longer one is scaled down."
    )
    autoclip: AutoClipSpec | None = Field(default=None, description="A largest norm that follows the gradient's own.")
    zclip: ZClipSpec | None = Field(default=None, description="Scale down norms far above their running mean.")
    adagc: AdaGcSpec | None = Field(
        default=None, description="Scale down the gradient of a parameter above the running mean of its norms."
    )
    agc: AgcSpec | None = Field(
        default=None, description="Scale down the gradient of units where it is large against their weights."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) > 1:
            numbers = ("norm", "value", "parameter_norm")
            said = [f"{name} = {getattr(self, name)}" if name in numbers else name for name in given]
            raise ValueError(f"{' and '.join(said)} are both given; allowed: at most one")
        return self

    @property
    def policy(self) -> AutoClipSpec | ZClipSpec | None:
        """What sets the largest norm anew at each step, if anything does."""
        return self.autoclip or self.zclip

    @property
    def is_by_parameter(self) -> bool:
        """Whether every parameter's gradient is scaled by itself, by its norm."""
        return self.parameter_norm is not None or self.adagc is not None


class AverageSpec(SpecModel):
    """A running average of the parameters over the steps, which often evaluates better than the parameters."""

    name: Literal["none", "ema", "swa", "lookahead"] = Field(
        default="none",
        description="Average: ema (exponential), swa (the mean of all; Izmailov et al. 2018), lookahead (parameters go "
        "back to it; Zhang et al. 2019) or none.",
    )
    decay: float = Field(
        default=0.999, gt=0.0, lt=1.0, description="Share of the average that stays at each update, for ema."
    )
    start: NonNegativeInt = Field(default=0, description="The average begins with the parameters after this step.")
    every: PositiveInt = Field(
        default=1,
        description="Steps between two updates of the average.",
        json_schema_extra={"default_text": "1, for lookahead 5"},
    )
    pull: float = Field(
        default=0.5, gt=0.0, le=1.0, description="How far the average goes towards the parameters, for lookahead."
    )
    evaluate: bool = Field(default=True, description="Evaluate the average; else the parameters that are trained.")

    @model_validator(mode="after")
    def _lookahead_begins_at_once(self) -> Self:
        if self.is_lookahead and self.start:
            raise ValueError(f"start = {self.start} with lookahead, which begins with the first step; allowed: 0")
        if self.is_lookahead and "every" not in self.model_fields_set:
            self.__dict__["every"] = LOOKAHEAD_STEPS  # the model is frozen, and this is its default
        return self

    @property
    def is_lookahead(self) -> bool:
        """Whether the parameters go back to the average whenever it is updated."""
        return self.name == "lookahead"

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self.name != "none"

    def updates(self, step: int) -> int:
        """How many updates there have been when the step of that number is over; the first takes the parameters."""
        return 0 if step < self.start or not self.is_on else 1 + (step - self.start) // self.every


class BestSpec(SpecModel):
    """The best evaluation: its checkpoint is kept, and a job may end when there has long been no better one."""

    metric: str | None = Field(
        default=None, description="Keep the checkpoint of the best evaluation by this metric, or by loss."
    )
    mode: Literal["min", "max"] | None = Field(
        default=None,
        description="Whether less or more of the metric is better.",
        json_schema_extra={"default_text": "min for loss, max for metrics"},
    )
    patience: PositiveInt | None = Field(
        default=None, description="End the job after so many evaluations in a row that are no better."
    )
    min_delta: NonNegativeFloat = Field(default=0.0, description="By how much a better evaluation must differ.")

    @property
    def is_on(self) -> bool:
        """Whether the best evaluation matters."""
        return self.metric is not None or self.patience is not None

    @property
    def metric_name(self) -> str:
        """What is compared."""
        return self.metric or "loss"

    @property
    def is_max(self) -> bool:
        """Whether more is better."""
        return self.mode == "max" if self.mode is not None else self.metric_name != "loss"
