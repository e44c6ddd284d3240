"""Products of a loss's second derivatives with a direction, as gradients of a number.

The Hessian times v is the gradient of g·v, where g is the gradient and v constant (Pearlmutter 1994). The Gauss-Newton
matrix times v is the gradient of z·b: z are the model's outputs, and b, constant too, is H_z J v, with J the Jacobian
of z and H_z the Hessian of the loss by z (Schraudolph 2002). So whatever computes gradients computes products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree

from worker.gradients.losses import LossValue

_CANNOT = "the model cannot be differentiated twice, which curvature needs"
OUTPUTS = (
    "state the loss as Task.loss, have batch_loss return (loss, outputs), or use a model whose own output has logits"
)


class CurvatureError(Exception):
    """A loss that has no second derivative. The message says why."""


def slope(
    found: LossValue, tensors: Sequence[torch.Tensor], vector: Sequence[torch.Tensor], *, is_gauss_newton: bool
) -> torch.Tensor | None:
    """A number whose gradient is the product; None where the product is zero. Raises CurvatureError.

    found: a loss with its graph. tensors: that it depends on; vector: one like each of them.
    """
    return _along_outputs(found, tensors, vector) if is_gauss_newton else _along_gradient(found, tensors, vector)


def _along_gradient(
    found: LossValue, tensors: Sequence[torch.Tensor], vector: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    with errors_named():
        first = torch.autograd.grad(found.value, tensors, create_graph=True, allow_unused=True)
    check_twice(first)
    return _inner(first, vector)


def _along_outputs(
    found: LossValue, tensors: Sequence[torch.Tensor], vector: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    outputs = outputs_of(found.outputs)
    with errors_named():
        first = torch.autograd.grad(found.value, outputs, create_graph=True, allow_unused=True)
        if all(gradient is None for gradient in first):
            raise CurvatureError(f"the loss is not computed from the model's outputs; {OUTPUTS}")
        curved = [(g, z) for g, z in zip(first, outputs, strict=True) if g is not None and g.requires_grad]
        if not curved:  # the loss is linear in the outputs
            return None
        check_twice([g for g, _ in curved])
        # J v: what goes back for a dual vector is linear in it, and its derivative by that is J v.
        dual = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        back = torch.autograd.grad(outputs, tensors, dual, create_graph=True, allow_unused=True)
        check_twice(back)
        inner = _inner(back, vector)
        if inner is None:
            return None
        moved = torch.autograd.grad(inner, dual, retain_graph=True, allow_unused=True)
        pairs = [
            (g, u) for g, u in zip(first, moved, strict=True) if g is not None and g.requires_grad and u is not None
        ]
        if not pairs:
            return None
        bent = torch.autograd.grad(
            [g for g, _ in pairs], outputs, [u for _, u in pairs], retain_graph=True, allow_unused=True
        )
    return _inner(bent, outputs)


def _inner(left: Sequence[torch.Tensor | None], right: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Their inner product, of what there is on the left; None when it depends on nothing."""
    parts = [(a * b.to(a.dtype)).sum() for a, b in zip(left, right, strict=True) if a is not None]
    kept = [part for part in parts if part.requires_grad]
    if not kept:
        return None
    total = kept[0]
    for part in kept[1:]:
        total = total + part
    return total


def outputs_of(outputs: Any) -> list[torch.Tensor]:
    """The tensors among a model's outputs that the loss can depend on.

    Raises CurvatureError without any, or when one of them is computed from another.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    known = _pytree.tree_leaves(outputs if logits is None else logits)
    found = [value for value in known if isinstance(value, torch.Tensor) and value.requires_grad]
    if not found:
        raise CurvatureError(f"the model's outputs are not known, which this needs; {OUTPUTS}")
    if len(found) > 1 and _depend(found):
        raise CurvatureError(
            "one of the model's outputs is computed from another, so derivatives by them are not those of independent "
            "outputs: have the model return what the loss takes alone, or call that logits"
        )
    return found


def _depend(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether one is computed from another."""
    ends = {output.grad_fn for output in outputs}
    for output in outputs:
        waiting = [output.grad_fn]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            following = [] if node is None else [near for near, _ in node.next_functions if near is not None]
            if any(near in ends for near in following):
                return True
            fresh = [near for near in following if near not in seen]
            seen.update(fresh)
            waiting += fresh
    return False


def check_twice(gradients: Iterable[torch.Tensor | None]) -> None:
    """Raises CurvatureError where the graph of a gradient ends in an operation that has no second derivative.

    torch itself takes such a derivative for zero when it is asked for parameters that it cannot reach.
    """
    waiting = [gradient.grad_fn for gradient in gradients if gradient is not None and gradient.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        name = node.name()
        if "Error" in name or "NotImplemented" in name:
            raise CurvatureError(f"{_CANNOT}: {name}, as of a function that is once_differentiable")
        fresh = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(fresh)
        waiting += fresh


@contextmanager
def errors_named() -> Iterator[None]:
    """What torch raises meanwhile is a CurvatureError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CurvatureError(f"{_CANNOT}: {error}") from error
