"""The leader of a job as a deterministic state machine: same state and message, same new state and effects.

It deals micro-batches, counts what came back, decides once for all shards, and says when a version is complete. Time
comes in as an argument; effects go out, which `ps.server.leader_runner` carries out. Late,
duplicate and stale messages are named outcomes.

A round moves so:  assign -> collect (pushes from workers, reports from shards) -> decide -> commit (shards applied).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ps.numerics.ranges import bits_of, leaves_of, ranges
from ps.step.agenda import Agenda
from ps.step.assignment import Dealer
from ps.step.best import Standing
from ps.step.blame import blame
from ps.step.clipping import Clipping
from ps.step.effects import (
    ENDED,
    Decide,
    Dismiss,
    Effect,
    Evaluated,
    Hung,
    Lost,
    Phase,
    PhaseChanged,
    Save,
    Send,
    Settle,
    Stepped,
)
from ps.step.members import Members
from ps.step.messages import Assign, Decision, Failure, Outcome, Push, Round
from ps.step.parts import Parts
from ps.step.plan import Plan
from ps.step.round import RoundState
from ps.step.signals import NOTHING_MEASURED, Sums, UpdateSignals


class Leader:
    """The state of one job's training: step, membership, decisions.

    since: where the training stands that it goes on with. kept: parts whose residuals lie with the servers, as after a
    restart.
    """

    def __init__(
        self,
        plan: Plan,
        since: Standing = Standing(),  # noqa: B008  # immutable
        *,
        buffers: bytes | None = None,
        constants: bytes = b"",
        initialized: bool = False,
        kept: Iterable[int] = (),
    ) -> None:
        self.plan = plan
        self.step = since.step
        self.updates = since.updates  # optimizer updates applied; a skipped step makes none
        self.buffers = buffers
        self.constants = constants  # frozen parameters: workers have their own, checkpoints have these
        self.direction = b""  # of the next step, see Assign; whoever drives the leader sets it
        self.phase = Phase.WAITING
        self.members = Members()
        self._deal_out = Dealer()
        self._initialized = initialized
        self._round: RoundState | None = None
        self._version = since.step  # of what workers see: it grows with each step and each round that shows
        self._shows_average = False
        self._agenda = Agenda(plan, since.step if initialized else -1, since.best, since.seconds)
        self._clip = Clipping(plan.clip, plan.segment_owners, since.clip, since.norms if plan.skip_exploding else None)
        self._pause = False
        self._cancel = False
        self._served_seconds = 0.0  # that the servers took for the last step
        self._parts = Parts(plan.parts, kept)

    @property
    def standing(self) -> Standing:
        """Where the training stands, for a checkpoint."""
        agenda, clip = self._agenda, self._clip
        return Standing(self.step, self.updates, agenda.best, clip.state, clip.norms, agenda.seconds)

    # -- messages ---------------------------------------------------------------------------------------------------

    def join(self, worker: str, now: float, host: str = "") -> list[Effect]:
        """A worker is there. host: which one it is on; the workers of one are dealt neighbouring micro-batches."""
        if self.phase in ENDED:
            return [Dismiss(worker, "the job has ended")]
        self.members.join(worker, host)
        if self.phase == Phase.WAITING:
            effects: list[Effect] = [self._enter(Phase.WORKING, f"worker {worker} joined", worker)]
            return effects + (self._next_round(now) if self._round is None else self._deal(now))
        return self._deal(now)

    def leave(self, worker: str, now: float) -> list[Effect]:
        """A worker is gone: deal what it had not delivered to every shard to the others, within the round."""
        current, member = self._round, self.members.pop(worker, None)
        if member is None or self.phase in ENDED:
            return []
        if self._parts.is_owner(worker):
            self.phase = Phase.FAILED
            return [Lost(f"{worker} is gone, and the compression residuals it held are lost")]
        if current is not None and not current.is_decided:
            lost = current.lost_with(member, self.plan.num_servers)
            # What another worker has been given too, it has delivered or will deliver to every shard.
            current.give_back(lost & ~self.members.taken_by_any())
        effects = self._deal(now)
        if not self.members and self.phase == Phase.WORKING and (current is None or not current.is_decided):
            effects.append(self._enter(Phase.WAITING, f"worker {worker} left, and there is no other", worker))
        return effects

    def retire(self, worker: str, now: float) -> list[Effect]:
        """A worker is to leave when it has answered what it was given."""
        if (member := self.members.get(worker)) is not None:
            member.retiring = True
        return self._dismiss_idle_retired(now)

    def push(self, worker: str, push: Push, now: float) -> tuple[Outcome, list[Effect]]:
        """A worker's answer to an assignment."""
        member = self.members.get(worker)
        if member is None:
            return Outcome.LATE, []
        member.in_flight -= 1
        current = self._round
        if current is None or current.is_decided or not current.is_answered_by(push.step, push.kind):
            return Outcome.LATE, self._after_answer(now)
        outcome, delivered = current.take_push(worker, push, now)
        member.leaves &= ~delivered
        member.measure(push)
        return outcome, self._advance(now) or self._after_answer(now)

    def report(
        self, server: int, step: int, kind: Round, sums: Sums, now: float, signals: Sums | None = None
    ) -> tuple[Outcome, list[Effect]]:
        """A shard has reduced its part of the round and measured it. signals: see RoundState.take_report."""
        current = self._round
        if current is None or not current.is_answered_by(step, kind):
            return Outcome.LATE, []
        outcome = current.take_report(server, sums, signals)
        return outcome, self._advance(now) if outcome == Outcome.ACCEPTED else []

    def applied(
        self, server: int, step: int, clipped_sum: float, now: float, signals: UpdateSignals = NOTHING_MEASURED
    ) -> tuple[Outcome, list[Effect]]:
        """A shard has carried out the decision. signals: see RoundState.take_applied."""
        current = self._round
        if current is None or step != self.step or not current.is_decided:
            return Outcome.LATE, []
        outcome = current.take_applied(server, clipped_sum, signals)
        if outcome == Outcome.DUPLICATE or not current.is_applied(self.plan.num_servers):
            return outcome, []
        return outcome, self._commit(current, now)

    def failure(self, worker: str, failure: Failure, now: float) -> tuple[Outcome, list[Effect]]:
        """User code failed on a worker. Ignores failures of a finished round: it was reading parameters mid-update."""
        current, member = self._round, self.members.get(worker)
        if member is not None:
            member.in_flight -= 1
        if self.phase in ENDED or current is None or not current.is_answered_by(failure.step, failure.kind):
            return Outcome.LATE, self._after_answer(now)
        return Outcome.ACCEPTED, self._fail(failure, worker)

    def copied(self, now: float) -> list[Effect]:
        """What a checkpoint takes is copied: go on while it is written."""
        self._agenda.copied(self.step, now)
        self.phase = Phase.WORKING
        return self._next_round(now)

    def saved(self, step: int, problem: str, now: float) -> list[Effect]:
        """The checkpoint of a step is on disk, or could not be written."""
        if self.phase != Phase.SAVING or step != self.step:
            self._agenda.written()
            return []
        self._agenda.saved(step, now)
        if problem and (self._cancel or self._agenda.end_reason(self.step)):
            return self._fail(Failure(self.step, -1, "checkpoint_failed", problem), "")
        self.phase = Phase.WORKING
        return self._next_round(now)

    def settled(self, now: float) -> list[Effect]:
        """Go on after Settle: the residuals have arrived."""
        if self.phase != Phase.SETTLING:
            return []
        self._parts.settle()
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
        """End at the next step boundary, with a checkpoint if there is anything to save; finish what is decided."""
        self._cancel = True
        if self.phase not in (Phase.PAUSED, Phase.WAITING) or (self._round is not None and self._round.is_decided):
            return []
        self._round = None  # nobody will finish it; the last version is whole
        self.phase = Phase.WORKING
        return self._next_round(now)

    def tick(self, now: float) -> list[Effect]:
        """Time passes: find stragglers and workers that hang."""
        if self._round is None or self._round.is_decided or self.phase in ENDED:
            return []
        effects: list[Effect] = [Hung(name) for name in self.members.hanging(now, self.plan.worker_timeout_seconds)]
        idle = [] if self._parts.any else self.members.idle()
        if idle and (leaves := self.members.duplicate_straggler(now)):
            effects += self._assign(leaves_of(leaves), idle, now)
        return effects

    # -- rounds -----------------------------------------------------------------------------------------------------

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
        end = self._agenda.end_reason(self.step)
        evaluates = not self._cancel and self._agenda.wants_evaluation(self.step, ends=bool(end))
        if self._shows_average and not evaluates:
            return self._show(average=False, now=now)
        # A checkpoint comes before an evaluation, whose user code may fail.
        waits = self._agenda.wants_checkpoint(self.step, now, ends=bool(end) or self._cancel)
        if waits is not None and not self._shows_average:
            self.phase = Phase.SAVING
            return [Save(self.step, self._parts.owners, waits)]
        if evaluates and plan.evaluates_average and not self._shows_average:
            return self._show(average=True, now=now)
        if evaluates:
            return self._begin(Round.EVALUATE, plan.evaluation_leaves, now)
        if self._cancel and not end:
            return self._end(Phase.CANCELLED, f"cancelled at step {self.step}")
        if end:
            return self._end(Phase.FINISHED, end)
        if self._pause:
            return [self._enter(Phase.PAUSED, f"paused at step {self.step}")]
        return self._settle() or self._begin(Round.TRAIN, plan.num_leaves, now)

    def _begin(self, kind: Round, num_leaves: int, now: float) -> list[Effect]:
        self._round = RoundState(self.step, kind, num_leaves, now, self._served_seconds)
        self.members.begin_round()
        if not self.members:
            return [] if self.phase == Phase.WAITING else [self._enter(Phase.WAITING, "there is no worker")]
        return self._deal(now)

    def _show(self, *, average: bool, now: float) -> list[Effect]:
        """Have all shards show workers the average, or the parameters again."""
        self._round = RoundState(self.step, Round.SHOW, 0, now)
        self._round.decision = Decision(self.step, Round.SHOW, apply=average)
        self.members.begin_round()
        return [Decide(self._round.decision)]

    def _deal(self, now: float) -> list[Effect]:
        """Deal the undealt micro-batches to the idle workers."""
        current = self._round
        if current is None or not current.has_undealt or current.is_decided:
            return []
        if self._parts.any and current.kind == Round.TRAIN:
            return self._deal_parts(current, now)
        idle = self.members.idle()
        return self._assign(current.take_undealt(), idle, now) if idle else []

    def _assign(self, leaves: Sequence[int], workers: list[str], now: float) -> list[Effect]:
        dealt = self._deal_out(leaves, self.members.speeds(workers))
        hosts = self.members.host_ranges(dealt)
        return [self._give(name, parts, now, hosts.get(self.members[name].host, ())) for name, parts in dealt.items()]

    def _give(
        self,
        worker: str,
        given: Sequence[tuple[int, int]],
        now: float,
        host_ranges: tuple[tuple[int, int], ...] = (),
        handed: tuple[int, ...] = (),
    ) -> Send:
        current, member = self._round, self.members[worker]
        assert current is not None  # noqa: S101  # callers are inside a round
        member.give(bits_of(given), now)
        buffers = None if member.buffers is self.buffers else self.buffers
        member.buffers = self.buffers
        wanted = self.direction if current.kind in (Round.TRAIN, Round.DIAGNOSE) else b""
        work = Assign(self.step, current.kind, tuple(given), buffers, host_ranges, self._version, wanted)
        return Send(worker, work, handed)

    # -- parts whose residuals stay with a worker -------------------------------------------------------------------

    def _settle(self) -> list[Effect]:
        """Before a step: have parts change hands if the workers are others now."""
        moving = self._parts.begin_step(self.members.staying()) if self._parts.any else {}
        if not moving:
            return []
        self.phase = Phase.SETTLING
        return [Settle(self.step, moving)]

    def _deal_parts(self, current: RoundState, now: float) -> list[Effect]:
        """Give each worker the parts that are its own."""
        self._parts.deal(self.members.staying())
        effects: list[Effect] = []
        for worker, member in self.members.items():
            if member.in_flight:
                continue
            if leaves := current.take_undealt_of(self._parts.leaves_of(worker)):
                effects.append(self._give(worker, ranges(leaves_of(leaves)), now, handed=self._parts.hand_over(worker)))
        return effects

    def _advance(self, now: float) -> list[Effect]:
        """Move the round on when all that was awaited is there."""
        current = self._round
        if current is None or current.is_decided or not current.has_all_pushes:
            return []
        if current.kind == Round.EVALUATE:
            return self._finish_evaluation(current, now)
        if current.kind == Round.DIAGNOSE:
            return self._fail(*blame(current))
        if not current.has_all_reports(self.plan.num_servers):
            return []
        current.reported = now
        if current.kind == Round.INITIALIZE:
            current.decision = Decision(self.step, current.kind, apply=True)
            return [Decide(current.decision)]
        return self._decide(current, now)

    def _decide(self, current: RoundState, now: float) -> list[Effect]:
        """One decision for all shards: clip and apply, or skip."""
        decision = current.decide(self.plan.learning_rate(self.step, self.updates), self._clip)
        if not current.is_finite and not self.plan.skip_nonfinite:
            # Name the micro-batch: have the step computed again, and looked at.
            return self._begin(Round.DIAGNOSE, self.plan.num_leaves, now)
        current.decision = decision._replace(last=self.step + 1 >= self.plan.total_steps)
        return [Decide(current.decision)]

    def _commit(self, current: RoundState, now: float) -> list[Effect]:
        """All shards have carried the decision out: the next version is visible everywhere."""
        self._round = None
        if current.buffers is not None:
            self.buffers = current.buffers
        if current.kind == Round.INITIALIZE:
            self.constants = current.constants or b""
            self._initialized = True
            return self._next_round(now)
        self._version += 1
        if current.kind == Round.SHOW:
            self._shows_average = not self._shows_average
            return self._next_round(now)
        clip, slowest = self.plan.clip, self.members.slowest()
        completed = current.completed(len(self.members), now, clip=clip, slowest=slowest)
        self._served_seconds = completed.committed - completed.collected
        self._agenda.seconds += completed.committed - completed.began
        self.members.favour_idle()
        self.step += 1
        self.updates += completed.decision.apply
        following = self._next_round(now)
        stepped = Stepped(completed)
        # Work first, so that nobody waits for the telemetry; but nothing that ends or saves overtakes the record.
        return [*following, stepped] if following and isinstance(following[0], Send) else [stepped, *following]

    def _finish_evaluation(self, current: RoundState, now: float) -> list[Effect]:
        self._round = None
        is_best = self._agenda.evaluated(self.step, metrics := current.mean_metrics(self.plan.metric_names))
        return [Evaluated(self.step, metrics, is_best), *self._next_round(now)]

    # -- ends, and who leaves ---------------------------------------------------------------------------------------

    def _fail(self, failure: Failure, worker: str) -> list[Effect]:
        self._round = None
        self.phase = Phase.FAILED
        failed = PhaseChanged(Phase.FAILED, failure.message, worker, failure)
        return [failed, *(Dismiss(name, "the job failed") for name in self.members)]

    def _end(self, phase: Phase, reason: str) -> list[Effect]:
        self.phase = phase
        return [PhaseChanged(phase, reason), *(Dismiss(name, reason) for name in self.members)]

    def _enter(self, phase: Phase, reason: str, worker: str = "") -> PhaseChanged:
        self.phase = phase
        return PhaseChanged(phase, reason, worker)

    def _after_answer(self, now: float) -> list[Effect]:
        return self._dismiss_idle_retired(now) + self._deal(now)

    def _dismiss_idle_retired(self, now: float) -> list[Effect]:
        gone = [name for name in self.members.retired() if not self._parts.is_owner(name)]
        return [effect for name in gone for effect in (Dismiss(name, "scaled down"), *self.leave(name, now))]
