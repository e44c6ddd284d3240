"""Linear layers whose weight gradient is computed where the server reads it, with no copy.

Autograd hands over a fresh tensor for every gradient; moving a large one to its place costs three passes over memory
that no cache holds. `torch.nn.Linear`'s backward is one matrix product, and a product can be told where to write. The
result still travels through autograd, so that hooks of the user run, and a weight that is used twice is added up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

MIN_NUMEL = 1 << 17  # a smaller gradient is moved sooner than Python can arrange for this

Place = Callable[[nn.Parameter], torch.Tensor | None]


class _Linear(torch.autograd.Function):
    """functional.linear; `place` says where the gradient of the weight is to be written, or None for anywhere."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None, place: Place
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.place = place
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_inputs = gradient @ weight if ctx.needs_input_grad[0] else None
        transposed, flat = rows.t(), inputs.reshape(-1, inputs.shape[-1])
        # With grad mode on, this pass is itself to be differentiated.
        place = None if torch.is_grad_enabled() else ctx.place(weight)
        of_weight = transposed @ flat if place is None else torch.mm(transposed, flat, out=place)
        return of_inputs, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None


def write_directly(model: nn.Module, place: Place) -> None:
    """Have the large linear layers of `model` write their gradients to where `place` says.

    place: asked in every backward pass for every use of a weight; it returns a tensor of the weight's shape, or None.
    Modes that need the layer as it is (autocast, torch.func, torch.compile, no gradient) get it as it is.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= MIN_NUMEL:
            module.forward = _forward_of(module, place)  # type: ignore[method-assign, assignment]


def _forward_of(module: nn.Linear, place: Place) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        weight = module.weight
        if (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and weight.requires_grad
            and isinstance(weight, nn.Parameter)
            and not torch.is_autocast_enabled(input.device.type)
            and not torch._C._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0
        ):
            return _Linear.apply(input, weight, module.bias, place)  # type: ignore[no-any-return, no-untyped-call]
        return functional.linear(input, weight, module.bias)

    return forward
