"""One server of a job: carries messages to the state machines of shard and leader, and out what they want.

Messages are handled one at a time, under one lock, in the thread that received them. Server 0 leads: it has a `Leader`
besides its shard; the others (followers) report to it.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from ps import convert
from ps.checkpoint import newest_valid, write_checkpoint
from ps.collection import Collection, parts_of, pieces
from ps.config import JobConfig, ServerAddress
from ps.effects import Decide, Dismiss, Effect, Evaluated, Hung, PhaseChanged, Save, Send, Stepped
from ps.layout import shards
from ps.leader import Leader
from ps.messages import PROTOCOL, Decision, Outcome, Push, Round
from ps.peer import Peer, chunks
from ps.segment import Segment, SegmentReference
from ps.shard import ShardServer
from ps.state import assemble, flatten
from ps.stream import Connection, Hub, HungUpError, Listener, Role, Service, StreamError, call
from ps.supervisor import Supervisor
from ps.tree import Node
from steepest.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5


class ParameterServer:
    """Serves one shard. bind: the IP address to listen on."""

    def __init__(self, config: JobConfig, index: int, bind: str) -> None:
        self.config = config
        self.index = index
        self.layout = config.layout()
        self.shard = shards(self.layout, config.num_servers)[index]
        self._plan = config.plan()
        self._lock = threading.RLock()
        self._peers: dict[str, Peer] = {}
        self._segment: Segment | None = None
        self._flat = torch.empty(0)
        self._server: ShardServer | None = None
        self._ended = threading.Event()
        self._problem = ""
        # The leader's part.
        self.leader: Leader | None = None
        self._followers: dict[int, Callable[[pb.LeaderMessage], None]] = {}
        self._collection: Collection | None = None
        # The follower's part.
        self._to_leader: Connection[pb.LeaderMessage] | None = None
        self._hub = Hub()
        self._supervisor = Supervisor(
            bind,
            self._controller_refusal,
            self._on_command,
            record_every=config.spec.telemetry.every,
            layout=self.layout if config.spec.telemetry.parameter_norms else None,
        )
        services: dict[Role, Service[Any]] = {
            Role.WORKER: Service(pb.WorkerMessage.FromString, self._serve_worker),
            Role.FOLLOWER: Service(pb.FollowerMessage.FromString, self._serve_follower),
        }
        self._listeners = (Listener(services, bind), Listener(services))
        network, local = (listener.address for listener in self._listeners)
        self.address = ServerAddress(self._supervisor.address, network, local)
        if index == 0:
            self._open(None)
            threading.Thread(target=self._tick, daemon=True).start()

    # -- start and end ----------------------------------------------------------------------------------------------

    def _open(self, shared: SegmentReference | None) -> None:
        """Get memory for the parameters (the leader's segment on its host) and the state of the newest checkpoint."""
        segment = Segment.open(shared) if shared is not None else None
        self._segment = segment or Segment.create(self.layout.nbytes, f"parameters-{self.config.job}")
        self._flat = self._segment.tensor(self.layout.dtype, self.layout.numel)
        parameters = self._flat[self.shard.start : self.shard.stop]
        restored = newest_valid(self.config.checkpoint_directory)
        step, updates, buffers = 0, 0, None
        if restored is not None:
            state = restored[1]
            flat, buffers = flatten(self.config.model, self.layout, state)
            parameters.copy_(flat[self.shard.start : self.shard.stop])
            step, updates = state.step, state.updates
        server = ShardServer(
            self.shard,
            parameters,
            self.config.spec.optimizer,
            num_leaves=self._plan.num_leaves,
            max_value=self._plan.max_value,
            step=step,
            initialized=restored is not None,
            num_threads=max(1, (os.cpu_count() or 1) // self.config.num_servers),
        )
        if restored is not None:
            server.optimizer.import_state(restored[1].optimizer)
        if self.index == 0:
            self.leader = Leader(
                self._plan, step=step, updates=updates, buffers=buffers, initialized=restored is not None
            )
        self._server = server

    def connect(self, leader: ServerAddress) -> None:
        """Enlist with the leader (followers only); returns when this shard is ready for workers."""
        inline = self.config.spec.placement.transport == "inline"
        self._to_leader = call(leader, Role.FOLLOWER, pb.LeaderMessage.FromString, inline=inline)
        fence = pb.Fence(job=self.config.job, incarnation=self.config.incarnation)
        enlist = pb.Enlist(fence=fence, token=self.config.token, server=self.index)
        self._to_leader.send(pb.FollowerMessage(enlist=enlist))
        replies = iter(self._to_leader)
        first = next(replies, None)
        if first is None or first.WhichOneof("message") != "enlisted":
            reason = "it is gone" if first is None else first.refusal.reason
            raise RuntimeError(f"the leader refused server {self.index}: {reason}")
        self._open(convert.segment_from_proto(first.enlisted.parameters))
        threading.Thread(target=self._follow, args=(self._to_leader, replies), daemon=True).start()

    def stop(self) -> None:
        """End all streams."""
        self._ended.set()
        for listener in self._listeners:
            listener.close()
        if self._to_leader is not None:
            self._to_leader.close()
        for peer in list(self._peers.values()):
            peer.end()
        self._hub.close()
        self._supervisor.stop()

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
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                if self.leader is not None:
                    self._carry_out(self.leader.tick(time.time()))

    def _refusal(self, fence: pb.Fence, token: str) -> str:
        """Why a peer is not let in, or nothing."""
        if not secrets.compare_digest(token, self.config.token):
            return "wrong token"
        if (fence.job, fence.incarnation) != (self.config.job, self.config.incarnation):
            return f"this is incarnation {self.config.incarnation} of {self.config.job}"
        return ""

    # -- workers ----------------------------------------------------------------------------------------------------

    def _serve_worker(self, connection: Connection[pb.WorkerMessage]) -> None:
        """A worker's stream: its hello here, the rest in the hub on this host, and in this thread otherwise."""
        try:
            hello = connection.receive()
        except (HungUpError, StreamError):
            hello = None
        if hello is None:
            connection.release()
            return
        refusal = self._worker_refusal(hello.hello)
        if refusal:
            connection.refuse(pb.ServerMessage(refusal=pb.Refusal(reason=refusal)))
            return
        peer = self._admit(hello.hello, connection)
        on_message, on_end = partial(self._on_worker_message, peer), partial(self._on_worker_end, peer, connection)
        if connection.is_local:
            self._hub.add(connection, on_message, on_end)
            return
        try:
            while (message := connection.receive()) is not None:
                on_message(message)
        except Exception as error:
            on_end(error)

    def _on_worker_end(self, peer: Peer, connection: Connection[pb.WorkerMessage], error: Exception) -> None:
        self._leave(peer)
        if isinstance(error, StreamError):
            log.warning("server %d hangs up on worker %s: %s", self.index, peer.worker, error)
            connection.refuse(pb.ServerMessage(refusal=pb.Refusal(reason=str(error))))
            return
        if not isinstance(error, HungUpError):
            log.error("server %d, worker %s", self.index, peer.worker, exc_info=error)
            self._break(f"server {self.index} failed on a message of worker {peer.worker}: {error!r}")
        connection.release()

    def _worker_refusal(self, hello: pb.Hello) -> str:
        """Why a worker is not let in, or nothing."""
        refusal = self._refusal(hello.fence, hello.token)
        if refusal:
            return refusal
        if hello.protocol != PROTOCOL:
            return f"the worker speaks protocol {hello.protocol}, this server {PROTOCOL}"
        if hello.layout_sha256 != self.config.model.sha256():
            return "the worker's model is not the one the job was submitted with"
        return "" if self._server is not None else "the server is not ready"

    def _admit(self, hello: pb.Hello, connection: Connection[pb.WorkerMessage]) -> Peer:
        slots = parameters = None
        if hello.HasField("slots"):
            slots = Segment.open(convert.segment_from_proto(hello.slots))
            assert self._segment is not None  # noqa: S101  # set before workers are let in
            parameters = convert.segment_to_proto(self._segment.reference)
        peer = Peer(hello.worker, self.shard, slots, connection, inline_parameters=slots is None)
        connection.sink = peer.sink
        peer.send(
            pb.ServerMessage(
                welcome=pb.Welcome(parameters=parameters if slots else None, slots_mapped=slots is not None)
            )
        )
        with self._lock:
            if self.leader is not None and hello.worker in self._peers:
                self._carry_out(self.leader.leave(hello.worker, time.time()))  # an older generation of it
            self._peers[hello.worker] = peer
            self._send_parameters([peer])
            if self.leader is not None:
                self._supervisor.tell_member(hello.worker, "joined")
                self._carry_out(self.leader.join(hello.worker, time.time()))
        return peer

    def _leave(self, peer: Peer) -> None:
        with self._lock:
            if self._peers.get(peer.worker) is peer:
                del self._peers[peer.worker]
                if self.leader is not None:
                    self._supervisor.tell_member(peer.worker, "left")
                    self._carry_out(self.leader.leave(peer.worker, time.time()))

    def _on_worker_message(self, peer: Peer, message: pb.WorkerMessage) -> None:
        with self._lock:
            if self._peers.get(peer.worker) is not peer:
                return  # a newer generation of this worker has taken its place
            match message.WhichOneof("message"):
                case "push":
                    self._on_push(peer, convert.push_from_proto(message.push))
                case "failure" if self.leader is not None:
                    failure = convert.failure_from_proto(message.failure)
                    self._carry_out(self.leader.failure(peer.worker, failure, time.time())[1])

    def _on_push(self, peer: Peer, push: Push) -> None:
        shard = self._server
        assert shard is not None  # noqa: S101  # set before workers are let in
        has_gradients = push.kind in (Round.TRAIN, Round.INITIALIZE)
        if has_gradients:
            nodes = [(Node(n.low, n.high), None if n.slot is None else peer.part(n.slot)) for n in push.nodes]
            if shard.accept(push.step, push.kind, nodes) == Outcome.AHEAD:
                raise StreamError(f"worker {peer.worker} pushed step {push.step}; this shard is at {shard.step}")
        if self.leader is not None:
            self._carry_out(self.leader.push(peer.worker, push, time.time())[1])
        if has_gradients and shard.is_complete:
            self._reduce(shard, push.step, push.kind)

    def _reduce(self, shard: ShardServer, step: int, kind: Round) -> None:
        began = time.perf_counter()
        sums = shard.reduce()
        if self.leader is not None:
            self._carry_out(self.leader.report(self.index, step, kind, sums, time.time())[1])
        elif self._to_leader is not None:
            report = pb.ShardReport(
                step=step,
                kind=kind,
                server=self.index,
                segment_sums=convert.sums_to_bytes(sums),
                seconds=time.perf_counter() - began,
            )
            self._to_leader.send(pb.FollowerMessage(report=report))

    def _apply(self, decision: Decision) -> float:
        shard = self._server
        assert shard is not None  # noqa: S101  # a decision follows a report
        clamped = shard.apply(decision)
        self._send_parameters(self._peers.values())
        return clamped

    def _send_parameters(self, peers: Iterable[Peer]) -> None:
        """Give the present version to the peers that do not map it.

        The next version may overwrite what is still on its way to a worker that was not waited for; what that worker
        makes of it comes too late to count.
        """
        shard = self._server
        if shard is None or not shard.initialized:
            return
        for peer in peers:
            if peer.inline_parameters:
                for chunk, data in chunks(shard.parameters, step=shard.step):
                    peer.send(pb.ServerMessage(chunk=chunk), data)

    # -- the leader ---------------------------------------------------------------------------------------------------

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        """Do what the leader's state machine asks for. The caller holds the lock."""
        leader = self.leader
        assert leader is not None  # noqa: S101  # effects are a leader's
        for effect in effects:
            match effect:
                case Send(worker, assign):
                    self._post(worker, pb.ServerMessage(assign=convert.assign_to_proto(assign)))
                case Dismiss(worker, reason):
                    self._post(worker, pb.ServerMessage(stop=pb.Stop(reason=reason)))
                case Decide(decision):
                    self._decide(leader, decision)
                case Stepped(completed):
                    self._supervisor.tell_step(completed)
                case Evaluated(step, metrics):
                    self._supervisor.tell_evaluation(step, metrics)
                case Save():
                    self._save(leader, effect)
                case Hung(worker):
                    self._supervisor.tell_member(worker, "hung")
                case PhaseChanged():
                    self._supervisor.tell_phase(effect, leader.step)

    def _post(self, worker: str, message: pb.ServerMessage) -> None:
        peer = self._peers.get(worker)
        if peer is not None:
            peer.send(message)

    def _decide(self, leader: Leader, decision: Decision) -> None:
        for send in self._followers.values():
            send(pb.LeaderMessage(decision=convert.decision_to_proto(decision)))
        clamped = self._apply(decision)
        self._carry_out(leader.applied(0, decision.step, clamped, time.time())[1])

    def _serve_follower(self, connection: Connection[pb.FollowerMessage]) -> None:
        """A follower's stream."""
        server = -1
        try:
            for message in connection:
                if server >= 0:
                    with self._lock:
                        self._on_follower_message(server, message)
                    continue
                if not self._enlist(message.enlist, connection):
                    break
                server = message.enlist.server
        except Exception as error:  # its end needs no word: the controller sees it and starts a new incarnation
            log.exception("message of server %d", server)
            self._break(f"the leader failed on a message of server {server}: {error!r}")
        connection.release()

    def _enlist(self, enlist: pb.Enlist, connection: Connection[pb.FollowerMessage]) -> bool:
        refusal = self._refusal(enlist.fence, enlist.token)
        if refusal or self.leader is None or self._segment is None:
            reason = refusal or "this server does not lead"
            connection.refuse(pb.LeaderMessage(refusal=pb.Refusal(reason=reason)))
            return False
        reference = convert.segment_to_proto(self._segment.reference)

        def sink(message: pb.FollowerMessage, num_bytes: int) -> memoryview:
            collection = self._collection
            if collection is None or message.state.step != collection.step:
                raise StreamError(f"state of step {message.state.step} is not expected")
            return collection.sink(enlist.server, message.state, num_bytes)

        connection.sink = sink
        with self._lock:
            self._followers[enlist.server] = connection.send
            connection.send(pb.LeaderMessage(enlisted=pb.Enlisted(parameters=reference)))
        return True

    def _on_follower_message(self, server: int, message: pb.FollowerMessage) -> None:
        leader = self.leader
        assert leader is not None  # noqa: S101  # followers enlist with the leader only
        match message.WhichOneof("message"):
            case "report":
                report = message.report
                sums = convert.sums_from_bytes(report.segment_sums)
                self._carry_out(leader.report(server, report.step, Round(report.kind), sums, time.time())[1])
            case "applied":
                applied = message.applied
                self._carry_out(leader.applied(server, applied.step, applied.clipped_sum, time.time())[1])
            case "state" if not message.state.name and self._collection is not None:
                self._collection.finish(server)
                if self._collection.is_complete:
                    self._write(leader, self._collection.step, self._collection)

    # -- the follower -------------------------------------------------------------------------------------------------

    def _follow(self, leader: Connection[pb.LeaderMessage], messages: Iterator[pb.LeaderMessage]) -> None:
        try:
            for message in messages:  # when they end, the leader is gone: the controller starts a new incarnation
                with self._lock:
                    self._on_leader_message(leader, message)
        except Exception as error:
            log.exception("server %d cannot follow", self.index)
            self._break(f"server {self.index} failed on a message of the leader: {error!r}")

    def _on_leader_message(self, leader: Connection[pb.LeaderMessage], message: pb.LeaderMessage) -> None:
        match message.WhichOneof("message"):
            case "decision":
                began = time.perf_counter()
                decision = convert.decision_from_proto(message.decision)
                clamped = self._apply(decision)
                seconds = time.perf_counter() - began
                applied = pb.Applied(step=decision.step, server=self.index, clipped_sum=clamped, seconds=seconds)
                leader.send(pb.FollowerMessage(applied=applied))
            case "collect":
                assert self._server is not None  # noqa: S101  # set by connect
                for chunk, data in pieces(parts_of(self._server), message.collect.step):
                    leader.send(pb.FollowerMessage(state=chunk), data)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, leader: Leader, save: Save) -> None:
        """Collect every shard's state, then write it in a thread of its own; the leader waits in phase SAVING."""
        collection = Collection(save.step, self._followers, self.layout.dtype)
        self._collection = collection
        for send in self._followers.values():
            send(pb.LeaderMessage(collect=pb.CollectState(step=save.step)))
        if collection.is_complete:
            self._write(leader, save.step, collection)

    def _write(self, leader: Leader, step: int, collection: Collection) -> None:
        self._collection = None
        assert self._server is not None  # noqa: S101  # the leader opens before it serves
        flat = self._flat.clone()
        states = []
        for part in [*parts_of(self._server), *collection.parts]:
            if part.parameter:
                states.append(part)
            else:
                flat[part.offset : part.offset + part.values.numel()] = part.values
        buffers = leader.buffers or b""
        state = assemble(self.config.model, self.layout, flat, buffers, states, step=step, updates=leader.updates)
        records = self._supervisor.unstored()

        def write() -> None:
            problem = ""
            try:
                written = write_checkpoint(
                    self.config.checkpoint_directory, state, records=records, incarnation=self.config.incarnation
                )
                saved = pb.CheckpointSaved(
                    step=written.step,
                    path=str(written.path),
                    parameters_sha256=written.parameters_sha256,
                    state_sha256=written.state_sha256,
                )
            except Exception as error:
                log.exception("checkpoint of step %d", step)
                problem = f"the checkpoint of step {step} could not be written: {error}"
                saved = pb.CheckpointSaved(step=step, problem=problem)
            with self._lock:
                self._supervisor.tell_checkpoint(saved)
                self._carry_out(leader.saved(problem, time.time()))

        threading.Thread(target=write, daemon=True).start()

    # -- the controller ------------------------------------------------------------------------------------------------

    def _controller_refusal(self, fence: pb.Fence, token: str) -> str:
        """Why a controller is not let in, or nothing."""
        return self._refusal(fence, token) or ("this server does not lead" if self.leader is None else "")

    def _on_command(self, command: pb.Command) -> None:
        leader = self.leader
        assert leader is not None  # noqa: S101  # followers refuse controllers
        now = time.time()
        with self._lock:
            match command.verb:
                case "pause":
                    self._carry_out(leader.pause(now))
                case "resume":
                    self._carry_out(leader.resume(now))
                case "cancel":
                    self._carry_out(leader.cancel(now))
                case "retire":
                    self._carry_out(leader.retire(command.worker, now))
