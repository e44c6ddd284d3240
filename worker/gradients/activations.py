"""What comes out of a model's activation functions in one pass: how large it is, what is off, what is at its bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

# Of each kind of module, the bounds of its outputs, OFF where a unit can be off, or FREE where it is never quite that.
OFF, FREE = "off", "free"
_KINDS: dict[type[nn.Module], tuple[float, float] | str] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
    nn.ReLU: OFF,
    nn.ReLU6: OFF,
    nn.LeakyReLU: FREE,
    nn.ELU: FREE,
    nn.GELU: FREE,
    nn.SiLU: FREE,
    nn.Mish: FREE,
    nn.Softplus: FREE,
}
LEAST_SAMPLES = 16  # of a micro-batch, with fewer of which a unit may well be off for all
AT_ONCE = 25  # modules that are looked at in one pass of a running job; the others have their turn in later ones
NEAR = 0.015  # of the distance between the bounds: for tanh, beyond 0.97, where a gradient loses 94 % of its size


class Activations:
    """Watches the modules of known kinds, by name."""

    def __init__(self, roots: Sequence[tuple[str, nn.Module]]) -> None:
        self._modules = {
            name: module
            for prefix, root in roots
            for name, module in root.named_modules(prefix=prefix[:-1])
            if type(module) in _KINDS
        }
        self._seen: dict[str, list[tuple[float | torch.Tensor, float | torch.Tensor]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the modules, in the order of the model."""
        return tuple(self._modules)

    @contextmanager
    def observed(self, turn: int | None = None) -> Iterator[None]:
        """Look at what the modules return meanwhile: all of them, or those whose turn it is, at most AT_ONCE."""
        self._seen = {}
        turns = 1 if turn is None else math.ceil(len(self._modules) / AT_ONCE)
        now = list(self._modules.items())[(turn or 0) % max(1, turns) :: max(1, turns)]
        hooks = [module.register_forward_hook(self._hook(name)) for name, module in now]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.numel() and output.dim():
                detached = output.detach()
                self._seen.setdefault(name, []).append((_share(module, detached), _size(detached)))

        return look

    def measured(self) -> bytes:
        """Of each module, the share of saturated outputs, or of units that were 0 for all samples; then of each, the
        root mean square of its outputs. float64, little-endian.

        Not a number for a module that was not called or not looked at; a share, too, where it has no meaning or there
        were too few samples to say.
        """
        found = {name: [[each[kind] for each in seen] for kind in (0, 1)] for name, seen in self._seen.items()}
        if any(isinstance(value, torch.Tensor) for pair in found.values() for own in pair for value in own):
            flat = torch.stack(  # one wait for all
                [torch.as_tensor(v, dtype=torch.float64).cpu() for pair in found.values() for own in pair for v in own]
            )
            values = iter(flat.tolist())
            found = {name: [[next(values) for _ in own] for own in pair] for name, pair in found.items()}
        out = np.full((2, len(self._modules)), math.nan, "<f8")
        for column, name in enumerate(self._modules):
            if name in found:
                out[:, column] = [sum(own) / len(own) for own in found[name]]
        return out.tobytes()


def _size(output: torch.Tensor) -> float | torch.Tensor:
    """The root mean square of an output."""
    if output.device.type != "cpu" or output.dtype not in (torch.float32, torch.float64):
        return output.double().square().mean().sqrt()
    flat = output.numpy().reshape(-1)
    return math.sqrt(float(np.dot(flat, flat)) / flat.size)


def _share(module: nn.Module, output: torch.Tensor) -> float | torch.Tensor:
    """Of one output; a tensor where it is on a GPU, for which nobody waits here."""
    bounds = _KINDS[type(module)]
    if bounds == FREE or (bounds == OFF and len(output) < LEAST_SAMPLES):
        return math.nan
    # A unit is a channel of a convolution, else an element.
    over = (0,) if output.dim() < 4 else (0, *range(2, output.dim()))
    low, high = (0.0, 0.0) if isinstance(bounds, str) else _limits(*bounds)
    if output.device.type == "cpu":  # operations of NumPy take a quarter of the time of torch's on small arrays
        array = (output if output.dtype in (torch.float32, torch.float64) else output.float()).numpy()
        if bounds == OFF:
            on = array.any(axis=over)
            return (on.size - np.count_nonzero(on)) / on.size
        return (np.count_nonzero(array < low) + np.count_nonzero(array > high)) / array.size
    if bounds == OFF:
        return (output.abs().amax(dim=over) == 0).double().mean()
    return ((output < low) | (output > high)).double().mean()


def _limits(low: float, high: float) -> tuple[float, float]:
    margin = NEAR * (high - low)
    return low + margin, high - margin
