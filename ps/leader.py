"""The leader of a job as a deterministic state machine: same state and message, same new state and effects.

It deals micro-batches, counts what came back, decides once for all shards, and says when a version is complete. Time
comes in as an argument; what is to be done goes out as effects, which `ps.server` carries out. Late, duplicate and
stale messages are named outcomes.

A round moves so:  assign -> collect (pushes from workers, reports from shards) -> decide -> commit (shards applied).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ps.assignment import deal
from ps.clip import clip_coefficient
from ps.messages import Assign, Decision, Failure, LeafResult, Outcome, Push, Round, StepRecord
from ps.schedule import learning_rate
from steepest.spec import ScheduleSpec

SPEED_MEMORY = 0.8  # weight of the past in a worker's measured speed
WARM_UP_PUSHES = 3  # a worker's first answers are slow, and say nothing of its speed
PATIENCE_STEPS = 8  # a worker that got no work is tried again after so many steps, then after twice as many, ...
MAX_PATIENCE_STEPS = 512
STRAGGLER_FACTOR = 4.0  # a range this many times over its expected time is given to an idle worker too
STRAGGLER_SECONDS = 5.0  # but never sooner than this


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job does, as far as the leader needs to know it. evaluation_leaves: 0 without evaluation data."""

    total_steps: int
    num_leaves: int
    num_servers: int
    base_lr: float
    schedule: ScheduleSpec
    max_norm: float | None = None
    max_value: float | None = None
    evaluation_leaves: int = 0
    metric_names: tuple[str, ...] = ()
    eval_every: int = 0
    checkpoint_every: int = 0
    skip_nonfinite: bool = False
    worker_timeout_seconds: float = 300.0


class Phase(StrEnum):
    """What the leader is doing."""

    WAITING = "waiting"  # no worker is there to work
    WORKING = "working"
    PAUSED = "paused"
    SAVING = "saving"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


ENDED = frozenset({Phase.FINISHED, Phase.CANCELLED, Phase.FAILED})


@dataclass(frozen=True, slots=True)
class Send:
    """Give work to a worker."""

    worker: str
    assign: Assign


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Tell a worker to end in good order."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decide:
    """Tell all shards what to do with the round."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step is complete."""

    record: StepRecord


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation is complete."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Save:
    """Write a checkpoint of the present version, then call `saved`."""

    step: int
    updates: int


@dataclass(frozen=True, slots=True)
class PhaseChanged:
    """The phase is another one now."""

    phase: Phase
    reason: str
    worker: str = ""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Hung:
    """A worker has not answered for worker_timeout_seconds: it is to be killed."""

    worker: str


Effect = Send | Dismiss | Decide | Stepped | Evaluated | Save | PhaseChanged | Hung


@dataclass(slots=True)
class _Member:
    """A worker as the leader sees it. in_flight: rounds assigned and not answered. leaves: of the present round."""

    speed: float = 1.0
    pushes: int = 0
    guessed: bool = True  # whether its speed is not known, or known too long ago
    idle_steps: int = 0
    patience_steps: int = PATIENCE_STEPS
    in_flight: int = 0
    leaves: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    since: float = 0.0
    retiring: bool = False
    duplicated: bool = False
    buffers: bytes | None = None  # the newest it was sent


@dataclass(slots=True)
class _Round:
    """The round in progress."""

    kind: Round
    num_leaves: int
    began: float
    pending: set[int]
    results: dict[int, LeafResult] = field(default_factory=dict)
    by: dict[int, str] = field(default_factory=dict)
    reports: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    collected: float = 0.0
    reported: float = 0.0
    decision: Decision | None = None
    norm: float = 0.0
    loss: float = 0.0
    weight: float = 0.0
    applied: dict[int, float] = field(default_factory=dict)
    buffers: bytes | None = None


class Leader:
    """The state of one job's training: step, membership, decisions."""

    def __init__(
        self,
        plan: Plan,
        *,
        step: int = 0,
        updates: int = 0,
        buffers: bytes | None = None,
        initialized: bool = False,
    ) -> None:
        self.plan = plan
        self.step = step
        self.updates = updates  # optimizer updates applied; a skipped step makes none
        self.buffers = buffers
        self.phase = Phase.WAITING
        self.members: dict[str, _Member] = {}
        self._initialized = initialized
        self._round: _Round | None = None
        self._evaluated = -1
        self._saved = step if initialized else -1
        self._pause = False
        self._cancel = False

    # -- messages ---------------------------------------------------------------------------------------------------

    def join(self, worker: str, now: float) -> list[Effect]:
        """A worker is there."""
        if self.phase in ENDED:
            return [Dismiss(worker, "the job has ended")]
        self.members[worker] = _Member()
        if self.phase == Phase.WAITING:
            effects: list[Effect] = [self._enter(Phase.WORKING, f"worker {worker} joined", worker)]
            return effects + (self._next_round(now) if self._round is None else self._deal(now))
        return self._deal(now)

    def leave(self, worker: str, now: float) -> list[Effect]:
        """A worker is gone. What it had not delivered to every shard is dealt to the others, within the round."""
        member = self.members.pop(worker, None)
        if member is None or self.phase in ENDED:
            return []
        current = self._round
        if current is not None and current.decision is None:
            # What another worker has been given too, it has delivered or will deliver to every shard.
            lost = set(member.leaves)
            if current.kind in (Round.TRAIN, Round.INITIALIZE) and len(current.reports) < self.plan.num_servers:
                lost |= member.taken  # a push may have reached some shards and not others; duplicates are harmless
            lost -= {leaf for other in self.members.values() for leaf in other.taken}
            current.pending |= lost
        effects = self._deal(now)
        if not self.members and self.phase == Phase.WORKING and (current is None or current.decision is None):
            effects.append(self._enter(Phase.WAITING, f"worker {worker} left, and there is no other", worker))
        return effects

    def retire(self, worker: str, now: float) -> list[Effect]:
        """A worker is to leave when it has answered what it was given."""
        member = self.members.get(worker)
        if member is None:
            return []
        member.retiring = True
        return self._dismiss_idle_retired(now)

    def push(self, worker: str, push: Push, now: float) -> tuple[Outcome, list[Effect]]:
        """A worker's answer to an assignment."""
        member = self.members.get(worker)
        if member is None:
            return Outcome.LATE, []
        member.in_flight -= 1
        current = self._round
        if current is None or push.step != self.step or push.kind != current.kind or current.decision is not None:
            return Outcome.LATE, self._after_answer(now)
        delivered = {leaf.index for leaf in push.leaves}
        member.leaves -= delivered
        self._measure_speed(member, push)
        outcome = Outcome.ACCEPTED if delivered - current.results.keys() else Outcome.DUPLICATE
        for leaf in push.leaves:
            current.results.setdefault(leaf.index, leaf)
            current.by.setdefault(leaf.index, worker)
        current.pending -= delivered
        if push.buffers is not None and current.buffers is None:
            current.buffers = push.buffers
        if len(current.results) == current.num_leaves and not current.collected:
            current.collected = now
        effects = self._advance(now)
        return outcome, effects or self._after_answer(now)

    def report(
        self, server: int, step: int, kind: Round, sums: NDArray[np.float64], now: float
    ) -> tuple[Outcome, list[Effect]]:
        """A shard has reduced its part of the round and measured it."""
        current = self._round
        if current is None or step != self.step or kind != current.kind:
            return Outcome.LATE, []
        if server in current.reports:
            return Outcome.DUPLICATE, []
        current.reports[server] = sums
        return Outcome.ACCEPTED, self._advance(now)

    def applied(self, server: int, step: int, clipped_sum: float, now: float) -> tuple[Outcome, list[Effect]]:
        """A shard has carried out the decision."""
        current = self._round
        if current is None or step != self.step or current.decision is None:
            return Outcome.LATE, []
        if server in current.applied:
            return Outcome.DUPLICATE, []
        current.applied[server] = clipped_sum
        if len(current.applied) < self.plan.num_servers:
            return Outcome.ACCEPTED, []
        return Outcome.ACCEPTED, self._commit(now)

    def failure(self, worker: str, failure: Failure, now: float) -> tuple[Outcome, list[Effect]]:
        """User code failed on a worker. One of a round that is over read parameters in motion, and means nothing."""
        current = self._round
        member = self.members.get(worker)
        if member is not None:
            member.in_flight -= 1
        if self.phase in ENDED or current is None or failure.step != self.step or failure.kind != current.kind:
            return Outcome.LATE, self._after_answer(now)
        return Outcome.ACCEPTED, self._fail(failure, worker)

    def saved(self, problem: str, now: float) -> list[Effect]:
        """The checkpoint is on disk, or could not be written."""
        if self.phase != Phase.SAVING:
            return []
        self._saved = self.step
        if problem and (self._is_over or self._cancel):
            return self._fail(Failure(self.step, -1, "checkpoint_failed", problem), "")
        self.phase = Phase.WORKING
        return self._next_round(now)

    def pause(self, now: float) -> list[Effect]:
        """Hold at the next step boundary."""
        self._pause = True
        return self._next_round(now) if self._round is None and self.phase == Phase.WAITING else []

    def resume(self, now: float) -> list[Effect]:
        """Go on."""
        self._pause = False
        if self.phase != Phase.PAUSED:
            return []
        return [self._enter(Phase.WORKING, "resumed"), *self._next_round(now)]

    def cancel(self, now: float) -> list[Effect]:
        """End at the next step boundary, with a checkpoint if there is anything to save."""
        self._cancel = True
        if self.phase == Phase.PAUSED or (self.phase == Phase.WAITING and self._round is None):
            self.phase = Phase.WORKING
            return self._next_round(now)
        if self.phase == Phase.WAITING:
            # In the middle of a round that nobody will finish; the last version is whole.
            self._round = None
            self.phase = Phase.WORKING
            return self._next_round(now)
        return []

    def tick(self, now: float) -> list[Effect]:
        """Time passes: find stragglers and workers that hang."""
        if self._round is None or self._round.decision is not None or self.phase in ENDED:
            return []
        effects: list[Effect] = []
        idle = {name: m for name, m in self.members.items() if self._is_idle(m)}
        for name, member in list(self.members.items()):
            if not member.leaves:
                continue
            waited = now - member.since
            if waited > self.plan.worker_timeout_seconds:
                effects.append(Hung(name))
                continue
            expected = math.inf if member.guessed else len(member.leaves) / member.speed
            if idle and not member.duplicated and waited > max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * expected):
                member.duplicated = True
                effects += self._assign(sorted(member.leaves), self._speeds(idle), now)
                idle = {}
        return effects

    # -- rounds -----------------------------------------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        return self.step >= self.plan.total_steps

    def _next_round(self, now: float) -> list[Effect]:
        """At a step boundary: what comes next."""
        retired = self._dismiss_idle_retired(now)
        return retired + self._choose_round(now)

    def _choose_round(self, now: float) -> list[Effect]:
        plan = self.plan
        if not self._initialized:
            if self._cancel:
                return self._end(Phase.CANCELLED, "cancelled before the first step")
            return self._begin(Round.INITIALIZE, 1, now)
        if not self._cancel and plan.evaluation_leaves and self._evaluated < self.step and self._wants_evaluation():
            return self._begin(Round.EVALUATE, plan.evaluation_leaves, now)
        over = self._is_over or self._cancel
        if self._saved < self.step and (
            over or (plan.checkpoint_every and self.step and self.step % plan.checkpoint_every == 0)
        ):
            self.phase = Phase.SAVING
            return [Save(self.step, self.updates)]
        if self._cancel and not self._is_over:
            return self._end(Phase.CANCELLED, f"cancelled at step {self.step}")
        if self._is_over:
            return self._end(Phase.FINISHED, f"all {self.step} steps are done")
        if self._pause:
            return [self._enter(Phase.PAUSED, f"paused at step {self.step}")]
        return self._begin(Round.TRAIN, plan.num_leaves, now)

    def _wants_evaluation(self) -> bool:
        every = self.plan.eval_every
        return self._is_over or bool(every and self.step and self.step % every == 0)

    def _begin(self, kind: Round, num_leaves: int, now: float) -> list[Effect]:
        self._round = _Round(kind, num_leaves, now, set(range(num_leaves)))
        for member in self.members.values():
            member.leaves.clear()
            member.taken.clear()
            member.duplicated = False
        if not self.members:
            return [] if self.phase == Phase.WAITING else [self._enter(Phase.WAITING, "there is no worker")]
        return self._deal(now)

    def _is_idle(self, member: _Member) -> bool:
        return not member.in_flight and not member.retiring

    def _deal(self, now: float) -> list[Effect]:
        """Give what nobody has to those who have nothing."""
        current = self._round
        if current is None or not current.pending or current.decision is not None:
            return []
        idle = {name: m for name, m in self.members.items() if self._is_idle(m)}
        if not idle:
            return []
        leaves = sorted(current.pending)
        current.pending.clear()
        return self._assign(leaves, self._speeds(idle), now)

    def _assign(self, leaves: Sequence[int], speeds: dict[str, float], now: float) -> list[Effect]:
        current = self._round
        assert current is not None  # noqa: S101  # callers are inside a round
        effects: list[Effect] = []
        for worker, parts in deal(leaves, speeds).items():
            member = self.members[worker]
            own = {leaf for low, high in parts for leaf in range(low, high)}
            member.leaves |= own
            member.taken |= own
            member.in_flight += 1
            member.since = now
            buffers = None if member.buffers is self.buffers else self.buffers
            member.buffers = self.buffers
            effects.append(Send(worker, Assign(self.step, current.kind, tuple(parts), buffers)))
        return effects

    def _advance(self, now: float) -> list[Effect]:
        """Move the round on when all that was awaited is there."""
        current = self._round
        if current is None or current.decision is not None or len(current.results) < current.num_leaves:
            return []
        if current.kind == Round.EVALUATE:
            return self._finish_evaluation(now)
        if current.kind == Round.DIAGNOSE:
            return self._finish_diagnosis()
        if len(current.reports) < self.plan.num_servers:
            return []
        current.reported = now
        return self._decide(current, now)

    def _decide(self, current: _Round, now: float) -> list[Effect]:
        if current.kind == Round.INITIALIZE:
            current.decision = Decision(self.step, current.kind, apply=True)
            return [Decide(current.decision)]
        results = [current.results[i] for i in range(current.num_leaves)]
        sums = np.concatenate([current.reports[i] for i in range(self.plan.num_servers)])
        finite = all(math.isfinite(r.loss) and math.isfinite(r.weight) for r in results) and bool(
            np.isfinite(sums).all()
        )
        if not finite and not self.plan.skip_nonfinite:
            return self._blame(results, now)
        lr = learning_rate(self.plan.base_lr, self.plan.schedule, self.updates, self.plan.total_steps)
        current.weight = math.fsum(r.weight for r in results) if finite else math.nan
        if not finite or current.weight <= 0.0:
            current.loss = current.norm = math.nan
            current.decision = Decision(self.step, current.kind, apply=False, lr=lr)
            return [Decide(current.decision)]
        current.loss = math.fsum(r.loss for r in results) / current.weight
        current.norm = math.sqrt(math.fsum(sums)) / current.weight
        coefficient = clip_coefficient(current.norm, self.plan.max_norm)
        current.decision = Decision(self.step, current.kind, True, current.weight, coefficient, lr)
        return [Decide(current.decision)]

    def _commit(self, now: float) -> list[Effect]:
        """All shards have applied: the next version is visible everywhere."""
        current = self._round
        assert current is not None  # noqa: S101  # only `applied` calls this
        assert current.decision is not None  # noqa: S101
        self._round = None
        if current.buffers is not None:
            self.buffers = current.buffers
        if current.kind == Round.INITIALIZE:
            self._initialized = True
            return self._next_round(now)
        record = self._record(current, current.decision, now)
        self._favour_idle()
        self.step += 1
        self.updates += current.decision.apply
        return [Stepped(record), *self._next_round(now)]

    def _record(self, current: _Round, decision: Decision, now: float) -> StepRecord:
        clipped_norm = current.norm * decision.coefficient
        if self.plan.max_value is not None and decision.apply:
            clipped_norm = math.sqrt(math.fsum(current.applied.values()))
        return StepRecord(
            step=self.step,
            time=now,
            loss=current.loss,
            lr=decision.lr,
            weight=current.weight,
            samples=sum(r.samples for r in current.results.values()),
            gradient_norm=current.norm,
            clipped_norm=clipped_norm,
            clip_coefficient=clipped_norm / current.norm if current.norm > 0 else 1.0,
            clipped=clipped_norm < current.norm * (1 - 1e-12),
            skipped=not decision.apply,
            workers=len(self.members),
            step_seconds=now - current.began,
            compute_seconds=current.collected - current.began,
            reduce_seconds=max(0.0, current.reported - current.collected),
            apply_seconds=now - current.reported,
        )

    def _finish_evaluation(self, now: float) -> list[Effect]:
        current = self._round
        assert current is not None  # noqa: S101  # only `_advance` calls this
        results = [current.results[i] for i in range(current.num_leaves)]
        samples = sum(r.samples for r in results)
        metrics = {
            name: math.fsum(r.values[k] for r in results) / samples for k, name in enumerate(self.plan.metric_names)
        }
        weight = math.fsum(r.weight for r in results)
        metrics["loss"] = math.fsum(r.loss for r in results) / weight if weight else math.nan
        self._evaluated = self.step
        self._round = None
        return [Evaluated(self.step, metrics), *self._next_round(now)]

    # -- failures ---------------------------------------------------------------------------------------------------

    def _blame(self, results: Sequence[LeafResult], now: float) -> list[Effect]:
        """A sum is not finite: name the micro-batch, by its loss or by computing the step again."""
        current = self._round
        assert current is not None  # noqa: S101  # only `_decide` calls this
        for leaf in results:
            if not (math.isfinite(leaf.loss) and math.isfinite(leaf.weight)):
                worker = current.by[leaf.index]
                message = (
                    f"the loss is not finite at step {self.step}, worker {worker}, micro-batch {leaf.index}: "
                    f"loss sum {leaf.loss}, weight {leaf.weight}"
                )
                return self._fail(Failure(self.step, leaf.index, "nonfinite_loss", message), worker)
        return self._begin(Round.DIAGNOSE, self.plan.num_leaves, now)

    def _finish_diagnosis(self) -> list[Effect]:
        current = self._round
        assert current is not None  # noqa: S101  # only `_advance` calls this
        for index in range(current.num_leaves):
            leaf = current.results[index]
            if leaf.nonfinite:
                worker = current.by[index]
                message = (
                    f"the gradient of {leaf.nonfinite} is not finite at step {self.step}, worker {worker}, "
                    f"micro-batch {index}"
                )
                return self._fail(Failure(self.step, index, "nonfinite_gradient", message), worker)
        message = f"the sum of finite gradients is not finite at step {self.step}: they are too large to add"
        return self._fail(Failure(self.step, -1, "nonfinite_gradient", message), "")

    def _fail(self, failure: Failure, worker: str) -> list[Effect]:
        self._round = None
        self.phase = Phase.FAILED
        dismissals: list[Effect] = [Dismiss(name, "the job failed") for name in self.members]
        return [PhaseChanged(Phase.FAILED, failure.message, worker, failure), *dismissals]

    def _end(self, phase: Phase, reason: str) -> list[Effect]:
        self.phase = phase
        dismissals: list[Effect] = [Dismiss(name, reason) for name in self.members]
        return [PhaseChanged(phase, reason), *dismissals]

    # -- members ----------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase, reason: str, worker: str = "") -> PhaseChanged:
        self.phase = phase
        return PhaseChanged(phase, reason, worker)

    def _after_answer(self, now: float) -> list[Effect]:
        return self._dismiss_idle_retired(now) + self._deal(now)

    def _dismiss_idle_retired(self, now: float) -> list[Effect]:
        gone = [name for name, m in self.members.items() if m.retiring and m.in_flight <= 0]
        effects: list[Effect] = []
        for name in gone:
            effects.append(Dismiss(name, "scaled down"))
            effects += self.leave(name, now)
        return effects

    def _speeds(self, members: Mapping[str, _Member]) -> dict[str, float]:
        """How fast these are; whoever is not known yet is taken for as fast as the fastest."""
        fastest = max((m.speed for m in self.members.values() if not m.guessed), default=1.0)
        return {name: fastest if m.guessed else m.speed for name, m in members.items()}

    def _favour_idle(self) -> None:
        """A worker without work is not measured: try it again now and then."""
        for member in self.members.values():
            member.idle_steps = 0 if member.taken else member.idle_steps + 1
            if member.idle_steps >= member.patience_steps:
                member.guessed, member.idle_steps = True, 0
                member.patience_steps = min(2 * member.patience_steps, MAX_PATIENCE_STEPS)

    def _measure_speed(self, member: _Member, push: Push) -> None:
        if push.kind != Round.TRAIN or push.seconds <= 0.0 or not push.leaves:
            return
        speed = len(push.leaves) / push.seconds
        member.pushes += 1
        if member.pushes <= WARM_UP_PUSHES:
            return
        old = speed if member.guessed else member.speed
        member.speed, member.guessed = SPEED_MEMORY * old + (1 - SPEED_MEMORY) * speed, False
