"""The controller's stream to the leader: commands in, all that happens out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import ClassVar

import grpc

from ps.job.config import JobConfig
from ps.job.credentials import NAME, Credentials
from ps.step.messages import Failure, Printed, StepRecord
from ps.wire import convert
from ps.wire.address import GRPC_OPTIONS, REPORT_SECONDS
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import exchange_pb2_grpc as pb_grpc

REPORTS_A_SECOND = 50  # of all jobs together: so many cost the service a fifth of a core


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """The leader's phase is another one now."""

    phase: str
    reason: str
    step: int
    failure: Failure | None
    worker: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint is on disk, or `problem` says why not."""

    step: int
    parameters_sha256: str
    state_sha256: str
    problem: str


@dataclass(frozen=True, slots=True)
class Report:
    """What happened since the last report. members: (worker, change). evaluations: (step, metrics, whether the best).

    records: those that go to the history. newest: of the last step, whether it is one of them or not. number: counts
    the reports of a life from 1.
    """

    records: list[StepRecord]
    newest: StepRecord | None
    evaluations: list[tuple[int, dict[str, float], bool]]
    checkpoints: list[CheckpointReport]
    members: list[tuple[str, str]]
    phases: list[PhaseReport]
    printed: list[Printed]
    number: int = 0

    @property
    def is_of_steps_only(self) -> bool:
        """Whether it tells of nothing else."""
        return not (self.evaluations or self.checkpoints or self.members or self.phases or self.printed)


def report_from_proto(message: pb.SupervisionMessage) -> Report:
    """Report, from the wire."""
    records = convert.records_from_proto(message.records)
    newest = [*records, *convert.records_from_proto(message.newest)]
    return Report(
        records=records,
        newest=newest[-1] if newest else None,
        evaluations=[(e.step, dict(e.metrics), e.is_best) for e in message.evaluations],
        checkpoints=[
            CheckpointReport(c.step, c.parameters_sha256, c.state_sha256, c.problem) for c in message.checkpoints
        ],
        members=[(m.worker, m.change) for m in message.members],
        phases=[
            PhaseReport(
                p.phase,
                p.reason,
                p.step,
                convert.failure_from_proto(p.failure) if p.HasField("failure") else None,
                p.worker,
            )
            for p in message.phases
        ],
        printed=convert.printed_from_proto(message.printed),
        number=message.number,
    )


def _channel(address: str, credentials: Credentials | None) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address, options=GRPC_OPTIONS)
    known, key = credentials.certificate, credentials.key
    options = [*GRPC_OPTIONS, ("grpc.ssl_target_name_override", NAME)]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(known, key, known), options=options)


class LeaderClient:
    """Supervises one life of a job. on_report is called in a thread of its own.

    The more jobs a process supervises, the less often each of their leaders reports steps.
    """

    _all: ClassVar[set[LeaderClient]] = set()

    def __init__(self, address: str, config: JobConfig, on_report: Callable[[Report], None]) -> None:
        self._channel = _channel(address, config.credentials)
        self._outbox: SimpleQueue[pb.ControllerMessage | None] = SimpleQueue()
        fence = pb.Fence(job=config.job, incarnation=config.incarnation)
        self._outbox.put(pb.ControllerMessage(hello=pb.Hello(fence=fence, token=config.token)))
        stub = pb_grpc.ParameterExchangeServiceStub(self._channel)
        self._replies = stub.Supervise(iter(self._outbox.get, None))
        self._on_report = on_report
        self._pause = 0.0
        self._all.add(self)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for message in self._replies:
                self._set_pace()
                self._on_report(report_from_proto(message))
        except grpc.RpcError:
            pass  # the leader is gone: its actor's end says so

    def _set_pace(self) -> None:
        pause = max(REPORT_SECONDS, len(self._all) / REPORTS_A_SECOND)
        if pause != self._pause:
            self._pause = pause
            self._outbox.put(pb.ControllerMessage(report_seconds=pause))

    def send(self, verb: str, worker: str = "") -> None:
        """A command: pause, resume, cancel, or retire a worker."""
        self._outbox.put(pb.ControllerMessage(command=pb.Command(verb=verb, worker=worker)))

    def acknowledge(self, step: int) -> None:
        """The records up to this step are stored."""
        self._outbox.put(pb.ControllerMessage(stored=step))

    def seen(self, number: int) -> None:
        """The reports up to this number have done their work."""
        self._outbox.put(pb.ControllerMessage(seen=number))

    def close(self) -> None:
        """Hang up."""
        self._all.discard(self)
        self._outbox.put(None)
        self._channel.close()
