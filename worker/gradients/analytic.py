"""Gradients that the user derived by hand, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ps.memory.segment import Segment
from ps.parameters.layout import Layout
from steepest.task import AnalyticTask
from worker.data.sources import ArraySource, Source
from worker.gradients.activations import Activations
from worker.gradients.engine import Direction, LossError, Measured, measure_metrics


class AnalyticEngine:
    """An `AnalyticTask`; its parameters are NumPy views of the bound flat tensor."""

    only_torch = False
    logged: tuple[str, ...] | None = ()
    activations: Activations | None = None

    def __init__(self, task: AnalyticTask, layout: Layout) -> None:
        self._task = task
        self._layout = layout
        self._parameters: dict[str, NDArray[np.floating[Any]]] = {}
        self._on_final: Callable[[int], None] | None = None
        self.train_source: Source = ArraySource(task.train_data.arrays, as_numpy=True)
        self.eval_source: Source | None = (
            None if task.eval_data is None else ArraySource(task.eval_data.arrays, as_numpy=True)
        )

    def write_initial(self, flat: torch.Tensor) -> None:
        """See Engine."""
        for placed, view in zip(self._layout.parameters, self._layout.views(flat), strict=True):
            view.numpy()[...] = self._task.parameters[placed.name]

    def bind(self, flat: torch.Tensor) -> None:
        """See Engine."""
        views = (v.numpy() for v in self._layout.views(flat))
        self._parameters = {p.name: v for p, v in zip(self._layout.parameters, views, strict=True)}

    def refresh(self) -> None:
        """See Engine."""

    def gradient(
        self, batch: Any, num_samples: int, into: list[torch.Tensor], *, add: bool, direction: Direction | None = None
    ) -> Measured:
        """See Engine. Raises LossError for a gradient that is missing or has another shape, or for a direction."""
        if direction is not None:
            raise LossError("an AnalyticTask has no second derivatives: set optimizer.products=differences")
        loss, weight, gradients = self._task.gradient(self._parameters, batch)
        for placed, target in zip(self._layout.parameters, into, strict=True):
            if placed.name not in gradients:
                raise LossError(f"gradient returned nothing for {placed.name}")
            value = np.asarray(gradients[placed.name])
            if value.shape != placed.shape:
                raise LossError(f"gradient of {placed.name} has shape {value.shape}; the parameter has {placed.shape}")
            target_array = target.numpy()
            if add:
                np.add(target_array, value.astype(target_array.dtype, copy=False), out=target_array)
            else:
                target_array[...] = value
        if self._on_final is not None:
            for index in range(len(into)):
                self._on_final(index)
        return Measured(float(loss), float(weight))

    def watch(self, on_final: Callable[[int], None]) -> None:
        """See Engine: all of a gradient comes at once."""
        self._on_final = on_final

    def evaluate(self, batch: Any, num_samples: int, *, metrics: bool = True) -> Measured:
        """See Engine."""
        loss, weight, _ = self._task.gradient(self._parameters, batch)
        values: tuple[float, ...] = ()
        if metrics and self._task.predict is not None and self._task.metrics:
            inputs, targets = batch
            outputs = self._task.predict(self._parameters, inputs)
            values = measure_metrics(self._task.metrics, outputs, targets, num_samples)
        return Measured(float(loss), float(weight), values)

    def set_buffers(self, packed: bytes) -> None:
        """See Engine: such a task has none."""

    def buffers(self) -> bytes | None:
        """See Engine."""
        return None

    def initial_buffers(self) -> bytes:
        """See Engine."""
        return b""

    def constants(self) -> bytes:
        """See Engine."""
        return b""

    def share_constants(self, memory: Segment) -> None:
        """See Engine."""
