"""One shard of the parameter server, as a deterministic state machine: collect, reduce, apply.

It knows nothing of workers: it holds nodes of the canonical tree for the round it is in. A node that comes twice or too
late is an outcome, not an error, and never reaches the sum.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from ps.compression.codec import Codec
from ps.memory.gpu import Device
from ps.numerics.average import RunningAverage
from ps.numerics.clip_parameters import Agc, scale_parameters
from ps.numerics.full_batch import FullBatchOptimizer
from ps.numerics.optimizer import ShardOptimizer
from ps.numerics.reduce_cpu import Reducer
from ps.numerics.reduce_gpu import DeviceReducer
from ps.numerics.signals import CpuSignals, DeviceSignals, Signals
from ps.numerics.threads import Threads, split
from ps.numerics.tree import Node, addition_plan
from ps.numerics.whole_optimizer import WholeOptimizer
from ps.parameters.layout import Shard
from ps.step.messages import Decision, Outcome, Round
from ps.step.signals import UpdateSignals, has_histogram, is_measured
from steepest.optimizer_base import OptimizerSpec
from steepest.step_spec import AverageSpec, ClipSpec


class ShardState:
    """The state of one shard.

    parameters: the shard's part of the layout, shape (shard.numel,), written in place: what workers compute with.
    num_leaves: micro-batches of a training step. push: what gradients come in, added up in the order of micro-batches.
    pull: what updates are sent in; the optimizer then has parameters of its own (`master`), and what an update could
    not say stays between the two. device: the GPU to compute on; the optimizer's parameters are there, and `expose`
    brings them to `parameters`. Not together with push or pull. master: memory for them there. signals_every,
    histograms_every: of the spec's telemetry. average: what is kept beside the parameters, if anything is.

    version: of what workers see; it grows with every step and whenever they are shown something else.
    """

    def __init__(
        self,
        shard: Shard,
        parameters: torch.Tensor,
        optimizer: OptimizerSpec,
        *,
        num_leaves: int,
        clip: ClipSpec = ClipSpec(),  # noqa: B008  # immutable
        step: int = 0,
        initialized: bool = False,
        num_threads: int = 1,
        push: Codec | None = None,
        pull: Codec | None = None,
        device: Device | None = None,
        master: torch.Tensor | None = None,
        average: AverageSpec | None = None,
        signals_every: int = 0,
        histograms_every: int = 0,
    ) -> None:
        self.shard = shard
        self.parameters = parameters
        self.master = parameters
        if device is not None:
            device.lock(parameters)
            self.master = torch.empty_like(parameters, device=device.torch_device) if master is None else master
            self.master.copy_(parameters)
        elif pull is not None:
            self.master = parameters.clone()
        self._device = device
        self._is_exposed = True
        self.update: torch.Tensor | None = None  # the payload that makes this version of the last; None: it is whole
        self.optimizer = optimizer_of(optimizer, shard, self.master, on_gpu=device is not None)
        self.step = self.version = step
        self.initialized = initialized
        self._hidden: torch.Tensor | None = None  # the parameters, while workers see the average
        is_averaged = average is not None and average.is_on and bool(shard.numel)
        self.average = RunningAverage(average, self.master, step) if average is not None and is_averaged else None
        self._num_leaves = num_leaves
        self.push_codec, self._pull = push, pull
        self._scratch = torch.empty(0)
        self._clip = clip
        self._signals_every, self._histograms_every = signals_every, histograms_every
        self.gradient_signals: NDArray[np.float64] | None = None  # of the round, once it is reduced
        self.update_signals = UpdateSignals()  # of the last decision
        self._held: dict[Node, torch.Tensor | None] = {}
        self._covered = 0  # a bit for each micro-batch in `_held`
        self._sum: torch.Tensor | None = None
        self._reduced = False
        self.use_threads(num_threads)
        self._planned: dict[Node, bool] = {}
        self._plan: list[tuple[Node, Node]] = []
        self._last: Node | None = None

    def use_threads(self, num_threads: int) -> None:
        """How many cores there are for this shard, before its first round."""
        if self._device is not None:
            self._reducer: Reducer | DeviceReducer = DeviceReducer(self.shard, self._device.torch_device)
            self._signals: Signals = DeviceSignals(self.shard, self._device.torch_device)
            self._agc = None if self._clip.agc is None else Agc(self._clip.agc, self.shard)
            return
        ranges = split(self.shard, num_threads)
        threads = Threads(len(ranges))
        self._reducer = Reducer(self.shard, threads, ranges)
        self._signals = CpuSignals(self.shard, threads, ranges)
        self._agc = None if self._clip.agc is None else Agc(self._clip.agc, self.shard, threads, ranges)
        if not isinstance(self.optimizer, FullBatchOptimizer):
            self.optimizer.use_threads(threads, ranges, num_threads)

    @property
    def _root(self) -> Node:
        return Node(0, self._num_leaves if self.initialized else 1)

    def _is_current(self, step: int, kind: Round) -> bool:
        return step == self.step and kind == (Round.TRAIN if self.initialized else Round.INITIALIZE)

    def accept(self, step: int, kind: Round, nodes: Iterable[tuple[Node, torch.Tensor | None]]) -> Outcome:
        """Hold nodes of the round in progress.

        Each tensor, shape (shard.numel,), may be changed from now on; of a step that is compressed it is a payload.
        """
        if step > self.step:
            return Outcome.AHEAD
        if not self._is_current(step, kind) or self._reduced:
            return Outcome.LATE
        # Nodes of the tree are nested or disjoint, so the sum of a node is held, as it is, in parts, or as a part of
        # another, exactly when each of its micro-batches is.
        fresh = [(node, value) for node, value in nodes if node.leaves & ~self._covered]
        for node, value in fresh:
            self._held[node] = value if value is None else self._here(value)
            self._covered |= node.leaves
        return Outcome.ACCEPTED if fresh else Outcome.DUPLICATE

    def _here(self, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient where it can be added up; from the host's memory it begins to come in."""
        if self._device is None or gradient.device == self.master.device:
            return gradient
        copied = torch.empty_like(gradient, device=self.master.device)
        self._device.copy(copied, gradient)
        return copied

    @property
    def is_complete(self) -> bool:
        """Whether the round's sum can be made, and has not been."""
        return not self._reduced and not self._root.leaves & ~self._covered

    def reduce(self) -> NDArray[np.float64]:
        """Add up the round and return the sum of squares of each segment of the shard."""
        if self.push_codec is not None and self.initialized:
            self._decode(self.push_codec)
        present = {node: self._held[node] is not None for node in sorted(self._held)}
        if present != self._planned:  # steps are alike
            self._plan, self._last = addition_plan(self._root, present)
            self._planned = present
        root = self._last
        if self._device is not None:
            self._device.await_copies()
        values = {node: value for node in present if (value := self._held[node]) is not None}
        sums = self._reducer(self._plan, root, values)
        self._sum = values[root] if root is not None else None
        self._reduced = True
        self.gradient_signals = None
        if self._sum is not None and self._measures:
            self.gradient_signals = self._signals.of_gradient(self._sum)
        return sums

    @property
    def _measures(self) -> bool:
        return self.initialized and is_measured(self.step, self._signals_every)

    def _decode(self, codec: Codec) -> None:
        """Put the sum of the payloads in their place."""
        payloads = [value for _, value in sorted(self._held.items()) if value is not None]
        root = Node(0, self._num_leaves)
        if not payloads:
            self._held = {root: None}
            return
        if not len(self._scratch):
            self._scratch = torch.empty_like(self.parameters)
        self._scratch.zero_()
        for payload in payloads:
            codec.decode(payload, self._scratch, self.shard.start)
        self._held = {root: self._scratch}

    def _encode_update(self, codec: Codec) -> None:
        """Bring the workers' parameters as near to the optimizer's as one payload can."""
        start = self.shard.start
        first, last = codec.span(start, self.shard.stop)
        self.update = torch.empty(last - first, dtype=torch.uint8)  # the last one may still be under way
        rest = torch.sub(self.master, self.parameters, out=self._scratch)
        codec.encode(rest, self.update, codec.initial_state(), start)
        codec.decode(self.update, self.parameters, start)

    def apply(self, decision: Decision) -> float:
        """Carry out the leader's decision and end the round.

        Returns the sum of squares of the gradient after a clip by value, or those that agc took away, else 0.0. Raises
        ValueError for a decision of another round: that is a fault of the leader, and nothing is applied.
        """
        if not self._is_current(decision.step, decision.kind) or not self._reduced:
            raise ValueError(f"shard {self.shard.index} at step {self.step} cannot apply {decision}")
        clipped = 0.0
        if decision.kind == Round.INITIALIZE:
            if self._sum is None:
                raise ValueError("the initial parameters are absent")
            self.parameters.copy_(self._sum)
            if self.master is not self.parameters:
                self.master.copy_(self._sum)
            if self.average is not None:
                self.average.begin()
            self._is_exposed = True
            self.initialized = True
        else:
            self.update = None if self._pull is None else torch.empty(0, dtype=torch.uint8)
            clipped = self._step(self._sum, decision)
            self.step += 1
            self.version += 1
        self._held.clear()
        self._covered = 0
        self._sum = None
        self._reduced = False
        return clipped

    def _step(self, gradient: torch.Tensor | None, decision: Decision) -> float:
        """Make the next version of the parameters; see `apply` for the result."""
        applies = decision.apply and gradient is not None
        before = self.master.clone() if applies and self._measures else None
        histogram = squares = None
        if applies and gradient is not None and has_histogram(self.step, self._histograms_every):
            histogram = self._signals.histogram(gradient, decision.divisor)
        clipped = self._update(gradient, decision) if applies and gradient is not None else 0.0
        moved = False
        if self.average is not None:
            moved = self.average.advance()
        if applies or moved:
            self._is_exposed = False
            if before is not None:
                squares = self._signals.of_update(before, self.master)
            if self._pull is not None:
                self._encode_update(self._pull)
        self.update_signals = UpdateSignals(squares, histogram)
        return clipped

    def _update(self, gradient: torch.Tensor, decision: Decision) -> float:
        """Step the optimizer; see `apply` for the result."""
        lr, divisor = decision.lr, decision.divisor
        if isinstance(self.optimizer, FullBatchOptimizer):
            self.optimizer.step(gradient, lr=lr, divisor=divisor, loss=decision.loss, last=decision.last)
            return 0.0
        clipped = 0.0
        if decision.coefficients:
            scale_parameters(gradient, self.shard, np.frombuffer(decision.coefficients, "<f8"))
        if self._agc is not None:
            clipped = self._agc(gradient, self.master, divisor)
        return clipped + self.optimizer.step(
            gradient, lr=lr, divisor=divisor, coefficient=decision.coefficient, max_value=self._clip.value
        )

    @property
    def direction(self) -> bytes:
        """What the next step is to multiply the matrix of second derivatives with; see Assign."""
        wanted = self.optimizer.direction if isinstance(self.optimizer, FullBatchOptimizer) else None
        return b"" if wanted is None else wanted.cpu().numpy().tobytes()

    @property
    def averaged(self) -> torch.Tensor | None:
        """What evaluates better than the parameters, shape (shard.numel,); None when nothing is averaged."""
        if self.average is not None:
            return self.average.values
        return self.optimizer.averaged() if isinstance(self.optimizer, WholeOptimizer) else None

    def show(self, *, average: bool) -> None:
        """Put the average where workers see the parameters, or these there again, with the bits that they had.

        Between the two nothing may change the parameters. Without an average, they stay where they are.
        """
        if average and self._hidden is not None:
            raise ValueError(f"shard {self.shard.index} shows the average already")
        seen = self.parameters if self.is_lossy else self.master
        if average:
            averaged = self.averaged
            if averaged is not None:
                self._hidden = seen.clone()
                seen.copy_(averaged)
        elif self._hidden is not None:
            seen.copy_(self._hidden)
            self._hidden = None
        self.update = None
        self._is_exposed = False
        self.version += 1

    def expose(self) -> None:
        """Have the present version in `parameters`, for processes that are not on the shard's GPU."""
        if self._device is None or self._is_exposed:
            return
        self._device.copy(self.parameters, self.master)
        self._device.synchronize()
        self._is_exposed = True

    @property
    def is_lossy(self) -> bool:
        """Whether updates are lossy, so that the optimizer's parameters are not those of the workers."""
        return self._pull is not None


def optimizer_of(
    spec: OptimizerSpec, shard: Shard, parameters: torch.Tensor, *, on_gpu: bool
) -> ShardOptimizer | WholeOptimizer | FullBatchOptimizer:
    """The optimizer of a shard; see ShardOptimizer for the arguments."""
    if spec.is_full_batch:
        return FullBatchOptimizer(spec, shard, parameters)
    if spec.is_whole:
        return WholeOptimizer(spec, shard, parameters)
    return ShardOptimizer(spec, shard, parameters, on_gpu=on_gpu)
