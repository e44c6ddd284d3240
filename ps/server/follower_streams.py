"""The leader's end of its followers' streams."""

from __future__ import annotations

import logging

from ps.server.doorman import Doorman
from ps.server.guard import Guard
from ps.server.leader_runner import LeaderRunner
from ps.server.shard_links import RemoteShard, ShardLinks
from ps.step.messages import Round
from ps.wire import convert
from ps.wire.connection import Connection
from steepest.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)


class FollowerStreams:
    """Lets followers in and carries their messages to the leader."""

    def __init__(self, runner: LeaderRunner, shards: ShardLinks, doorman: Doorman, guard: Guard) -> None:
        self._runner = runner
        self._shards = shards
        self._doorman = doorman
        self._guard = guard

    def serve(self, connection: Connection[pb.FollowerMessage]) -> None:
        """Serve a follower until its stream ends, which the controller sees and starts a new incarnation."""
        enlist = self._doorman.greet_follower(connection)
        if enlist is None:
            return
        server = enlist.server
        try:
            self._enlist(server, connection)
            for message in connection:
                with self._guard.lock:
                    self._on_message(server, message)
        except Exception as error:
            log.exception("message of server %d", server)
            self._guard.fail(f"the leader failed on a message of server {server}: {error!r}")
        connection.release()

    def _enlist(self, server: int, connection: Connection[pb.FollowerMessage]) -> None:
        connection.sink = lambda message, num_bytes: self._runner.state_sink(server, message.state, num_bytes)
        with self._guard.lock:
            self._shards.add(server, RemoteShard(connection.send))
            connection.send(pb.LeaderMessage(enlisted=pb.Enlisted()))

    def _on_message(self, server: int, message: pb.FollowerMessage) -> None:
        match message.WhichOneof("message"):
            case "report":
                report = message.report
                sums = convert.sums_from_bytes(report.segment_sums)
                measured = convert.signals_from_bytes(report.signals if report.HasField("signals") else None, 3)
                self._runner.report(server, report.step, Round(report.kind), sums, measured)
            case "applied":
                applied = message.applied
                signals = convert.update_signals_from_proto(applied)
                self._runner.applied(server, applied.step, applied.clipped_sum, signals)
            case "state" if not message.state.name:
                self._runner.state_sent(server)
