"""The batches of a worker's micro-batches, fetched ahead where possible, with random generators seeded for each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steepest.spec import TrainingJobSpec
from worker.data.sampler import Sampler
from worker.data.sources import Source
from worker.gradients.backend import Backend
from worker.gradients.engine import Engine
from worker.gradients.readers import Readers
from worker.gradients.seeding import COMPUTE, DATA, EVALUATE, seed_all


class Batches:
    """num_samples, num_evaluation_samples: sizes of the data sets. readers: processes that read ahead, if any."""

    def __init__(
        self,
        spec: TrainingJobSpec,
        engine: Engine,
        backend: Backend,
        num_samples: int,
        num_evaluation_samples: int,
        readers: Readers | None = None,
    ) -> None:
        self._readers = readers
        self._spec = spec
        self._engine = engine
        self._backend = backend
        engine.train_source.prepare(num_samples, spec.data, spec.seed, shuffle=spec.data.shuffle)
        if engine.eval_source is not None:
            engine.eval_source.prepare(num_evaluation_samples, spec.data, spec.seed, shuffle=False)
        order = engine.train_source.order(spec.seed)
        self._sampler = Sampler(num_samples, spec.data, spec.seed, order, spec.changes)
        self._eval_sampler = Sampler(max(num_evaluation_samples, 1), spec.data, spec.seed)
        self._total_steps = spec.total_steps(num_samples)
        self._ahead: dict[tuple[int, int], tuple[Any, int]] = {}  # by step and micro-batch
        self.read_seconds = 0.0  # spent reading training samples, ahead or not, since somebody last set it to 0
        self._seeded: tuple[int, int, int] | None = None  # what the generators are seeded for, and unused since

    def has_samples(self, step: int, index: int) -> bool:
        """Whether a micro-batch has any; the last of an epoch may have none."""
        return (step, index) in self._ahead or bool(len(self._sampler.indices(step, index)))

    def training(self, step: int, index: int) -> tuple[Any, int]:
        """(batch, samples in it) of a micro-batch that has samples; generators are seeded for its computation."""
        found = self._ahead.pop((step, index), None)
        if found is None:
            began = time.perf_counter()
            indices = self._sampler.indices(step, index)
            found = self._read(step, index, indices), len(indices)
            self.read_seconds += time.perf_counter() - began
        self._seed(COMPUTE, step, index)
        self._seeded = None
        return found

    def indices(self, step: int, index: int) -> NDArray[np.int64]:
        """The numbers of a micro-batch's samples."""
        return self._sampler.indices(step, index)

    def some(self, step: int, index: int, indices: NDArray[np.int64]) -> Any:
        """The batch of some samples of a micro-batch, with the micro-batch's seeds."""
        batch = self._fetch(self._engine.train_source, indices, step, index)
        self._seed(COMPUTE, step, index)
        self._seeded = None
        return batch

    def evaluation(self, step: int, index: int) -> tuple[Any, int]:
        """(batch, samples in it) of a part of the evaluation data."""
        source = self._engine.eval_source
        assert source is not None  # noqa: S101  # only a job with evaluation data has such rounds
        low, high = self._eval_sampler.evaluation_range(index)
        self._seed(EVALUATE, step, index)
        self._seeded = None
        return source.batch(np.arange(low, high, dtype=np.int64)), high - low

    def prefetch(self, step: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch these micro-batches of a step that may come; what fails will fail again when it is needed."""
        self._ahead.clear()
        if step >= self._total_steps:
            return
        if self._readers is not None:
            self._read_ahead(self._readers, step, tuple(ranges))
            return
        began = time.perf_counter()
        try:
            first = -1
            for low, high in ranges:
                for index in range(low, high):
                    indices = self._sampler.indices(step, index)
                    if len(indices):
                        first = index if first < 0 else first
                        batch = self._fetch(self._engine.train_source, indices, step, index)
                        self._ahead[step, index] = batch, len(indices)
            if first >= 0:
                self._seed(COMPUTE, step, first)
        except BaseException:
            self._ahead.clear()
        self.read_seconds += time.perf_counter() - began

    def forget(self) -> None:
        """Drop what was fetched ahead."""
        self._ahead.clear()

    def _read(self, step: int, index: int, indices: NDArray[np.int64]) -> Any:
        if self._readers is None:
            return self._fetch(self._engine.train_source, indices, step, index)
        self._readers.ask(step, index, indices)
        return self._readers.take(step, index)

    def _read_ahead(self, readers: Readers, step: int, ranges: Iterable[tuple[int, int]]) -> None:
        readers.forget(step)
        own = [index for low, high in ranges for index in range(low, high)]
        # Enough for every reader to have one in work and one to go on with.
        steps = max(2, math.ceil(2 * readers.number / max(len(own), 1)))
        for ahead in range(step, min(step + steps, self._total_steps)):
            for index in own:
                indices = self._sampler.indices(ahead, index)
                if len(indices):
                    readers.ask(ahead, index, indices)

    def _fetch(self, source: Source, indices: Any, step: int, index: int) -> Any:
        if source.random:
            self._seed(DATA, step, index)
            self._seeded = None
        return source.batch(indices)

    def _seed(self, purpose: int, step: int, index: int) -> None:
        """Have the random generators seeded for user code that comes next; it uses them up."""
        wanted = purpose, step, index
        if wanted != self._seeded:
            only_torch = purpose == COMPUTE and self._engine.only_torch
            seed_all(self._spec.seed, *wanted, backend=self._backend, only_torch=only_torch)
            self._seeded = wanted
