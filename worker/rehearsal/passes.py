"""Passes of a task over a few samples, in this process, with errors that say what raised them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ps.job.config import layout_of
from ps.parameters.description import ModelDescription
from steepest.change_spec import samples_left_out
from steepest.full_batch_spec import DIFFERENCES, is_gauss_newton
from steepest.spec import TrainingJobSpec
from steepest.task import AnalyticTask, Task
from worker.data.sampler import Sampler
from worker.data.sources import Source
from worker.gradients.analytic import AnalyticEngine
from worker.gradients.backend import CpuBackend
from worker.gradients.curvature import measure_curvature
from worker.gradients.engine import Direction, Engine, InPartsError, LossError, Measured, MetricError, StateError
from worker.gradients.products import CurvatureError
from worker.gradients.seeding import COMPUTE, DATA, EVALUATE, seed_all
from worker.gradients.torch_engine import TorchEngine, written_to
from worker.rehearsal.hidden_state import hidden_state
from worker.rehearsal.words import some
from worker.task.load import TaskError, said, user_traceback
from worker.task.state import TaskState


class Passes:
    """A task with its engine on the CPU. Raises TaskError when that cannot be set up.

    seconds, samples: of the last timed pass. fetched: the last batch. code: where the user's modules lie.
    """

    def __init__(
        self,
        task: Task | AnalyticTask,
        spec: TrainingJobSpec,
        model: ModelDescription,
        num_samples: int,
        code: Path | None,
    ) -> None:
        self.task = task
        self.spec = spec
        self.model = model
        self.num_samples = num_samples
        self._code = code
        self._backend = CpuBackend()
        self.layout = layout_of(model, spec)
        self.engine: Engine
        self._known: set[int] = set()
        self.frozen: dict[str, torch.Tensor] = {}
        with blamed("task", "the task could not be set up"):
            if isinstance(task, AnalyticTask):
                self.engine = AnalyticEngine(task, self.layout)
            else:
                state = TaskState.of(task)
                self.frozen.update(state.constants)
                self.engine = TorchEngine(task, model, self.layout, self._backend, spec.precision)
                self._known = {id(place.tensor) for place in state.buffers.values()} | set(state.names())
        self.flat = torch.zeros(self.layout.numel, dtype=self.layout.dtype)
        self.engine.write_initial(self.flat)
        self.engine.bind(self.flat)
        source = self.engine.train_source
        source.prepare(num_samples, spec.data, spec.seed, shuffle=spec.data.shuffle)
        self.every = Sampler(num_samples, spec.data, spec.seed, source.order(spec.seed))  # what the steps are cut from
        left_out = samples_left_out(spec.changes)
        self.sampler = self.every.without(left_out) if left_out else self.every
        self._gradients: dict[str, torch.Tensor] = {}
        self.alter: Callable[[Any, NDArray[np.int64]], Any] = lambda batch, indices: batch  # before a pass
        self.fetched: Any = None
        self.seconds = 0.0
        self.samples = 0

    def gradient(self, name: str) -> torch.Tensor:
        """A place for a gradient, shape (layout.numel,), the same for each name."""
        if name not in self._gradients:
            self._gradients[name] = torch.zeros(self.layout.numel, dtype=self.layout.dtype)
        return self._gradients[name]

    def fetch(self, indices: NDArray[np.int64], source: Source | None = None, seed: int | None = None) -> Any:
        """The batch of some samples of the training data. Raises TaskError."""
        with blamed("task.train_data", f"fetching the samples {some(indices)} of train_data"):
            seed_all(self.spec.seed if seed is None else seed, DATA, 0, 0, backend=self._backend)
            self.fetched = (source or self.engine.train_source).batch(indices)
            return self.fetched

    def compute(
        self,
        indices: NDArray[np.int64],
        into: torch.Tensor | None = None,
        *,
        what: str = "the first micro-batch",
        seed: int | None = None,
        batch: Any = None,
    ) -> Measured:
        """Forward and backward; the gradient of the loss sum goes to `into`. Raises TaskError.

        batch: of these samples, where it has been fetched.
        """
        batch = self.alter(self.fetch(indices) if batch is None else batch, indices)
        views = self.layout.views(self.gradient("any") if into is None else into)
        with blamed("task", f"forward and backward of {what} ({len(indices)} samples)"):
            self.seed(seed)
            try:
                return self.engine.gradient(batch, len(indices), views, add=False)
            except InPartsError:  # once: the engine waits for the rest from then on
                self.seed(seed)
                return self.engine.gradient(batch, len(indices), views, add=False)

    def look_at_curvature(self, indices: NDArray[np.int64]) -> None:
        """As telemetry does in some steps, with fewer products. Raises TaskError."""
        field = "telemetry.curvature_every"
        if not isinstance(self.engine, TorchEngine):
            raise TaskError(field, "curvature needs a task of torch; this is an AnalyticTask: leave it out")
        pairs = [p.name for p in self.model.parameters if p.is_complex]
        if pairs:
            raise TaskError(field, f"curvature needs real parameters, and {pairs[0]} is complex: leave it out")
        batch = self.fetch(indices)
        with blamed(field, f"measuring the curvature of {len(indices)} samples"):
            self.seed()
            try:
                measure_curvature(self.engine, batch, len(indices), self.layout, 0, products=2)
            except CurvatureError as error:
                raise TaskError(field, f"{error}; leave it out") from error

    def multiply(self, indices: NDArray[np.int64]) -> None:
        """As a step of newton_cg with a direction does. Raises TaskError."""
        field = "optimizer.products"
        remedy = f"set {field}={DIFFERENCES}, which takes float64"
        if not isinstance(self.engine, TorchEngine):
            raise TaskError(field, f"an AnalyticTask has no second derivatives: {remedy}")
        pairs = [p.name for p in self.model.parameters if p.is_complex]
        if pairs:
            raise TaskError(field, f"products are of real parameters, and {pairs[0]} is complex: {remedy}")
        batch, views = self.fetch(indices), self.layout.views(self.gradient("any"))
        ones = torch.ones(self.layout.numel, dtype=self.layout.dtype)
        direction = Direction(self.layout.views(ones), is_gauss_newton(self.spec.optimizer))
        with blamed(field, f"a product of second derivatives for {len(indices)} samples"):
            for _ in range(2):  # a gradient that comes in parts is waited for the second time
                self.seed()
                try:
                    with contextlib.suppress(InPartsError):
                        self.engine.gradient(batch, len(indices), views, add=False, direction=direction)
                        return
                except CurvatureError as error:
                    raise TaskError(field, f"{error}; {remedy}") from error

    def seed(self, seed: int | None = None, purpose: int = COMPUTE) -> None:
        """Seed for a pass, always for the same one unless another seed is given."""
        seed_all(self.spec.seed if seed is None else seed, purpose, 0, 0, backend=self._backend)

    def timed(self, indices: NDArray[np.int64]) -> Measured:
        """As `compute`, with a look at the clock, the parameters and the buffers."""
        with self.unwritten():
            began = time.perf_counter()
            measured = self.compute(indices)
            self.seconds, self.samples = time.perf_counter() - began, len(indices)
        with blamed("task.model", "the buffers after the first micro-batch"):
            self.engine.buffers()
        return measured

    @contextmanager
    def unwritten(self) -> Iterator[None]:
        """Raises TaskError when parameters change meanwhile; code that writes through `.data` moves no version."""
        before = self.flat.clone()
        yield
        if torch.equal(before, self.flat):
            return
        views = zip(self.layout.parameters, self.layout.views(before), self.layout.views(self.flat), strict=True)
        name = next((p.name for p, old, new in views if not torch.equal(old, new)), "")
        if name:
            raise TaskError("task.model", written_to(name))

    def evaluate(self, batch: Any, size: int) -> None:
        """Loss and metrics of a batch of the evaluation data. Raises TaskError."""
        with blamed("task", f"evaluating {size} samples of eval_data"):
            self.seed(purpose=EVALUATE)
            self.engine.evaluate(batch, size)

    @property
    def logged(self) -> tuple[str, ...]:
        """What the loss function returns besides."""
        return (self.engine.logged or ()) if isinstance(self.engine, TorchEngine) else ()

    def hidden(self) -> dict[str, str]:
        """See hidden_state."""
        return {} if isinstance(self.task, AnalyticTask) else hidden_state(self.task, self._known, self._code)


@contextmanager
def blamed(field: str, what: str) -> Iterator[None]:
    """Turns what user code raises into a TaskError. field: of the spec; what: was being done."""
    try:
        yield
    except (TaskError, InPartsError):
        raise
    except LossError as error:
        found = "task.metrics" if isinstance(error, MetricError) else "task.loss"
        raise TaskError(found if field == "task" else field, str(error)) from error
    except StateError as error:
        raise TaskError("task.model", str(error)) from error
    except Exception as error:
        raise TaskError(field, f"{what} raised {said(error)}", user_traceback(error)) from error
