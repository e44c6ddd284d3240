"""One round of work as the leader sees it: what is dealt, what came back, and what was decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.numerics.ranges import leaves_of
from ps.step.clipping import Clipping
from ps.step.members import Member
from ps.step.messages import Decision, LeafResult, Outcome, Outlier, Push, Round
from ps.step.record import CompletedStep
from ps.step.signals import NOTHING_MEASURED, StepSignals, UpdateSignals
from steepest.step_spec import ClipSpec

_NOTHING = LeafResult(-1, 0.0, 0.0, 0)


class RoundState:
    """Sets of micro-batches are the bits of an integer. now: when the round begins, in seconds.

    served_seconds: that the servers took for the round before, while workers read ahead.
    """

    def __init__(self, step: int, kind: Round, num_leaves: int, now: float, served_seconds: float = 0.0) -> None:
        self.step = step
        self.kind = kind
        self.began = now
        self.collected = 0.0  # when all pushes were there
        self.reported = 0.0  # when all shards had reported
        self.results = [_NOTHING] * num_leaves
        self.decision: Decision | None = None
        self.loss = self.norm = self.weight = 0.0  # of the mean; set with the decision
        self.buffers: bytes | None = None
        self.constants: bytes | None = None
        self.activations: bytes | None = None
        self.curvature: tuple[float, ...] = ()
        self._everything = (1 << num_leaves) - 1
        self._undealt = self._everything
        self._missing = self._everything
        self._by = [""] * num_leaves
        self._data_seconds: dict[str, float] = {}  # by worker
        self._worker_seconds: dict[str, float] = {}
        self._served_seconds = served_seconds
        self._reports: dict[int, NDArray[np.float64]] = {}
        self._sums: NDArray[np.float64] | None = None
        self._applied: dict[int, float] = {}
        self._gradient_signals: dict[int, NDArray[np.float64]] = {}
        self._update_signals: dict[int, UpdateSignals] = {}

    # -- what is where ------------------------------------------------------------------------------------------------

    def is_answered_by(self, step: int, kind: Round) -> bool:
        """Whether a message of that step and kind belongs to this round."""
        return step == self.step and kind == self.kind

    @property
    def is_decided(self) -> bool:
        """Whether nothing more is awaited from workers."""
        return self.decision is not None

    @property
    def has_undealt(self) -> bool:
        """Whether some micro-batches are not with any worker."""
        return self._undealt != 0

    @property
    def has_all_pushes(self) -> bool:
        """Whether every micro-batch has come back."""
        return self._missing == 0

    def has_all_reports(self, num_servers: int) -> bool:
        """Whether every shard has reduced the round."""
        return len(self._reports) == num_servers

    def is_applied(self, num_servers: int) -> bool:
        """Whether every shard has carried out the decision."""
        return len(self._applied) == num_servers

    # -- dealing ------------------------------------------------------------------------------------------------------

    def take_undealt(self) -> Sequence[int]:
        """Take all undealt micro-batches, for the caller to deal."""
        everything = self._undealt == self._everything
        leaves = range(len(self.results)) if everything else leaves_of(self._undealt)
        self._undealt = 0
        return leaves

    def take_undealt_of(self, leaves: int) -> int:
        """Take those of `leaves` that are undealt, for the caller to deal."""
        taken = self._undealt & leaves
        self._undealt &= ~taken
        return taken

    def lost_with(self, member: Member, num_servers: int) -> int:
        """What may be missing once a worker is gone."""
        is_summed = self.kind in (Round.TRAIN, Round.INITIALIZE)
        if is_summed and not self.has_all_reports(num_servers):
            return member.leaves | member.taken  # a push may have reached some shards only; duplicates are harmless
        return member.leaves

    def give_back(self, leaves: int) -> None:
        """Return micro-batches to be dealt again."""
        self._undealt |= leaves

    # -- answers ------------------------------------------------------------------------------------------------------

    def take_push(self, worker: str, push: Push, now: float) -> tuple[Outcome, int]:
        """A worker's answer: what becomes of it, and the micro-batches in it."""
        delivered = 0
        for result in push.leaves:
            bit = 1 << result.leaf
            delivered |= bit
            if self._missing & bit:
                self.results[result.leaf] = result
                self._by[result.leaf] = worker
        outcome = Outcome.ACCEPTED if delivered & self._missing else Outcome.DUPLICATE
        self._worker_seconds[worker] = self._worker_seconds.get(worker, 0.0) + push.seconds
        if push.data_seconds:
            self._data_seconds[worker] = self._data_seconds.get(worker, 0.0) + push.data_seconds
        self._missing &= ~delivered
        self._undealt &= ~delivered
        if push.buffers is not None and self.buffers is None:
            self.buffers = push.buffers
        if push.activations is not None and self.activations is None:
            self.activations = push.activations
        self.curvature = self.curvature or push.curvature
        if push.constants is not None and self.constants is None:
            self.constants = push.constants
        if self.has_all_pushes and not self.collected:
            self.collected = now
        return outcome, delivered

    def take_report(
        self, server: int, sums: NDArray[np.float64], signals: NDArray[np.float64] | None = None
    ) -> Outcome:
        """A shard's sums of squares of its segments. signals: of its gradient, if they are measured in this step."""
        if server in self._reports:
            return Outcome.DUPLICATE
        self._reports[server] = sums
        if signals is not None:
            self._gradient_signals[server] = signals
        return Outcome.ACCEPTED

    def take_applied(self, server: int, clipped_sum: float, signals: UpdateSignals = NOTHING_MEASURED) -> Outcome:
        """A shard has carried out the decision. signals: what it measured then."""
        if server in self._applied:
            return Outcome.DUPLICATE
        self._applied[server] = clipped_sum
        self._update_signals[server] = signals
        return Outcome.ACCEPTED

    # -- the decision ------------------------------------------------------------------------------------------------

    @property
    def is_finite(self) -> bool:
        """Whether gradient, loss and weight are; known once `decide` has been called."""
        return math.isfinite(self.weight)

    def decide(self, lr: float, clipping: Clipping) -> Decision:
        """Clip and apply, or skip a step that is not finite, weighs nothing, or explodes.

        Also sets loss, norm and weight, which are of the mean gradient.
        """
        total = exact_sum(self.segment_sums().tolist())
        loss, weight = exact_sum([r.loss for r in self.results]), exact_sum([r.weight for r in self.results])
        finite = math.isfinite(total) and math.isfinite(loss) and math.isfinite(weight)
        self.weight = weight if finite else math.nan
        if not finite or weight <= 0.0:
            self.loss = self.norm = self.clipped_norm = math.nan
            return Decision(self.step, self.kind, apply=False, lr=lr)
        self.loss = loss / weight
        self.norm = math.sqrt(total) / weight
        if clipping.explodes(self.norm):
            self.clipped_norm = 0.0
            return Decision(self.step, self.kind, apply=False, divisor=weight, lr=lr, loss=self.loss)
        clip = clipping(self.norm, self.segment_sums(), weight)
        self.clipped_norm = clip.norm
        return Decision(
            self.step, self.kind, True, weight, clip.coefficient, lr, self.loss, coefficients=clip.coefficients
        )

    def completed(
        self, workers: int, now: float, *, clip: ClipSpec, slowest: tuple[int, float] = (-1, 1.0)
    ) -> CompletedStep:
        """What is told of the step, when all shards have applied the decision. slowest: see Members."""
        assert self.decision is not None  # noqa: S101  # a step is complete when it is decided and applied
        return CompletedStep(
            decision=self.decision,
            loss=self.loss,
            norm=self.norm,
            weight=self.weight,
            samples=self.total_samples(),
            workers=workers,
            segment_sums=self.segment_sums(),
            clipped_norm=self.clipped_norm,
            clipped_sum=self._clipped_sum(clip),
            began=self.began,
            collected=self.collected,
            reported=self.reported,
            committed=now,
            logged=self.mean_logged(),
            data_seconds=self._waiting_seconds(),
            worker_seconds=tuple(self._worker_seconds.values()),
            slowest_worker=slowest[0],
            slowest_ratio=slowest[1],
            signals=self._signals(),
            histogram=_joined([self._update_signals[i].histogram for i in sorted(self._update_signals)]),
            activations=self.activations or b"",
            curvature=self.curvature,
            outlier=self._outlier(),
        )

    def _clipped_sum(self, clip: ClipSpec) -> float | None:
        """Squares of the mean gradient after a clip that only the shards know the outcome of."""
        total = math.fsum(self._applied.values())
        if clip.agc is not None:
            return max(0.0, self.norm**2 - total)
        return None if clip.value is None else total

    # -- totals -------------------------------------------------------------------------------------------------------

    def segment_sums(self) -> NDArray[np.float64]:
        """Those of all shards, in the layout's order."""
        if self._sums is None:
            reports = self._reports
            self._sums = reports[0] if len(reports) == 1 else np.concatenate([reports[i] for i in range(len(reports))])
        return self._sums

    def total_samples(self) -> int:
        """How many samples there were."""
        return sum([r.samples for r in self.results])

    def _signals(self) -> StepSignals | None:
        """Those of all shards, in the layout's order; None when they are not measured in this step."""
        changed = _joined([self._update_signals[i].squares for i in sorted(self._update_signals)])
        gradient = self._gradient_signals
        if changed is None or len(gradient) < len(self._reports):
            return None
        leaves = [(r.weight, r.squares) for r in self.results if r.squares]
        return StepSignals(np.concatenate([gradient[i] for i in sorted(gradient)]), changed, leaves)

    def _outlier(self) -> Outlier | None:
        """The micro-batch that is furthest above what is usual."""
        result, worker = max(zip(self.results, self._by, strict=True), key=lambda each: each[0].times_usual)
        if not result.times_usual:
            return None
        return Outlier(result.leaf, worker, result.loss / result.weight, result.times_usual, result.bad_samples)

    def _waiting_seconds(self) -> float:
        """That workers waited for samples: what they read while the servers finished the step before is no waiting."""
        read = max(self._data_seconds.values(), default=0.0)
        return max(0.0, min(read, self.collected - self.began) - self._served_seconds)

    def mean_logged(self) -> tuple[float, ...]:
        """Of a training step: the mean of each value that the loss function returned besides, by weight."""
        count = max(len(r.values) for r in self.results)
        sums = [exact_sum([r.values[k] for r in self.results if r.values]) for k in range(count)]
        return tuple(total / self.weight for total in sums)

    def mean_metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Of an evaluation: each metric's mean over the samples, and the mean loss."""
        samples, weight = self.total_samples(), math.fsum(r.weight for r in self.results)
        metrics = {name: math.fsum(r.values[k] for r in self.results) / samples for k, name in enumerate(names)}
        metrics["loss"] = math.fsum(r.loss for r in self.results) / weight if weight else math.nan
        return metrics

    def find_nonfinite_loss(self) -> tuple[LeafResult, str] | None:
        """The first micro-batch whose loss or weight is not finite, and who computed it."""
        for result, worker in zip(self.results, self._by, strict=True):
            if not (math.isfinite(result.loss) and math.isfinite(result.weight)):
                return result, worker
        return None

    def find_nonfinite_gradient(self) -> tuple[LeafResult, str] | None:
        """Of a diagnosis: the first micro-batch with a gradient that is not finite, and who computed it."""
        for result, worker in zip(self.results, self._by, strict=True):
            if result.nonfinite:
                return result, worker
        return None


def _joined(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """What all shards measured, in the layout's order; None when one did not."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known and len(known) == len(parts) else None


def exact_sum(values: Sequence[float]) -> float:
    """The exact sum, rounded once; not finite when it, or what is added, is not."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond range; inf - inf
        return math.nan
