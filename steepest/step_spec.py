"""The part of the job spec that says what a step does with a gradient: optimizer, schedule, clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from steepest.spec_base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, SpecModel, UnitFloat

OPTIMIZER_NAMES = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw")
SCHEDULE_NAMES = ("constant", "linear", "cosine", "step", "exponential")

# Which hyper-parameters each optimizer takes besides lr and weight_decay: torch.optim's own names.
HYPER_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening"),
    "momentum": ("momentum", "dampening"),
    "nesterov": ("momentum",),
    "adagrad": ("lr_decay", "initial_accumulator_value", "eps"),
    "rmsprop": ("alpha", "eps", "momentum", "centered"),
    "adam": ("betas", "eps", "amsgrad"),
    "adamw": ("betas", "eps", "amsgrad"),
}
DEFAULT_LR: Mapping[str, float] = {"adagrad": 1e-2, "rmsprop": 1e-2}
DEFAULT_LR_OTHERWISE = 1e-3
_TORCH: dict[str, JsonValue] = {"default_text": "torch.optim's"}


class OptimizerSpec(SpecModel):
    """Which optimizer, with its hyper-parameters; absent ones are torch.optim's defaults."""

    name: Literal["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"] = Field(
        default="adamw", description="Optimizer: sgd, momentum, nesterov, adagrad, rmsprop, adam or adamw."
    )
    lr: PositiveFloat | None = Field(
        default=None,
        description="Learning rate before the schedule.",
        json_schema_extra={"default_text": "0.001; 0.01 for adagrad and rmsprop"},
    )
    momentum: UnitFloat | None = Field(
        default=None,
        description="Momentum factor, for sgd, momentum, nesterov and rmsprop.",
        json_schema_extra={"default_text": "0.9 for momentum and nesterov, else 0"},
    )
    dampening: NonNegativeFloat | None = Field(
        default=None, description="Dampening of the momentum, for sgd and momentum.", json_schema_extra=_TORCH
    )
    weight_decay: NonNegativeFloat | None = Field(
        default=None,
        description="Weight decay; decoupled for adamw, an L2 penalty for the others.",
        json_schema_extra=_TORCH,
    )
    betas: tuple[UnitFloat, UnitFloat] | None = Field(
        default=None,
        description="Decay rates of the two moment estimates, for adam and adamw.",
        json_schema_extra=_TORCH,
    )
    eps: PositiveFloat | None = Field(
        default=None,
        description="Term added to the denominator, for adagrad, rmsprop, adam and adamw.",
        json_schema_extra=_TORCH,
    )
    alpha: UnitFloat | None = Field(
        default=None, description="Smoothing constant of the squared gradient, for rmsprop.", json_schema_extra=_TORCH
    )
    centered: bool | None = Field(
        default=None,
        description="Normalize by the estimated variance of the gradient, for rmsprop.",
        json_schema_extra=_TORCH,
    )
    amsgrad: bool | None = Field(
        default=None, description="Use the AMSGrad variant, for adam and adamw.", json_schema_extra=_TORCH
    )
    lr_decay: NonNegativeFloat | None = Field(
        default=None, description="Decay of the learning rate with the updates, for adagrad.", json_schema_extra=_TORCH
    )
    initial_accumulator_value: NonNegativeFloat | None = Field(
        default=None, description="Initial sum of squared gradients, for adagrad.", json_schema_extra=_TORCH
    )
    decay_biases_and_norms: bool = Field(
        default=True, description="Apply weight decay to parameters of fewer than two dimensions too."
    )

    @model_validator(mode="after")
    def _only_own_hyper_parameters(self) -> Self:
        own = HYPER_PARAMETERS[self.name]
        for names in HYPER_PARAMETERS.values():
            for name in names:
                if name not in own and getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is no hyper-parameter of {self.name}; allowed: lr, weight_decay, {', '.join(own)}"
                    )
        if self.name == "nesterov" and self.momentum == 0:
            raise ValueError("momentum = 0: nesterov needs a momentum greater than 0")
        return self

    @property
    def base_lr(self) -> float:
        """The learning rate before any schedule."""
        return self.lr if self.lr is not None else DEFAULT_LR.get(self.name, DEFAULT_LR_OTHERWISE)


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


class ClipSpec(SpecModel):
    """Clipping of the aggregated gradient: at most one of the two."""

    norm: PositiveFloat | None = Field(
        default=None, description="Largest global L2 norm of the gradient; a longer one is scaled down."
    )
    value: PositiveFloat | None = Field(
        default=None, description="Largest magnitude of a gradient element; others are set to it."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.norm is not None and self.value is not None:
            raise ValueError(f"norm = {self.norm} and value = {self.value} are both given; allowed: at most one")
        return self
