"""From sample numbers to batches: whole-batch indexing for arrays, one sample at a time for other Datasets."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset, default_collate

from steepest.spec import DataSpec
from steepest.task import ArrayData
from worker.data.loader import LoaderData
from worker.data.streams import StreamSource, is_stream

MAPPED_BYTES = 64 << 20
FAULT_BYTES = 16 * mmap.PAGESIZE  # of a file, that Linux maps when one of its pages is touched


class Source(Protocol):
    """Gives batches by sample numbers."""

    random: bool  # whether user code runs in `batch`, so that the random generators must be seeded for it
    reads_ahead: bool  # whether other processes can read for it, to advantage

    def prepare(self, num_samples: int, data: DataSpec, seed: int, *, shuffle: bool) -> None:
        """Called before the first batch. num_samples: of an epoch."""

    def order(self, seed: int) -> Callable[[int], Sequence[int]] | None:
        """By epoch, the numbers of its samples in order; None where any order will do."""

    def batch(self, indices: NDArray[np.int64]) -> Any:
        """The batch of these samples."""


class _AnyOrder:
    """A source whose samples can be had by number."""

    def prepare(self, num_samples: int, data: DataSpec, seed: int, *, shuffle: bool) -> None:
        """See Source."""

    def order(self, seed: int) -> Callable[[int], Sequence[int]] | None:
        """See Source."""
        return None


class ArraySource(_AnyOrder):
    """Arrays in memory. as_numpy: give NumPy rows, for a task without torch."""

    random = False
    reads_ahead = False

    def __init__(self, arrays: Sequence[Any], *, as_numpy: bool = False) -> None:
        self._as_numpy = as_numpy
        convert = np.asarray if as_numpy else torch.as_tensor
        self._arrays: list[Any] = [a if isinstance(a, np.memmap) else convert(a) for a in arrays]
        # Pages of a private mapping may hold what is in no file.
        self._mapped = [a for a in self._arrays if isinstance(a, np.memmap) and a.mode in ("r", "r+")]
        self._touched = 0

    def batch(self, indices: NDArray[np.int64]) -> Any:
        """Rows of each array; one gather each."""
        if self._as_numpy:
            rows: tuple[Any, ...] = tuple(np.asarray(a[indices]) for a in self._arrays)
        else:
            chosen = torch.from_numpy(indices)
            rows = tuple(
                torch.from_numpy(np.array(a[indices])) if isinstance(a, np.memmap) else a.index_select(0, chosen)
                for a in self._arrays
            )
        if self._mapped:
            self._let_go(len(indices))
        return rows if len(rows) > 1 else rows[0]

    def _let_go(self, num_rows: int) -> None:
        """Give back the pages of mapped files now and then; the kernel keeps them as long as it has room."""
        self._touched += num_rows * sum(max(a.strides[0], FAULT_BYTES) for a in self._mapped)
        if self._touched > MAPPED_BYTES:
            self._touched = 0
            for array in self._mapped:
                if isinstance(array._mmap, mmap.mmap):  # type: ignore[attr-defined]
                    array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


class DatasetSource(_AnyOrder):
    """A map-style Dataset: `__getitems__` where it has one, else a sample at a time; then the collate function."""

    random = True
    reads_ahead = True

    def __init__(self, dataset: Any, collate: Callable[[Sequence[Any]], Any] | None) -> None:
        self._dataset = dataset
        self._collate = collate or default_collate
        self._get_items = getattr(dataset, "__getitems__", None)

    def batch(self, indices: NDArray[np.int64]) -> Any:
        """Fetch and collate."""
        numbers = indices.tolist()
        if self._get_items is not None:
            return self._collate(self._get_items(numbers))
        return self._collate([self._dataset[i] for i in numbers])


class LoaderSource:
    """What is in a DataLoader, in the order of its sampler."""

    def __init__(self, data: LoaderData, collate: Callable[[Sequence[Any]], Any] | None) -> None:
        self._data = data
        self._source = source_of(data.dataset, collate or data.collate)
        self.random = self._source.random
        self.reads_ahead = self._source.reads_ahead

    def prepare(self, num_samples: int, data: DataSpec, seed: int, *, shuffle: bool) -> None:
        """See Source."""
        self._source.prepare(num_samples, data, seed, shuffle=shuffle)

    def order(self, seed: int) -> Callable[[int], Sequence[int]] | None:
        """See Source."""
        return self._data.order(seed) or self._source.order(seed)

    def batch(self, indices: NDArray[np.int64]) -> Any:
        """See Source."""
        return self._source.batch(indices)


def source_of(data: Any, collate: Callable[[Sequence[Any]], Any] | None = None) -> Source:
    """The fastest source for what a user gave."""
    if isinstance(data, LoaderData):
        return LoaderSource(data, collate)
    if isinstance(data, ArrayData):
        return ArraySource(data.arrays)
    if type(data) is TensorDataset and collate is None:
        return ArraySource(data.tensors) if len(data.tensors) > 1 else DatasetSource(data, None)
    if is_stream(data):
        return StreamSource(data, collate)
    return DatasetSource(data, collate)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch (tensors in tuples, lists and dicts) on another device; anything else is passed through."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
