"""What a client sees of a job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from steepest.change_spec import ChangeSpec
from steepest.convert import change_from_proto, spec_from_proto
from steepest.spec import TrainingJobSpec
from steepest.v1 import training_jobs_pb2 as pb

ENDED_STATES = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
_STATE_PREFIX = "TRAINING_JOB_STATE_"


def state_from_proto(state: pb.TrainingJobState.ValueType) -> str:
    """A state's name, such as RUNNING."""
    return pb.TrainingJobState.Name(state).removeprefix(_STATE_PREFIX)


@dataclass(frozen=True, slots=True)
class Member:
    """A worker or server process of a job."""

    id: str
    pid: int
    host: str
    state: str


class Finding(NamedTuple):
    """Something that is wrong with a job's training, or soon will be.

    rule: vanishing, exploding, dead_units, saturated, initialization, stalled, diverging, update_ratio, update_spike,
    nonfinite, outlier, overfitting, straggler, input_bound or staleness. severity: warning or critical. message: the
    evidence, and what to try. The rest is None where it does not apply.
    """

    rule: str
    severity: str
    step: int
    message: str
    layer: str | None = None
    worker: str | None = None
    micro_batch: int | None = None
    samples: tuple[int, ...] | None = None


def _finding_from_proto(message: pb.Finding) -> Finding:
    return Finding(
        message.rule,
        message.severity,
        message.step,
        message.message,
        message.layer if message.HasField("layer") else None,
        message.worker if message.HasField("worker") else None,
        message.micro_batch if message.HasField("micro_batch") else None,
        tuple(message.samples) or None,
    )


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job at one moment. loss: of the last step; metrics: of the last evaluation; error: None unless FAILED.

    etag: to be given with a request that is meant for the job as it is now. owner: the name of the token that created
    it; empty if none was needed. incarnation: one more whenever the job goes back to a checkpoint, at began_at_step.
    changes: that rollbacks have made, besides those of the spec.
    """

    job: str
    state: str
    reason: str
    step: int
    total_steps: int
    samples: int
    loss: float | None
    metrics: dict[str, float]
    parameters_sha256: str
    state_sha256: str
    wall_seconds: float
    samples_per_second: float | None
    workers: tuple[Member, ...]
    servers: tuple[Member, ...]
    error: str | None
    created: float
    spec: TrainingJobSpec
    best_step: int | None = None
    findings: tuple[Finding, ...] = ()
    priority: int = 0
    owner: str = ""
    incarnation: int = 0
    began_at_step: int = 0
    etag: str = ""
    changes: tuple[ChangeSpec, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ENDED_STATES

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that --json prints; a number that is not finite becomes null."""

        def member(m: Member) -> dict[str, Any]:
            return {"id": m.id, "pid": m.pid, "host": m.host, "state": m.state}

        return {
            "job": self.job,
            "state": self.state,
            "reason": self.reason,
            "step": self.step,
            "total_steps": self.total_steps,
            "samples": self.samples,
            "loss": _finite(self.loss),
            "metrics": {key: _finite(value) for key, value in sorted(self.metrics.items())},
            "parameters_sha256": self.parameters_sha256,
            "state_sha256": self.state_sha256,
            "wall_seconds": self.wall_seconds,
            "samples_per_second": _finite(self.samples_per_second),
            "workers": [member(m) for m in self.workers],
            "servers": [member(m) for m in self.servers],
            "error": self.error,
            "best_step": self.best_step,
            "findings": [finding._asdict() for finding in self.findings],
            "priority": self.priority,
            "owner": self.owner or None,
            "labels": dict(sorted(self.spec.labels.items())),
            "etag": self.etag,
            "changes": [change.model_dump(mode="json") for change in (*self.spec.changes, *self.changes)],
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def job_from_proto(message: pb.TrainingJob) -> JobInfo:
    """A job, from the wire."""
    status = message.status

    def members(raw: Any) -> tuple[Member, ...]:
        return tuple(Member(m.id, m.pid, m.host, m.state) for m in raw)

    return JobInfo(
        job=message.name,
        state=state_from_proto(status.state),
        reason=status.reason,
        step=status.step,
        total_steps=status.total_steps,
        samples=status.samples,
        loss=status.loss if status.HasField("loss") else None,
        metrics=dict(status.metrics),
        parameters_sha256=status.parameters_sha256,
        state_sha256=status.state_sha256,
        wall_seconds=status.wall_seconds,
        samples_per_second=status.samples_per_second if status.HasField("samples_per_second") else None,
        workers=members(status.workers),
        servers=members(status.servers),
        error=status.error or None,
        created=message.create_time.ToNanoseconds() / 1e9,
        spec=spec_from_proto(message.spec),
        best_step=status.best_step if status.HasField("best_step") else None,
        findings=tuple(map(_finding_from_proto, status.findings)),
        priority=status.priority,
        owner=message.owner,
        incarnation=status.incarnation,
        began_at_step=status.began_at_step,
        etag=message.etag,
        changes=tuple(map(change_from_proto, status.changes)),
    )


@dataclass(frozen=True, slots=True)
class Event:
    """A change of state, or a notable moment in one."""

    sequence: int
    time: float
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The newest step of a running job. Seconds: see docs/watching.md. logged: what the loss returned besides."""

    step: int
    loss: float
    lr: float
    gradient_norm: float
    clipped_norm: float
    samples: int
    workers: int
    time: float
    step_seconds: float
    data_seconds: float
    logged: dict[str, float]
    compute_seconds: float = 0.0
    reduce_seconds: float = 0.0
    apply_seconds: float = 0.0
    worker_seconds: float = 0.0
    mean_worker_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found. step: how many were done. metrics: by name, the mean loss as "loss" among them."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class StepHistograms:
    """How large the elements of parameters' mean gradients were in one step, before the clip.

    counts: by parameter, of each bin; bin i has magnitudes from edges[i] up to edges[i + 1], the first and the last bin
    also what is smaller or larger. Zeros are in none.
    """

    step: int
    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that the service keeps.

    best: whether it is that of the best evaluation. problem: what is wrong with its files; empty when each has the hash
    that its manifest says.
    """

    step: int
    size_bytes: int
    time: float
    parameters_sha256: str
    state_sha256: str
    best: bool
    problem: str


def checkpoint_from_proto(message: pb.Checkpoint) -> Checkpoint:
    """A checkpoint, from the wire."""
    return Checkpoint(
        message.step,
        message.size_bytes,
        message.create_time.ToNanoseconds() / 1e9,
        message.parameters_sha256,
        message.state_sha256,
        message.best,
        message.problem,
    )


MAX_PRIORITY = 1000  # and the least is its negative
SUBMISSION = "submission"  # in the place of a worker's name


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line that user code printed.

    process: the worker that printed it, or SUBMISSION when the job was rehearsed. stream: stdout or stderr. offset: to
    go on after this line.
    """

    time: float
    process: str
    stream: str
    text: str
    offset: int


def line_from_proto(message: pb.LogLine) -> LogLine:
    """A line of a job's log, from the wire."""
    when = message.time.ToNanoseconds() / 1e9
    return LogLine(when, message.process, message.stream, message.text, message.offset)


def event_from_proto(message: pb.Event) -> Event:
    """An event, from the wire."""
    return Event(message.sequence, message.time.ToNanoseconds() / 1e9, state_from_proto(message.state), message.reason)


def record_from_proto(
    message: pb.StepRecord, parameters: Sequence[str], functions: Sequence[str] = ()
) -> dict[str, Any]:
    """A step record with all there is in it, from the wire. parameters, functions: names, in order."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    norms = dict(zip(parameters, message.parameter_norms))  # noqa: B905  # there may be none
    measured = {signal: dict(zip(parameters, own.values, strict=True)) for signal, own in message.signals.items()}
    seen = {signal: dict(zip(functions, own.values, strict=True)) for signal, own in message.activations.items()}
    nested = {"parameter_norms": norms, "logged": dict(message.logged), "signals": measured, "activations": seen}
    return {**values, **nested}


def histograms_from_proto(message: pb.QueryHistogramsResponse) -> Iterator[StepHistograms]:
    """A page of histograms, from the wire."""
    edges = tuple(message.edges)
    for step in message.histograms:
        counts = {name: tuple(own.counts) for name, own in zip(message.parameter_names, step.parameters, strict=True)}
        yield StepHistograms(step.step, edges, counts)


def progress_from_proto(message: pb.StepRecord) -> Progress:
    """A step record, from the wire. step: how many are done."""
    return Progress(
        message.step + 1,
        message.loss,
        message.lr,
        message.gradient_norm,
        message.clipped_norm,
        message.samples,
        message.workers,
        message.time,
        message.step_seconds,
        message.data_seconds,
        dict(message.logged),
        message.compute_seconds,
        message.reduce_seconds,
        message.apply_seconds,
        message.worker_seconds,
        message.mean_worker_seconds,
    )
