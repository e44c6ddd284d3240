"""Brings one job to its end: starts its processes, replaces those that die, and carries out what users ask.

One thread and one inbox: reports of the leader, ends of processes and requests of users are events, handled one at a
time. `services.jobs.policy` decides; this module acts. A *life* of a job is one incarnation: it begins with new servers
and ends when one of them is lost, or with the job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from itertools import takewhile
from queue import Empty, SimpleQueue

from ps.checkpoint.files import Written, newest_verified
from ps.job.config import JobConfig
from ps.step.effects import Phase
from ps.wire.address import ServerAddress
from services.cluster.kept_life import KeptLife
from services.cluster.processes import Exit, ExitKind, named
from services.jobs import policy
from services.jobs.blame import nonfinite
from services.jobs.inbox import Asked, Detach, Event, Reported, ServerEnded, WorkerEnded, WorkerStarted
from services.jobs.job_log import JobLog
from services.jobs.leader_client import LeaderClient, PhaseReport, Report
from services.jobs.ledger import Ledger
from services.jobs.life import Assignment, Life, ends_of
from services.jobs.rollback import discard_after
from services.jobs.room import Dial, LeaderLink, Room
from services.jobs.team import Team, WorkerState
from services.jobs.totals import Totals
from services.settings import Settings
from services.store.history import JobHistory
from services.store.lifecycle import JobState
from services.store.store import Store

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class Controller(threading.Thread):
    """One job that holds resources. on_end is called when it holds none any more.

    kept: a life that went on without a service, and goes on with this controller.
    """

    def __init__(
        self,
        job: Assignment,
        store: Store,
        settings: Settings,
        room: Room,
        on_end: Callable[[str], None],
        dial: Dial = LeaderClient,
        kept: KeptLife | None = None,
    ) -> None:
        super().__init__(name=f"controller-{job.row.id}", daemon=True)
        self.job = job.row.id
        self.job_name = job.row.name
        self.spec = job.spec
        self.total_steps = job.row.total_steps
        self.totals = Totals(job.spec.telemetry.every)
        history = JobHistory(settings.history_of(job.row.id))
        self.ledger = Ledger(store, history, job.health, job.row, job.spec, job.description.num_samples)
        self.description = job.description
        self.assignment = job
        self._settings = settings
        self._log = JobLog(settings.log_of(job.row.id), settings.max_log_bytes)
        self._room = room
        self._on_end = on_end
        self._dial = dial
        self._incarnation = job.row.incarnation
        self._inbox: SimpleQueue[Event] = SimpleQueue()
        self.team = Team(job.workers or job.row.workers)
        self._life: Life | None = None
        self._kept = kept
        self._checkpoint: Written | None = None  # that the next life begins from; sought while no server runs
        self._patience = policy.Patience(job.spec.placement.max_worker_restarts)
        self.target, self.most = self.team.wanted, job.row.workers  # of workers, now and when there is room
        self.room_for = ""  # who it vacates its room for, once it is to
        self._pause_wanted = self._has_vacated = False
        self._cancel_deadline: float | None = None
        self._detached = False

    # -- asked from outside -------------------------------------------------------------------------------------------

    def ask(self, verb: str, workers: int = 0) -> None:
        """Have a verb carried out: pause, resume, cancel, scale."""
        if verb == "scale":
            self.target = workers
        self._inbox.put(Asked(verb, workers))

    def vacate(self, room_for: str) -> None:
        """Have the job give its room back at the next step boundary, and wait. room_for: for whom, in words."""
        self.room_for = room_for
        self._inbox.put(Asked("vacate"))

    def detach(self) -> None:
        """Leave the job as it is: the service is stopping, and the next one takes the job over."""
        self._inbox.put(Detach())

    # -- lives --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Live until the job has ended, or the service stops."""
        try:
            self._room.set_code(self.assignment.code)
            if self._kept is None:
                self._checkpoint = newest_verified(self._settings.checkpoints_of(self.job))
            while not self._is_over() and self._live():
                pass
        except Exception as error:
            if not self._detached:
                log.exception("controller of %s", self.job_name)
                self._end(policy.End(JobState.FAILED, "the controller failed", f"internal error: {error!r}"))
        finally:
            self._hang_up()
            self._room.leave() if self._detached else self._room.release()
            self._on_end(self.job)

    def _is_over(self) -> bool:
        if self._cancel_deadline is not None and time.time() > self._cancel_deadline:
            self._end(policy.on_no_step(self._settings.cancel_grace_seconds))
        return self._detached or self._has_vacated or self.ledger.has_ended

    def _live(self) -> bool:
        """One life of the job. Returns whether there is to be another."""
        kept, self._kept = self._kept, None
        if kept is None:
            self._incarnation += 1
            self.ledger.begin_life(self._incarnation, self._checkpoint)
        try:
            life = self._begin_life() if kept is None else self._take_up(kept)
        except Exception as error:
            return self._after_loss(f"the servers did not start: {error}")
        self._life = life
        if self._pause_wanted:
            life.leader.send("pause")
        self._match_workers()
        while not life.lost and not self._is_over():
            self._handle_next()
        return bool(life.lost) and not self._detached and self._after_loss(life.lost)

    def _begin_life(self) -> Life:
        incarnation = self._incarnation
        config = self.assignment.config(incarnation, self.ledger.result.changes, self._settings)
        started = self._room.start_servers(config, lambda i, end: self._inbox.put(ServerEnded(incarnation, i, end)))
        addresses = [address for address, _ in started]
        leader = self._call_leader(config, addresses[0])
        self.team.clear()
        return Life(config, addresses, [where for _, where in started], leader)

    def _take_up(self, kept: KeptLife) -> Life:
        """Go on with a life that went on without a service."""
        self.team.take_up(kept, {id_: state for _, id_, _, _, state in self.ledger.result.members})
        incarnation, put = self._incarnation, self._inbox.put
        self._room.listen(
            lambda index, end: put(ServerEnded(incarnation, index, end)),
            lambda name, generation, at: put(WorkerStarted(incarnation, name, generation, at)),
            lambda name, generation, end: put(WorkerEnded(incarnation, name, generation, end)),
        )
        for event in ends_of(kept, incarnation):
            put(event)
        leader = self._call_leader(kept.config, kept.addresses[0])
        state = self.ledger.take_up()
        self._pause_wanted = state in (JobState.PAUSING, JobState.PAUSED)
        if state == JobState.CANCELLING:
            self.ask("cancel")
        elif not self._pause_wanted:
            leader.send("resume")  # the service may have ended before it could
        return Life(kept.config, list(kept.addresses), list(kept.servers), leader)

    def _call_leader(self, config: JobConfig, address: ServerAddress) -> LeaderLink:
        incarnation = self._incarnation
        return self._dial(address.control, config, lambda report: self._inbox.put(Reported(incarnation, report)))

    def _after_loss(self, what_happened: str) -> bool:
        """The servers are gone. Returns whether the job starts again from its last checkpoint."""
        self._hang_up()
        self._room.stop_actors()
        if self._room.is_gone:
            self.ledger.move(JobState.RECOVERING, f"{what_happened}; waiting for room anew")
            self._detached = True  # whoever admits jobs starts it again
            return False
        cancelling = self._cancel_deadline is not None
        culprit = None if cancelling else self.ledger.culprit
        rollbacks, health = self.ledger.result.rollbacks, self.spec.health
        if culprit is not None and rollbacks < health.max_rollbacks:
            self._room.wait_stopped()  # or a checkpoint could still be written
            discard_after(self._settings.checkpoints_of(self.job), policy.suspect_step(culprit))
        self._checkpoint = newest_verified(self._settings.checkpoints_of(self.job))
        at, step = self.ledger.result.step, None if self._checkpoint is None else self._checkpoint.step
        if culprit is not None:
            decision = policy.on_rollback(rollbacks, health, culprit, step)
        else:
            decision = policy.on_server_loss(self._patience, what_happened, at, step, cancelling=cancelling)
        if isinstance(decision, policy.End):
            self._end(decision)
            return False
        if decision.change is not None:
            self.ledger.note_rollback(decision.change)
        self.ledger.move(JobState.RECOVERING, decision.reason)
        return True

    def _hang_up(self) -> None:
        life, self._life = self._life, None
        if life is not None:
            life.leader.close()

    # -- events -------------------------------------------------------------------------------------------------------

    def _handle_next(self) -> None:
        try:
            self._handle(self._inbox.get(timeout=POLL_SECONDS))
        except Empty:
            if self.ledger.look():
                self._publish()
            self._act_on_findings()

    def _handle(self, event: Event) -> None:
        if isinstance(event, Asked):
            self._obey(event)
            return
        if isinstance(event, Detach):
            self._detached = True
            return
        life = self._life
        if life is None or event.incarnation != self._incarnation:
            return  # of a life that is over
        match event:
            case ServerEnded(_, index, end):
                life.lost = f"{named(life.name(index), life.servers[index])} {end.message}"
            case WorkerStarted(_, name, generation, started):
                worker = self.team.current(name, generation)
                if worker is not None:
                    worker.started = started
                    self._publish()
            case WorkerEnded(_, name, generation, end):
                if self.team.current(name, generation) is not None and not self.ledger.has_ended:
                    self._worker_ended(name, end)
            case Reported(_, report):
                self._on_report(life, report)

    def _obey(self, asked: Asked) -> None:
        life = self._life
        match asked.verb:
            case "scale":
                self.team.wanted = asked.workers
                if life is not None:
                    self._match_workers()
                return
            case "cancel":
                if life is None or not self.team.any_running():
                    while_ = "" if self.ledger.state == JobState.CANCELLING else " while starting"
                    self._end(policy.End(JobState.CANCELLED, f"cancelled{while_}"))
                    return
                self._cancel_deadline = time.time() + self._settings.cancel_grace_seconds
            case "vacate":
                if life is None or not self.team.any_running():
                    self._give_back(JobState.RECOVERING)
                    return
                self.ledger.say(f"makes room for {self.room_for} at the next step boundary, with a checkpoint")
                life.leader.send("cancel")
                return
            case "rollback":
                if life is not None and not self.ledger.has_ended:
                    life.lost = self.ledger.result.findings[-1].message
                return
            case _:
                self._pause_wanted = asked.verb == "pause"
        if life is not None:
            life.leader.send(asked.verb)

    # -- workers ------------------------------------------------------------------------------------------------------

    def _match_workers(self) -> None:
        """Start or retire workers until there are as many as wanted."""
        for name in self.team.surplus(self._room.has_server):
            self._retire(name)
        for name in self.team.missing():
            self._start_worker(name)

    def _start_worker(self, name: str) -> None:
        life, incarnation = self._life, self._incarnation
        assert life is not None  # noqa: S101  # only called in a life
        generation = self.team.add(name).generation
        self._room.start_worker(
            life.config,
            name,
            generation,
            life.addresses,
            lambda started: self._inbox.put(WorkerStarted(incarnation, name, generation, started)),
            lambda end: self._inbox.put(WorkerEnded(incarnation, name, generation, end)),
        )
        self._publish()

    def _retire(self, name: str) -> None:
        worker = self.team[name]
        if worker.state == WorkerState.RUNNING and self._life is not None:
            worker.state = WorkerState.RETIRING
            self._life.leader.send("retire", name)
            return
        if self._room.has_server(name):  # not to be killed alone: it retires once it has joined
            return
        del self.team[name]
        self._room.stop_worker(name, keep_room=False)

    def _worker_ended(self, name: str, end: Exit) -> None:
        worker = self.team.pop(name)
        who = named(name, worker.started)
        match policy.on_worker_exit(self._patience, who, worker.state, end, self.ledger.result.step):
            case policy.End() as decision:
                self._room.stop_worker(name, keep_room=True)
                self._end(decision)
            case policy.LetGo(frees_room):
                if frees_room:
                    self._room.stop_worker(name, keep_room=False)
                    self._publish()
            case policy.Replace(note):
                self._room.stop_worker(name, keep_room=True)
                self.totals.replaced_workers += 1
                self.ledger.say(note)
                self._start_worker(name)

    # -- reports of the leader ----------------------------------------------------------------------------------------

    def _on_report(self, life: Life, report: Report) -> None:
        if report.number <= self.ledger.result.reports and report.number:
            life.leader.seen(report.number)  # by the service before this one
            return
        first = list(takewhile(lambda p: p.phase in (Phase.WAITING, Phase.WORKING), report.phases))
        self._on_phases(first)  # a rule pauses, or sends back, only a job that runs
        if self.ledger.note_report(self._incarnation, report) and report.records:
            life.leader.acknowledge(report.records[-1].step)
        self.totals.count(report.records)
        if report.printed:
            self._log.append(report.printed)
        for worker, change in report.members:
            self._on_member(worker, change)
        self._on_phases(report.phases[len(first) :])
        self._act_on_findings()
        self.ledger.note_result(reports=report.number)
        if self.ledger.is_stale or not report.is_of_steps_only:
            self._publish()
        life.leader.seen(report.number)

    def _on_phases(self, phases: list[PhaseReport]) -> None:
        for phase in phases:
            failure = phase.failure
            if failure is not None and failure.reason.startswith("nonfinite"):
                self.ledger.note_finding(nonfinite(failure, phase.worker))
                if self.ledger.culprit is not None:
                    continue
            said = phase.reason, "" if failure is None else failure.traceback
            for decision in policy.on_phase(phase.phase, *said, self.ledger.state, pause_wanted=self._pause_wanted):
                if isinstance(decision, policy.End):
                    self._end(decision)
                elif isinstance(decision, policy.GiveBack):
                    self._give_back(decision.state)
                else:
                    self.ledger.move(decision.state, decision.reason)

    def _act_on_findings(self) -> None:
        while not self.ledger.wanted.empty():
            self._obey(Asked(self.ledger.wanted.get()))

    def _on_member(self, name: str, change: str) -> None:
        worker = self.team.get(name)
        if worker is None:
            return
        if change == "joined" and worker.state == WorkerState.STARTING:
            worker.state = WorkerState.RUNNING
            if len(self.team) > self.team.wanted:
                self._match_workers()
        elif change == "hung" and worker.state != WorkerState.STARTING:  # else it is the successor of the one that hung
            seconds = self.spec.placement.worker_timeout_seconds
            message = f"did not answer within {seconds:g} s (placement.worker_timeout_seconds) and was killed"
            if self._room.has_server(name) and self._life is not None:  # the server in its process is killed with it
                self._life.lost = f"{named(name, worker.started)} {message}"
            else:
                self._worker_ended(name, Exit(ExitKind.DIED, message))

    # -- the store ----------------------------------------------------------------------------------------------------

    def _give_back(self, state: JobState) -> None:
        """End this life, but not the job: it begins another one when there is room for it again."""
        self.ledger.move(state, policy.made_room(self.room_for, self.ledger.result.step, state))
        self._has_vacated = True

    def _publish(self) -> None:
        servers = self._life.members() if self._life is not None else []
        self.ledger.publish([*servers, *self.team.members()])

    def _end(self, decision: policy.End) -> None:
        self.ledger.note_result(error=decision.error)
        self._publish()
        self.ledger.end(decision.state, decision.reason)
