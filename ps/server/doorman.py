"""Who is let in to a server."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from ps.job.config import JobConfig
from ps.step.messages import PROTOCOL
from ps.wire.connection import Connection, Message, Received, StreamError
from ps.wire.in_process import InProcess
from steepest.v1 import exchange_pb2 as pb

READY_SECONDS = 60.0  # for the servers of a job to find each other


class Doorman:
    """Checks the first message of every stream. Workers wait at the door until `open`."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self._ready = threading.Event()

    def open(self) -> None:
        """The server is ready for workers."""
        self._ready.set()

    def refusal(self, fence: pb.Fence, token: str) -> str:
        """Why a caller is not let in, or nothing."""
        if not secrets.compare_digest(token.encode(), self._config.token.encode()):
            return "wrong token"
        if (fence.job, fence.incarnation) != (self._config.job, self._config.incarnation):
            return f"this is incarnation {self._config.incarnation} of {self._config.job}"
        return ""

    def wait_open(self) -> bool:
        """Whether the server is ready, now or soon."""
        return self._ready.wait(READY_SECONDS)

    def _hello_refusal(self, hello: pb.Hello) -> str:
        refusal = self.refusal(hello.fence, hello.token)
        if refusal:
            return refusal
        if hello.protocol != PROTOCOL:
            return f"the worker speaks protocol {hello.protocol}, this server {PROTOCOL}"
        if hello.layout_sha256 != self._config.model.sha256():
            return "the worker's model is not the one the job was submitted with"
        return "" if self.wait_open() else "the server is not ready"

    def greet(self, connection: Connection[pb.WorkerMessage] | InProcess[pb.WorkerMessage]) -> pb.Hello | None:
        """The hello of a worker or of another host's home; None when it is not let in, and has been told why."""
        first = self._first(connection, lambda message: self._hello_refusal(message.hello), pb.ServerMessage)
        return None if first is None else first.hello

    def greet_follower(self, connection: Connection[pb.FollowerMessage]) -> pb.Enlist | None:
        """The first message of a follower; None as for `greet`."""

        def refusal(message: pb.FollowerMessage) -> str:
            return self.refusal(message.enlist.fence, message.enlist.token)

        first = self._first(connection, refusal, pb.LeaderMessage)
        return None if first is None else first.enlist

    def _first(
        self,
        connection: Connection[Received] | InProcess[Received],
        refusal_of: Callable[[Received], str],
        answer: Callable[..., Message],
    ) -> Received | None:
        """The first message of who is let in, and trusted from then on. answer: makes a message with a refusal."""
        try:
            first = connection.next_message()
        except StreamError:
            first = None
        if first is None:
            connection.release()
            return None
        refusal = refusal_of(first)
        if refusal:
            connection.refuse(answer(refusal=pb.Refusal(reason=refusal)))
            return None
        connection.trust()
        return first
