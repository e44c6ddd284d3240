"""A pass in float64, of code that names narrower types."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
}


class _Widening(TorchFunctionMode):
    """A call that names a type of less than 64 bits, as logits.float(), means the one of 64."""

    def __torch_function__(  # type: ignore[no-untyped-def]  # as torch's own
        self, func, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return _NARROWING.get(func, func)(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


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
