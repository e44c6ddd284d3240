"""The leader's side of the controller's stream: its commands, and all that it has not been told yet."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import grpc

from ps import convert
from ps.config import GRPC_OPTIONS
from ps.effects import PhaseChanged
from ps.messages import StepRecord
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import exchange_pb2_grpc as pb_grpc

REPORT_SECONDS = 0.1
MAX_STREAMS = 4
MAX_UNSTORED = 100_000  # records kept while no controller is there to take them


class Supervisor(pb_grpc.ParameterExchangeServiceServicer):
    """Listens for the controller on gRPC.

    refusal: why a peer is not let in, or nothing. obey: carries out a command, in a thread of the stream.
    record_every: the records of every so many steps are for the history.
    """

    def __init__(
        self,
        bind: str,
        refusal: Callable[[pb.Fence, str], str],
        obey: Callable[[pb.Command], None],
        *,
        record_every: int,
    ) -> None:
        self._refusal = refusal
        self._obey_command = obey
        self._record_every = record_every
        self._news = threading.Condition()
        self._report = pb.SupervisionMessage()
        self._has_news = False
        self._unstored: deque[StepRecord] = deque(maxlen=MAX_UNSTORED)
        self._stopped = False
        self._grpc = grpc.server(futures.ThreadPoolExecutor(MAX_STREAMS), options=GRPC_OPTIONS)
        pb_grpc.add_ParameterExchangeServiceServicer_to_server(self, self._grpc)
        self.address = f"{bind}:{self._grpc.add_insecure_port(f'{bind}:0')}"
        self._grpc.start()

    def Supervise(  # noqa: N802  # the name on the wire
        self, request_iterator: Iterator[pb.ControllerMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.SupervisionMessage]:
        """The controller's stream."""
        first = next(request_iterator)
        refusal = self._refusal(first.hello.fence, first.hello.token)
        if refusal:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
        threading.Thread(target=self._obey, args=(request_iterator,), daemon=True).start()
        while context.is_active() and not self._stopped:
            report = None
            with self._news:
                if self._news.wait_for(lambda: self._stopped or self._has_news, timeout=1.0):
                    report, self._report, self._has_news = self._report, pb.SupervisionMessage(), False
            if report is not None:
                yield report
            time.sleep(REPORT_SECONDS)

    def _obey(self, messages: Iterable[pb.ControllerMessage]) -> None:
        try:
            for message in messages:
                if message.WhichOneof("message") == "stored":
                    self._forget(message.stored)
                else:
                    self._obey_command(message.command)
        except grpc.RpcError:
            pass  # the controller is gone; the job goes on

    def _forget(self, step: int) -> None:
        with self._news:
            while self._unstored and self._unstored[0].step <= step:
                self._unstored.popleft()

    def _tell(self, add: Callable[[pb.SupervisionMessage], object]) -> None:
        with self._news:
            add(self._report)
            self._has_news = True
            self._news.notify()

    def tell_record(self, record: StepRecord) -> None:
        """A step was made."""
        if record.step % self._record_every:
            self._tell(lambda report: report.newest.CopyFrom(convert.record_to_proto(record)))
            return
        self._unstored.append(record)
        self._tell(lambda report: report.records.append(convert.record_to_proto(record)))

    def unstored(self) -> list[StepRecord]:
        """The records for the history that no controller has stored yet, as far as is known here."""
        with self._news:
            return list(self._unstored)

    def tell_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation is done."""
        self._tell(lambda report: report.evaluations.append(pb.Evaluation(step=step, metrics=metrics)))

    def tell_checkpoint(self, saved: pb.CheckpointSaved) -> None:
        """A checkpoint is on disk, or could not be written."""
        self._tell(lambda report: report.checkpoints.append(saved))

    def tell_member(self, worker: str, change: str) -> None:
        """A worker joined, left, or hangs."""
        self._tell(lambda report: report.members.append(pb.MembershipChanged(worker=worker, change=change)))

    def tell_phase(self, change: PhaseChanged, step: int) -> None:
        """The leader's phase is another one."""
        failure = convert.failure_to_proto(change.failure) if change.failure is not None else None
        phase = pb.PhaseChanged(
            phase=change.phase, reason=change.reason, step=step, failure=failure, worker=change.worker
        )
        self._tell(lambda report: report.phases.append(phase))

    def stop(self) -> None:
        """End the stream."""
        with self._news:
            self._stopped = True
            self._news.notify_all()
        self._grpc.stop(grace=0.5)
