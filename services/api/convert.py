"""Between rows and the wire."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from ps.checkpoint.files import MANIFEST, problem_of, step_of
from services.jobs.job_log import StoredLine
from services.settings import Settings
from services.store.lifecycle import JobState
from services.store.store import EventRow, JobRow
from steepest.convert import change_to_proto, spec_to_proto
from steepest.spec import spec_from_dict
from steepest.v1 import training_jobs_pb2 as pb

_STATE_PREFIX = "TRAINING_JOB_STATE_"


def state_to_proto(state: JobState) -> pb.TrainingJobState.ValueType:
    """JobState, to the wire."""
    return pb.TrainingJobState.Value(_STATE_PREFIX + state)


def timestamp(seconds: float) -> Timestamp:
    """Seconds since the epoch, to the wire."""
    message = Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


@functools.lru_cache(maxsize=2000)
def _spec_message(text: str) -> pb.TrainingJobSpec:
    """Of a stored spec; not to be written to. A list makes many of them, and each takes a millisecond."""
    return spec_to_proto(spec_from_dict(json.loads(text)))


def job_to_proto(row: JobRow, settings: Settings, samples_per_second: float | None, now: float) -> pb.TrainingJob:
    """A job, to the wire."""
    result = row.result
    status = pb.TrainingJobStatus(
        state=state_to_proto(row.state),
        reason=row.reason,
        step=result.step,
        total_steps=row.total_steps,
        samples=result.samples,
        loss=result.loss,
        metrics=result.metrics,
        parameters_sha256=result.parameters_sha256,
        state_sha256=result.state_sha256,
        wall_seconds=(row.ended or now) - row.created,
        samples_per_second=samples_per_second,
        error=result.error,
        checkpoint_directory=str(settings.checkpoints_of(row.id)),
        incarnation=row.incarnation,
        began_at_step=row.result.began_at,
        best_step=result.best_step,
        priority=row.priority,
    )
    for finding in result.findings:
        status.findings.append(pb.Finding(**{k: v for k, v in finding._asdict().items() if v is not None}))
    status.changes.extend(map(change_to_proto, result.changes))
    for role, id_, pid, host, state in result.members:
        members = status.workers if role == "worker" else status.servers
        members.append(pb.Member(id=id_, pid=pid, host=host, state=state))
    job = pb.TrainingJob(name=row.name, status=status, create_time=timestamp(row.created), owner=row.owner)
    job.spec.CopyFrom(_spec_message(row.spec))
    placement = job.spec.placement
    placement.workers = row.workers
    if placement.HasField("min_workers"):
        placement.min_workers = min(placement.min_workers, row.workers)
    job.etag = row.etag
    if row.ended is not None:
        job.end_time.CopyFrom(timestamp(row.ended))
    return job


def line_to_proto(stored: StoredLine) -> pb.LogLine:
    """A line of a job's log, to the wire."""
    line = stored.line
    return pb.LogLine(
        time=timestamp(line.time), process=line.worker, stream=line.stream, text=line.text, offset=stored.offset
    )


def checkpoint_to_proto(path: Path, best: Path | None) -> pb.Checkpoint:
    """A checkpoint on disk, to the wire. best: that of the best evaluation."""
    problem = problem_of(path)
    manifest = json.loads((path / MANIFEST).read_text()) if not problem else {}
    files = [file.stat() for file in path.iterdir()]
    return pb.Checkpoint(
        step=step_of(path),
        size_bytes=sum(file.st_size for file in files),
        create_time=timestamp(max((file.st_mtime for file in files), default=0.0)),
        parameters_sha256=manifest.get("parameters_sha256", ""),
        state_sha256=manifest.get("state_sha256", ""),
        best=path == best,
        problem=problem,
    )


def curvature_to_proto(found: Mapping[str, Any]) -> pb.Curvature:
    """What worker.analysis found of a Hessian, to the wire."""
    values = {name: value for name, value in found.items() if name in pb.Curvature.DESCRIPTOR.fields_by_name}
    return pb.Curvature(**values, density_grid=found["density"]["grid"], density_values=found["density"]["values"])


def check_to_proto(found: Mapping[str, Any]) -> pb.GradientCheck:
    """What worker.analysis found of two gradients, to the wire."""
    worst = found["worst"]
    return pb.GradientCheck(**{**found, "worst": None if worst is None else pb.Derivative(**worst)})


def event_to_proto(row: EventRow) -> pb.Event:
    """An event, to the wire."""
    return pb.Event(sequence=row.sequence, time=timestamp(row.time), state=state_to_proto(row.state), reason=row.reason)
