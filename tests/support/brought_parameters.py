"""Small tasks as people bring them: whose parameters behave in a way of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import steepest
from tests.support.brought_base import WIDTH, Line, task_of


class MomentumEncoder(nn.Module):
    """A frozen copy that follows the encoder in every forward pass, as in MoCo."""

    def __init__(self, *, rebinds: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.rebinds = rebinds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for own, theirs in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                if self.rebinds:
                    own.data = own.data * 0.9 + theirs.data * 0.1
                else:
                    own.mul_(0.9).add_(theirs, alpha=0.1)
            wanted = self.teacher(x)
        return (self.encoder(x) - wanted).square().mean(1, keepdim=True)


def momentum_encoder(*, rebinds: bool = False) -> steepest.Task:
    """Frozen parameters that forward changes."""
    return task_of(MomentumEncoder(rebinds=rebinds))


class PartlyUsed(Line):
    """Has a layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x)


def unreached_parameters() -> steepest.Task:
    """Parameters that the loss does not depend on."""
    return task_of(PartlyUsed())


class UsedLater(PartlyUsed):
    """Uses its other layer from the fourth step on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.line(self.pooler(x) if self.passes > 3 else x)


def parameters_used_later() -> steepest.Task:
    """Parameters that the loss depends on later."""
    return task_of(UsedLater())


class CreatesParameters(Line):
    """Makes a parameter in its first pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "shift"):
            self.shift = nn.Parameter(torch.zeros(1))
        return self.line(x) + self.shift


def created_parameter() -> steepest.Task:
    """A parameter that is created in forward."""
    return task_of(CreatesParameters())


def grouped() -> steepest.Task:
    """Groups of parameters: a slow one, one without decay, a frozen one."""
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    groups = [
        steepest.ParameterGroup(names="0.*", frozen=True),
        steepest.ParameterGroup(names="*.bias", weight_decay=0.0),
        steepest.ParameterGroup(names="2.*", lr_scale=0.1),
    ]
    return task_of(model, parameter_groups=groups)


def groups_that_fit_nothing() -> steepest.Task:
    """A group with a mistake in its pattern."""
    return task_of(nn.Linear(WIDTH, 1), parameter_groups=[steepest.ParameterGroup(names="backbone.*")])


def own_schedule(kind: str = "steps") -> steepest.Task:
    """A schedule of the task's."""
    schedules: dict[str, Any] = {
        "steps": lambda step: [1.0, 0.5, 0.25][min(step // 2, 2)],
        "negative": lambda step: 1.0 - step,
        "raising": lambda step: {0: 1.0}[step],
    }
    return task_of(nn.Linear(WIDTH, 1), schedule=schedules[kind])
