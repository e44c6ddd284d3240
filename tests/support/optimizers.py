"""Optimizers that people might bring: one that works, and one of every kind that cannot."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch


class RowSigns(torch.optim.Optimizer):
    """Steps by the signs of the gradient, times the mean of each row; counts in its group and keeps a list."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, warmup: int = 2) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "warmup": warmup, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            factor = min(1.0, group["k"] / group["warmup"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("means", []).append(float(p.grad.mean()))
                state["means"] = state["means"][-3:]
                scale = p.grad.abs().mean(-1, keepdim=True) if p.dim() else p.grad.abs()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(p.grad.sign() * scale * (1 + sum(state["means"])), alpha=-group["lr"] * factor)


class NeedsClosure(RowSigns):
    def step(self, closure: Callable[[], float]) -> None:  # type: ignore[override]
        closure()


class TwoModes(RowSigns):
    def train(self) -> None:
        """Go to the parameters that it trains with."""

    def eval(self) -> None:
        """Go to those that it evaluates with."""


class LosesMomentum(TwoModes):
    def eval(self) -> None:
        """Forget."""
        self.state.clear()


class Draws(RowSigns):
    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step()
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p.add_(random.random() * 0.01)


class Couples(RowSigns):
    """Scales all gradients by their global norm."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        all_of_them = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(all_of_them, 0.1)
        super().step()


class KeepsElsewhere(RowSigns):
    """Counts in an attribute, which no checkpoint has."""

    calls = 0

    def step(self, closure: Callable[[], float] | None = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(self.calls)
        super().step()


class KeepsAFunction(RowSigns):
    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["hook"] = print


class MatricesOnly(RowSigns):
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"only matrices, not {tuple(p.shape)}")
        super().step()


class ChecksRate(RowSigns):
    def __init__(self, params: Any, lr: float, rank: int) -> None:
        if rank > 4:
            raise ValueError(f"rank = {rank}; allowed: 1 to 4")
        super().__init__(params, lr)
