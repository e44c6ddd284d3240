"""Gradients of one micro-batch by torch autograd, written where the server reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module

from ps.checkpoint.named_state import pack_buffers, unpack_buffers
from ps.memory.segment import Segment, constant_start
from ps.parameters.description import ModelDescription
from ps.parameters.layout import Layout
from steepest.task import Task
from worker.data.sources import Source, source_of
from worker.gradients.activations import Activations
from worker.gradients.backend import Backend
from worker.gradients.buffers import Buffers
from worker.gradients.caches import Caches
from worker.gradients.engine import Direction, LossError, Measured, Pending, Rehearsed, StateError, measure_metrics
from worker.gradients.held import Held, as_real
from worker.gradients.linear import write_directly
from worker.gradients.losses import LossValue, loss_of
from worker.gradients.modes import Modes
from worker.gradients.products import CurvatureError, slope
from worker.gradients.sink import GradientSink
from worker.task.state import TaskState, roots

MAX_FACTORS = 64
_NOT_REHEARSED = Rehearsed()
_AS_IT_IS = contextlib.nullcontext()

_run_backward = torch.autograd.Variable._execution_engine.run_backward
_version_of = torch.Tensor._version.__get__  # type: ignore[attr-defined]  # a property
_address_of = torch.Tensor.data_ptr


class TorchEngine:
    """A `Task` on one device. The model's parameters become views of the bound flat tensor.

    precision: of the spec. logged: names of what the loss function returns besides, once they are known.
    """

    def __init__(
        self,
        task: Task,
        model: ModelDescription,
        layout: Layout,
        backend: Backend,
        precision: str = "full",
        known: Rehearsed = _NOT_REHEARSED,
    ) -> None:
        device = backend.device
        self._is_on_host = device.type == "cpu"
        self._backend = backend
        self._autocasts = precision == "bf16"
        self.evaluates_with_gradients = known.evaluates_with_gradients
        self.logged = known.logged
        self.train_source: Source = source_of(task.train_data, task.collate)
        self.eval_source: Source | None = None if task.eval_data is None else source_of(task.eval_data, task.collate)
        modules = [root for _, root in roots(task)]
        self.only_torch = _is_torchs_own(task, modules)
        self._task = task
        self._description = model
        self._layout = layout
        state = TaskState.of(task)
        unchanging = {**state.parameters, **state.constants}
        self._constants = [unchanging[c.name] for c in model.constants]
        self._unreached = [(c.name, state.parameters[c.name]) for c in model.constants if c.name in state.parameters]
        aliases = [state.aliases[a.name] for a in model.aliases]
        for root in modules:
            root.to(device)
        self._parameters = [state.parameters[p.name] for p in layout.parameters]
        index = {p.name: i for i, p in enumerate(layout.parameters)}
        self._aliases = [(index[alias.description.of], alias) for alias in aliases]
        self._initial = [as_real(p.detach().cpu().clone()) for p in self._parameters]
        self._held = Held([p.dtype for p in self._parameters])
        self._buffers = Buffers({b.name: state.place(task, b.name) for b in model.buffers})
        self.activations: Activations | None = Activations(roots(task))
        self._modes = Modes(modules)
        self._is_frozen = False
        self.scale = 1.0  # of what backward begins from; gradients are as many times as large
        self._caches = Caches(roots(task), known.caches)
        self._flat = torch.empty(0)
        self._on_device = torch.empty(0)
        self._sink = GradientSink(self._parameters, self._aliases, together=not self._is_on_host)
        if device.type == "cpu":
            write_directly(task.model, self._sink.place)
        self.count(known.counts)
        self._watched: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._factors: dict[tuple[float, torch.dtype, torch.Size], torch.Tensor] = {}

    def count(self, counts: str) -> None:
        """Take the loss for a mean over something else; see losses.loss_of."""
        self._loss_of = loss_of(self._task, counts)

    def write_initial(self, flat: torch.Tensor) -> None:
        """See Engine."""
        for view, value in zip(self._layout.views(flat), self._initial, strict=True):
            view.copy_(value)

    def bind(self, flat: torch.Tensor) -> None:
        """See Engine."""
        self._flat = flat
        self._initial = []  # from here on the servers have them
        self._on_device = self._backend.parameters(flat)
        views = self._held.over(self._layout.views(self._on_device))
        for parameter, view in zip(self._parameters, views, strict=True):
            parameter.data = view
        for index, alias in self._aliases:
            view = alias.over(views[index])
            if alias.place is None:
                alias.tensor.data = view
            else:
                alias.place.bind(view)
        self._watched = [*self._parameters, *(a.tensor for _, a in self._aliases if a.place is None), *self._constants]
        self._versions, self._addresses = self._marks()

    def refresh(self) -> None:
        """See Engine."""
        self._backend.refresh(self._on_device, self._flat)
        self._held.refresh()

    def gradient(
        self, batch: Any, num_samples: int, into: list[torch.Tensor], *, add: bool, direction: Direction | None = None
    ) -> Measured:
        """See Engine. Raises LossError, StateError, InPartsError, and CurvatureError for a direction."""
        if direction is None:
            return self._gradient(batch, num_samples, into, add, None)
        with torch.enable_grad(), plain_kernels():
            return self._gradient(batch, num_samples, into, add, direction)

    def _gradient(
        self, batch: Any, num_samples: int, into: list[torch.Tensor], add: bool, direction: Direction | None
    ) -> Measured:
        self._start(training=True)
        self._sink.begin(into, add=add)
        found = self._loss(self._backend.batch(batch), num_samples, batch)
        value, factor = found.value, found.factor
        if found.weight == 0 and (factor == 0 or not bool(torch.isfinite(value))):  # the mean of nothing
            self._sink.finish()
            return Measured(0.0, 0.0, (0.0,) * len(self.logged or ()))
        if not value.requires_grad:
            raise LossError("the loss does not depend on any trainable parameter")
        goal = value if direction is None else self._slope(found, direction)
        if goal is not None:
            # Backward of factor * goal, as goal.backward(factor) comes to after 20 us of checks.
            _run_backward(
                (goal,),
                (self._factor(factor * self.scale, goal),),
                False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )
        self._sink.finish()
        self.check_parameters()
        for name, parameter in self._unreached:
            if parameter.grad is not None:
                raise StateError(first_gradient(name))
        if self._is_on_host:
            return Measured(value.item() * factor, found.weight, self._logged(found))
        return Measured(0.0, found.weight, self._logged(found), Pending(value.detach(), factor))

    @contextlib.contextmanager
    def with_parameters(self, values: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """Passes see these in the place of parameters, by index, and of what lies in their memory."""
        named = {self._layout.parameters[index].name: value for index, value in values.items()}
        for index, alias in self._aliases:
            if index in values and alias.tensor.requires_grad:
                named[alias.description.name] = alias.over(values[index])
        with contextlib.ExitStack() as stack:
            for prefix, root in roots(self._task):
                own = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
                there = {name: own[name] for name, _ in root.named_parameters() if name in own}
                stack.enter_context(_reparametrize_module(root, there, tie_weights=True))
            yield

    def _slope(self, found: LossValue, direction: Direction) -> torch.Tensor | None:
        """What has the product for its gradient; None where that is zero."""
        vector = [part.to(self._backend.device) for part in direction.vector]
        tied = [(vector[index], alias) for index, alias in self._aliases if alias.tensor.requires_grad]
        tensors = [*self._parameters, *(alias.tensor for _, alias in tied)]
        vector += [alias.over(part) for part, alias in tied]
        return slope(found, tensors, vector, is_gauss_newton=direction.is_gauss_newton)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable ones, in the layout's order."""
        return self._parameters

    def forward(self, batch: Any, num_samples: int) -> LossValue:
        """The loss of a batch as training computes it, in the present gradient mode. Raises LossError."""
        self._start(training=True)
        return self._loss(self._backend.batch(batch), num_samples, batch)

    def _logged(self, found: LossValue) -> tuple[float, ...]:
        """The sums of what the loss function returned besides."""
        if self.logged is None:
            self.logged = tuple(found.logged)
        if found.logged.keys() != set(self.logged):
            own, known = (", ".join(map(repr, names)) or "none" for names in (found.logged, self.logged))
            raise LossError(f"the loss came with the values {own}; it did with {known} when the job was submitted")
        values = [found.logged[name] for name in self.logged]
        return tuple([(v.item() if isinstance(v, torch.Tensor) else float(v)) * found.weight for v in values])

    @property
    def missed(self) -> list[str]:
        """The parameters without a gradient in the last pass."""
        return [self._layout.parameters[index].name for index in sorted(self._sink.missed)]

    def watch(self, on_final: Callable[[int], None]) -> None:
        """See Engine."""
        self._sink.watch(on_final)

    def evaluate(self, batch: Any, num_samples: int, *, metrics: bool = True) -> Measured:
        """See Engine. Raises LossError, StateError."""
        self._start(training=False)
        host, batch = batch, self._backend.batch(batch)
        # Not inference mode: what a module keeps of it could not be used in training.
        with torch.set_grad_enabled(self.evaluates_with_gradients):
            found = self._loss(batch, num_samples, host)
            values: tuple[float, ...] = ()
            if metrics and self._task.metrics:
                outputs, targets = found.outputs, found.targets
                if outputs is None:
                    inputs, targets = _pair(batch)
                    with self._precision():
                        outputs = self._task.model(inputs)
                values = measure_metrics(self._task.metrics, outputs, targets, num_samples)
        self.check_parameters()
        return Measured(found.value.item() * found.factor, found.weight, values)

    def set_buffers(self, packed: bytes) -> None:
        """See Engine."""
        self._buffers.replace(unpack_buffers(self._description, packed))

    def buffers(self) -> bytes | None:
        """See Engine. Raises StateError for one that has another shape or type than before."""
        changed = self._buffers.changed()
        return None if changed is None else pack_buffers(changed)

    def initial_buffers(self) -> bytes:
        """See Engine."""
        return pack_buffers(self._buffers.starts())

    def constants(self) -> bytes:
        """See Engine."""
        return pack_buffers(constant.detach().cpu() for constant in self._constants)

    def share_constants(self, memory: Segment) -> None:
        """See Engine. One that is not laid out in order stays where it is, as all do on a GPU."""
        places, num_bytes = self._description.constant_places()
        if not num_bytes or not self._is_on_host:
            return
        placed = [(at, c) for at, c in zip(places, self._constants, strict=True) if c.numel() and c.is_contiguous()]

        def tensors(room: memoryview) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for at, constant in placed:
                yield constant, torch.frombuffer(room, dtype=constant.dtype, count=constant.numel(), offset=at)

        def fill(room: memoryview) -> None:
            for constant, place in tensors(room):
                place.copy_(constant.detach().reshape(-1))

        for constant, place in tensors(memory.constant(constant_start(self._layout.nbytes), fill)):
            constant.data = place.view(constant.shape)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Gradients are computed in evaluation mode meanwhile: without dropout, and with constant batch statistics."""
        self._is_frozen = True
        try:
            yield
        finally:
            self._is_frozen = False

    @contextlib.contextmanager
    def differentiable_twice(self) -> Iterator[None]:
        """As `frozen`, in operations that have second derivatives where torch has faster ones that have none.

        Raises CurvatureError for parameters that lie in others, whose part would be missing.
        """
        if any(alias.tensor.requires_grad for _, alias in self._aliases):
            raise CurvatureError("the model has parameters that lie in the memory of others, so no single Hessian")
        with self.frozen(), torch.enable_grad(), plain_kernels():
            yield

    def _start(self, *, training: bool) -> None:
        self._modes.set(training=training and not self._is_frozen)
        self._buffers.start()
        self._caches.restore()

    def _marks(self) -> tuple[list[int], list[int]]:
        """What changes when somebody writes to a parameter, or gives it other memory."""
        return list(map(_version_of, self._watched)), list(map(_address_of, self._watched))

    def check_parameters(self) -> None:
        """Raises StateError when user code wrote to a parameter."""
        if self._marks() == (self._versions, self._addresses):
            return
        named = [p.name for p in self._layout.parameters]
        named += [a.description.name for _, a in self._aliases if a.place is None]
        named += [c.name for c in self._description.constants]
        versions, addresses = self._marks()
        now, before = zip(versions, addresses, strict=True), zip(self._versions, self._addresses, strict=True)
        name = next(name for name, new, old in zip(named, now, before, strict=True) if new != old)
        self._versions, self._addresses = versions, addresses
        raise StateError(written_to(name))

    def _loss(self, batch: Any, num_samples: int, host: Any) -> LossValue:
        with self._precision():
            return self._loss_of(batch, num_samples, host)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """What the forward pass runs in; gradients and parameters keep the model's own type."""
        if not self._autocasts:
            return _AS_IT_IS
        return torch.autocast(self._backend.device.type, torch.bfloat16)

    def _factor(self, factor: float, value: torch.Tensor) -> torch.Tensor:
        """A tensor like the loss with this number in it."""
        key = factor, value.dtype, value.shape
        if key not in self._factors:
            if len(self._factors) > MAX_FACTORS:  # weights that are different every time
                self._factors.clear()
            self._factors[key] = torch.full_like(value, factor, requires_grad=False)
        return self._factors[key]


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention and convolutions are computed by operations that have all derivatives, where torch has faster ones."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def first_gradient(name: str) -> str:
    """What is wrong with a task that uses a parameter it did not use when it was rehearsed."""
    return (
        f"the loss depends on the parameter {name!r}, which it did not when the job was submitted: have every pass use "
        "it (add 0 * parameter.sum() where it is left out), so that it is trained from the start"
    )


def written_to(name: str) -> str:
    """What is wrong with a task whose forward pass writes to the parameter of that name."""
    return (
        f"the forward pass writes to the parameter {name!r}, which only the servers may change (nn.Embedding with "
        "max_norm does so, and code that clamps or normalizes weights in place): compute what you need from the "
        "parameter instead, as by torch.nn.functional.normalize(weight) or weight.clamp(...) where it is used"
    )


def _is_torchs_own(task: Task, roots: list[nn.Module]) -> bool:
    """Whether model and loss are made of torch's own modules, with no code of the user in between."""
    if not isinstance(task.loss, nn.Module) or task.loss_weight is not None:
        return False
    modules = [module for root in roots for module in root.modules()]
    own = all(type(m).__module__.startswith("torch.nn.modules.") and "forward" not in vars(m) for m in modules)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = any(getattr(m, name) for m in modules for name in hooks)
    parameters = [p for m in modules for p in m.parameters(recurse=False)]
    return own and not hooked and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise LossError(f"metrics need batches of pairs (inputs, targets); this one is {type(batch).__name__}")
    return batch[0], batch[1]
