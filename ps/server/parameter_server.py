"""One server of a job: carries messages between sockets and the state machine of its shard.

Messages are handled one at a time, under one lock, in the thread that received them. Server 0 also leads
(ps.server.leader_runner); the others (followers) report to it. The first server of every host is that host's home: its
memory holds the parameters for all workers there, and it speaks for those workers with servers on other hosts
(ps.server.relay). A server beyond the job's number of shards has none, and is a home only.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from ps.checkpoint.files import State, newest_valid
from ps.checkpoint.named_state import flatten, master_of, residuals_of
from ps.job.config import JobConfig
from ps.job.topology import home_of
from ps.memory.gpu import Device
from ps.memory.host import host_identity
from ps.memory.segment import Segment
from ps.numerics.tree import Node
from ps.parameters.layout import shards
from ps.server.collection import parts_of, pieces
from ps.server.leader_runner import TICK_SECONDS, Leading
from ps.server.peer import Peer
from ps.server.relay import Relay
from ps.server.residuals import Residuals
from ps.step.leader import Leader
from ps.step.messages import PROTOCOL, Decision, Outcome, Push, Round
from ps.step.shard import ShardServer
from ps.wire import convert
from ps.wire.address import ServerAddress
from ps.wire.chunks import chunks
from ps.wire.connection import Connection, HungUpError, Role, StreamError, call
from ps.wire.hub import Hub
from ps.wire.listener import Listener, Service
from steepest.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)

READY_SECONDS = 60.0  # for the servers of a job to find each other


class ParameterServer:
    """Serves one shard. bind: the IP address to listen on. device: the GPU to hold it on, None for the host."""

    def __init__(self, config: JobConfig, index: int, bind: str, device: Device | None = None) -> None:
        self.config = config
        self._device = device
        self.index = index
        self.layout = config.layout()
        self._plan = config.plan()
        self._push_codec, self._pull_codec = config.push_codec(), config.pull_codec()
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._ready = threading.Event()
        self._problem = ""
        self._peers: dict[str, Peer] = {}
        self._relays: dict[str, Peer] = {}  # homes of other hosts
        self._segment = Segment.create(self.layout.nbytes, f"parameters-{config.job}")
        self._flat = self._segment.tensor(self.layout.dtype, self.layout.numel)
        self._shard: ShardServer | None = None
        self._leading: Leading | None = None
        self._relay: Relay | None = None
        self._to_leader: Connection[pb.LeaderMessage] | None = None
        self._hub = Hub()
        if index == 0:
            self._lead(bind)
        services: dict[Role, Service[Any]] = {
            Role.WORKER: Service(pb.WorkerMessage.FromString, self._serve_worker),
            Role.RELAY: Service(pb.WorkerMessage.FromString, self._serve_relay),
        }
        if self._leading is not None:
            services[Role.FOLLOWER] = Service(pb.FollowerMessage.FromString, self._leading.serve_follower)
        self._listeners = (Listener(services, bind), Listener(services))
        network, local = (listener.address for listener in self._listeners)
        control = "" if self._leading is None else self._leading.control_address
        self.address = ServerAddress(control, network, local, host_identity(), self._segment.reference)

    # -- start and end ------------------------------------------------------------------------------------------------

    def _lead(self, bind: str) -> None:
        shard, state, buffers = self._open(num_threads=1)
        held = {} if state is None else residuals_of(self.layout, state.compression)
        step, updates = (0, 0) if state is None else (state.step, state.updates)
        leader = Leader(
            self._plan, step=step, updates=updates, buffers=buffers, initialized=state is not None, kept=held
        )
        codec = self._push_codec
        numel = self.layout.numel + (0 if codec is None else codec.state_numel)
        self._leading = Leading(
            self.config,
            self.layout,
            leader,
            shard,
            self._flat,
            bind,
            self._lock,
            Residuals(numel, self.layout.dtype, held),
            post=self._post,
            apply=self._apply,
            fail=self._break,
            refusal=self._refusal,
        )

    def _open(self, num_threads: int) -> tuple[ShardServer, State | None, bytes | None]:
        """Make the shard, from the newest checkpoint if there is one; that is returned too, and its packed buffers."""
        own = shards(self.layout, self.config.num_servers)[self.index]
        here = slice(own.start, own.stop)
        parameters = self._flat[here]
        restored = newest_valid(self.config.checkpoint_directory)
        state = None if restored is None else restored[1]
        buffers = None
        if state is not None:
            flat, buffers = flatten(self.config.model, self.layout, state)
            parameters.copy_(flat[here])
        shard = ShardServer(
            own,
            parameters,
            self.config.spec.optimizer,
            num_leaves=self._plan.num_leaves,
            max_value=self._plan.max_value,
            step=0 if state is None else state.step,
            initialized=state is not None,
            num_threads=num_threads,
            push=self._push_codec,
            pull=self._pull_codec,
            device=self._device,
        )
        if state is not None:
            shard.optimizer.import_state(state.optimizer)
            master = master_of(self.layout, state.compression)
            if master is not None:
                shard.master.copy_(master[here])
        self._shard = shard
        return shard, state, buffers

    def connect(self, addresses: Sequence[ServerAddress]) -> None:
        """Meet the other servers; returns when this one is ready for workers. addresses: of all, the leader first."""
        own_host = self.address.host
        home = home_of([address.host for address in addresses], own_host)
        here = sum(address.host == own_host for address in addresses)
        num_threads = max(1, (os.cpu_count() or 1) // here)
        if home is not None and home != self.index:
            self._share(addresses[home])
        if self._shard is not None:
            self._shard.use_threads(num_threads)
        elif self.index < self.config.num_servers:
            self._enlist(addresses[0])
            self._open(num_threads)
        self._ready.set()
        if self._to_leader is not None:
            threading.Thread(target=self._follow, args=(self._to_leader,), daemon=True).start()
        cut = zip(shards(self.layout, self.config.num_servers), addresses, strict=False)
        elsewhere = {shard: address for shard, address in cut if address.host != own_host}
        if elsewhere and home == self.index and not self._is_inline:
            with self._lock:
                self._relay = Relay(self.config, f"server-{self.index}", elsewhere, self._flat, self._announce)
            threading.Thread(target=self._tick, daemon=True).start()

    @property
    def leader(self) -> Leader | None:
        """The job's leader, if it is here."""
        return None if self._leading is None else self._leading.leader

    @property
    def _is_inline(self) -> bool:
        return self.config.spec.is_inline

    def _share(self, home: ServerAddress) -> None:
        """Have the parameters in the memory of this host's home."""
        segment = Segment.open(home.parameters)
        if segment is None:
            raise RuntimeError(f"server {self.index} cannot map the memory of another server on its host")
        self._segment.close()
        self._segment = segment
        self._flat = segment.tensor(self.layout.dtype, self.layout.numel)

    def _enlist(self, leader: ServerAddress) -> None:
        self._to_leader = call(leader, Role.FOLLOWER, pb.LeaderMessage.FromString, inline=self._is_inline)
        fence = pb.Fence(job=self.config.job, incarnation=self.config.incarnation)
        enlist = pb.Enlist(fence=fence, token=self.config.token, server=self.index)
        self._to_leader.send(pb.FollowerMessage(enlist=enlist))
        first = self._to_leader.next_message()
        if first is None or first.WhichOneof("message") != "enlisted":
            reason = "it is gone" if first is None else first.refusal.reason
            raise RuntimeError(f"the leader refused server {self.index}: {reason}")

    def stop(self) -> None:
        """End all streams."""
        self._ended.set()
        for listener in self._listeners:
            listener.close()
        if self._to_leader is not None:
            self._to_leader.close()
        for peer in [*self._peers.values(), *self._relays.values()]:
            peer.end()
        self._hub.close()
        if self._relay is not None:
            self._relay.close()
        if self._leading is not None:
            self._leading.stop()

    def wait(self) -> None:
        """Block until `stop`. Raises RuntimeError when this server failed."""
        self._ended.wait()
        if self._problem:
            raise RuntimeError(self._problem)

    def _break(self, message: str) -> None:
        """Something of ours failed: end this server rather than hang; the controller starts a new incarnation."""
        self._problem = message
        self._ended.set()

    def _tick(self) -> None:
        while self._relay is not None and not self._ended.wait(TICK_SECONDS):
            with self._lock:
                self._relay.tick(time.time())

    # -- who is let in ------------------------------------------------------------------------------------------------

    def _refusal(self, fence: pb.Fence, token: str) -> str:
        """Why a peer is not let in, or nothing."""
        if not secrets.compare_digest(token, self.config.token):
            return "wrong token"
        if (fence.job, fence.incarnation) != (self.config.job, self.config.incarnation):
            return f"this is incarnation {self.config.incarnation} of {self.config.job}"
        return ""

    def _hello_refusal(self, hello: pb.Hello) -> str:
        """Why a worker, or the home of another host, is not let in, or nothing."""
        refusal = self._refusal(hello.fence, hello.token)
        if refusal:
            return refusal
        if hello.protocol != PROTOCOL:
            return f"the worker speaks protocol {hello.protocol}, this server {PROTOCOL}"
        if hello.layout_sha256 != self.config.model.sha256():
            return "the worker's model is not the one the job was submitted with"
        return "" if self._ready.wait(READY_SECONDS) else "the server is not ready"

    def _greet(self, connection: Connection[pb.WorkerMessage]) -> pb.Hello | None:
        """A caller's hello; None when it is not let in."""
        try:
            first = connection.next_message()
        except StreamError:
            first = None
        if first is None:
            connection.release()
            return None
        refusal = self._hello_refusal(first.hello)
        if refusal:
            connection.refuse(pb.ServerMessage(refusal=pb.Refusal(reason=refusal)))
            return None
        return first.hello

    # -- workers ------------------------------------------------------------------------------------------------------

    def _serve_worker(self, connection: Connection[pb.WorkerMessage]) -> None:
        """A worker's stream: its hello here, the rest in the hub on this host, and in this thread otherwise."""
        hello = self._greet(connection)
        if hello is None:
            return
        peer = self._admit(hello, connection)
        on_message, on_end = partial(self._on_worker_message, peer), partial(self._on_worker_end, peer, connection)
        if connection.is_local:
            self._hub.add(connection, on_message, on_end)
        else:
            _read_all(connection, on_message, on_end)

    def _admit(self, hello: pb.Hello, connection: Connection[pb.WorkerMessage]) -> Peer:
        slots = Segment.open(convert.segment_from_proto(hello.slots)) if hello.HasField("slots") else None
        own = None if self._shard is None else self._shard.shard
        shares = slots is not None and connection.is_local
        device = self._device
        if device is not None and (not shares or own is None or not own.numel or device.identity != hello.gpu):
            device = None
        peer = Peer(
            hello.worker,
            own,
            slots,
            connection,
            inline_parameters=not shares and not hello.control_only,
            carries_gradients=not hello.control_only,
            payload_bytes=self._payload_bytes,
            residual=None if self._leading is None else self._leading.residual_sink,
            device=device,
        )
        connection.sink = peer.sink
        welcome = pb.Welcome(slots_mapped=slots is not None)
        if shares:
            welcome.parameters.CopyFrom(convert.segment_to_proto(self._segment.reference))
        if device is not None and self._shard is not None:
            welcome.gpu_parameters.CopyFrom(convert.device_to_proto(device.share(self._shard.master)))
        with self._lock:
            if self._leading is not None and hello.worker in self._peers:
                self._leading.replace(hello.worker)
            self._peers[hello.worker] = peer
            self._expose([peer])  # before it is welcome: it may be given work at once
            peer.send(pb.ServerMessage(welcome=welcome))
            self._send_parameters([peer])
            if self._relay is not None and shares:
                peer.send(pb.ServerMessage(arrived=self._relay.arrived))
            if self._leading is not None:
                self._leading.join(hello.worker, hello.host)
        return peer

    @property
    def _payload_bytes(self) -> int:
        """Of this shard's part of a compressed gradient."""
        if self._push_codec is None or self._shard is None:
            return 0
        first, last = self._push_codec.span(self._shard.shard.start, self._shard.shard.stop)
        return last - first

    def _on_worker_end(self, peer: Peer, connection: Connection[pb.WorkerMessage], error: Exception) -> None:
        with self._lock:
            if self._peers.get(peer.worker) is peer:
                del self._peers[peer.worker]
                if self._relay is not None:
                    self._relay.flush()
                if self._leading is not None:
                    self._leading.leave(peer.worker)
        self._part(peer, connection, error)

    def _part(self, peer: Peer, connection: Connection[pb.WorkerMessage], error: Exception) -> None:
        """The end of a stream, for whatever reason."""
        if isinstance(error, StreamError):
            log.warning("server %d hangs up on %s: %s", self.index, peer.worker, error)
            refusal = pb.ServerMessage(refusal=pb.Refusal(reason=str(error)))
            threading.Thread(target=connection.refuse, args=(refusal,), daemon=True).start()
            return
        if not isinstance(error, HungUpError):
            log.error("server %d, %s", self.index, peer.worker, exc_info=error)
            self._break(f"server {self.index} failed on a message of {peer.worker}: {error!r}")
        connection.release()

    def _on_worker_message(self, peer: Peer, message: pb.WorkerMessage) -> None:
        with self._lock:
            if self._peers.get(peer.worker) is not peer:
                return  # a newer generation of this worker has taken its place
            match message.WhichOneof("message"):
                case "push":
                    push = convert.push_from_proto(message.push)
                    self._take(peer, push)
                    if self._leading is not None:
                        self._leading.push(peer.worker, push)
                    self._reduce(push)
                case "gpu_slot":
                    peer.show(message.gpu_slot.slot, convert.device_from_proto(message.gpu_slot.memory))
                case "ready" if self._relay is not None and peer.is_mapped:
                    total = peer.whole(message.ready.slot, self.layout)
                    self._relay.begin(convert.ready_from_proto(message.ready), total)
                case "chunk" if self._leading is not None and message.chunk.name and message.chunk.last:
                    self._leading.residual(peer.worker, message.chunk.slot)
                case "failure" if self._leading is not None:
                    self._leading.failure(peer.worker, convert.failure_from_proto(message.failure))

    def _take(self, peer: Peer, push: Push) -> None:
        """Hold the gradients of a push, and pass them on to other hosts."""
        if not peer.carries_gradients or push.kind not in (Round.TRAIN, Round.INITIALIZE):
            return
        shard = self._shard
        if shard is not None:
            if peer.is_on_gpu and push.kind == Round.TRAIN:
                values = _values(push, peer.pushed_on_gpu)
            else:
                compressed = self._push_codec is not None and push.kind == Round.TRAIN
                values = _values(push, lambda slot: peer.pushed(slot, push.step, compressed=compressed))
            if shard.accept(push.step, push.kind, values) == Outcome.AHEAD:
                raise StreamError(f"{peer.worker} pushed step {push.step}; this shard is at {shard.step}")
        if self._relay is not None and peer.is_mapped:
            whole = _values(push, lambda slot: peer.whole(slot, self.layout))
            self._relay.push(push, whole, time.time())

    def _reduce(self, push: Push) -> None:
        """Add up and measure the round, if all of it is there."""
        shard = self._shard
        if shard is None or not shard.is_complete or push.kind not in (Round.TRAIN, Round.INITIALIZE):
            return
        step, kind = shard.step, push.kind
        sums = shard.reduce()
        if self._leading is not None:
            self._leading.report(self.index, step, kind, sums)
        elif self._to_leader is not None:
            report = pb.ShardReport(step=step, kind=kind, segment_sums=convert.sums_to_bytes(sums))
            self._to_leader.send(pb.FollowerMessage(report=report))

    def _apply(self, decision: Decision) -> float:
        assert self._shard is not None  # noqa: S101  # a decision follows a report
        clamped = self._shard.apply(decision)
        peers = [*self._peers.values(), *self._relays.values()]
        if self._shard.update is None:
            self._send_parameters(peers)
        else:
            self._send_tensor(peers, self._shard.update, compressed=True)
        return clamped

    def _expose(self, peers: Iterable[Peer]) -> None:
        """Have the present version in the host's memory if any of the peers looks there."""
        if self._device is not None and self._shard is not None and not all(peer.is_on_gpu for peer in peers):
            self._shard.expose()

    def _send_parameters(self, peers: Sequence[Peer]) -> None:
        """Have the present version where the peers find it, and give it as a whole to those that do not map it.

        The next version may overwrite what is still on its way to a worker that was not waited for; what that worker
        makes of it comes too late to count. Where only updates follow, nothing may overwrite it.
        """
        shard = self._shard
        if shard is None or not shard.initialized:
            return
        self._expose(peers)
        parameters = shard.parameters if self._pull_codec is None else shard.parameters.clone()
        self._send_tensor(peers, parameters, compressed=False)

    def _send_tensor(self, peers: Iterable[Peer], tensor: torch.Tensor, *, compressed: bool) -> None:
        """Send the present version, or what makes it of the last one, to the peers that do not map it."""
        assert self._shard is not None  # noqa: S101  # a server without a shard has nothing to send
        for peer in peers:
            if peer.inline_parameters:
                for chunk, data in chunks(tensor, step=self._shard.step, compressed=compressed):
                    peer.send(pb.ServerMessage(chunk=chunk), data)

    def _post(self, worker: str, message: pb.ServerMessage, tensor: memoryview | None) -> None:
        peer = self._peers.get(worker)
        if peer is not None:
            peer.send(message, tensor)

    # -- other hosts --------------------------------------------------------------------------------------------------

    def _serve_relay(self, connection: Connection[pb.WorkerMessage]) -> None:
        """The stream of another host's home: gradients in, parameters out."""
        hello = self._greet(connection)
        if hello is None:
            return
        assert self._shard is not None  # noqa: S101  # homes call servers with a shard only
        peer = Peer(hello.worker, self._shard.shard, None, connection, inline_parameters=True, carries_gradients=True)
        connection.sink = peer.sink
        with self._lock:
            self._relays[peer.worker] = peer
            self._send_parameters([peer])
        _read_all(connection, partial(self._on_relay_message, peer), partial(self._part, peer, connection))

    def _on_relay_message(self, peer: Peer, message: pb.WorkerMessage) -> None:
        if message.WhichOneof("message") == "push":
            with self._lock:
                push = convert.push_from_proto(message.push)
                self._take(peer, push)
                self._reduce(push)

    def _announce(self, version: int) -> None:
        """All parameters of other hosts are here, in this version."""
        with self._lock:
            for peer in self._peers.values():
                if peer.is_mapped:
                    peer.send(pb.ServerMessage(arrived=version))

    # -- the follower -------------------------------------------------------------------------------------------------

    def _follow(self, leader: Connection[pb.LeaderMessage]) -> None:
        try:
            for message in leader:  # when they end, the leader is gone: the controller starts a new incarnation
                with self._lock:
                    self._on_leader_message(leader, message)
        except Exception as error:
            log.exception("server %d cannot follow", self.index)
            self._break(f"server {self.index} failed on a message of the leader: {error!r}")

    def _on_leader_message(self, leader: Connection[pb.LeaderMessage], message: pb.LeaderMessage) -> None:
        match message.WhichOneof("message"):
            case "decision":
                decision = convert.decision_from_proto(message.decision)
                clamped = self._apply(decision)
                applied = pb.Applied(step=decision.step, clipped_sum=clamped)
                leader.send(pb.FollowerMessage(applied=applied))
            case "collect":
                assert self._shard is not None  # noqa: S101  # followers have one
                for chunk, data in pieces(parts_of(self._shard), message.collect.step):
                    leader.send(pb.FollowerMessage(state=chunk), data)


def _values(push: Push, in_slot: Callable[[int], torch.Tensor]) -> list[tuple[Node, torch.Tensor | None]]:
    """The nodes of a push with their tensors."""
    return [(Node(n.low, n.high), None if n.slot is None else in_slot(n.slot)) for n in push.nodes]


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
