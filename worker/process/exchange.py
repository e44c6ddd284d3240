"""A worker's side of the exchange: one stream to each server, gradients out, parameters in."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from ps.job.config import JobConfig
from ps.job.topology import Contact, contacts
from ps.memory.host import host_identity
from ps.memory.segment import Segment
from ps.parameters.layout import Shard, shards
from ps.server.residuals import NAME
from ps.step.messages import PROTOCOL, Assign, Failure, Printed, Push, Ready, Round
from ps.wire import convert
from ps.wire.address import ServerAddress
from ps.wire.chunks import chunks, place
from ps.wire.connection import Connection, Role, StreamError, call
from ps.wire.in_process import InProcess
from ps.wire.outgoing import Outgoing
from steepest.v1 import exchange_pb2 as pb
from worker.gradients.compressor import Compressor
from worker.gradients.slots import Slots


class Beside(NamedTuple):
    """A server in this process. call: opens this worker's stream to it."""

    server: int
    call: Callable[[], InProcess[pb.ServerMessage]]


class RefusedError(Exception):
    """A server does not let this worker in. The message says why."""


@dataclass
class _Link:
    """The stream to one server. shard: what the server owns, None when that is nothing.

    outgoing: of gradient sums, if they go over this stream. version: of the shard's parameters that came in chunks.
    arrived: of all parameters from other hosts. update: the payload that is coming in, and how much of it has.
    """

    server: int
    contact: Contact
    shard: Shard | None
    connection: Connection[pb.ServerMessage] | InProcess[pb.ServerMessage]
    outgoing: Outgoing | None
    version: int = -1
    arrived: int = -1
    is_gone: bool = False
    update: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    update_bytes: int = 0


class Exchange:
    """Joins a job. The leader comes last: when it deals work, all the servers know this worker.

    addresses: of all servers, the leader first. slots: the memory the gradients lie in. compressor: of gradients.
    beside: the server in this process, if there is one on its GPU.

    Raises RefusedError, or OSError when a server cannot be reached.
    """

    def __init__(
        self,
        config: JobConfig,
        worker: str,
        generation: int,
        addresses: Sequence[ServerAddress],
        slots: Segment,
        compressor: Compressor | None = None,
        beside: Beside | None = None,
    ) -> None:
        self._compressor = compressor
        self._credentials = config.credentials
        self._beside = beside
        self._pull_codec = config.pull_codec()
        layout = config.layout()
        host = host_identity()
        hello = pb.Hello(
            fence=pb.Fence(job=config.job, incarnation=config.incarnation),
            token=config.token,
            protocol=PROTOCOL,
            worker=worker,
            generation=generation,
            layout_sha256=config.model.sha256(),
            host=host,
        )
        inline = config.spec.is_inline
        cut = dict(enumerate(shards(layout, config.num_servers)))
        self._shared: Segment | None = None  # the host's parameters
        self._links: list[_Link] = []
        for server, contact in reversed(
            contacts([address.host for address in addresses], host, len(cut), inline=inline).items()
        ):
            self._links.insert(0, self._open(server, contact, cut.get(server), addresses[server], hello, slots))
        self._beside = None  # else what sends from another thread would keep this worker's memory
        self._leader = self._links[0]
        numel, dtype = layout.numel, layout.dtype
        self.parameters = torch.zeros(numel, dtype=dtype) if self._shared is None else self._shared.tensor(dtype, numel)
        # With servers elsewhere, the first one here says when their parameters have arrived.
        is_alone = all(address.host == host for address in addresses[: len(cut)])
        here = [link for link in self._links if link.contact == Contact.SHARED]
        self._home = here[0] if here and not is_alone else None
        self._arrival = threading.Condition()
        self._put_back: deque[pb.ServerMessage] = deque()
        for link in self._links:
            link.connection.sink = partial(self._sink, link)
        for link in self._links[1:]:
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def _open(
        self,
        server: int,
        contact: Contact,
        shard: Shard | None,
        address: ServerAddress,
        hello: pb.Hello,
        slots: Segment,
    ) -> _Link:
        connection: Connection[pb.ServerMessage] | InProcess[pb.ServerMessage]
        if self._beside is not None and server == self._beside.server and contact == Contact.SHARED:
            connection = self._beside.call()
        else:
            connection = call(
                address,
                Role.WORKER,
                pb.ServerMessage.FromString,
                inline=contact != Contact.SHARED,
                credentials=self._credentials,
            )
        shared = convert.segment_to_proto(slots.reference) if contact == Contact.SHARED else None
        own = pb.Hello(slots=shared, control_only=contact == Contact.CONTROL)
        own.MergeFrom(hello)
        connection.send(pb.WorkerMessage(hello=own))
        first = connection.next_message()
        if first is None:
            raise ConnectionError(f"server {server} is gone")
        if first.WhichOneof("message") != "welcome":
            connection.release()
            raise RefusedError(f"server {server}: {first.refusal.reason}")
        if contact == Contact.SHARED:
            self._shared = Segment.open(convert.segment_from_proto(first.welcome.parameters))
            if self._shared is None or not first.welcome.slots_mapped:
                raise RefusedError(
                    f"server {server}: memory cannot be shared with it; use placement.transport = inline"
                )
        outgoing = None if shard is None or contact != Contact.INLINE else Outgoing(shard, connection.send)
        return _Link(server, contact, shard, connection, outgoing)

    def _sink(self, link: _Link, message: pb.ServerMessage, num_bytes: int) -> memoryview:
        """Where a piece of the parameters, of an update to them or of a residual belongs."""
        chunk = message.chunk
        if message.WhichOneof("message") != "chunk" or link.shard is None or link.contact != Contact.INLINE:
            raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")
        if chunk.name and self._compressor is not None and link is self._leader:
            return place(self._compressor.residual(chunk.slot), chunk, num_bytes)
        if not chunk.compressed:
            return place(self.parameters[link.shard.start : link.shard.stop], chunk, num_bytes)
        if not len(link.update) and self._pull_codec is not None:
            first, last = self._pull_codec.span(link.shard.start, link.shard.stop)
            link.update = torch.empty(last - first, dtype=torch.uint8)
        link.update_bytes += num_bytes
        return place(link.update, chunk, num_bytes)

    def _take_update(self, link: _Link) -> None:
        """Add an update that is here to the parameters; an empty one says that they stay as they are.

        Raises StreamError for one that is not whole.
        """
        arrived, link.update_bytes = link.update_bytes, 0
        if arrived and arrived != len(link.update):
            raise StreamError(f"an update has {arrived} bytes instead of {len(link.update)}")
        if arrived and self._pull_codec is not None and link.shard is not None:
            own = self.parameters[link.shard.start : link.shard.stop]
            self._pull_codec.decode(link.update, own, link.shard.start)

    def _listen(self, link: _Link) -> None:
        try:
            for message in link.connection:
                self._on_news(link, message)
        finally:
            with self._arrival:
                link.is_gone = True
                self._arrival.notify()

    def _on_news(self, link: _Link, message: pb.ServerMessage) -> bool:
        """Note which parameters are there; whether the message was about that."""
        match message.WhichOneof("message"):
            case "chunk":
                if message.chunk.last and not message.chunk.name:
                    if message.chunk.compressed:
                        self._take_update(link)
                    with self._arrival:
                        link.version = message.chunk.step
                        self._arrival.notify()
            case "arrived":
                with self._arrival:
                    link.arrived = message.arrived
                    self._arrival.notify()
            case _:
                return False
        return True

    def assignments(self) -> Iterator[Assign]:
        """What the leader asks for, one at a time, until it dismisses this worker or is gone.

        Raises ConnectionError for that, RefusedError when a server finds fault with this worker.
        """
        while True:
            message = self._next()
            match message.WhichOneof("message"):
                case "assign":
                    assign = convert.assign_from_proto(message.assign)
                    if assign.kind == Round.INITIALIZE or self._pull(assign.version):
                        yield assign
                case "collect":
                    self._hand_in(message.collect.parts)
                case "refusal":
                    raise RefusedError(f"server 0: {message.refusal.reason}")
                case "stop":
                    return

    def _hand_in(self, parts: Iterable[int]) -> None:
        """Give residuals to the leader."""
        assert self._compressor is not None  # noqa: S101  # only a job that compresses has any
        for part in parts:
            for chunk, data in chunks(self._compressor.residual(part), slot=part, name=NAME):
                self._leader.connection.send(pb.WorkerMessage(chunk=chunk), data)

    def _next(self) -> pb.ServerMessage:
        """The leader's next message that is not about parameters."""
        if self._put_back:
            return self._put_back.popleft()
        while self._on_news(self._leader, message := self._receive()):
            pass
        return message

    def _receive(self) -> pb.ServerMessage:
        message = self._leader.connection.next_message()
        if message is None:
            raise ConnectionError("the leader is gone")
        return message

    def _pull(self, version: int) -> bool:
        """Have this version, which every server holds by now, in `parameters`. False: dismissed meanwhile.

        Raises ConnectionError when a server is gone.
        """
        if self._home is self._leader:
            while self._leader.arrived < version:
                message = self._receive()
                if not self._on_news(self._leader, message):
                    self._put_back.append(message)
                    return False
            return True
        if self._home is not None:
            self._await(self._home, lambda link: link.arrived >= version)
        for link in self._links:
            if link.contact == Contact.INLINE:
                self._await(link, lambda link: link.version >= version)
        return True

    def _await(self, link: _Link, is_there: Callable[[_Link], bool]) -> None:
        with self._arrival:
            self._arrival.wait_for(lambda: link.is_gone or is_there(link))
        if not is_there(link):
            raise ConnectionError(f"server {link.server} is gone")

    @property
    def memory(self) -> Segment | None:
        """What processes of this job share on this host, if a server is on it: the parameters, then the constants."""
        return self._shared

    @property
    def has_network(self) -> bool:
        """Whether gradients leave this host, so that it pays to begin before they are complete."""
        return self._home is not None or any(link.outgoing is not None for link in self._links)

    def begin(self, ready: Ready, total: torch.Tensor) -> None:
        """Send a part of a sum that is still computed, not compressed. total: the slot, shape (layout.numel,)."""
        if self._home is not None:
            self._home.connection.send(pb.WorkerMessage(ready=convert.ready_to_proto(ready)))
        for link in self._links:
            if link.outgoing is not None:
                link.outgoing.part(ready.step, ready.slot, total, ready.start, ready.stop)

    def push(self, push: Push, slots: Slots) -> None:
        """Give an answer to every server that waits for it.

        slots: with what is not compressed; what is pushed stays as it is until the next step.
        """
        if push.kind in (Round.TRAIN, Round.INITIALIZE):
            followers = self._links[1:]
            to_followers = convert.push_to_proto(push._replace(leaves=(), buffers=None)) if followers else None
            for link in followers:
                self._send_gradients(link, push, slots)
                link.connection.send(pb.WorkerMessage(push=to_followers))
            self._send_gradients(self._leader, push, slots)
        self._leader.connection.send(pb.WorkerMessage(push=convert.push_to_proto(push)))

    def _send_gradients(self, link: _Link, push: Push, slots: Slots) -> None:
        if link.outgoing is None or link.shard is None:
            return
        for node in push.nodes:
            if node.slot is None:
                continue
            if self._compressor is None or push.kind != Round.TRAIN:
                link.outgoing.rest(push.step, node.slot, slots.shared(node.slot))
                continue
            payload = self._compressor.payload_for(node.slot, link.shard)
            for chunk, data in chunks(payload, step=push.step, slot=node.slot, compressed=True):
                link.connection.send(pb.WorkerMessage(chunk=chunk), data)

    def show(self, lines: Iterable[Printed]) -> None:
        """Tell the leader what user code printed, from any thread."""
        self._leader.connection.send(pb.WorkerMessage(printed=convert.printed_to_proto(lines)))

    def fail(self, failure: Failure) -> None:
        """Tell the leader that user code failed."""
        self._leader.connection.send(pb.WorkerMessage(failure=convert.failure_to_proto(failure)))

    def close(self) -> None:
        """End all streams in good order."""
        for link in self._links:
            link.connection.close()
