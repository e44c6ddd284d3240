"""What was acknowledged is on disk: jobs, their events and evaluations, in SQL."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from typing import Any, NamedTuple

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from services.store.database import PATIENT_SECONDS, RETRY_SECONDS, Claim, open_database, retried, text
from services.store.known import Known
from services.store.lifecycle import ENDED, JobState, check_move
from services.store.schema import evaluations, events, jobs, labels
from services.store.selection import NEWEST, Selection
from services.store.tokens import Tokens
from steepest.change_spec import ChangeSpec
from steepest.errors import ConflictError, NotFoundError
from steepest.jobs import Finding

NEWEST_EVALUATIONS = 50


@dataclass(frozen=True, slots=True)
class Result:
    """What is known of a job's training, kept across restarts of the service."""

    step: int = 0
    samples: int = 0
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    parameters_sha256: str = ""
    state_sha256: str = ""
    error: str = ""
    best_step: int | None = None
    findings: tuple[Finding, ...] = ()
    members: tuple[tuple[str, str, int, str, str], ...] = ()  # (role, id, pid, host, state)
    rollbacks: int = 0
    changes: tuple[ChangeSpec, ...] = ()  # that rollbacks have made, besides those of the spec
    reports: int = 0  # of the leader of this incarnation, that have done their work
    began_at: int = 0  # the step at which this incarnation began


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as it is stored. spec, description: JSON; description is what the probe of the task said.

    owner: the name of the token that created it; empty if none was needed.
    """

    id: str
    request_id: str
    spec: str
    description: str
    state: JobState
    reason: str
    workers: int
    incarnation: int
    total_steps: int
    created: float
    ended: float | None
    result: Result
    priority: int = 0
    owner: str = ""

    @property
    def name(self) -> str:
        """Its resource name."""
        return f"trainingJobs/{self.id}"

    @property
    def etag(self) -> str:
        """Changes with what users and the service decide about the job, and not with its progress."""
        decided = json.dumps([self.created, self.state, self.workers, self.priority, self.incarnation])
        return hashlib.sha256(decided.encode()).hexdigest()[:16]


class Newest(NamedTuple):
    """The number of a job's last event, and (step, metrics) of its last evaluations, in order."""

    event: int
    evaluations: list[tuple[int, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class EventRow:
    """A change of state."""

    job: str
    sequence: int
    time: float
    state: JobState
    reason: str


class Store:
    """Jobs in a SQL database. Safe to use from many threads. url: see open_database, for what it raises, too.

    lost: given by the one service that is to use the database; see Claim, for what it raises, too. SQLite needs none:
    its data directory is locked.
    """

    def __init__(self, url: str, lost: Callable[[], None] | None = None) -> None:
        self.retry_seconds = RETRY_SECONDS
        self._engine = open_database(url)
        self._claim: Claim | None = None
        if lost is not None and self._engine.dialect.name != "sqlite":
            self._claim = Claim(self._engine, lost)
        self._migrate()
        if self._claim is not None:
            self._refresh_statistics()
        self._write = threading.Lock()
        self._known = Known[JobRow]()
        self._newest = Known[Newest]()
        self.tokens = Tokens(self._engine, self._write)

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(files("services.store") / "migrations"))
        with self._engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _refresh_statistics(self) -> None:
        """What PostgreSQL plans queries by; a database that was just restored, say, has none."""
        with self._engine.begin() as connection:
            connection.execute(
                sa.text(f"ANALYZE {', '.join(table.name for table in (jobs, labels, events, evaluations))}")
            )

    def patient(self) -> Store:
        """The same jobs for one who must not give up: who waits an hour for a database that does not answer."""
        other = copy.copy(self)
        other.retry_seconds = PATIENT_SECONDS
        return other

    def close(self) -> None:
        """Close all connections."""
        if self._claim is not None:
            self._claim.close()
        self._engine.dispose()

    @contextmanager
    def _writing(self, job: str, *changed: Known[Any]) -> Iterator[sa.Connection]:
        """A transaction that changes a job. changed: what is kept of it that is then read anew; all by default."""
        try:
            with self._write, self._engine.begin() as connection:
                yield connection
        finally:
            for known in changed or (self._known, self._newest):
                known.written(job)

    # -- jobs -------------------------------------------------------------------------------------------------------

    @retried
    def create(self, row: JobRow, notes: Iterable[str] = (), labelled: Mapping[str, str] | None = None) -> JobRow:
        """Store a new job with its first event, one for each of the notes, and its labels; returns `row` itself.

        The same request_id again returns the first one's job. Raises ConflictError when the id is taken.
        """
        with self._writing(row.id) as connection:
            same = _of_request(connection, row.request_id)
            if same is not None:
                return same
            if connection.execute(sa.select(jobs.c.id).where(jobs.c.id == row.id)).first() is not None:
                raise ConflictError(f"training_job_id: {row.id!r} is taken; choose another --name")
            connection.execute(sa.insert(jobs).values(**_job_values(row)))
            own = [{"job": row.id, "key": key, "value": value} for key, value in (labelled or {}).items()]
            if own:
                connection.execute(sa.insert(labels), own)
            for reason in (row.reason, *notes):
                self._add_event(connection, row.id, row.created, row.state, reason)
        return row

    @retried
    def of_request(self, request_id: str) -> JobRow | None:
        """The job that a request has created, if any."""
        with self._engine.connect() as connection:
            return _of_request(connection, request_id)

    @retried
    def get(self, job: str) -> JobRow:
        """Raises NotFoundError."""
        return self._known.of(job, lambda: self._read(job))

    def _read(self, job: str) -> JobRow:
        with self._engine.connect() as connection:
            found = connection.execute(sa.select(jobs).where(jobs.c.id == job)).first()
        if found is None:
            raise NotFoundError(f"there is no job trainingJobs/{job}")
        return _job(found)

    @retried
    def page(self, limit: int, selection: Selection = NEWEST, after: str = "") -> tuple[list[JobRow], str]:
        """(up to `limit` jobs, a token for those after them; empty at the end). after: such a token.

        Raises SpecError for a token that does not belong to the selection.
        """
        with self._engine.connect() as connection:
            rows = list(connection.execute(selection.query(limit + 1, selection.read_token(after))))
        token = selection.token(rows[limit - 1]) if len(rows) > limit else ""
        return [_job(row) for row in rows[:limit]], token

    @retried
    def delete(self, job: str) -> None:
        """Forget a job."""
        with self._writing(job) as connection:
            others = ((evaluations, evaluations.c.job), (events, events.c.job), (labels, labels.c.job))
            for table, column in (*others, (jobs, jobs.c.id)):
                connection.execute(sa.delete(table).where(column == job))

    @retried
    def in_states(self, states: Iterable[JobState]) -> list[JobRow]:
        """Jobs in some of the states: by priority, the highest first, then the oldest first."""
        order = (jobs.c.priority.desc(), jobs.c.created, jobs.c.id)
        query = sa.select(jobs).where(jobs.c.state.in_(list(states))).order_by(*order)
        with self._engine.connect() as connection:
            return [_job(row) for row in connection.execute(query)]

    @retried
    def code_bundles(self) -> set[str]:
        """The names of those that jobs have. It reads every job: not for what anybody waits for."""
        with self._engine.connect() as connection:
            rows = connection.execution_options(yield_per=500).execute(sa.select(jobs.c.spec)).scalars()
            return {json.loads(spec).get("task", {}).get("code_bundle", "") for spec in rows}

    @retried
    def ended_before(self, time: float, most: int = 1000) -> list[str]:
        """The ids of jobs that had ended by then, those that ended first before the others."""
        query = sa.select(jobs.c.id).where(jobs.c.ended < time).order_by(jobs.c.ended).limit(most)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    @retried
    def exists(self, job: str) -> bool:
        """Whether there is a job of that id."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(jobs.c.id).where(jobs.c.id == job)).first() is not None

    @retried
    def count_states(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        with self._engine.connect() as connection:
            return {JobState(state): count for state, count in connection.execute(query)}

    @retried
    def move(self, job: str, state: JobState, reason: str, now: float) -> JobRow:
        """Change the state of a job, with an event. Raises ConflictError for a move that is not legal."""
        with self._writing(job) as connection:
            row = _job(connection.execute(sa.select(jobs).where(jobs.c.id == job)).one())
            if row.state == state and row.reason == reason:
                return row
            if row.state != state:
                check_move(row.name, row.state, state)
            new = replace(row, state=state, reason=reason, ended=now if state in ENDED else None)
            connection.execute(sa.update(jobs).where(jobs.c.id == job).values(**_job_values(new)))
            self._add_event(connection, job, now, state, reason)
        return new

    @retried
    def update(self, job: str, **values: Any) -> None:
        """Change fields of a job other than its state: workers, incarnation, result."""
        if "result" in values:
            values["result"] = _result_json(values["result"])
        with self._writing(job, self._known) as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job).values(**values))

    # -- events -----------------------------------------------------------------------------------------------------

    def _add_event(self, connection: sa.Connection, job: str, now: float, state: JobState, reason: str) -> None:
        last = connection.execute(sa.select(sa.func.max(events.c.sequence)).where(events.c.job == job)).scalar()
        values = {"job": job, "sequence": (last or 0) + 1, "time": now, "state": state.value, "reason": text(reason)}
        connection.execute(sa.insert(events).values(**values))

    @retried
    def note(self, job: str, reason: str, now: float) -> None:
        """An event without a change of state, such as a worker that was replaced."""
        with self._writing(job, self._newest) as connection:
            state = connection.execute(sa.select(jobs.c.state).where(jobs.c.id == job)).scalar_one()
            self._add_event(connection, job, now, JobState(state), reason)

    @retried
    def events_after(self, job: str, sequence: int) -> list[EventRow]:
        """The events of a job after a sequence number, in order."""
        query = sa.select(events).where(events.c.job == job, events.c.sequence > sequence).order_by(events.c.sequence)
        with self._engine.connect() as connection:
            rows = connection.execute(query)
            return [EventRow(r.job, r.sequence, r.time, JobState(r.state), r.reason) for r in rows]

    # -- evaluations ------------------------------------------------------------------------------------------------

    @retried
    def add_evaluation(self, job: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of an evaluation, in the place of an earlier one of the same step."""
        with self._writing(job, self._newest) as connection:
            connection.execute(sa.delete(evaluations).where(evaluations.c.job == job, evaluations.c.step == step))
            values = {"job": job, "step": step, "metrics": json.dumps(dict(metrics))}
            connection.execute(sa.insert(evaluations).values(**values))

    @retried
    def rewind(self, job: str, step: int) -> None:
        """Forget the evaluations after `step`: they will be computed again."""
        with self._writing(job, self._newest) as connection:
            connection.execute(sa.delete(evaluations).where(evaluations.c.job == job, evaluations.c.step > step))

    @retried
    def evaluations_of(self, job: str, after: int = -1) -> list[tuple[int, dict[str, float]]]:
        """(step, metrics) of every evaluation after a step, in order."""
        wanted = (evaluations.c.job == job, evaluations.c.step > after)
        query = sa.select(evaluations).where(*wanted).order_by(evaluations.c.step)
        with self._engine.connect() as connection:
            return [(row.step, json.loads(row.metrics)) for row in connection.execute(query)]

    @retried
    def newest(self, job: str) -> Newest:
        """What pages and streams ask for again and again: it is read once after each change."""
        return self._newest.of(job, lambda: self._read_newest(job))

    def _read_newest(self, job: str) -> Newest:
        query = sa.select(evaluations).where(evaluations.c.job == job).order_by(evaluations.c.step.desc())
        with self._engine.connect() as connection:
            event = connection.execute(sa.select(sa.func.max(events.c.sequence)).where(events.c.job == job)).scalar()
            found = [(row.step, json.loads(row.metrics)) for row in connection.execute(query.limit(NEWEST_EVALUATIONS))]
        return Newest(event or 0, found[::-1])


def _of_request(connection: sa.Connection, request_id: str) -> JobRow | None:
    if not request_id:
        return None
    row = connection.execute(sa.select(jobs).where(jobs.c.request_id == request_id)).first()
    return None if row is None else _job(row)


def _result_json(result: Result) -> str:
    values = {f.name: getattr(result, f.name) for f in fields(Result)}
    return json.dumps({**values, "changes": [change.model_dump() for change in result.changes]})


def _finding(values: list[Any]) -> Finding:
    found = Finding._make(values)
    return found._replace(samples=None if found.samples is None else tuple(found.samples))


def _job_values(row: JobRow) -> dict[str, Any]:
    values = {f.name: getattr(row, f.name) for f in fields(JobRow)}
    values["state"] = row.state.value
    values["reason"] = text(row.reason)
    values["request_id"] = row.request_id or None
    values["result"] = _result_json(row.result)
    return values


def _job(row: Any) -> JobRow:
    values = {f.name: getattr(row, f.name) for f in fields(JobRow)}
    values["state"] = JobState(row.state)
    values["request_id"] = row.request_id or ""
    raw = json.loads(row.result)
    raw["members"] = tuple((r, i, p, h, s) for r, i, p, h, s in raw["members"])
    raw["findings"] = tuple(_finding(values) for values in raw.get("findings", ()))
    raw["changes"] = tuple(map(ChangeSpec.model_validate, raw.get("changes", ())))
    values["result"] = Result(**raw)
    return JobRow(**values)
