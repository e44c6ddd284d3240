"""Activation checkpointing of any model: activations that are computed again instead of kept (Chen et al. 2016).

Gradients have the same bits with it and without: torch's generator is put back for the second pass, and buffers have
their values of the first one afterwards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

ALL, SQRT = "all", "sqrt"
LEAST = 4  # layers of a sequence, with fewer of which segments save nothing


class RecomputeError(Exception):
    """There is nothing in the model that could be computed again. The message says what there is."""


def checkpoint_activations(model: nn.Module, how: str) -> list[str]:
    """Have a model keep fewer activations in training, and return the names of what is computed again.

    how: "all" for every layer of a sequence, "sqrt" for about the square root of n segments of n layers, or a name of
    modules, with * and ?. Raises RecomputeError.
    """
    if how == SQRT:
        return _in_segments(model)
    names = _layers(model) if how == ALL else _matching(model, how)
    for name in names:
        module = model.get_submodule(name)
        module.forward = _recomputed(module.forward, [module])
    return names


def _outermost(names: Sequence[str]) -> list[str]:
    """Without those within others."""
    chosen: list[str] = []
    for name in names:  # an outer module comes before what is in it
        if not any(not outer or name.startswith(f"{outer}.") for outer in chosen):
            chosen.append(name)
    return chosen


def _sequences(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """Containers of layers, the outer ones first."""
    for name, module in model.named_modules():
        if isinstance(module, kinds) and len(list(module.children())) >= LEAST:
            yield name, module


def _layers(model: nn.Module) -> list[str]:
    found = [
        f"{name}.{child}".lstrip(".")
        for name, module in _sequences(model, (nn.Sequential, nn.ModuleList))
        for child, layer in module.named_children()
        if any(True for _ in layer.parameters())
    ]
    if not found:
        raise RecomputeError(
            f"the model has no nn.Sequential or nn.ModuleList of {LEAST} or more layers; allowed: the name of modules, "
            f"such as {_example(model)}"
        )
    return _outermost(found)


def _matching(model: nn.Module, pattern: str) -> list[str]:
    found = [
        name
        for name, module in model.named_modules()
        # Of a list, the layers are called, and never the list.
        if name and fnmatchcase(name, pattern) and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    if not found:
        raise RecomputeError(f"no module is called {pattern!r}; the model has {_example(model)}")
    return _outermost(found)


def _example(model: nn.Module) -> str:
    names = [name for name, _ in model.named_modules() if name]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "no modules in it"


def _in_segments(model: nn.Module) -> list[str]:
    names = _outermost([name for name, _ in _sequences(model, (nn.Sequential,))])
    if not names:
        raise RecomputeError(
            f"sqrt needs an nn.Sequential of {LEAST} or more layers, for these can be computed in segments, and the "
            "model has none; allowed: all, or the name of modules"
        )
    for name in names:
        sequence = model.get_submodule(name)
        layers = list(sequence.children())
        size = math.ceil(math.sqrt(len(layers)))
        segments = [layers[start : start + size] for start in range(0, len(layers), size)]
        # The last one would be computed again at once.
        parts = [_recomputed(_chain(segment), segment) for segment in segments[:-1]] + [_chain(segments[-1])]
        sequence.forward = _chain(parts)
    return names


def _chain(parts: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def forward(input: Any) -> Any:  # noqa: A002  # torch's name
        for part in parts:
            input = part(input)  # noqa: A001
        return input

    return forward


def _recomputed(forward: Callable[..., Any], modules: Sequence[nn.Module]) -> Callable[..., Any]:
    """`forward`, whose activations are not kept where a gradient is computed. modules: that it runs."""

    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return contextlib.nullcontext(), _same_buffers(modules)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return wrapped


@contextlib.contextmanager
def _same_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What is computed within leaves no trace in buffers: the first pass has left it."""
    owners = [owner for module in modules for owner in module.modules() if owner._buffers]
    before = [
        (owner, name, tensor, tensor.detach().clone())
        for owner in owners
        for name, tensor in owner._buffers.items()
        if tensor is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, tensor, value in before:
                owner._buffers[name] = tensor
                tensor.copy_(value)
