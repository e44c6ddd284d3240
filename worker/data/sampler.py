"""Which samples belong to which micro-batch: a pure function of (seed, epoch, step, micro-batch)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from steepest.change_spec import ChangeSpec
from steepest.spec import DataSpec


class Sampler:
    """Cuts a data set of `num_samples` into steps and micro-batches; remembers the order of one epoch.

    order: by epoch, where the source has an order of its own. changes: samples that are left out, from steps on;
    with half of a micro-batch, all of it is.
    """

    def __init__(
        self,
        num_samples: int,
        data: DataSpec,
        seed: int,
        order: Callable[[int], Sequence[int] | NDArray[np.int64]] | None = None,
        changes: Sequence[ChangeSpec] = (),
    ) -> None:
        self._num_samples = num_samples
        self._data = data
        self._global_batch, self._micro_batch = data.global_batch, data.micro_batch_size
        # The last step of an epoch may be short.
        self.steps_per_epoch = data.steps_per_epoch(num_samples)
        self._seed = seed
        self._own_order = order
        self._skipped = [(c.step, np.array(c.skip_samples, np.int64)) for c in changes if c.skip_samples]
        self._epoch = -1
        self._order: Sequence[int] | NDArray[np.int64] = ()

    def indices(self, step: int, micro_batch: int) -> NDArray[np.int64]:
        """The samples of a micro-batch, possibly none. step: from 0, over all epochs."""
        every = self._all_indices(step, micro_batch)
        left = every
        for since, skipped in self._skipped:
            if step >= since:
                left = left[~np.isin(left, skipped)]
        # A batch normalization can do nothing with one sample, and little with few.
        return left if len(left) == len(every) or 2 * len(left) > len(every) else left[:0]

    def _all_indices(self, step: int, micro_batch: int) -> NDArray[np.int64]:
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self._global_batch
        stop = min(start + self._global_batch, self._num_samples)
        low = min(start + micro_batch * self._micro_batch, stop)
        high = min(low + self._micro_batch, stop)
        if self._own_order is None and not self._data.shuffle:
            return np.arange(low, high)
        if epoch != self._epoch:
            self._order, self._epoch = self._order_of(epoch), epoch
        return np.asarray(self._order[low:high], dtype=np.int64)

    def without(self, samples: Collection[int]) -> Sampler:
        """The same order as if these samples were not there."""
        left_out = np.array(sorted(samples), np.int64)

        def order(epoch: int) -> NDArray[np.int64]:
            every = np.asarray(self._order_of(epoch), dtype=np.int64)
            return every[~np.isin(every, left_out)]

        return Sampler(len(order(0)), self._data, self._seed, order)

    def _order_of(self, epoch: int) -> Sequence[int] | NDArray[np.int64]:
        if self._own_order is not None:
            return self._own_order(epoch)
        return self._permutation(epoch) if self._data.shuffle else np.arange(self._num_samples)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, epoch])))
        return generator.permutation(self._num_samples)

    def evaluation_range(self, chunk: int) -> tuple[int, int]:
        """The half-open range of samples of chunk number `chunk` of an evaluation set of `num_samples`."""
        size = self._data.evaluation_batch
        return min(chunk * size, self._num_samples), min((chunk + 1) * size, self._num_samples)
