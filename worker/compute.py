"""Answers an assignment: gradients of its micro-batches, added along the canonical tree into the worker's slots."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ps.layout import Layout
from ps.messages import Assign, LeafResult, Push, PushedNode, Round
from ps.tree import Node, maximal_nodes
from steepest.spec import TrainingJobSpec
from worker.backend import Backend
from worker.compressor import Compressor
from worker.data import Source
from worker.engine import Engine, as_indices, finite_parameters
from worker.sampler import Sampler
from worker.seeding import COMPUTE, DATA, EVALUATE, seed_all


def num_slots(num_leaves: int) -> int:
    """Slots that suffice for any assignment: a node for each leaf, and one per level while they are added."""
    return num_leaves + max(num_leaves - 1, 0).bit_length() + 1


class Slots:
    """The worker's gradient slots, each a whole layout. Sums grow where the backend computes, and are published then.

    shared: shape (num_slots, layout.numel), where servers read.
    """

    def __init__(self, shared: torch.Tensor, layout: Layout, backend: Backend) -> None:
        self._shared = shared
        self._layout = layout
        self._backend = backend
        self._free: list[int] = []
        self._flats: dict[int, torch.Tensor] = {}
        self._views: dict[int, list[torch.Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """All slots are free again: a new step has begun, so no server reads them any more."""
        self._free = list(range(len(self._shared) - 1, -1, -1))

    def take(self) -> int:
        """A free slot."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give back a slot that no server was told of."""
        self._free.append(slot)

    def flat(self, slot: int) -> torch.Tensor:
        """A slot's sum where it grows, shape (layout.numel,)."""
        if slot not in self._flats:
            self._flats[slot] = self._backend.gradient(self._shared[slot])
        return self._flats[slot]

    def views(self, slot: int) -> list[torch.Tensor]:
        """One tensor per parameter over a slot's sum."""
        if slot not in self._views:
            self._views[slot] = self._layout.views(self.flat(slot))
        return self._views[slot]

    def publish(self, slot: int) -> None:
        """Have a slot on its way to where servers see it."""
        self._backend.publish(self.flat(slot), self._shared[slot])

    def wait(self) -> None:
        """Return when servers see all that was published."""
        self._backend.wait()

    def shared(self, slot: int) -> torch.Tensor:
        """A published slot, shape (layout.numel,)."""
        return self._shared[slot]


class MicroBatchError(Exception):
    """User code raised in a micro-batch; the cause is chained."""

    def __init__(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch
        super().__init__(f"micro-batch {micro_batch}")


class Computer:
    """Does what assignments say. Knows nothing of who asks."""

    def __init__(
        self,
        spec: TrainingJobSpec,
        engine: Engine,
        layout: Layout,
        slots: Slots,
        backend: Backend,
        *,
        num_samples: int,
        num_evaluation_samples: int,
        compressor: Compressor | None = None,
    ) -> None:
        self._spec = spec
        self._compressor = compressor
        self._engine = engine
        self._layout = layout
        self._slots = slots
        self._backend = backend
        self._sampler = Sampler(num_samples, spec.data, spec.seed)
        self._eval_sampler = Sampler(max(num_evaluation_samples, 1), spec.data, spec.seed)
        self._total_steps = spec.total_steps(num_samples)
        self._step, self._kind = -1, Round.TRAIN
        self._fetched: dict[tuple[int, int], tuple[Any, int]] = {}  # batches ahead of time, with their sizes
        self._seeded: tuple[int, int, int] | None = None  # what the random generators are seeded for, and unused since
        self._leaves: list[LeafResult] = []
        self._new_buffers: bytes | None = None

    def answer(self, assign: Assign, initial_buffers: bytes) -> Push:
        """Compute one assignment. Raises MicroBatchError when user code does."""
        began = time.perf_counter()
        if (assign.step, assign.kind) != (self._step, self._kind):
            self._step, self._kind = assign.step, assign.kind
            self._slots.reset()
        if assign.buffers is not None:
            self._engine.set_buffers(assign.buffers)
        self._leaves, self._new_buffers = [], None
        nodes: list[PushedNode] = []
        match assign.kind:
            case Round.INITIALIZE:
                nodes = self._initial()
                self._new_buffers = initial_buffers
            case Round.TRAIN if self._compressor is not None:
                nodes = self._compressed(self._compressor, assign)
            case Round.TRAIN:
                for low, high in assign.ranges:
                    for node in maximal_nodes(low, high, self._spec.data.num_micro_batches):
                        slot = self._sum(node)
                        if slot is not None:
                            self._slots.publish(slot)
                        nodes.append(PushedNode(node.low, node.high, slot))
                self._slots.wait()
            case Round.EVALUATE | Round.DIAGNOSE:
                for low, high in assign.ranges:
                    for index in range(low, high):
                        self._leaves.append(
                            self._evaluate(index) if assign.kind == Round.EVALUATE else self._diagnose(index)
                        )
        seconds = time.perf_counter() - began
        return Push(
            assign.step,
            assign.kind,
            tuple(nodes),
            tuple(self._leaves),
            self._new_buffers,
            seconds,
            assign.host_ranges,
        )

    def prefetch(self, assign: Assign) -> None:
        """While the servers work: fetch what the same assignment would need in the next step."""
        step = assign.step + 1
        self._fetched.clear()
        if assign.kind != Round.TRAIN or step >= self._total_steps:
            return
        try:
            first = -1
            for low, high in assign.ranges:
                for index in range(low, high):
                    indices = self._sampler.indices(step, index)
                    if len(indices):
                        first = index if first < 0 else first
                        batch = self._fetch(self._engine.train_source, indices, step, index)
                        self._fetched[step, index] = batch, len(indices)
            if first >= 0:
                self._seed(COMPUTE, step, first)
        except BaseException:  # it will be raised again, and reported, when the batch is needed
            self._fetched.clear()

    def _initial(self) -> list[PushedNode]:
        slot = self._slots.take()
        self._engine.write_initial(self._slots.shared(slot))
        self._leaves.append(LeafResult(0, 0.0, 0.0, 0))
        return [PushedNode(0, 1, slot)]

    def _compressed(self, compressor: Compressor, assign: Assign) -> list[PushedNode]:
        """The parts of an assignment; the payload of each lies with the compressor, under its number."""
        parts = {part: node for low, high in assign.ranges for part, node in compressor.parts(low, high).items()}
        compressor.keep(parts)
        pushed = []
        for part, node in parts.items():
            slot = self._sum(node)
            if slot is not None:
                self._slots.publish(slot)
                self._slots.wait()
                compressor.compress(part, self._slots.shared(slot))
                self._slots.release(slot)
            pushed.append(PushedNode(node.low, node.high, None if slot is None else part))
        return pushed

    def _sum(self, node: Node) -> int | None:
        """Compute a node of the tree; the slot with its sum, or None when it has no samples."""
        if node.is_leaf:
            return self._leaf(node.low, None)
        left_node, right_node = node.halves()
        left = self._sum(left_node)
        if left is not None and right_node.is_leaf:
            self._leaf(right_node.low, left)
            return left
        right = self._sum(right_node)
        if left is None or right is None:
            return left if right is None else right
        self._slots.flat(left).add_(self._slots.flat(right))
        self._slots.release(right)
        return left

    def _leaf(self, index: int, add_to: int | None) -> int | None:
        fetched = self._fetched.pop((self._step, index), None)
        indices = self._sampler.indices(self._step, index) if fetched is None else None
        if indices is not None and not len(indices):
            self._leaves.append(LeafResult(index, 0.0, 0.0, 0))
            return None
        slot = self._slots.take() if add_to is None else add_to
        self._leaves.append(self._gradient(index, fetched, indices, slot, add=add_to is not None))
        return slot

    def _gradient(
        self, index: int, fetched: tuple[Any, int] | None, indices: NDArray[np.int64] | None, slot: int, *, add: bool
    ) -> LeafResult:
        """One of `fetched` and `indices` is given."""
        try:
            if fetched is None:
                assert indices is not None  # noqa: S101  # as said
                fetched = self._fetch(self._engine.train_source, indices, self._step, index), len(indices)
            batch, num_samples = fetched
            self._seed(COMPUTE, self._step, index)
            self._seeded = None
            measured = self._engine.gradient(batch, num_samples, self._slots.views(slot), add=add)
            if index == 0:
                self._new_buffers = self._engine.buffers()
        except BaseException as error:
            raise MicroBatchError(index) from error
        return LeafResult(index, measured.loss, measured.weight, num_samples)

    def _diagnose(self, index: int) -> LeafResult:
        indices = self._sampler.indices(self._step, index)
        if not len(indices):
            return LeafResult(index, 0.0, 0.0, 0)
        slot = self._slots.take()
        result = self._gradient(index, None, indices, slot, add=False)
        nonfinite = finite_parameters(self._slots.views(slot), self._layout)
        self._slots.release(slot)
        self._new_buffers = None
        return LeafResult(index, result.loss, result.weight, result.samples, nonfinite=nonfinite)

    def _evaluate(self, index: int) -> LeafResult:
        source = self._engine.eval_source
        assert source is not None  # noqa: S101  # only a job with evaluation data has such rounds
        low, high = self._eval_sampler.evaluation_range(index)
        try:
            batch = self._fetch(source, as_indices(low, high), self._step, index, purpose=EVALUATE)
            measured = self._engine.evaluate(batch, high - low)
        except BaseException as error:
            raise MicroBatchError(index) from error
        return LeafResult(index, measured.loss, measured.weight, high - low, measured.values)

    def _fetch(self, source: Source, indices: NDArray[np.int64], step: int, index: int, *, purpose: int = DATA) -> Any:
        if source.random or purpose == EVALUATE:
            self._seed(purpose, step, index)
            self._seeded = None
        return source.batch(indices)

    def _seed(self, purpose: int, step: int, index: int) -> None:
        """Have the random generators seeded for user code that comes next; it uses them up."""
        wanted = purpose, step, index
        if wanted != self._seeded:
            only_torch = purpose == COMPUTE and self._engine.only_torch
            seed_all(self._spec.seed, *wanted, backend=self._backend, only_torch=only_torch)
            self._seeded = wanted
