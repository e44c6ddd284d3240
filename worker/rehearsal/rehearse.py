"""Goes through what a job will do, on one micro-batch, and refuses what would fail or differ between placements."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ps.parameters.description import ModelDescription
from ps.parameters.layout import build_layout
from steepest.spec import TrainingJobSpec
from steepest.task import AnalyticTask, Task
from worker.data.sampler import Sampler
from worker.data.sources import Source, source_of
from worker.data.streams import is_stream
from worker.gradients.analytic import AnalyticEngine
from worker.gradients.backend import CpuBackend
from worker.gradients.engine import Engine, InPartsError, LossError, Measured, StateError
from worker.gradients.losses import loss_of
from worker.gradients.seeding import COMPUTE, DATA, EVALUATE, seed_all
from worker.gradients.torch_engine import TorchEngine, written_to
from worker.rehearsal.hidden_state import differences, hidden_state
from worker.task.load import TaskError, said, user_traceback
from worker.task.model import Conduct
from worker.task.state import TaskState, roots

FEW_SAMPLES = 2
SLOW_SECONDS = 2.0  # a micro-batch that takes longer is rehearsed with a few samples
QUICK_SECONDS = 0.2  # a micro-batch that takes less is compared over whole steps, several times
COMPARED_STEPS = 3
OTHER_PASSES = 4  # before a parameter without a gradient counts as not reached
EXPENSIVE = 1.5
NOTICEABLE_SECONDS = 0.003
TOLERANCE = {"full": 2e-3, "bf16": 5e-2}  # of sums in another order, relative


class OtherConductError(Exception):
    """Tensors behave in another way than the description says. conduct: how; describe the task again with it."""

    def __init__(self, conduct: Conduct) -> None:
        self.conduct = conduct
        super().__init__(str(conduct))


@dataclass
class Rehearsal:
    """What was found out, some of it in words.

    seconds: of a micro-batch of `samples` samples, by one thread. price: how many times as long the micro-batches of a
    step take, one after another, as all its samples at once; 0 when that was not measured.
    """

    evaluates_with_gradients: bool = False
    caches: list[str] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    batch: str = ""
    weight: str = ""
    seconds: float = 0.0
    samples: int = 0
    model: str = ""
    loss: str = ""
    price: float = 0.0


class _Pass(NamedTuple):
    """The loss sum, weight and gradient of a batch. gradient: shape (layout.numel,)."""

    measured: Measured
    gradient: torch.Tensor


def rehearse(
    task: Task | AnalyticTask,
    spec: TrainingJobSpec,
    model: ModelDescription,
    num_samples: int,
    num_evaluation_samples: int,
    code: Path | None,
) -> Rehearsal:
    """Rehearse a job. num_samples, num_evaluation_samples: sizes of the data. code: where the user's modules lie.

    The task is not to be used after that. Raises TaskError for what would fail later, or differ between placements, and
    OtherConductError.
    """
    return _Rehearsing(task, spec, model, num_samples, num_evaluation_samples, code).run()


class _Rehearsing:
    def __init__(
        self,
        task: Task | AnalyticTask,
        spec: TrainingJobSpec,
        model: ModelDescription,
        num_samples: int,
        num_evaluation_samples: int,
        code: Path | None,
    ) -> None:
        self._task = task
        self._spec = spec
        self._model = model
        self._code = code
        self._num_samples = num_samples
        self._num_evaluation_samples = num_evaluation_samples
        data = getattr(task.train_data, "dataset", task.train_data)
        self._is_stream = is_stream(data)
        self._backend = CpuBackend()
        layout = build_layout(model, decay_biases_and_norms=spec.optimizer.decay_biases_and_norms)
        self._layout = layout
        self._engine: Engine
        self._known: set[int] = set()
        self._frozen: dict[str, torch.Tensor] = {}
        if isinstance(task, AnalyticTask):
            self._engine = AnalyticEngine(task, layout)
        else:
            with _blamed("task", "the task could not be set up"):
                state = TaskState.of(task)
                self._frozen.update(state.constants)
                self._engine = TorchEngine(task, model, layout, self._backend, spec.precision)
                self._known = {id(place.tensor) for place in state.buffers.values()}
                self._known |= set(state.names())
        self._flat = torch.zeros(layout.numel, dtype=layout.dtype)
        self._engine.write_initial(self._flat)
        self._engine.bind(self._flat)
        source = self._engine.train_source
        source.prepare(num_samples, spec.data, spec.seed, shuffle=spec.data.shuffle)
        self._sampler = Sampler(num_samples, spec.data, spec.seed, source.order(spec.seed))
        self._found = Rehearsal()
        self._fetched: Any = None  # the last batch

    def run(self) -> Rehearsal:
        """Go through all steps."""
        fresh = self._hidden()
        whole = self._sampler.indices(0, 0)
        few = whole[:FEW_SAMPLES]
        self._check_data(few)
        try:
            self._watch_first_pass(few)
        except TaskError:
            if len(whole) == len(few):
                raise
            few = whole  # a state of a fixed size may need all of it
            self._watch_first_pass(few)
        indices = few
        self._timed(few)
        if self._found.seconds * len(whole) / max(len(few), 1) <= SLOW_SECONDS and len(whole) > len(few):
            indices = whole
            self._timed(whole)
        self._check_repeats(indices)
        self._check_last_step()
        self._check_parts()
        self._check_evaluation()
        self._describe()
        # What passes left behind is a cache, or `_check_repeats` had refused it.
        self._found.caches = [name for name in differences(fresh, self._hidden()) if ": " not in name]
        return self._found

    def _describe(self) -> None:
        task, found, data = self._task, self._found, self._spec.data
        if isinstance(task, Task):
            found.model = type(task.model).__name__
            if task.loss is not None:
                found.loss = f"loss: {_name_of(task.loss)}"
            else:
                found.loss = (
                    "the model's own" if task.batch_loss is None else f"batch_loss: {_name_of(task.batch_loss)}"
                )
        else:
            found.model, found.loss = "AnalyticTask", f"gradient: {_name_of(task.gradient)}"
        still = [c.name for c in self._model.constants if isinstance(task, Task) and c.name in _trainable(task)]
        if still:
            some = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
            found.warnings.append(("unreached_parameters", f"the loss does not depend on {some}: not trained"))
        workers = self._spec.placement.workers
        if workers > data.num_micro_batches:
            problem = (
                f"a step has {data.num_micro_batches} micro-batches for {workers} workers, so some have nothing to do: "
                f"set placement.max_workers = {workers} (or a smaller data.micro_batch)"
            )
            found.warnings.append(("idle_workers", problem))
        if found.price > EXPENSIVE and found.seconds > NOTICEABLE_SECONDS and workers < data.num_micro_batches:
            problem = (
                f"the {data.num_micro_batches} micro-batches of a step take {found.price:.1f} times as long, one after "
                f"another, as its {data.global_batch} samples at once: with {workers} workers, micro-batches of more "
                f"than {data.micro_batch_size} samples are faster (data.micro_batch)"
            )
            found.warnings.append(("small_micro_batch", problem))

    def _hidden(self) -> dict[str, str]:
        task = self._task
        return {} if isinstance(task, AnalyticTask) else hidden_state(task, self._known, self._code)

    # -- passes -----------------------------------------------------------------------------------------------------

    def _fetch(self, indices: NDArray[np.int64], source: Source | None = None) -> Any:
        with _blamed("task.train_data", f"fetching the samples {_some(indices)} of train_data"):
            seed_all(self._spec.seed, DATA, 0, 0, backend=self._backend)
            self._fetched = (source or self._engine.train_source).batch(indices)
            return self._fetched

    def _pass(self, indices: NDArray[np.int64], what: str = "the first micro-batch", seed: int | None = None) -> _Pass:
        batch = self._fetch(indices)
        gradient = torch.zeros(self._layout.numel, dtype=self._layout.dtype)
        views = self._layout.views(gradient)
        with _blamed("task", f"forward and backward of {what} ({len(indices)} samples)"):
            for _ in range(2):
                seed_all(self._spec.seed if seed is None else seed, COMPUTE, 0, 0, backend=self._backend)
                try:
                    measured = self._engine.gradient(batch, len(indices), views, add=False)
                    break
                except InPartsError:  # once: the engine waits for the rest from then on
                    continue
        return _Pass(measured, gradient)

    def _timed(self, indices: NDArray[np.int64]) -> None:
        before = self._flat.clone()
        began = time.perf_counter()
        found = self._pass(indices)
        self._found.seconds, self._found.samples = time.perf_counter() - began, len(indices)
        self._found.batch = _shape_of(self._fetched)
        self._found.weight = f"{found.measured.weight:g} for {len(indices)} samples"
        self._check_unwritten(before)
        with _blamed("task.model", "the buffers after the first micro-batch"):
            self._engine.buffers()

    def _check_unwritten(self, before: torch.Tensor) -> None:
        """Code that writes through `.data` moves no version."""
        if torch.equal(before, self._flat):
            return
        views = zip(self._layout.parameters, self._layout.views(before), self._layout.views(self._flat), strict=True)
        name = next((p.name for p, old, new in views if not torch.equal(old, new)), "")
        if name:
            raise TaskError("task.model", written_to(name))

    def _watch_first_pass(self, indices: NDArray[np.int64]) -> None:
        """Raises OtherConductError for frozen parameters that move, and for parameters that the loss does not reach."""
        task, engine = self._task, self._engine
        if not isinstance(task, Task) or not isinstance(engine, TorchEngine):
            return
        names = _trainable(task)
        before = {name: tensor.detach().clone() for name, tensor in self._frozen.items()}
        flat = self._flat.clone()
        try:
            self._pass(indices)
        except TaskError:
            if not self._moved(before):
                raise
        self._check_unwritten(flat)
        unreached = set(engine.missed)
        for other in range(1, OTHER_PASSES):
            if not unreached:
                break
            chosen = self._sampler.indices(other % self._sampler.steps_per_epoch, 0)[: len(indices)]
            self._pass(chosen, seed=self._spec.seed + other)
            unreached &= set(engine.missed)
        moved = self._moved(before)
        if moved or (unreached and unreached != {p.name for p in self._layout.parameters}):
            raise OtherConductError(Conduct(frozenset(moved), frozenset(unreached)))
        if (new := _trainable(task)) != names:
            name = min(new ^ names)
            raise TaskError(
                "task.model",
                f"the first pass changed which parameters there are or which are trained ({name!r}); create them in "
                "__init__, and freeze before the job starts",
            )

    def _moved(self, before: Mapping[str, torch.Tensor]) -> list[str]:
        assert isinstance(self._task, Task)  # noqa: S101  # only a Task has frozen parameters
        now = {**dict(self._task.model.named_parameters()), **_of_loss(self._task)}
        known = {b.name for b in self._model.buffers}
        return [n for n, tensor in before.items() if n not in known and not torch.equal(now[n].detach(), tensor)]

    # -- checks -----------------------------------------------------------------------------------------------------

    def _check_data(self, indices: NDArray[np.int64]) -> None:
        """A sample is the same whenever it is fetched with the same seeds."""
        first = self._fetch(indices)
        if isinstance(self._task, Task):  # a stream keeps what it has read
            again = source_of(self._task.train_data, self._task.collate)
            again.prepare(self._num_samples, self._spec.data, self._spec.seed, shuffle=self._spec.data.shuffle)
            second = self._fetch(indices, again)
        else:
            second = self._fetch(indices)
        if not _same(first, second):
            raise TaskError(
                "task.train_data",
                f"train_data gave other values for the samples {_some(indices)} when they were fetched a second time "
                "with the same seeds, so it draws from a generator of its own: have it draw from torch's, NumPy's or "
                "Python's global generator, which are seeded for every micro-batch",
            )

    def _check_repeats(self, indices: NDArray[np.int64]) -> None:
        """The same micro-batch gives the same gradient, and leaves nothing behind."""
        states: list[dict[str, str]] = []
        passes = []
        for _ in range(2):
            passes.append(self._pass(indices))
            states.append(self._hidden())
        differing = differences(*states)
        if differing:
            raise TaskError(
                "task",
                f"{differing[0].lstrip('.')} has another value after every pass, and each worker would count for "
                "itself: make it a buffer of the module (register_buffer), which all workers share, or leave it out",
            )
        one, two = passes
        if not torch.equal(one.gradient, two.gradient) and not bool(torch.isnan(one.gradient).any()):
            raise TaskError(
                "task",
                "the same micro-batch gave two different gradients with the same seeds, so model or loss draw from a "
                "generator of their own or keep a state: draw from torch's global generator, and keep state in buffers",
            )

    def _check_last_step(self) -> None:
        """The last micro-batch of an epoch may be short."""
        spec, last = self._spec, self._sampler.steps_per_epoch - 1
        if spec.total_steps(self._num_samples) <= last:
            return
        sizes = [len(self._sampler.indices(last, index)) for index in range(spec.data.num_micro_batches)]
        short = min((size for size in sizes if size), default=0)
        if not short or short == self._found.samples or short >= spec.data.micro_batch_size:
            return
        try:
            self._pass(self._sampler.indices(0, 0)[:short], "the last micro-batch of an epoch")
        except TaskError as error:
            raise TaskError(
                "data.global_batch",
                f"the last step of every epoch ends with a micro-batch of {short} of the {self._num_samples} samples, "
                f"and that fails: {error.message}; set data.drop_last = true, or another global_batch or micro_batch",
                error.traceback,
            ) from error

    def _check_parts(self) -> None:
        """A step in several micro-batches gives what it gives in one, so the mean is over what the weight says."""
        data = self._spec.data
        if (
            data.num_micro_batches == 1
            or self._num_samples <= data.micro_batch_size
            or isinstance(self._task, AnalyticTask)
        ):
            return
        engine = self._engine
        assert isinstance(engine, TorchEngine)  # noqa: S101  # of a Task
        quick = self._found.seconds < QUICK_SECONDS
        if self._found.samples * 2 > self._num_samples and self._num_samples < 2:
            return
        with engine.frozen():
            for parts in self._steps_in_parts(quick):
                problem = self._compare(parts)
                if problem is not None:
                    if self._is_random(parts[0]):
                        self._found.warnings.append(("random_loss", _RANDOM))
                        return
                    if self._couples(parts) and self._adds_up(parts):
                        self._found.warnings.append(("coupled_samples", _COUPLED))
                        return
                    raise TaskError("task.loss" if self._task_loss() else "task.batch_loss", problem)

    def _task_loss(self) -> bool:
        return isinstance(self._task, Task) and self._task.batch_loss is None

    def _steps_in_parts(self, quick: bool) -> Iterator[list[NDArray[np.int64]]]:
        """The micro-batches of a few steps; then samples from all over the data."""
        data, size = self._spec.data, max(self._found.samples, 1)
        if not quick:
            whole = np.concatenate([self._sampler.indices(0, i) for i in range(data.num_micro_batches)])[: 2 * size]
            if len(whole) > size:
                yield [whole[:size], whole[size:]]
            return
        for step in range(min(COMPARED_STEPS, self._sampler.steps_per_epoch)):
            parts = [self._sampler.indices(step, index) for index in range(data.num_micro_batches)]
            parts = [part for part in parts if len(part)]
            if len(parts) > 1:
                yield parts
        if self._is_stream:
            return
        spread = np.unique(np.linspace(0, self._num_samples - 1, 4 * size).astype(np.int64))
        yield from ([part for part in np.array_split(spread, 4) if len(part)],)

    def _compare(self, parts: Sequence[NDArray[np.int64]]) -> str | None:
        """What is wrong, or None. A batch that the task cannot take as a whole is not compared."""
        began = time.perf_counter()
        apart = [self._pass(part) for part in parts]
        middle = time.perf_counter()
        try:
            together = self._pass(np.concatenate(parts))
        except TaskError:
            self._found.warnings.append(("not_compared", _NOT_COMPARED))
            return None
        if len(parts) == self._spec.data.num_micro_batches:
            price = (middle - began) / (time.perf_counter() - middle)
            self._found.price = min(price, self._found.price or price)
        weight = sum(p.measured.weight for p in apart)
        if weight <= 0 or together.measured.weight <= 0:
            return None
        tolerance = TOLERANCE[self._spec.precision]
        losses = [p.measured.loss for p in apart]
        mean, whole = sum(losses) / weight, together.measured.loss / together.measured.weight
        scale = max(abs(whole), sum(map(abs, losses)) / weight)
        gradient = sum((p.gradient.double() for p in apart), torch.zeros(len(self._flat), dtype=torch.float64)) / weight
        reference = together.gradient.double() / together.measured.weight
        size = max(sum(float(p.gradient.norm()) for p in apart) / weight, float(reference.norm()))
        off = float((gradient - reference).norm())
        if not np.isfinite([mean, whole, off]).all():
            return None  # the job itself says what is not finite
        if abs(mean - whole) <= tolerance * scale + 1e-7 and off <= tolerance * size + 1e-7:
            return None
        return (
            f"the loss is not a mean over the samples: {len(parts)} micro-batches of one step give {mean:.6g} and a "
            f"gradient that is {off / max(size, 1e-30):.1%} off from the {whole:.6g} of all their samples together. "
            "Return (sum, weight) from batch_loss, or give the task loss_weight(batch), what the mean is over: the "
            "number of targets that count, say. A loss that compares the samples of a batch with each other needs the "
            f"step in one piece: micro_batch = {self._spec.data.global_batch}"
        )

    def _is_random(self, indices: NDArray[np.int64]) -> bool:
        """Whether the loss draws numbers even in evaluation mode; then another cut of a step draws others."""
        batch = self._fetch(indices)
        values = []
        for seed in (1, 2):
            seed_all(seed, COMPUTE, 0, 0, backend=self._backend)
            into = self._layout.views(torch.zeros(self._layout.numel, dtype=self._layout.dtype))
            values.append(self._engine.gradient(batch, len(indices), into, add=False).loss)
        return values[0] != values[1]

    def _outputs(self, parts: Sequence[NDArray[np.int64]]) -> list[tuple[Any, Any]]:
        """(outputs, targets) of the model for each batch."""
        assert isinstance(self._task, Task)  # noqa: S101  # only a Task has several micro-batches compared
        found = []
        for part in parts:
            seed_all(self._spec.seed, COMPUTE, 0, 0, backend=self._backend)
            with torch.no_grad():
                *inputs, targets = self._fetch(part)
                found.append((self._task.model(*inputs), targets))
        return found

    def _couples(self, parts: Sequence[NDArray[np.int64]]) -> bool:
        """Whether the model's outputs for a sample depend on the others in its batch, as with batch norm."""
        if not isinstance(self._task, Task) or self._task.loss is None:
            return False
        apart = [outputs for outputs, _ in self._outputs(parts)]
        whole = self._outputs([np.concatenate(parts)])[0][0]
        if not all(isinstance(outputs, torch.Tensor) for outputs in [whole, *apart]):
            return False
        joined = torch.cat(apart)
        tolerance = TOLERANCE[self._spec.precision]
        return joined.shape != whole.shape or not torch.allclose(joined, whole, rtol=tolerance, atol=tolerance)

    def _adds_up(self, parts: Sequence[NDArray[np.int64]]) -> bool:
        """Whether the loss alone, of the outputs that the model gives for micro-batches, is a mean by the weights."""
        assert isinstance(self._task, Task)  # noqa: S101  # `_couples` has seen to it
        weighed = loss_of(replace(self._task, model=_Given()))
        found = self._outputs(parts)
        whole = torch.cat([o for o, _ in found]), torch.cat([t for _, t in found])
        sizes = [len(part) for part in parts]
        with torch.no_grad():
            apart = [weighed(pair, size) for pair, size in zip(found, sizes, strict=True)]
            together = weighed(whole, sum(sizes))
        mean = sum(v.value.item() * v.factor for v in apart) / sum(v.weight for v in apart)
        return math.isclose(
            mean, together.value.item() * together.factor / together.weight, rel_tol=TOLERANCE[self._spec.precision]
        )

    def _check_evaluation(self) -> None:
        source = self._engine.eval_source
        if source is None:
            return
        task = self._task
        with _blamed("task.eval_data", "fetching samples of eval_data"):
            size = min(self._num_evaluation_samples, self._spec.data.evaluation_batch)
            if self._found.seconds * size / max(self._found.samples, 1) > SLOW_SECONDS:
                size = min(size, FEW_SAMPLES)
            source.prepare(self._num_evaluation_samples, self._spec.data, self._spec.seed, shuffle=False)
            seed_all(self._spec.seed, EVALUATE, 0, 0, backend=self._backend)
            batch = source.batch(np.arange(size, dtype=np.int64))
        before = self._flat.clone()
        wanted = task.evaluation_needs_gradients if isinstance(task, Task) else False
        engine = self._engine
        if isinstance(engine, TorchEngine):
            engine.evaluates_with_gradients = bool(wanted)
        try:
            self._evaluate(batch, size)
        except TaskError:
            if wanted is not None or not isinstance(engine, TorchEngine):
                raise
            engine.evaluates_with_gradients = True
            try:
                self._evaluate(batch, size)
            except TaskError:
                engine.evaluates_with_gradients = False
                self._evaluate(batch, size)  # says what is wrong without
        self._found.evaluates_with_gradients = isinstance(engine, TorchEngine) and engine.evaluates_with_gradients
        self._check_unwritten(before)

    def _evaluate(self, batch: Any, size: int) -> None:
        with _blamed("task", f"evaluating {size} samples of eval_data"):
            seed_all(self._spec.seed, EVALUATE, 0, 0, backend=self._backend)
            self._engine.evaluate(batch, size)


_RANDOM = (
    "the loss draws random numbers in evaluation mode, too, so it could not be checked that a step in several "
    "micro-batches gives what it gives in one"
)
_COUPLED = (
    "what the model returns for a sample depends on the other samples of its micro-batch, so a step in several "
    "micro-batches differs from one over the whole batch, as with batch normalization; micro_batch = global_batch "
    "gives what one batch gives"
)
_NOT_COMPARED = (
    "the task cannot take a batch larger than a micro-batch, so it could not be checked that a step in several "
    "micro-batches gives what it gives in one"
)


class _Given(torch.nn.Module):
    """Returns what it is given."""

    def forward(self, outputs: Any) -> Any:
        return outputs


@contextmanager
def _blamed(field: str, what: str) -> Iterator[None]:
    """Turns what user code raises into a TaskError."""
    try:
        yield
    except (TaskError, InPartsError):
        raise
    except LossError as error:
        raise TaskError(field, str(error)) from error
    except StateError as error:
        raise TaskError("task.model", str(error)) from error
    except Exception as error:
        raise TaskError(field, f"{what} raised {said(error)}", user_traceback(error)) from error


def _trainable(task: Task) -> set[str]:
    """The names of the parameters that require gradients."""
    return {n for prefix, root in roots(task) for n, p in root.named_parameters(prefix[:-1]) if p.requires_grad}


def _of_loss(task: Task) -> dict[str, torch.nn.Parameter]:
    return {n: p for prefix, root in roots(task)[1:] for n, p in root.named_parameters(prefix[:-1])}


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _some(indices: NDArray[np.int64]) -> str:
    return ", ".join(map(str, indices[:4].tolist())) + (", ..." if len(indices) > 4 else "")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and _equal_with_nan(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool | int | float | str | bytes | None.__class__):
        return bool(one == other)
    return True  # of a kind that cannot be compared


def _equal_with_nan(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(one, other) or bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def _shape_of(batch: Any) -> str:
    """A batch in words: types and shapes."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key}: {_shape_of(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(_shape_of, batch)) + ")"
    return type(batch).__name__
