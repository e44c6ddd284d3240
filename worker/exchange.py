"""A worker's side of the exchange: one stream to each server, gradients out, parameters in."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ps import convert
from ps.config import JobConfig, ServerAddress
from ps.layout import Shard, shards
from ps.messages import PROTOCOL, Assign, Failure, Push, Round
from ps.peer import chunks, place
from ps.segment import Segment
from ps.stream import Connection, Role, StreamError, call
from steepest.v1 import exchange_pb2 as pb


class RefusedError(Exception):
    """A server does not let this worker in. The message says why."""


@dataclass
class _Link:
    """The stream to one server. version: of the parameters that came in chunks."""

    shard: Shard
    connection: Connection[pb.ServerMessage]
    replies: Iterator[pb.ServerMessage]
    slots_mapped: bool = False
    parameters: Segment | None = None
    version: int = -1
    is_gone: bool = False


class Exchange:
    """Joins a job. Followers first, the leader last: when it deals work, all the servers know this worker.

    addresses: of all servers, the leader first. slots: the memory the gradients lie in.

    Raises RefusedError, or OSError when a server cannot be reached.
    """

    def __init__(
        self, config: JobConfig, worker: str, generation: int, addresses: Sequence[ServerAddress], slots: Segment
    ) -> None:
        self._layout = config.layout()
        inline = config.spec.placement.transport == "inline"
        hello = pb.Hello(
            fence=pb.Fence(job=config.job, incarnation=config.incarnation),
            token=config.token,
            protocol=PROTOCOL,
            worker=worker,
            generation=generation,
            layout_sha256=config.model.sha256(),
            slots=None if inline else convert.segment_to_proto(slots.reference),
        )
        self._links: list[_Link] = []
        for shard, address in reversed(list(zip(shards(self._layout, len(addresses)), addresses, strict=True))):
            self._links.insert(0, self._open(shard, address, hello, inline=inline))
        self._leader = self._links[0]
        shared = self._leader.parameters
        self._is_shared = shared is not None and all(
            link.parameters is not None and link.parameters.reference == shared.reference for link in self._links
        )
        numel, dtype = self._layout.numel, self._layout.dtype
        self.parameters = (
            shared.tensor(dtype, numel) if shared is not None and self._is_shared else torch.zeros(numel, dtype=dtype)
        )
        self._arrival = threading.Condition()
        for link in self._links:
            link.connection.sink = partial(self._sink, link)
        for link in self._links[1:]:
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def _open(self, shard: Shard, address: ServerAddress, hello: pb.Hello, *, inline: bool) -> _Link:
        connection = call(address, Role.WORKER, pb.ServerMessage.FromString, inline=inline)
        connection.send(pb.WorkerMessage(hello=hello))
        link = _Link(shard, connection, iter(connection))
        first = next(link.replies, None)
        if first is None:
            raise ConnectionError(f"server {shard.index} is gone")
        if first.WhichOneof("message") != "welcome":
            connection.release()
            raise RefusedError(f"server {shard.index}: {first.refusal.reason}")
        link.slots_mapped = first.welcome.slots_mapped
        if first.welcome.HasField("parameters"):
            link.parameters = Segment.open(convert.segment_from_proto(first.welcome.parameters))
            if link.parameters is None:
                raise RefusedError(f"server {shard.index}: its parameters cannot be mapped; use transport = inline")
        return link

    def _sink(self, link: _Link, message: pb.ServerMessage, num_bytes: int) -> memoryview:
        """Where a piece of the parameters belongs."""
        if message.WhichOneof("message") != "chunk":
            raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")
        return place(self.parameters[link.shard.start : link.shard.stop], message.chunk, num_bytes)

    def _listen(self, link: _Link) -> None:
        try:
            for message in link.replies:
                self._on_chunk(link, message)
        finally:
            with self._arrival:
                link.is_gone = True
                self._arrival.notify()

    def _on_chunk(self, link: _Link, message: pb.ServerMessage) -> None:
        if message.WhichOneof("message") == "chunk" and message.chunk.last:
            with self._arrival:
                link.version = message.chunk.step
                self._arrival.notify()

    def assignments(self) -> Iterator[Assign]:
        """What the leader asks for, one at a time, until it dismisses this worker or is gone.

        Raises ConnectionError for that, RefusedError when a server finds fault with this worker.
        """
        for message in self._leader.replies:
            match message.WhichOneof("message"):
                case "assign":
                    assign = convert.assign_from_proto(message.assign)
                    if assign.kind != Round.INITIALIZE:
                        self._pull(assign.step)
                    yield assign
                case "chunk":
                    self._on_chunk(self._leader, message)
                case "refusal":
                    raise RefusedError(f"server 0: {message.refusal.reason}")
                case "stop":
                    return
        raise ConnectionError("the leader is gone")

    def _pull(self, version: int) -> None:
        """Have this version in `parameters`. The leader has said that every server holds it."""
        if self._is_shared:
            return
        for link in self._links:
            if link.parameters is not None:
                flat = link.parameters.tensor(self._layout.dtype, self._layout.numel)
                part = slice(link.shard.start, link.shard.stop)
                self.parameters[part] = flat[part]
                continue
            with self._arrival:
                self._arrival.wait_for(lambda link=link: link.is_gone or link.version >= version)  # type: ignore[misc]
                if link.version < version:
                    raise ConnectionError(f"server {link.shard.index} is gone")

    def push(self, push: Push, slots: torch.Tensor) -> None:
        """Give an answer to every server that waits for it.

        slots: shape (slots, layout.numel); what is pushed stays as it is until the next step.
        """
        if push.kind in (Round.TRAIN, Round.INITIALIZE):
            followers = self._links[1:]
            to_followers = convert.push_to_proto(push._replace(leaves=(), buffers=None)) if followers else None
            for link in followers:
                self._send_gradients(link, push, slots)
                link.connection.send(pb.WorkerMessage(push=to_followers))
            self._send_gradients(self._leader, push, slots)
        self._leader.connection.send(pb.WorkerMessage(push=convert.push_to_proto(push)))

    def _send_gradients(self, link: _Link, push: Push, slots: torch.Tensor) -> None:
        if link.slots_mapped:
            return
        for node in push.nodes:
            if node.slot is not None:
                flat = slots[node.slot, link.shard.start : link.shard.stop]
                for chunk, data in chunks(flat, step=push.step, slot=node.slot):
                    link.connection.send(pb.WorkerMessage(chunk=chunk), data)

    def fail(self, failure: Failure) -> None:
        """Tell the leader that user code failed."""
        self._leader.connection.send(pb.WorkerMessage(failure=convert.failure_to_proto(failure)))

    def close(self) -> None:
        """End all streams in good order."""
        for link in self._links:
            link.connection.close()
