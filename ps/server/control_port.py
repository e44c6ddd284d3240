"""The leader's side of the controller's stream: its commands, and all that it has not been told yet."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import grpc

from ps.job.credentials import Credentials
from ps.parameters.layout import Layout
from ps.server.checkpoint_writer import Saved
from ps.step.effects import PhaseChanged
from ps.step.messages import StepRecord
from ps.step.record import CompletedStep, records_of
from ps.wire import convert
from ps.wire.address import GRPC_OPTIONS, REPORT_SECONDS
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import exchange_pb2_grpc as pb_grpc

MAX_STREAMS = 4
MAX_PRINTED = 20_000  # lines kept while no controller is there to take them
MAX_UNSTORED = 100_000  # records kept while no controller is there to take them


def _server_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    known, key = credentials.certificate, credentials.key
    return grpc.ssl_server_credentials([(key, known)], known, require_client_auth=True)


class ControlPort(pb_grpc.ParameterExchangeServiceServicer):
    """Listens for the controller on gRPC, once it is started.

    refusal: why a caller is not let in, or nothing. record_every: the records of every so many steps are for the
    history, and of those with an outlier, or that were not taken. layout: None leaves out parameter norms.
    """

    def __init__(
        self,
        bind: str,
        refusal: Callable[[pb.Fence, str], str],
        *,
        record_every: int,
        layout: Layout | None,
        credentials: Credentials | None = None,
    ) -> None:
        self._refusal = refusal
        self._obey_command: Callable[[str, str], None] = _ignore
        self._record_every = record_every
        self._layout = layout
        self._news = threading.Condition()
        self._report = pb.SupervisionMessage()
        self._is_urgent = self._stepped = False
        self._pause = REPORT_SECONDS
        self._completed: list[CompletedStep] = []  # for the history, and not told yet
        self._newest: CompletedStep | None = None
        self._unstored: deque[StepRecord] = deque(maxlen=MAX_UNSTORED)
        self._number = 0
        self._unseen: deque[pb.SupervisionMessage] = deque()
        self._caller: object = None  # the controller that called last
        self._stopped = False
        self._grpc = grpc.server(futures.ThreadPoolExecutor(MAX_STREAMS), options=GRPC_OPTIONS)
        pb_grpc.add_ParameterExchangeServiceServicer_to_server(self, self._grpc)
        port = (
            self._grpc.add_insecure_port(f"{bind}:0")
            if credentials is None
            else self._grpc.add_secure_port(f"{bind}:0", _server_credentials(credentials))
        )
        self.address = f"{bind}:{port}"

    def start(self, obey: Callable[[str, str], None]) -> None:
        """Begin to listen. obey: carries out a command (verb, worker), in a thread of the stream."""
        self._obey_command = obey
        self._grpc.start()

    def Supervise(  # noqa: N802  # the name on the wire
        self, request_iterator: Iterator[pb.ControllerMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.SupervisionMessage]:
        """The controller's stream. A new one replaces the one before, and hears again what that has not seen."""
        first = next(request_iterator)
        refusal = self._refusal(first.hello.fence, first.hello.token)
        if refusal:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
        threading.Thread(target=self._obey, args=(request_iterator,), daemon=True).start()
        with self._news:
            caller = self._caller = object()
            again = list(self._unseen)
        yield from again
        while context.is_active() and not self._stopped:
            with self._news:
                self._news.wait_for(lambda: self._stopped or self._is_urgent, timeout=self._pause)
                if self._caller is not caller:
                    return
                report = self._take_report()
                if report.ByteSize():
                    self._number += 1
                    report.number = self._number
                    self._unseen.append(report)
            if report.number:
                yield report

    def _take_report(self) -> pb.SupervisionMessage:
        """Collect everything that the controller has not been told. The caller holds the lock."""
        report, self._report, self._is_urgent = self._report, pb.SupervisionMessage(), False
        if records := self._make_records():
            report.records.CopyFrom(convert.records_to_proto(records))
        if self._newest is not None and not self._is_kept(self._newest):
            report.newest.CopyFrom(convert.records_to_proto(records_of([self._newest], self._layout)))
        self._newest = None
        return report

    def _make_records(self) -> list[StepRecord]:
        """Of the steps that are for the history. The caller holds the lock."""
        records, self._completed = records_of(self._completed, self._layout), []
        self._unstored.extend(records)
        return records

    def _obey(self, messages: Iterable[pb.ControllerMessage]) -> None:
        try:
            for message in messages:
                self._pause = message.report_seconds or self._pause
                if message.WhichOneof("message") == "stored":
                    self._forget(message.stored)
                elif message.WhichOneof("message") == "seen":
                    self._let_go(message.seen)
                elif message.HasField("command"):
                    self._obey_command(message.command.verb, message.command.worker)
        except grpc.RpcError:
            pass  # the controller is gone; the job goes on

    def _forget(self, step: int) -> None:
        with self._news:
            while self._unstored and self._unstored[0].step <= step:
                self._unstored.popleft()

    def _let_go(self, number: int) -> None:
        with self._news:
            while self._unseen and self._unseen[0].number <= number:
                self._unseen.popleft()

    def _tell(self, add: Callable[[pb.SupervisionMessage], object]) -> None:
        with self._news:
            add(self._report)
            self._is_urgent = True
            self._news.notify()

    def tell_step(self, completed: CompletedStep) -> None:
        """A step was made."""
        with self._news:
            self._newest = completed
            if not self._stepped:  # somebody waits for it
                self._stepped = self._is_urgent = True
                self._news.notify()
            if self._is_kept(completed):
                self._completed.append(completed)
                if len(self._completed) > MAX_UNSTORED:  # no controller is connected
                    self._make_records()

    def _is_kept(self, completed: CompletedStep) -> bool:
        """Whether a step is for the history: every so many, and those that something is to be said of."""
        decision = completed.decision
        return decision.step % self._record_every == 0 or completed.outlier is not None or not decision.apply

    def unstored(self) -> list[StepRecord]:
        """The records for the history that no controller has stored yet, as far as is known here."""
        with self._news:
            return [*self._unstored, *records_of(self._completed, self._layout)]

    def tell_evaluation(self, step: int, metrics: dict[str, float], *, is_best: bool) -> None:
        """An evaluation is done."""
        message = pb.Evaluation(step=step, metrics=metrics, is_best=is_best)
        self._tell(lambda report: report.evaluations.append(message))

    def tell_checkpoint(self, saved: Saved) -> None:
        """A checkpoint is on disk, or could not be written."""
        message = pb.CheckpointSaved(
            step=saved.step,
            parameters_sha256=saved.parameters_sha256,
            state_sha256=saved.state_sha256,
            problem=saved.problem,
        )
        self._tell(lambda report: report.checkpoints.append(message))

    def tell_member(self, worker: str, change: str) -> None:
        """A worker joined, left, or hangs."""
        self._tell(lambda report: report.members.append(pb.MembershipChanged(worker=worker, change=change)))

    def tell_printed(self, worker: str, lines: Iterable[pb.PrintedLine]) -> None:
        """User code has printed something. Without a controller for long, the first lines are kept."""
        with self._news:
            for line in lines:
                if len(self._report.printed) < MAX_PRINTED:
                    line.worker = worker
                    self._report.printed.append(line)

    def tell_phase(self, change: PhaseChanged, step: int) -> None:
        """The leader's phase is another one."""
        failure = convert.failure_to_proto(change.failure) if change.failure is not None else None
        phase = pb.PhaseChanged(
            phase=change.phase, reason=change.reason, step=step, failure=failure, worker=change.worker
        )
        self._tell(lambda report: report.phases.append(phase))

    def close(self) -> None:
        """End the stream."""
        with self._news:
            self._stopped = True
            self._news.notify_all()
        self._grpc.stop(grace=0.5)


def _ignore(verb: str, worker: str) -> None:
    """Nobody leads yet."""
