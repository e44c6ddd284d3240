"""What is known of a running job, and its way into the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from ps.checkpoint.files import Written, read_records
from ps.step.messages import StepRecord
from services.jobs import policy
from services.jobs.health import Health
from services.jobs.leader_client import Report
from services.jobs.staleness import Staleness
from services.store.history import JobHistory
from services.store.lifecycle import ENDED, JobState
from services.store.store import JobRow, Store
from steepest.change_spec import ChangeSpec, with_change
from steepest.errors import ConflictError
from steepest.jobs import Finding
from steepest.spec import TrainingJobSpec

log = logging.getLogger(__name__)

PERSIST_SECONDS = 1.0
MAX_LAYERS = 16  # of a job, that Prometheus sees
FIRST_STEPS, RECENT_STEPS = 50, 500  # of its history, that a service looks at when it goes on with a job
MAX_FINDINGS = 50  # of a job; the oldest go first


class Ledger:
    """Keeps one job's result and writes it down. num_samples: of the job's data.

    wanted: verbs that health rules have asked for, in order, for the controller to take. culprit: why a rule wants the
    job to go back; None when none does.
    """

    def __init__(
        self,
        store: Store,
        history: JobHistory,
        make_health: Callable[[], Health],
        row: JobRow,
        spec: TrainingJobSpec,
        num_samples: int,
    ) -> None:
        self.job = row.id
        self.name = row.name
        self.result = row.result
        self.record: StepRecord | None = None
        self._store = store.patient()
        self._history = history
        self._make_health = make_health
        self._health = make_health()
        self._staleness = Staleness(spec.eval_every, row.total_steps)
        self.culprit: Finding | None = None
        self._is_full = False
        self._num_samples = num_samples
        self._global_batch = spec.data.global_batch
        self._actions = {str(rule): action for rule, action in spec.health.actions.items()}
        self.wanted: SimpleQueue[str] = SimpleQueue()
        self._written, self._has_news = 0.0, False

    @property
    def state(self) -> JobState:
        """The job's state, as users see it."""
        return self._store.get(self.job).state

    @property
    def has_ended(self) -> bool:
        """Whether the job is over."""
        return self.state in ENDED

    def layer_norms(self) -> dict[str, float]:
        """The gradient norm of at most MAX_LAYERS groups of neighbouring parameters, in the last step."""
        if self.record is None:
            return {}
        return self._health.layer_norms(self.record, MAX_LAYERS)

    def note_result(self, **changes: Any) -> None:
        """Change fields of the result."""
        self.result = replace(self.result, **changes)
        self._has_news = True

    def note_checkpoint(self, parameters_sha256: str, state_sha256: str) -> None:
        """What the newest checkpoint has."""
        self.note_result(parameters_sha256=parameters_sha256, state_sha256=state_sha256)

    def note_step(self, step: int) -> None:
        """So many steps are done."""
        per_epoch = -(-self._num_samples // self._global_batch)
        epochs, rest = divmod(step, per_epoch)
        in_epoch = min(rest * self._global_batch, self._num_samples)
        self.note_result(step=step, samples=epochs * self._num_samples + in_epoch)

    def begin_life(self, incarnation: int, written: Written | None) -> None:
        """Begin an incarnation with a checkpoint, or at step 0: the store says what the servers are about to find."""
        step, of_incarnation, records = 0, 0, list[StepRecord]()
        if written is not None:
            step = written.step
            of_incarnation, records = read_records(written.path)
            self.note_checkpoint(written.parameters_sha256, written.state_sha256)
        try:
            self._history.append(of_incarnation, records)  # it had no time to report them
            self._history.begin(incarnation, step)
        except OSError as error:
            self._on_full(error)
        self._catch_up()
        self._store.rewind(self.job, step)
        self.note_result(began_at=step, reports=0)
        # After all that: who sees the new incarnation finds nothing of the old one's later steps any more.
        self._store.update(self.job, incarnation=incarnation, result=self.result)
        if self.result.best_step is not None and self.result.best_step > step:
            self.note_result(best_step=None)  # it comes again, or another one
        self.note_step(step)

    def take_up(self) -> JobState:
        """Go on with an incarnation that went on without a service. Returns the job's state."""
        self._catch_up()
        return self.state

    def _catch_up(self) -> None:
        """Have the health rules know what they would have seen of this job, so that they say nothing twice."""
        self._health = self._make_health()
        try:
            self._health.observe(self._history.records(0, FIRST_STEPS, signals=True))
            last = self._history.last()
            recent = FIRST_STEPS if last is None else max(FIRST_STEPS, last.step - RECENT_STEPS)
            self._health.observe(self._history.records(recent, signals=True))
        except OSError:
            log.warning("the history of %s cannot be read", self.name)

    def note_report(self, incarnation: int, report: Report) -> bool:
        """What the leader tells of steps, evaluations and checkpoints. Returns whether the records are on disk."""
        is_kept = self.append(incarnation, report.records, report.newest)
        for step, metrics, is_best in report.evaluations:
            self.note_evaluation(step, metrics, is_best=is_best)
        for checkpoint in report.checkpoints:
            if checkpoint.problem:
                self.say(checkpoint.problem)
            else:
                self.note_checkpoint(checkpoint.parameters_sha256, checkpoint.state_sha256)
        return is_kept

    def append(self, incarnation: int, records: list[StepRecord], newest: StepRecord | None) -> bool:
        """Steps are done. records: those that go to the history. Returns whether they are on disk."""
        is_kept = True
        try:
            self._history.append(incarnation, records)
            self._is_full = False
        except OSError as error:
            is_kept = False
            self._on_full(error)
        for finding in self._health.observe(records):
            self.note_finding(finding)
        if newest is not None:
            self._staleness.observe(records or [newest])
            self.record = newest
            self.note_step(newest.step + 1)
            self.note_result(loss=newest.loss)
        return is_kept

    def _on_full(self, error: OSError) -> None:
        """A full disk costs records of steps, and not the job. Said once until it is over."""
        log.warning("the history of %s cannot be written: %s", self.name, error)
        if not self._is_full:
            self._is_full = True
            self.say(f"the records of steps cannot be written, and are left out meanwhile: {error.strerror}")

    def note_finding(self, finding: Finding) -> None:
        """Something is wrong: it becomes an event and part of the result, and what the spec says is done."""
        action = self._actions.get(finding.rule, "record")
        if action == "ignore":
            return
        self.note_result(findings=(*self.result.findings, finding)[-MAX_FINDINGS:])
        self.say(f"{finding.severity}: {finding.rule}: {finding.message}")
        if action == "rollback" and self.culprit is None and self.state in (JobState.RUNNING, JobState.PAUSING):
            self.culprit = finding
            self.wanted.put(action)
        move = policy.on_finding(finding.rule, finding.message, action, self.state)
        if move is not None:
            self.move(move.state, move.reason)
            self.wanted.put(action)

    def note_rollback(self, change: ChangeSpec) -> None:
        """The job goes back, and something changes."""
        self.culprit = None
        self.note_result(rollbacks=self.result.rollbacks + 1, changes=with_change(self.result.changes, change))

    def note_evaluation(self, step: int, metrics: dict[str, float], *, is_best: bool) -> None:
        """An evaluation is done."""
        self._store.add_evaluation(self.job, step, metrics)
        for finding in self._health.observe_evaluation(step, metrics["loss"]):
            self.note_finding(finding)
        self.note_result(metrics=metrics, **({"best_step": step} if is_best else {}))

    def look(self) -> bool:
        """Nothing has been reported for a while. Returns whether something is known that is not written yet."""
        finding = self._staleness.look(time.time(), is_running=self.state == JobState.RUNNING)
        if finding is not None:
            self.note_finding(finding)
        return self._has_news

    def publish(self, members: Iterable[tuple[str, str, int, str, str]]) -> None:
        """Write the result down. members: (role, id, pid, host, state)."""
        self.note_result(members=tuple(members))
        self._store.update(self.job, result=self.result)
        self._written, self._has_news = time.time(), False

    @property
    def is_stale(self) -> bool:
        """Whether the result was last written a while ago."""
        return time.time() - self._written > PERSIST_SECONDS

    def say(self, text: str) -> None:
        """An event without a change of state."""
        self._store.note(self.job, text, time.time())

    def move(self, state: JobState, reason: str) -> None:
        """Change the state, unless a user's cancel came first."""
        try:
            self._store.move(self.job, state, reason, time.time())
        except ConflictError:
            log.info("%s cannot become %s", self.name, state)

    def end(self, state: JobState, reason: str) -> None:
        """Change the state for the last time."""
        if state == JobState.CANCELLED:
            self.move(JobState.CANCELLING, reason)
        self.move(state, reason)
