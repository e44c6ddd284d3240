"""How much memory the tensors of a pass take at its peak: each storage that an operation makes, until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ps.numerics.optimizer import leave_out_dynamo


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered. What was there before is not counted, nor what libraries take for themselves."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0  # bytes
        self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each operation."""
        before = {
            id(value.untyped_storage())
            for value in _pytree.tree_leaves((args, kwargs))
            if isinstance(value, torch.Tensor) and _has_storage(value)
        }
        out = func(*args, **(kwargs or {}))
        for value in _pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor) and _has_storage(value) and id(value.untyped_storage()) not in before:
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size


leave_out_dynamo(PeakMemory.__torch_dispatch__)  # a submission measures, and would wait for it


def _has_storage(value: torch.Tensor) -> bool:
    return value.layout == torch.strided and value.device.type != "meta"
