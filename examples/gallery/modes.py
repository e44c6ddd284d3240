"""Forward mode pays by the input, reverse mode by the output.

A pass in forward mode carries one direction through the function and costs as much as the function does; a gradient
takes one for each input. A reverse pass gives the derivative by all inputs at once, whatever their number, but has to
keep what the forward pass computed (Linnainmaa 1970; Baydin et al. 2018). That is why networks are trained backwards.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Runs, times

INPUTS = (1, 4, 16, 64, 256)
ROUNDS = 5


def function(x: torch.Tensor) -> torch.Tensor:
    """A smooth function of all inputs, whose own cost hardly depends on their number."""
    spread = torch.linspace(0.0, 1.0, 200_000).reshape(-1, 1)
    return torch.tanh(spread * x.mean() + x.square().sum()).sum()


def forward(x: torch.Tensor) -> torch.Tensor:
    """The gradient from one product of the Jacobian for each input."""
    return torch.stack([torch.func.jvp(function, (x,), (unit,))[1] for unit in torch.eye(len(x))])


def draw(runs: Runs, pyplot: Any) -> str:
    """Time of a gradient in each mode, by inputs, over that of the function."""
    reverse: Callable[[torch.Tensor], torch.Tensor] = torch.func.grad(function)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"forward": forward, "reverse": reverse}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for count in INPUTS:
        x = torch.linspace(-1.0, 1.0, count) / count
        torch.testing.assert_close(forward(x), reverse(x), rtol=1e-3, atol=1e-2)
        seconds: dict[str, list[float]] = {"function": [], **{name: [] for name in ways}}
        for _ in range(ROUNDS):
            for name, way in {"function": function, **ways}.items():
                began = time.perf_counter()
                way(x)
                seconds[name].append(time.perf_counter() - began)
        for name in ways:
            ratios[name].append(statistics.median(seconds[name]) / statistics.median(seconds["function"]))
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    for name, own in ratios.items():
        axis.loglog(INPUTS, own, marker="o", label=f"{name} mode")
    axis.set(xlabel="inputs", ylabel="time of the gradient / of the function")
    axis.legend()
    return (
        f"With one input forward mode takes {times(ratios['forward'][0])} times as long as the function and reverse "
        f"mode {times(ratios['reverse'][0])}; with {INPUTS[-1]}, {times(ratios['forward'][-1])} "
        f"and {times(ratios['reverse'][-1])}."
    )
