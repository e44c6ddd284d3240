"""A pass in float64, of code that names narrower types or keeps tensors of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from worker.task.load import TaskError

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_NARROWING: Mapping[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
    torch.Tensor.cfloat: torch.Tensor.cdouble,  # type: ignore[attr-defined]  # torch's stubs leave them out
}
_REINTERPRETS = torch.Tensor.view  # with a type: the same bits as another number


class _Widening(TorchFunctionMode):
    """A call that names a type of less than 64 bits, as logits.float(), means the one of 64; so do tensors of it.

    Raises TaskError for a tensor of less than 64 bits that was computed all the same, whose values are rounded.
    """

    def __torch_function__(  # type: ignore[no-untyped-def]  # as torch's own
        self, func, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        dtypes = {} if func is _REINTERPRETS else _WIDE
        wide = [value if writes and index == 0 else widened(value, dtypes) for index, value in enumerate(args)]
        named = {key: widened(value, dtypes) for key, value in (kwargs or {}).items()}
        found = _NARROWING.get(func, func)(*wide, **named)
        if isinstance(found, torch.Tensor) and found.dtype in _WIDE and found.grad_fn is None and not writes:
            return found.to(_WIDE[found.dtype])
        return found


def widened(value: Any, dtypes: Mapping[torch.dtype, torch.dtype] = _WIDE) -> Any:
    """A tensor, or a type, of 64 bits; within lists and tuples, too. All else as it is. dtypes: those to replace."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in _WIDE:
            return value
        if value.grad_fn is not None:
            raise TaskError("task.model", _NARROW.format(value.dtype, value.grad_fn.name()))
        return value.to(_WIDE[value.dtype])
    if isinstance(value, torch.dtype):
        return dtypes.get(value, value)
    if type(value) in (list, tuple):
        return type(value)(widened(each, dtypes) for each in value)
    return value


_NARROW = (
    "the model or its loss has a value of {} ({}), though parameters and data are of float64: something converts to a "
    "type of its own, and derivatives of rounded values tell nothing; convert to the type of the input instead"
)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """What is computed meanwhile is computed in float64, and new tensors are of it, whatever type is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(before)
