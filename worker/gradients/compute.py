"""Answers an assignment: gradients of its micro-batches, added along the canonical tree into the worker's slots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.tree import Node, maximal_nodes
from ps.parameters.layout import Layout
from ps.step.messages import Assign, LeafResult, Push, PushedNode, Ready, Round
from worker.gradients.batches import Batches
from worker.gradients.buckets import Overlap
from worker.gradients.compressor import Compressor
from worker.gradients.curvature import CurvatureSignal
from worker.gradients.engine import Direction, Engine, InPartsError, Pending, finite_parameters
from worker.gradients.guilty import guilty
from worker.gradients.leaf_norms import LeafNorms
from worker.gradients.outliers import MicroBatch, Outliers
from worker.gradients.slots import Slots
from worker.gradients.tree_sum import TreeSum


class MicroBatchError(Exception):
    """User code raised in a micro-batch; the cause is chained."""

    def __init__(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch
        super().__init__(f"micro-batch {micro_batch}")


class _Leaves:
    """The micro-batches of one assignment, and what was measured of them."""

    def __init__(self, engine: Engine, batches: Batches, norms: LeafNorms) -> None:
        self._engine = engine
        self._batches = batches
        self._norms = norms
        self._step = -1
        self._direction: Direction | None = None
        self.results: dict[int, LeafResult] = {}
        self._pending: dict[int, Pending] = {}  # losses that are still on a GPU
        self.buffers: bytes | None = None  # as micro-batch 0 left them
        self.activations: bytes | None = None  # of micro-batch 0, in some steps

    def begin(self, step: int, direction: Direction | None) -> None:
        """Another assignment. direction: of products that are wanted instead of gradients."""
        self._step, self._direction = step, direction
        self.results, self._pending = {}, {}
        self.buffers = self.activations = None

    def has_samples(self, index: int) -> bool:
        """See Leaf."""
        if self._batches.has_samples(self._step, index):
            return True
        self.results[index] = LeafResult(index, 0.0, 0.0, 0, (0.0,) * len(self._engine.logged or ()))
        return False

    def again(self, indices: Sequence[int]) -> None:
        """See Leaf."""
        for index in indices:
            self.results.pop(index, None)
            self._pending.pop(index, None)

    def gradient(self, index: int, into: list[torch.Tensor], *, add: bool) -> None:
        """See Leaf. Raises MicroBatchError too."""
        try:
            batch, num_samples = self._batches.training(self._step, index)
            activations, direction = self._engine.activations, self._direction
            if direction is not None:  # what its pass does to buffers is that of the gradient's pass, once more
                measured = self._engine.gradient(batch, num_samples, into, add=add, direction=direction)
            elif index == 0 and activations is not None and self._norms.wants(self._step, index):
                with activations.observed(self._norms.turn(self._step)):
                    measured = self._engine.gradient(batch, num_samples, into, add=add)
                self.activations = activations.measured()
            else:
                measured = self._engine.gradient(batch, num_samples, into, add=add)
            if index == 0 and direction is None:
                self.buffers = self._engine.buffers()
        except InPartsError:
            raise
        except BaseException as error:
            raise MicroBatchError(index) from error
        if measured.pending is not None:
            self._pending[index] = measured.pending
        self.results[index] = LeafResult(index, measured.loss, measured.weight, num_samples, measured.values)

    def settle(self) -> None:
        """Fetch losses that are still on a GPU. Raises MicroBatchError when what computed them failed there."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        try:
            values = torch.cat([loss.value.reshape(1) for loss in pending.values()]).tolist()
        except BaseException as error:
            raise MicroBatchError(next(iter(pending))) from error
        for (index, loss), value in zip(pending.items(), values, strict=True):
            self.results[index] = self.results[index]._replace(loss=value * loss.factor)

    def alone(self, index: int, slot: int) -> None:
        """See Leaf."""
        if self._direction is None and self._norms.wants(self._step, index):
            self.results[index] = self.results[index]._replace(squares=self._norms.squares(slot))

    def evaluate(self, index: int) -> None:
        """Loss and metrics of a part of the evaluation data. Raises MicroBatchError."""
        try:
            batch, num_samples = self._batches.evaluation(self._step, index)
            measured = self._engine.evaluate(batch, num_samples)
        except BaseException as error:
            raise MicroBatchError(index) from error
        self.results[index] = LeafResult(index, measured.loss, measured.weight, num_samples, measured.values)

    def ordered(self) -> tuple[LeafResult, ...]:
        """The results, by micro-batch. Raises MicroBatchError."""
        self.settle()
        return tuple(self.results[index] for index in sorted(self.results))


class Computer:
    """Does what assignments say. Knows nothing of who asks. num_leaves: micro-batches of a step.

    signals_every: of the spec's telemetry. curvature: None where nobody looks at it. is_gauss_newton: which products an
    assignment with a direction wants.
    """

    def __init__(
        self,
        engine: Engine,
        layout: Layout,
        slots: Slots,
        batches: Batches,
        num_leaves: int,
        compressor: Compressor | None = None,
        *,
        signals_every: int = 0,
        curvature: CurvatureSignal | None = None,
        is_gauss_newton: bool = False,
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._slots = slots
        self._batches = batches
        self._num_leaves = num_leaves
        self._compressor = compressor
        self._curvature = curvature
        self._is_gauss_newton = is_gauss_newton
        self._leaves = _Leaves(engine, batches, LeafNorms(layout, slots, signals_every))
        self._outliers = Outliers(self._mean_loss)
        self._tree = TreeSum(slots, self._leaves)
        self._assign = Assign(-1, Round.TRAIN, ())

    def overlap(self, begin: Callable[[Ready], None] | None = None) -> None:
        """From now on, publish sums while they are completed, if they are large enough for several buckets.

        begin: called with what is ready of a sum; None where publishing itself takes a while.
        """

        def announce(node: Node, slot: int, start: int, stop: int) -> None:
            if begin is not None:
                begin(Ready(self._assign.step, *node, slot, start, stop, self._assign.host_ranges))

        overlap = Overlap(self._layout, self._slots, announce)
        if len(overlap.buckets) > 1:
            self._tree.overlap = overlap
            self._engine.watch(overlap.on_final)

    def answer(self, assign: Assign, initial_buffers: bytes) -> Push:
        """Compute one assignment. Raises MicroBatchError when user code does."""
        began = time.perf_counter()
        if (assign.step, assign.kind) != (self._assign.step, self._assign.kind):
            self._slots.reset()
        self._assign = assign
        if assign.buffers is not None:
            self._engine.set_buffers(assign.buffers)
        leaves = self._leaves
        leaves.begin(assign.step, self._direction_of(assign))
        nodes: list[PushedNode] = []
        constants = None
        match assign.kind:
            case Round.INITIALIZE:
                nodes = self._initial()
                leaves.buffers = initial_buffers
                constants = self._engine.constants()
            case Round.TRAIN if self._compressor is not None:
                nodes = self._compressed(self._compressor, assign)
            case Round.TRAIN:
                nodes = self._sums(assign)
            case Round.EVALUATE:
                for low, high in assign.ranges:
                    for index in range(low, high):
                        leaves.evaluate(index)
            case Round.DIAGNOSE:
                for low, high in assign.ranges:
                    for index in range(low, high):
                        self._diagnose(index)
        results = self._watched(leaves.ordered()) if assign.kind == Round.TRAIN else leaves.ordered()
        seconds = time.perf_counter() - began
        return Push(
            assign.step,
            assign.kind,
            tuple(nodes),
            results,
            leaves.buffers,
            seconds,  # before the look at curvature, which says nothing of the worker's speed
            assign.host_ranges,
            constants,
            self._read_seconds(),
            leaves.activations,
            self._look_at_curvature(assign),
        )

    def _direction_of(self, assign: Assign) -> Direction | None:
        if not assign.direction:
            return None
        flat = torch.frombuffer(bytearray(assign.direction), dtype=self._layout.dtype)
        return Direction(self._layout.views(flat), self._is_gauss_newton)

    def _look_at_curvature(self, assign: Assign) -> tuple[float, ...]:
        """Of micro-batch 0, by the worker that has it, in some steps."""
        if self._curvature is None or assign.kind != Round.TRAIN or not any(low == 0 for low, _ in assign.ranges):
            return ()
        try:
            return self._curvature.look(assign.step) or ()
        except BaseException as error:
            raise MicroBatchError(0) from error

    def _watched(self, results: tuple[LeafResult, ...]) -> tuple[LeafResult, ...]:
        """The results, with what is to be said of outliers among them."""
        watched = []
        for result in results:
            own = result
            if result.weight > 0:
                samples = self._batches.indices(self._assign.step, result.leaf)
                micro_batch = MicroBatch(self._assign.step, result.leaf, samples)
                found = self._outliers.look(micro_batch, result.loss / result.weight)
                if found is not None:
                    own = result._replace(times_usual=found[0], bad_samples=found[1])
            watched.append(own)
        return tuple(watched)

    def _mean_loss(self, micro_batch: MicroBatch) -> float:
        """As in an evaluation."""
        batch = self._batches.some(*micro_batch)
        measured = self._engine.evaluate(batch, len(micro_batch.samples), metrics=False)
        return measured.loss / measured.weight if measured.weight > 0 else 0.0

    def _read_seconds(self) -> float:
        seconds, self._batches.read_seconds = self._batches.read_seconds, 0.0
        return seconds

    def prefetch(self, assign: Assign) -> None:
        """While the servers work: fetch what the same assignment would need in the next step."""
        if assign.kind == Round.TRAIN:
            self._batches.prefetch(assign.step + 1, assign.ranges)
        else:
            self._batches.forget()

    def _initial(self) -> list[PushedNode]:
        slot = self._slots.take()
        self._engine.write_initial(self._slots.shared(slot))
        self._leaves.results[0] = LeafResult(0, 0.0, 0.0, 0)
        return [PushedNode(0, 1, slot)]

    def _sums(self, assign: Assign) -> list[PushedNode]:
        inside = [node for low, high in assign.ranges for node in maximal_nodes(low, high, self._num_leaves)]
        nodes = [PushedNode(node.low, node.high, self._tree.published(node)) for node in inside]
        self._slots.wait()
        return nodes

    def _compressed(self, compressor: Compressor, assign: Assign) -> list[PushedNode]:
        """The parts of an assignment; the payload of each lies with the compressor, under its number."""
        parts = {part: node for low, high in assign.ranges for part, node in compressor.parts(low, high).items()}
        compressor.keep(parts)
        pushed = []
        for part, node in parts.items():
            slot = self._tree.whole(node)
            if slot is not None:
                self._slots.publish(slot)
                self._slots.wait()
                compressor.compress(part, self._slots.shared(slot))
                self._slots.release(slot)
            pushed.append(PushedNode(node.low, node.high, None if slot is None else part))
        return pushed

    def _diagnose(self, index: int) -> None:
        """Compute one micro-batch again; name the first parameter whose gradient is not finite, and the samples."""
        leaves, step = self._leaves, self._assign.step
        slot = self._tree.whole(Node(index, index + 1))
        leaves.buffers = None
        if slot is None:
            return
        views = self._slots.views(slot)
        leaves.settle()
        result = leaves.results[index]
        nonfinite = finite_parameters(views, self._layout)
        bad: tuple[int, ...] = ()
        if nonfinite or not math.isfinite(result.loss):

            def is_finite(samples: NDArray[np.int64]) -> bool:
                batch = self._batches.some(step, index, samples)
                direction = self._direction_of(self._assign)
                measured = self._engine.gradient(batch, len(samples), views, add=False, direction=direction)
                loss = measured.loss if measured.pending is None else measured.pending
                return math.isfinite(loss) and not finite_parameters(views, self._layout)

            bad = guilty(self._batches.indices(step, index), is_finite)
        self._slots.release(slot)
        leaves.results[index] = result._replace(nonfinite=nonfinite, bad_samples=bad)
