"""The leader's side of the controller's stream: its commands, and all that it has not been told yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import grpc

from ps import convert
from ps.config import GRPC_OPTIONS
from ps.leader import PhaseChanged
from ps.messages import StepRecord
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import exchange_pb2_grpc as pb_grpc

REPORT_SECONDS = 0.1
MAX_STREAMS = 4


class Supervisor(pb_grpc.ParameterExchangeServiceServicer):
    """Listens for the controller on gRPC.

    refusal: why a peer is not let in, or nothing. obey: carries out a command, in a thread of the stream.
    """

    def __init__(self, bind: str, refusal: Callable[[pb.Fence, str], str], obey: Callable[[pb.Command], None]) -> None:
        self._refusal = refusal
        self._obey_command = obey
        self._news = threading.Condition()
        self._report = pb.SupervisionMessage()
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
            with self._news:
                self._news.wait_for(lambda: self._stopped or self._report.ByteSize() > 0, timeout=1.0)
                report, self._report = self._report, pb.SupervisionMessage()
            if report.ByteSize():
                yield report
            time.sleep(REPORT_SECONDS)

    def _obey(self, commands: Iterable[pb.ControllerMessage]) -> None:
        try:
            for message in commands:
                self._obey_command(message.command)
        except grpc.RpcError:
            pass  # the controller is gone; the job goes on

    def _tell(self, add: Callable[[pb.SupervisionMessage], object]) -> None:
        with self._news:
            add(self._report)
            self._news.notify()

    def tell_record(self, record: StepRecord) -> None:
        """A step was made."""
        self._tell(lambda report: report.records.append(convert.record_to_proto(record)))

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
