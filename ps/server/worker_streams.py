"""The streams of workers, and of other hosts' homes, to one server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from ps.memory.segment import Segment, SegmentReference
from ps.parameters.layout import Layout
from ps.server.guard import Guard
from ps.server.home import Home
from ps.server.links import WorkerListener
from ps.server.peer import Peer, Peers
from ps.server.shard_host import NoShard, ShardHost
from ps.server.slots import GpuSlots, InlineSlots, MappedSlots, NoSlots, Slots
from ps.wire import convert
from ps.wire.connection import Connection, HungUpError, StreamError
from ps.wire.hub import Hub
from ps.wire.in_process import InProcess
from steepest.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)

Stream = Connection[pb.WorkerMessage] | InProcess[pb.WorkerMessage]


class WorkerStreams:
    """Lets workers in and carries their messages to shard, home and listener.

    parameters: the host's memory that workers here map. peers: where those that are there are noted.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: SegmentReference,
        shard: ShardHost | NoShard,
        home: Home,
        listener: WorkerListener,
        peers: Peers,
        guard: Guard,
    ) -> None:
        self._layout = layout
        self._parameters = parameters
        self._shard = shard
        self._home = home
        self._listener = listener
        self._peers = peers
        self._guard = guard
        self._hub = Hub()

    def close(self) -> None:
        """Read no more."""
        self._hub.close()

    # -- workers ------------------------------------------------------------------------------------------------------

    def serve(self, hello: pb.Hello, connection: Stream) -> None:
        """Serve a worker: in its own thread if that is in this process, else in the hub or, from afar, in this one."""
        peer = self._admit(hello, connection)
        on_message, on_end = partial(self._on_message, peer), partial(self._on_end, peer, connection)
        if isinstance(connection, InProcess):
            connection.deliver(on_message, on_end)
        elif connection.is_local:
            self._hub.add(connection, on_message, on_end)
        else:
            _read_all(connection, on_message, on_end)

    def _admit(self, hello: pb.Hello, connection: Stream) -> Peer:
        segment = Segment.open(convert.segment_from_proto(hello.slots)) if hello.HasField("slots") else None
        shares = segment is not None and connection.is_local
        shard = self._shard.shard
        slots: Slots = NoSlots()
        if segment is not None:
            slots = MappedSlots(segment, self._layout, shard)
        elif shard is not None and not hello.control_only:
            slots = InlineSlots(shard, self._shard.payload_bytes)
        welcome = pb.Welcome(slots_mapped=segment is not None)
        if shares:
            welcome.parameters.CopyFrom(convert.segment_to_proto(self._parameters))
        gpu = None
        if isinstance(connection, InProcess) and connection.slot is not None and shard is not None:
            gpu = GpuSlots(connection.slot, shard)
        peer = Peer(
            hello.worker,
            connection,
            slots,
            inline_parameters=not shares and not hello.control_only,
            gpu=gpu,
            listener=self._listener,
        )
        with self._guard.lock:
            if hello.worker in self._peers:
                self._listener.replace(hello.worker)
            self._peers[hello.worker] = peer
            self._shard.expose([peer])  # before it is welcome: it may be given work at once
            peer.send(pb.ServerMessage(welcome=welcome))
            self._shard.send_parameters([peer])
            self._home.greet(peer)
            self._listener.join(hello.worker, hello.host)
        return peer

    def _on_message(self, peer: Peer, message: pb.WorkerMessage) -> None:
        with self._guard.lock:
            if self._peers.get(peer.name) is not peer:
                return  # a newer generation of this worker has taken its place
            match message.WhichOneof("message"):
                case "push":
                    push = convert.push_from_proto(message.push)
                    self._shard.take(peer, push)
                    self._home.push(peer, push)
                    self._listener.push(peer.name, push)
                    self._shard.reduce(push)
                case "ready":
                    self._home.begin(peer, convert.ready_from_proto(message.ready))
                case "chunk" if message.chunk.name and message.chunk.last:
                    self._listener.residual(peer.name, message.chunk.slot)
                case "printed":
                    self._listener.printed(peer.name, message.printed.lines)
                case "failure":
                    self._listener.failure(peer.name, convert.failure_from_proto(message.failure))

    def _on_end(self, peer: Peer, connection: Stream, error: Exception) -> None:
        with self._guard.lock:
            if self._peers.get(peer.name) is peer:
                del self._peers[peer.name]
                self._home.flush()
                self._listener.leave(peer.name)
        self._part(peer, connection, error)

    def _part(self, peer: Peer, connection: Stream, error: Exception) -> None:
        """The end of a stream, for whatever reason."""
        if isinstance(error, StreamError):
            log.warning("hanging up on %s: %s", peer.name, error)
            refusal = pb.ServerMessage(refusal=pb.Refusal(reason=str(error)))
            threading.Thread(target=connection.refuse, args=(refusal,), daemon=True).start()
            return
        if not isinstance(error, HungUpError):
            log.error("message of %s", peer.name, exc_info=error)
            self._guard.fail(f"a message of {peer.name} could not be handled: {error!r}")
        connection.release()

    # -- homes of other hosts -----------------------------------------------------------------------------------------

    def serve_relay(self, hello: pb.Hello, connection: Connection[pb.WorkerMessage], relays: Peers) -> None:
        """Serve another host's home, in this thread: gradients in, parameters out. relays: where it is noted."""
        shard = self._shard.shard
        assert shard is not None  # noqa: S101  # homes call servers with a shard only
        peer = Peer(hello.worker, connection, InlineSlots(shard, 0), inline_parameters=True)
        with self._guard.lock:
            relays[peer.name] = peer
            self._shard.send_parameters([peer])
        _read_all(connection, partial(self._on_relay_message, peer), partial(self._part, peer, connection))

    def _on_relay_message(self, peer: Peer, message: pb.WorkerMessage) -> None:
        if message.WhichOneof("message") == "push":
            with self._guard.lock:
                push = convert.push_from_proto(message.push)
                self._shard.take(peer, push)
                self._shard.reduce(push)


def _read_all(
    connection: Connection[pb.WorkerMessage],
    on_message: Callable[[pb.WorkerMessage], None],
    on_end: Callable[[Exception], None],
) -> None:
    """Read a connection to its end, in this thread."""
    try:
        while (message := connection.receive()) is not None:
            on_message(message)
    except Exception as error:
        on_end(error)
