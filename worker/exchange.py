"""A worker's side of the exchange: one stream to each server, gradients out, parameters in.

A stream is a local socket to a server on the same host, else gRPC.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

import grpc
import torch

from ps import convert
from ps.config import GRPC_OPTIONS, JobConfig, ServerAddress
from ps.layout import Shard, shards
from ps.local import Connection, connect
from ps.messages import PROTOCOL, Assign, Failure, Push, Round
from ps.peer import chunks
from ps.segment import Segment
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import exchange_pb2_grpc as pb_grpc


class RefusedError(Exception):
    """A server does not let this worker in. The message says why."""


@dataclass
class _Link:
    """The stream to one server."""

    shard: Shard
    send: Callable[[pb.WorkerMessage], None]
    replies: Iterator[pb.ServerMessage]
    close: Callable[[], None]
    slots_mapped: bool = False
    parameters: Segment | None = None
    version: int = -1
    chunks: SimpleQueue[pb.Chunk | None] = field(default_factory=SimpleQueue)


class Exchange:
    """Joins a job. Followers first, the leader last: when it deals work, all the servers know this worker.

    addresses: of all servers, the leader first. slots: the memory the gradients lie in.

    Raises RefusedError, or grpc.RpcError when a server cannot be reached.
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
            self._links.insert(0, self._open(shard, address, hello, local=not inline))
        self._leader = self._links[0]
        shared = self._leader.parameters
        self._is_shared = shared is not None and all(
            link.parameters is not None and link.parameters.reference == shared.reference for link in self._links
        )
        numel, dtype = self._layout.numel, self._layout.dtype
        self.parameters = (
            shared.tensor(dtype, numel) if shared is not None and self._is_shared else torch.zeros(numel, dtype=dtype)
        )
        for link in self._links[1:]:
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def _open(self, shard: Shard, address: ServerAddress, hello: pb.Hello, *, local: bool) -> _Link:
        connection = connect(address.local, pb.ServerMessage.FromString) if local else None
        link = _over_grpc(shard, address.network) if connection is None else _over_socket(shard, connection)
        link.send(pb.WorkerMessage(hello=hello))
        first = next(link.replies, None)
        if first is None:
            raise ConnectionError(f"server {shard.index} is gone")
        if first.WhichOneof("message") != "welcome":
            link.close()
            raise RefusedError(f"server {shard.index}: {first.refusal.reason}")
        link.slots_mapped = first.welcome.slots_mapped
        if first.welcome.HasField("parameters"):
            link.parameters = Segment.open(convert.segment_from_proto(first.welcome.parameters))
            if link.parameters is None:
                raise RefusedError(f"server {shard.index}: its parameters cannot be mapped; use transport = inline")
        return link

    def _listen(self, link: _Link) -> None:
        with contextlib.suppress(grpc.RpcError):
            for message in link.replies:
                if message.WhichOneof("message") == "chunk":
                    link.chunks.put(message.chunk)
        link.chunks.put(None)

    def assignments(self) -> Iterator[Assign]:
        """What the leader asks for, one at a time, until it dismisses this worker or is gone."""
        try:
            for message in self._leader.replies:
                match message.WhichOneof("message"):
                    case "assign":
                        assign = convert.assign_from_proto(message.assign)
                        if assign.kind != Round.INITIALIZE:
                            self._pull(assign.step)
                        yield assign
                    case "chunk":
                        self._write(self._leader, message.chunk)
                    case "stop":
                        return
        except grpc.RpcError as error:
            raise ConnectionError(f"the leader is gone: {error.code()}") from None
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
            while link.version < version:
                chunk = link.chunks.get()
                if chunk is None:
                    raise ConnectionError(f"server {link.shard.index} is gone")
                self._write(link, chunk)

    def _write(self, link: _Link, chunk: pb.Chunk) -> None:
        if chunk.data:
            values = torch.frombuffer(bytearray(chunk.data), dtype=self._layout.dtype)
            start = link.shard.start + chunk.offset // self._layout.itemsize
            self.parameters[start : start + values.numel()] = values
        if chunk.last:
            link.version = chunk.step

    def push(self, push: Push, slots: torch.Tensor) -> None:
        """Give an answer to every server that waits for it. slots: shape (slots, layout.numel)."""
        to_followers = convert.push_to_proto(replace(push, leaves=(), buffers=None))
        if push.kind in (Round.TRAIN, Round.INITIALIZE):
            for link in self._links[1:]:
                self._send_gradients(link, push, slots)
                link.send(pb.WorkerMessage(push=to_followers))
            self._send_gradients(self._leader, push, slots)
        self._leader.send(pb.WorkerMessage(push=convert.push_to_proto(push)))

    def _send_gradients(self, link: _Link, push: Push, slots: torch.Tensor) -> None:
        if link.slots_mapped:
            return
        for node in push.nodes:
            if node.slot is not None:
                flat = slots[node.slot, link.shard.start : link.shard.stop]
                for chunk in chunks(flat, step=push.step, slot=node.slot):
                    link.send(pb.WorkerMessage(chunk=chunk))

    def fail(self, failure: Failure) -> None:
        """Tell the leader that user code failed."""
        self._leader.send(pb.WorkerMessage(failure=convert.failure_to_proto(failure)))

    def close(self) -> None:
        """End all streams in good order."""
        for link in self._links:
            link.close()


def _over_grpc(shard: Shard, address: str) -> _Link:
    channel = grpc.insecure_channel(address, options=GRPC_OPTIONS)
    outbox: SimpleQueue[pb.WorkerMessage | None] = SimpleQueue()
    stub = pb_grpc.ParameterExchangeServiceStub(channel)
    replies = stub.Exchange(iter(outbox.get, None), wait_for_ready=True)

    def close() -> None:
        outbox.put(None)
        channel.close()

    return _Link(shard, outbox.put, replies, close)


def _over_socket(shard: Shard, connection: Connection[pb.ServerMessage]) -> _Link:
    return _Link(shard, connection.send, iter(connection), connection.close)
