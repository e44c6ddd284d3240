"""The specs of optimizers that minimize the loss over all samples: each step of the job is one evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steepest.optimizer_base import TORCH, OptimizerSpec
from steepest.spec_base import NonNegativeFloat, PositiveInt


class LbfgsSpec(OptimizerSpec):
    """L-BFGS with a strong Wolfe line search."""

    default_lr = 1.0
    is_whole = True
    is_full_batch = True
    name: Literal["lbfgs"] = "lbfgs"
    history_size: PositiveInt | None = Field(
        default=None, le=1000, description="Pairs of differences that are kept, for lbfgs.", json_schema_extra=TORCH
    )
    tolerance_grad: NonNegativeFloat | None = Field(
        default=None,
        description="Largest gradient element at which it stays where it is, for lbfgs.",
        json_schema_extra=TORCH,
    )
    tolerance_change: NonNegativeFloat | None = Field(
        default=None,
        description="Smallest change of parameters or loss that it goes on for, for lbfgs.",
        json_schema_extra=TORCH,
    )


class NewtonCgSpec(OptimizerSpec):
    """Newton's method by conjugate gradients (Hessian-free), with a line search."""

    default_lr = 1.0
    is_whole = True
    is_full_batch = True
    name: Literal["newton_cg"] = "newton_cg"
