"""A task in float64 at one point of its parameters: losses, gradients and Hessian products over its samples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree

from ps.parameters.description import ModelDescription
from ps.parameters.layout import Layout, build_layout
from steepest.spec import ESTIMATE, REVERSE
from steepest.task import AnalyticTask, Task
from worker.analysis.double import in_double, widened
from worker.analysis.question import Question
from worker.gradients.analytic import AnalyticEngine
from worker.gradients.backend import CpuBackend
from worker.gradients.engine import Direction, InPartsError, LossError, Measured, Rehearsed
from worker.gradients.losses import LossValue
from worker.gradients.products import CurvatureError, outputs_of
from worker.gradients.seeding import COMPUTE, DATA, seed_all
from worker.gradients.slopes import engine_of, slope_of
from worker.gradients.torch_engine import TorchEngine
from worker.task.load import TaskError, initialize, load_task
from worker.task.model import conduct_of, describe_model
from worker.task.state import TaskState

_NEEDS_TORCH = "{} needs a task of torch; this is an AnalyticTask, whose gradient is all that is known"
MAX_JACOBIAN_NUMEL = 250_000_000


class Subject:
    """A task at one point. Raises TaskError when it cannot be had in float64.

    code: where the user's modules lie.

    flat: the parameters, shape (layout.numel,), float64; writing to it moves the point.
    """

    def __init__(self, question: Question, code: Path | None = None) -> None:
        spec = question.spec
        self._question = question
        self._backend = CpuBackend()
        task = load_task(spec.task, code, spec.seed)
        if question.freezes and isinstance(task, AnalyticTask):
            raise TaskError("task", _NEEDS_TORCH.format("curvature"))
        initialize(task, question.weights or spec.init_from, strict=bool(question.weights) or spec.init_strict)
        description = _wide(describe_model(task, conduct_of(question.model, task)))
        task = _in_float64(task)
        self._task = task
        self.layout: Layout = build_layout(description)
        self._engine: AnalyticEngine | TorchEngine
        if isinstance(task, AnalyticTask):
            self._engine = AnalyticEngine(task, self.layout)
        else:
            way = REVERSE if question.freezes or spec.derivative == ESTIMATE else spec.derivative
            known = Rehearsed(question.evaluates_with_gradients, question.caches, counts=question.loss_counts)
            self._engine = engine_of(way)(task, description, self.layout, self._backend, known=known)
        self.flat = torch.zeros(self.layout.numel, dtype=torch.float64)
        self._engine.write_initial(self.flat)
        self._engine.bind(self.flat)
        self._engine.train_source.prepare(question.num_samples, spec.data, spec.seed, shuffle=False)
        self._batches: dict[int, Any] = {}
        size = spec.data.micro_batch_size
        self.leaves = [
            np.arange(low, min(low + size, question.num_samples), dtype=np.int64)
            for low in range(0, question.num_samples, size)
        ]

    def loss(self, leaf: int) -> tuple[float, float]:
        """(loss sum, weight) of a micro-batch."""
        if isinstance(self._engine, AnalyticEngine):
            return self.gradient(leaf, torch.zeros_like(self.flat))
        with torch.set_grad_enabled(self._engine.evaluates_with_gradients):
            found = self._forward(leaf)
        return found.value.item() * found.factor, found.weight

    def gradient(self, leaf: int, into: torch.Tensor) -> tuple[float, float]:
        """(loss sum, weight) of a micro-batch; the gradient of the sum goes to `into`, shape (layout.numel,)."""
        measured = self._pass(leaf, into)
        return measured.loss, measured.weight

    def _pass(self, leaf: int, into: torch.Tensor, direction: Direction | None = None) -> Measured:
        views = self.layout.views(into)
        for _ in range(2):  # a gradient that comes in parts is waited for the second time
            batch = self._batch(leaf)
            with contextlib.suppress(InPartsError), self._modes():
                return self._engine.gradient(batch, len(self.leaves[leaf]), views, add=False, direction=direction)
        raise TaskError("task", "a gradient comes in parts whose number differs from pass to pass")

    def directional(self, leaf: int, direction: torch.Tensor) -> tuple[float, float]:
        """(derivative of the loss sum along a direction, weight), in forward mode. direction: (layout.numel,).

        Raises TaskError for a task without torch, or an operation that has no forward derivative.
        """
        engine = self._torch_engine("forward mode")
        found: list[LossValue] = []

        def loss() -> LossValue:
            found.append(self._forward(leaf))
            return found[-1]

        try:
            slope = slope_of(engine, loss, dict(enumerate(self.layout.views(direction))))
        except LossError as error:
            raise TaskError("task.model", str(error)) from error
        return slope * found[-1].factor, found[-1].weight

    def hessian_product(self, leaf: int, vector: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(Hessian of the loss sum times a vector, weight). vector: shape (layout.numel,).

        Raises TaskError for a task that is not twice differentiable.
        """
        return self._product(leaf, Direction(self.layout.views(vector)))

    def gauss_newton_product(self, leaf: int, vector: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(Gauss-Newton matrix of the loss sum times a vector, weight). vector: shape (layout.numel,).

        See worker.gradients.products. Raises TaskError when the model's outputs are not known, or the loss does not
        depend on them.
        """
        return self._product(leaf, Direction(self.layout.views(vector), is_gauss_newton=True))

    def _product(self, leaf: int, direction: Direction) -> tuple[torch.Tensor, float]:
        self._torch_engine("curvature")
        out = torch.zeros_like(self.flat)
        with _told():
            return out, self._pass(leaf, out, direction).weight

    def _write(self, flat: torch.Tensor, parts: Sequence[torch.Tensor | None]) -> None:
        """Bring what there is for each parameter to its place. flat: shape (layout.numel,), of zeros."""
        for view, part in zip(self.layout.views(flat), parts, strict=True):
            if part is not None:
                view.copy_(part)

    def jacobian(self, num_samples: int) -> NDArray[np.float64]:
        """The derivatives of the outputs for the first samples by all parameters, shape (outputs, layout.numel).

        Raises TaskError when the outputs are not known, or the Jacobian is too large.
        """
        engine = self._torch_engine("a Jacobian")
        raw = engine.train_source.batch(np.arange(num_samples, dtype=np.int64))
        seed_all(self._question.spec.seed, COMPUTE, 0, 0, backend=self._backend)
        with _told(), engine.differentiable_twice(), in_double():
            outputs = outputs_of(engine.forward(_pytree.tree_map(_double, raw), num_samples).outputs)
        flat = torch.cat([output.reshape(-1) for output in outputs])
        if len(flat) * self.layout.numel > MAX_JACOBIAN_NUMEL:
            problem = (
                f"{len(flat)} outputs by {self.layout.numel:,} parameters is beyond {MAX_JACOBIAN_NUMEL:,} numbers"
            )
            raise TaskError("jacobian", f"{problem}; ask for fewer samples")
        rows = torch.zeros(len(flat), self.layout.numel, dtype=torch.float64)
        with in_double():  # what is computed again
            for row, output in zip(rows, flat, strict=True):
                found = torch.autograd.grad(output, engine.parameters, retain_graph=True, allow_unused=True)
                self._write(row, found)
        return rows.numpy()

    def _forward(self, leaf: int) -> LossValue:
        engine = self._torch_engine("this")
        batch = self._batch(leaf)
        with self._modes():
            return engine.forward(batch, len(self.leaves[leaf]))

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(in_double())
            if self._question.freezes and isinstance(self._engine, TorchEngine):
                stack.enter_context(self._engine.frozen())
            yield

    def _batch(self, leaf: int) -> Any:
        """A micro-batch; the random generators are seeded for a pass over it, always alike."""
        seed = self._question.spec.seed
        if leaf not in self._batches:
            seed_all(seed, DATA, 0, leaf, backend=self._backend)
            self._batches[leaf] = _pytree.tree_map(_double, self._engine.train_source.batch(self.leaves[leaf]))
        seed_all(seed, COMPUTE, 0, leaf, backend=self._backend)
        return self._batches[leaf]

    def _torch_engine(self, what: str) -> TorchEngine:
        if not isinstance(self._engine, TorchEngine):
            raise TaskError("task", _NEEDS_TORCH.format(what))
        return self._engine

    def index_of(self, parameter: int, entry: int) -> NDArray[np.int64]:
        """The place of an entry in its parameter, along each axis."""
        return np.array(np.unravel_index(entry, self.layout.parameters[parameter].shape or (1,)), dtype=np.int64)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except CurvatureError as error:
        raise TaskError("task.model", str(error)) from error


def _double(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype({"f": np.float64, "c": np.complex128}.get(value.dtype.kind, value.dtype))
    return widened(value)


def _wide(model: ModelDescription) -> ModelDescription:
    """The same model in float64."""
    parameters = (
        dataclasses.replace(p, dtype="float64", held="complex128" if p.is_complex else "") for p in model.parameters
    )
    return dataclasses.replace(model, parameters=tuple(parameters))


def _in_float64(task: Task | AnalyticTask) -> Task | AnalyticTask:
    """The same task. Tensors over the memory of others stay there."""
    if isinstance(task, AnalyticTask):
        wide = {name: np.asarray(value, np.float64) for name, value in task.parameters.items()}
        return dataclasses.replace(task, parameters=wide)
    state = TaskState.of(task)
    with torch.no_grad():
        for parameter in [*state.parameters.values(), *state.constants.values()]:
            parameter.data = widened(parameter.data)
        for place in state.buffers.values():
            if place.tensor is not None:
                place.bind(widened(place.tensor))
        for alias in state.aliases.values():
            view = alias.over(state.parameters[alias.description.of].data)
            if alias.place is None:
                alias.tensor.data = view
            else:
                alias.place.bind(view)
    return task
