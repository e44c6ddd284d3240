"""The specs of optimizers that minimize the loss over all samples: each step of the job is one evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steepest.optimizer_base import TORCH, OptimizerSpec
from steepest.spec_base import NonNegativeFloat, PositiveInt

MOST_PRODUCTS = 200  # of newton_cg, for one step's direction
HESSIAN, GAUSS_NEWTON, DIFFERENCES = "hessian", "gauss_newton", "differences"


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
    products: Literal["hessian", "gauss_newton", "differences"] | None = Field(
        default=None,
        description="What multiplies a direction, for newton_cg: hessian, gauss_newton (never negative for a convex "
        "loss), or differences of gradients (in float64, for tasks without second derivatives).",
        json_schema_extra={"default_text": "hessian; differences for an AnalyticTask"},
    )
    damping: NonNegativeFloat = Field(
        default=0.0,
        description="Added to that matrix's diagonal, for newton_cg; from then on it follows how well the matrix "
        "foretells the loss (Levenberg-Marquardt). 0: none.",
    )


def multiplies(optimizer: OptimizerSpec) -> bool:
    """Whether some steps compute products of second derivatives with a direction."""
    return isinstance(optimizer, NewtonCgSpec) and optimizer.products != DIFFERENCES


def is_gauss_newton(optimizer: OptimizerSpec) -> bool:
    """Whether a step with a direction multiplies it with the Gauss-Newton matrix, rather than the Hessian."""
    return isinstance(optimizer, NewtonCgSpec) and optimizer.products == GAUSS_NEWTON
