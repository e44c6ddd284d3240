"""Model descriptions, and parts of models, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ps.parameters.description import ModelDescription, TensorDescription


def described(shapes: Sequence[tuple[int, ...]], dtype: str = "float32") -> ModelDescription:
    parameters = tuple(TensorDescription(f"p{i}", shape, dtype) for i, shape in enumerate(shapes))
    return ModelDescription(parameters, (), tuple((p.name, p.name) for p in parameters))


class DifferentiableOnce(torch.autograd.Function):
    """Returns what it is given, and has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]
