"""Data that can only be read from the start: every worker reads all of it, and keeps the samples of its micro-batches.

An epoch is one pass. Shuffling draws from a buffer of the next samples, by a generator of its own, so that the order is
a function of (seed, epoch) alone. A position that was read a while ago is read again from the start of its epoch.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, default_collate

from steepest.spec import DataSpec
from worker.data.loader import DataError
from worker.data.randomness import OwnRandomness, epoch_seed

KEPT_STEPS = 3
READ_AT_ONCE = 32
COUNT_SECONDS = 60.0  # that a stream may take to be read once at submission


def is_stream(data: Any) -> bool:
    """Whether samples can only be had by iterating."""
    if isinstance(data, IterableDataset):
        return True
    return hasattr(data, "__iter__") and not hasattr(data, "__getitem__")


def count(data: Any, most: int | None) -> int:
    """How many samples a stream has; with `most`, no more than so many are read.

    Raises DataError for one that can be read only once, or that does not end in time.
    """
    deadline = time.monotonic() + COUNT_SECONDS
    with OwnRandomness(0).used():
        iterator = iter(data)
        if iterator is data:
            raise DataError(
                f"it is a {type(data).__name__}, which can be read only once; give an object whose __iter__ begins "
                "anew each time, such as a torch IterableDataset"
            )
        length = getattr(data, "__len__", None)
        if length is not None:
            return int(length())
        found = 0
        for _ in iterator:
            found += 1
            if found == most:
                break
            if time.monotonic() > deadline:
                raise DataError(
                    f"it has not ended after {found:,} samples and {COUNT_SECONDS:.0f} s of reading: give the job "
                    "steps instead of epochs, or give the data a __len__"
                )
        return found


class StreamSource:
    """A Source over a stream. `prepare` comes first."""

    random = True  # collating may draw
    reads_ahead = False

    def __init__(self, data: Any, collate: Callable[[Sequence[Any]], Any] | None) -> None:
        self._data = data
        self._collate = collate or default_collate
        self._num_samples = 0
        self._seed = 0
        self._buffer = 1
        self._kept = 0
        self._epoch = -1
        self._position = 0
        self._samples: Iterator[Any] = iter(())
        self._recent: OrderedDict[int, Any] = OrderedDict()  # by global position

    def prepare(self, num_samples: int, data: DataSpec, seed: int, *, shuffle: bool) -> None:
        """See Source."""
        self._num_samples, self._seed = num_samples, seed
        self._buffer = data.shuffle_buffer if shuffle else 1
        self._kept = KEPT_STEPS * max(data.global_batch, data.evaluation_batch)

    def order(self, seed: int) -> Callable[[int], Sequence[int]] | None:
        """See Source: positions count on from epoch to epoch."""
        return lambda epoch: range(epoch * self._num_samples, (epoch + 1) * self._num_samples)

    def batch(self, indices: NDArray[np.int64]) -> Any:
        """Read on to these positions, and collate. Raises DataError when the stream ends before them."""
        return self._collate([self._at(index) for index in indices.tolist()])

    def _at(self, index: int) -> Any:
        if index in self._recent:
            return self._recent[index]
        epoch, position = divmod(index, self._num_samples)
        if epoch != self._epoch or position < self._position:
            self._epoch, self._position = epoch, 0
            self._samples = self._read(epoch)
        sample = None
        while self._position <= position:
            try:
                sample = next(self._samples)
            except StopIteration:
                raise DataError(
                    f"the data ended after {self._position} of the {self._num_samples} samples that they had when the "
                    "job was submitted; every pass has to give as many"
                ) from None
            self._recent[epoch * self._num_samples + self._position] = sample
            self._position += 1
            if len(self._recent) > self._kept:
                self._recent.popitem(last=False)
        return sample

    def _read(self, epoch: int) -> Iterator[Any]:
        """The samples of an epoch, shuffled within the buffer."""
        randomness = OwnRandomness(epoch_seed(self._seed, epoch))
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(epoch)
        with randomness.used():
            samples = iter(self._data)

        def plain() -> Iterator[Any]:
            while True:
                piece: list[Any] = []
                error = None
                with randomness.used():  # for several samples, because it takes longer than many a sample
                    try:
                        piece.extend(islice(samples, READ_AT_ONCE))
                    except Exception as raised:
                        error = raised
                yield from piece
                if error is not None:
                    raise error
                if len(piece) < READ_AT_ONCE:
                    return

        if self._buffer == 1:
            return plain()
        return _shuffled(plain(), self._buffer, np.random.Generator(np.random.Philox(epoch_seed(self._seed, epoch))))


def _shuffled(samples: Iterator[Any], size: int, generator: np.random.Generator) -> Iterator[Any]:
    waiting: list[Any] = []
    for sample in samples:
        if len(waiting) < size:
            waiting.append(sample)
            continue
        chosen = int(generator.integers(size))
        yield waiting[chosen]
        waiting[chosen] = sample
    for index in generator.permutation(len(waiting)):
        yield waiting[index]
