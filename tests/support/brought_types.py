"""Tasks whose parameters have other types than float32 and float64."""

from __future__ import annotations

import torch
from torch import nn

import steepest
from tests.support.brought_base import WIDTH, inputs, task_of

__all__ = ["complex_layer", "complex_only_halves", "half_model"]


class _Dtyped(nn.Module):
    """A network in a type of its own, for float32 data."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 400), nn.Tanh(), nn.Linear(400, 1)).to(getattr(torch, dtype))
        self.scale = nn.Parameter(torch.ones(1))  # as norms that are kept in float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.to(self.body[0].weight.dtype)).float() * self.scale


def half_model(dtype: str = "bfloat16") -> steepest.Task:
    """A model of bfloat16 or float16 with a parameter of float32 beside."""
    return task_of(_Dtyped(dtype))


class _Complex(nn.Module):
    """A complex layer between real ones, as in models of waves."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, WIDTH)
        self.turn = nn.Parameter(torch.randn(WIDTH, 5, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.zeros(5, dtype=torch.complex64))
        self.out = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((self.line(x).to(torch.complex64) @ self.turn + self.bias).abs())


def complex_layer() -> steepest.Task:
    """Complex and real parameters."""
    return task_of(_Complex())


def complex_only_halves() -> steepest.Task:
    """Complex parameters in half precision, which torch has no optimizer for."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(3, dtype=torch.complex32))
    model.forward = lambda x: (x[:, :3] * model.w.real).sum(1, keepdim=True)  # type: ignore[method-assign, assignment]
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=steepest.ArrayData(inputs(), inputs()[:, :1]))
