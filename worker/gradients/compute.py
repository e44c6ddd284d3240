"""Answers an assignment: gradients of its micro-batches, added along the canonical tree into the worker's slots."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ps.numerics.tree import Node, maximal_nodes
from ps.parameters.layout import Layout
from ps.step.messages import Assign, LeafResult, Push, PushedNode, Ready, Round
from steepest.spec import TrainingJobSpec
from worker.data.sampler import Sampler
from worker.data.sources import Source
from worker.gradients.backend import Backend
from worker.gradients.buckets import Overlap
from worker.gradients.compressor import Compressor
from worker.gradients.seeding import COMPUTE, DATA, EVALUATE, seed_all
from worker.gradients.slots import Slots
from worker.gradients.torch_engine import Engine, InPartsError, as_indices, finite_parameters

log = logging.getLogger(__name__)


class _Rest(NamedTuple):
    """What a sum that is published in buckets still lacks. chain: slots to add to, the innermost first."""

    node: Node
    overlap: Overlap
    chain: tuple[int, ...] = ()

    def after(self, slot: int) -> _Rest:
        """As it is for the right half of a node whose left half lies in `slot`."""
        return self._replace(chain=(slot, *self.chain))


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
        self._overlap: Overlap | None = None
        self._host_ranges: tuple[tuple[int, int], ...] = ()

    def overlap(self, begin: Callable[[Ready], None] | None = None) -> None:
        """From now on, publish sums while they are completed, if they are large enough for several buckets.

        begin: called with what is ready of a sum; None where that takes a while to be published.
        """

        def announce(node: Node, slot: int, start: int, stop: int) -> None:
            if begin is not None:
                begin(Ready(self._step, *node, slot, start, stop, self._host_ranges))

        overlap = Overlap(self._layout, self._slots, announce)
        if len(overlap.buckets) > 1:
            self._overlap = overlap
            self._engine.watch(overlap.on_final)

    def answer(self, assign: Assign, initial_buffers: bytes) -> Push:
        """Compute one assignment. Raises MicroBatchError when user code does."""
        began = time.perf_counter()
        if (assign.step, assign.kind) != (self._step, self._kind):
            self._step, self._kind = assign.step, assign.kind
            self._slots.reset()
        if assign.buffers is not None:
            self._engine.set_buffers(assign.buffers)
        self._leaves, self._new_buffers, self._host_ranges = [], None, assign.host_ranges
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
                        nodes.append(PushedNode(node.low, node.high, self._published(node)))
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
            slot = self._whole_sum(node)
            if slot is not None:
                self._slots.publish(slot)
                self._slots.wait()
                compressor.compress(part, self._slots.shared(slot))
                self._slots.release(slot)
            pushed.append(PushedNode(node.low, node.high, None if slot is None else part))
        return pushed

    def _published(self, node: Node) -> int | None:
        """Compute a node and publish it, in buckets if that is on. Returns as `_sum` does."""
        overlap = self._overlap
        # Buckets become final in the pass of the last micro-batch, so there has to be one.
        if overlap is not None and len(self._sampler.indices(self._step, node.high - 1)):
            return self._whole_sum(node, _Rest(node, overlap))
        slot = self._whole_sum(node)
        if slot is not None:
            self._slots.publish(slot)
        return slot

    def _whole_sum(self, node: Node, rest: _Rest | None = None) -> int | None:
        """As `_sum`, and again if a gradient came in parts."""
        num_leaves, free = len(self._leaves), self._slots.free()
        try:
            return self._sum(node, rest)
        except InPartsError:
            log.info("step %d: a gradient came in parts; the sum is made again", self._step)
            del self._leaves[num_leaves:]
            # In another slot if anything was announced of this one.
            self._slots.restore(free, but=None if rest is None else rest.overlap.slot)
            return self._whole_sum(node, rest)

    def _sum(self, node: Node, rest: _Rest | None = None) -> int | None:
        """Compute a node of the tree; the slot with its sum, or None when it has no samples.

        rest: given when the node is the last part of a sum that is published in buckets: its micro-batches end with
        one that has samples, and what it comes to is added to the slots in `rest` on the way.
        """
        if node.is_leaf:
            return self._leaf(node.low, None, rest)
        left_node, right_node = node.halves()
        left = self._sum(left_node)
        if left is not None and right_node.is_leaf:
            self._leaf(right_node.low, left, rest)
            return left
        if rest is not None:
            right = self._sum(right_node, rest if left is None else rest.after(left))
            if left is None or right is None:
                return right
        else:
            right = self._sum(right_node)
            if left is None or right is None:
                return left if right is None else right
            self._slots.flat(left).add_(self._slots.flat(right))
        self._slots.release(right)
        return left

    def _leaf(self, index: int, add_to: int | None, rest: _Rest | None = None) -> int | None:
        fetched = self._fetched.pop((self._step, index), None)
        indices = self._sampler.indices(self._step, index) if fetched is None else None
        if indices is not None and not len(indices):
            self._leaves.append(LeafResult(index, 0.0, 0.0, 0))
            return None
        slot = self._slots.take() if add_to is None else add_to
        if rest is None:
            self._leaves.append(self._gradient(index, fetched, indices, slot, add=add_to is not None))
            return slot
        with rest.overlap.last_pass(rest.node, (slot, *rest.chain)):
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
        except InPartsError:
            raise
        except BaseException as error:
            raise MicroBatchError(index) from error
        return LeafResult(index, measured.loss, measured.weight, num_samples)

    def _diagnose(self, index: int) -> LeafResult:
        indices = self._sampler.indices(self._step, index)
        if not len(indices):
            return LeafResult(index, 0.0, 0.0, 0)
        slot = self._slots.take()
        try:
            result = self._gradient(index, None, indices, slot, add=False)
        except InPartsError:
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
