"""One server of a job over gRPC: carries messages to the state machines of shard and leader, and out what they want.

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
from concurrent import futures
from functools import partial
from queue import SimpleQueue

import grpc
import torch

from ps import convert
from ps.checkpoint import newest_valid, write_checkpoint
from ps.config import GRPC_OPTIONS, JobConfig, ServerAddress
from ps.layout import shards
from ps.leader import Decide, Dismiss, Effect, Evaluated, Hung, Leader, PhaseChanged, Save, Send, Stepped
from ps.local import Connection, Listener, connect
from ps.messages import PROTOCOL, Decision, Push, Round, StepRecord
from ps.optimizer import StatePart
from ps.peer import Peer, chunks
from ps.segment import Segment, SegmentReference
from ps.shard import Outcome, ShardServer
from ps.state import assemble, flatten
from ps.tree import Node
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import exchange_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
REPORT_SECONDS = 0.1
MAX_STREAMS = 2048


class ParameterServer(pb_grpc.ParameterExchangeServiceServicer):
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
        self._collected: dict[int, list[StatePart]] = {}
        self._collecting: Save | None = None
        self._news = threading.Condition()
        self._report = pb.SupervisionMessage()
        # The follower's part.
        self._send_to_leader: Callable[[pb.FollowerMessage], None] = lambda message: None
        self._leave_leader: Callable[[], None] = lambda: None
        self._grpc = grpc.server(futures.ThreadPoolExecutor(MAX_STREAMS), options=GRPC_OPTIONS)
        pb_grpc.add_ParameterExchangeServiceServicer_to_server(self, self._grpc)
        port = self._grpc.add_insecure_port(f"{bind}:0")
        workers = Listener(pb.WorkerMessage.FromString, self._serve_local)
        followers = Listener(pb.FollowerMessage.FromString, self._serve_local_follower)
        self._close_listeners = (workers.close, followers.close)
        self.address = ServerAddress(f"{bind}:{port}", workers.name, followers.name)
        if index == 0:
            self._open(None)
            threading.Thread(target=self._tick, daemon=True).start()
        self._grpc.start()

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
        self._server = ShardServer(
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
            self._server.optimizer.import_state(restored[1].optimizer)
        if self.index == 0:
            self.leader = Leader(
                self._plan, step=step, updates=updates, buffers=buffers, initialized=restored is not None
            )

    def connect(self, leader: ServerAddress) -> None:
        """Enlist with the leader (followers only); returns when this shard is ready for workers."""
        is_inline = self.config.spec.placement.transport == "inline"
        connection = None if is_inline else connect(leader.followers, pb.LeaderMessage.FromString)
        if connection is not None:
            replies = iter(connection)
            self._send_to_leader, self._leave_leader = connection.send, connection.close
        else:
            replies = self._coordinate_over_grpc(leader.network)
        enlist = pb.Enlist(fence=self._fence(), token=self.config.token, server=self.index)
        self._send_to_leader(pb.FollowerMessage(enlist=enlist))
        first = next(replies)
        if first.WhichOneof("message") != "enlisted":
            raise RuntimeError(f"the leader refused server {self.index}: {first.refusal.reason}")
        self._open(convert.segment_from_proto(first.enlisted.parameters))
        threading.Thread(target=self._follow, args=(replies,), daemon=True).start()

    def _coordinate_over_grpc(self, address: str) -> Iterator[pb.LeaderMessage]:
        channel = grpc.insecure_channel(address, options=GRPC_OPTIONS)
        outbox: SimpleQueue[pb.FollowerMessage | None] = SimpleQueue()
        replies: Iterator[pb.LeaderMessage] = pb_grpc.ParameterExchangeServiceStub(channel).Coordinate(
            iter(outbox.get, None)
        )

        def leave() -> None:
            outbox.put(None)
            channel.close()

        self._send_to_leader, self._leave_leader = outbox.put, leave
        return replies

    def stop(self) -> None:
        """End all streams."""
        self._ended.set()
        self._leave_leader()
        with self._news:
            self._news.notify_all()
        for close in self._close_listeners:
            close()
        for peer in list(self._peers.values()):
            peer.end()
        self._grpc.stop(grace=0.5)

    def wait(self) -> None:
        """Block until `stop`. Raises RuntimeError when this server failed."""
        self._ended.wait()
        if self._problem:
            raise RuntimeError(self._problem)

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                if self.leader is not None:
                    self._carry_out(self.leader.tick(time.time()))

    def _fence(self) -> pb.Fence:
        return pb.Fence(job=self.config.job, incarnation=self.config.incarnation)

    def _refusal(self, fence: pb.Fence, token: str) -> str:
        """Why a peer is not let in, or nothing."""
        if not secrets.compare_digest(token, self.config.token):
            return "wrong token"
        if (fence.job, fence.incarnation) != (self.config.job, self.config.incarnation):
            return f"this is incarnation {self.config.incarnation} of {self.config.job}"
        return ""

    # -- workers ----------------------------------------------------------------------------------------------------

    def Exchange(  # noqa: N802  # the name on the wire
        self, request_iterator: Iterator[pb.WorkerMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        """A worker's stream."""
        hello = next(request_iterator).hello
        refusal = self._worker_refusal(hello)
        if refusal:
            yield pb.ServerMessage(refusal=pb.Refusal(reason=refusal))
            return
        outbox: SimpleQueue[pb.ServerMessage | None] = SimpleQueue()
        peer = self._admit(hello, outbox.put, partial(outbox.put, None))
        threading.Thread(target=self._serve_peer, args=(peer, request_iterator), daemon=True).start()
        yield from iter(outbox.get, None)

    def _serve_local(self, connection: Connection[pb.WorkerMessage]) -> None:
        """A worker's stream from the same host."""
        messages = iter(connection)
        first = next(messages, None)
        if first is None:
            return
        refusal = self._worker_refusal(first.hello)
        if refusal:
            connection.send(pb.ServerMessage(refusal=pb.Refusal(reason=refusal)))
            connection.close()
            return
        self._serve_peer(self._admit(first.hello, connection.send, connection.close), messages)

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

    def _admit(self, hello: pb.Hello, send: Callable[[pb.ServerMessage], None], end: Callable[[], None]) -> Peer:
        slots = parameters = None
        if hello.HasField("slots"):
            slots = Segment.open(convert.segment_from_proto(hello.slots))
            assert self._segment is not None  # noqa: S101  # set before workers are let in
            parameters = convert.segment_to_proto(self._segment.reference)
        peer = Peer(hello.worker, hello.generation, self.shard, slots, send, end, inline_parameters=slots is None)
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
                self._tell_members(hello.worker, "joined")
                self._carry_out(self.leader.join(hello.worker, time.time()))
        return peer

    def _serve_peer(self, peer: Peer, messages: Iterable[pb.WorkerMessage]) -> None:
        try:
            for message in messages:
                with self._lock:
                    self._on_worker_message(peer, message)
        except grpc.RpcError:
            pass  # the stream broke: the worker is gone
        except Exception as error:
            log.exception("server %d, worker %s", self.index, peer.worker)
            self._break(f"server {self.index} failed on a message of worker {peer.worker}: {error!r}")
        finally:
            with self._lock:
                if self._peers.get(peer.worker) is peer:
                    del self._peers[peer.worker]
                    if self.leader is not None:
                        self._tell_members(peer.worker, "left")
                        self._carry_out(self.leader.leave(peer.worker, time.time()))
            peer.end()

    def _on_worker_message(self, peer: Peer, message: pb.WorkerMessage) -> None:
        if self._peers.get(peer.worker) is not peer:
            return  # a newer generation of this worker has taken its place
        match message.WhichOneof("message"):
            case "chunk":
                peer.write(message.chunk)
            case "push":
                self._on_push(peer, convert.push_from_proto(message.push))
            case "failure" if self.leader is not None:
                failure = convert.failure_from_proto(message.failure)
                self._carry_out(self.leader.failure(peer.worker, failure, time.time())[1])

    def _on_push(self, peer: Peer, push: Push) -> None:
        shard = self._server
        assert shard is not None  # noqa: S101  # set before workers are let in
        if push.kind in (Round.TRAIN, Round.INITIALIZE):
            nodes = [(Node(n.low, n.high), None if n.slot is None else peer.part(n.slot)) for n in push.nodes]
            if shard.accept(push.step, push.kind, nodes) == Outcome.AHEAD:
                raise ValueError(f"worker {peer.worker} pushed step {push.step}; this shard is at {shard.step}")
        if self.leader is not None:
            self._carry_out(self.leader.push(peer.worker, push, time.time())[1])
        if push.kind in (Round.TRAIN, Round.INITIALIZE) and shard.is_complete:
            self._reduce(shard, push.step, push.kind)

    def _reduce(self, shard: ShardServer, step: int, kind: Round) -> None:
        began = time.perf_counter()
        sums = shard.reduce()
        if self.leader is not None:
            self._carry_out(self.leader.report(self.index, step, kind, sums, time.time())[1])
            return
        report = pb.ShardReport(
            step=step,
            kind=kind,
            server=self.index,
            segment_sums=convert.sums_to_bytes(sums),
            seconds=time.perf_counter() - began,
        )
        self._send_to_leader(pb.FollowerMessage(report=report))

    def _apply(self, decision: Decision) -> float:
        shard = self._server
        assert shard is not None  # noqa: S101  # a decision follows a report
        clamped = shard.apply(decision)
        self._send_parameters(self._peers.values())
        return clamped

    def _send_parameters(self, peers: Iterable[Peer]) -> None:
        """Give the present version to the peers that do not map it."""
        shard = self._server
        inline = [peer for peer in peers if peer.inline_parameters]
        if not inline or shard is None or not shard.initialized:
            return
        pieces = [pb.ServerMessage(chunk=c) for c in chunks(shard.parameters, step=shard.step)]
        for peer in inline:
            for piece in pieces:
                peer.send(piece)

    # -- the leader ---------------------------------------------------------------------------------------------------

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        """Do what the leader's state machine asks for. The caller holds the lock."""
        for effect in effects:
            match effect:
                case Send(worker, assign):
                    self._post(worker, pb.ServerMessage(assign=convert.assign_to_proto(assign)))
                case Dismiss(worker, reason):
                    self._post(worker, pb.ServerMessage(stop=pb.Stop(reason=reason)))
                case Decide(decision):
                    self._decide(decision)
                case Stepped(record):
                    self._tell_record(record)
                case Evaluated(step, metrics):
                    self._tell_evaluation(pb.Evaluation(step=step, metrics=metrics))
                case Save():
                    self._save(effect)
                case Hung(worker):
                    self._tell_members(worker, "hung")
                case PhaseChanged():
                    self._tell_phase(effect)

    def _post(self, worker: str, message: pb.ServerMessage) -> None:
        peer = self._peers.get(worker)
        if peer is not None:
            peer.send(message)

    def _decide(self, decision: Decision) -> None:
        for send in self._followers.values():
            send(pb.LeaderMessage(decision=convert.decision_to_proto(decision)))
        clamped = self._apply(decision)
        assert self.leader is not None  # noqa: S101  # only the leader decides
        self._carry_out(self.leader.applied(0, decision.step, clamped, time.time())[1])

    def Coordinate(  # noqa: N802  # the name on the wire
        self, request_iterator: Iterator[pb.FollowerMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.LeaderMessage]:
        """A follower's stream."""
        outbox: SimpleQueue[pb.LeaderMessage | None] = SimpleQueue()
        end = partial(outbox.put, None)
        threading.Thread(target=self._serve_follower, args=(request_iterator, outbox.put, end), daemon=True).start()
        yield from iter(outbox.get, None)

    def _serve_local_follower(self, connection: Connection[pb.FollowerMessage]) -> None:
        """A follower's stream from the same host."""
        self._serve_follower(iter(connection), connection.send, connection.close)

    def _serve_follower(
        self,
        messages: Iterator[pb.FollowerMessage],
        send: Callable[[pb.LeaderMessage], None],
        end: Callable[[], None],
    ) -> None:
        try:
            first = next(messages, None)
            if first is not None and self._enlist(first.enlist, send):
                for message in messages:
                    with self._lock:
                        self._on_follower_message(first.enlist.server, message)
        except grpc.RpcError:
            pass  # the controller sees the follower die, and starts a new incarnation
        except Exception as error:
            log.exception("message of a follower")
            self._break(f"the leader failed on a message of a follower: {error!r}")
        finally:
            end()

    def _enlist(self, enlist: pb.Enlist, send: Callable[[pb.LeaderMessage], None]) -> bool:
        refusal = self._refusal(enlist.fence, enlist.token)
        if refusal or self.leader is None or self._segment is None:
            send(pb.LeaderMessage(refusal=pb.Refusal(reason=refusal or "this server does not lead")))
            return False
        reference = convert.segment_to_proto(self._segment.reference)
        with self._lock:
            self._followers[enlist.server] = send
            send(pb.LeaderMessage(enlisted=pb.Enlisted(parameters=reference)))
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
            case "state":
                self._on_state(server, message.state)

    # -- the follower -------------------------------------------------------------------------------------------------

    def _follow(self, messages: Iterable[pb.LeaderMessage]) -> None:
        try:
            for message in messages:
                with self._lock:
                    self._on_leader_message(message)
        except grpc.RpcError:
            pass  # the leader is gone: the controller starts a new incarnation
        except Exception as error:
            log.exception("server %d cannot follow", self.index)
            self._break(f"server {self.index} failed on a message of the leader: {error!r}")

    def _on_leader_message(self, message: pb.LeaderMessage) -> None:
        match message.WhichOneof("message"):
            case "decision":
                began = time.perf_counter()
                decision = convert.decision_from_proto(message.decision)
                clamped = self._apply(decision)
                applied = pb.Applied(
                    step=decision.step,
                    server=self.index,
                    clipped_sum=clamped,
                    seconds=time.perf_counter() - began,
                )
                self._send_to_leader(pb.FollowerMessage(applied=applied))
            case "collect":
                assert self._server is not None  # noqa: S101  # set by connect
                parts = [StatePart("", "", self.shard.start, self._server.parameters)]
                for part in [*parts, *self._server.optimizer.export_state()]:
                    name = f"{part.parameter}\n{part.state}\n{part.offset}"
                    for chunk in chunks(part.values, step=message.collect.step, name=name):
                        self._send_to_leader(pb.FollowerMessage(state=chunk))
                self._send_to_leader(pb.FollowerMessage(state=pb.Chunk(step=message.collect.step, last=True)))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, save: Save) -> None:
        """Collect every shard's state, then write it in a thread of its own; the leader waits in phase SAVING."""
        self._collecting = save
        self._collected = {}
        for send in self._followers.values():
            send(pb.LeaderMessage(collect=pb.CollectState(step=save.step)))
        if not self._followers:
            self._write(save)

    def _on_state(self, server: int, chunk: pb.Chunk) -> None:
        save = self._collecting
        if save is None or chunk.step != save.step:
            return
        parts = self._collected.setdefault(server, [])
        if chunk.name:
            parameter, state, offset = chunk.name.split("\n")
            dtype = torch.float32 if state == "step" else self.layout.dtype
            if chunk.data:
                values = torch.frombuffer(bytearray(chunk.data), dtype=dtype)
                parts.append(StatePart(parameter, state, int(offset) + chunk.offset // dtype.itemsize, values))
            return
        self._collected[server] = [*parts, StatePart("", "complete", 0, torch.empty(0))]
        complete = [p for p in self._collected.values() if p and p[-1].state == "complete"]
        if len(complete) == len(self._followers):
            self._write(save)

    def _write(self, save: Save) -> None:
        self._collecting = None
        assert self._server is not None  # noqa: S101  # the leader opens before it serves
        assert self.leader is not None  # noqa: S101
        flat = self._flat.clone()
        states = list(self._server.optimizer.export_state())
        for parts in self._collected.values():
            for part in parts:
                if part.parameter:
                    states.append(part)
                elif part.state != "complete":
                    flat[part.offset : part.offset + part.values.numel()] = part.values
        self._collected = {}
        state = assemble(
            self.config.model,
            self.layout,
            flat,
            self.leader.buffers or b"",
            states,
            step=save.step,
            updates=save.updates,
        )

        def write() -> None:
            problem = ""
            try:
                written = write_checkpoint(self.config.checkpoint_directory, state)
                saved = pb.CheckpointSaved(
                    step=written.step,
                    path=str(written.path),
                    parameters_sha256=written.parameters_sha256,
                    state_sha256=written.state_sha256,
                )
            except Exception as error:
                log.exception("checkpoint of step %d", save.step)
                problem = f"the checkpoint of step {save.step} could not be written: {error}"
                saved = pb.CheckpointSaved(step=save.step, problem=problem)
            with self._lock:
                self._tell(lambda report: report.checkpoints.append(saved))
                if self.leader is not None:
                    self._carry_out(self.leader.saved(problem, time.time()))

        threading.Thread(target=write, daemon=True).start()

    # -- the controller ------------------------------------------------------------------------------------------------

    def Supervise(  # noqa: N802  # the name on the wire
        self, request_iterator: Iterator[pb.ControllerMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.SupervisionMessage]:
        """The controller's stream: its commands, and all that it has not been told yet."""
        first = next(request_iterator)
        refusal = self._refusal(first.hello.fence, first.hello.token)
        if refusal or self.leader is None:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal or "this server does not lead")
        threading.Thread(target=self._obey, args=(request_iterator,), daemon=True).start()
        while context.is_active() and not self._ended.is_set():
            with self._news:
                self._news.wait_for(lambda: self._report.ByteSize() > 0, timeout=1.0)
                report, self._report = self._report, pb.SupervisionMessage()
            if report.ByteSize():
                yield report
            time.sleep(REPORT_SECONDS)

    def _obey(self, commands: Iterable[pb.ControllerMessage]) -> None:
        try:
            for message in commands:
                with self._lock:
                    self._on_command(message.command)
        except grpc.RpcError:
            pass  # the controller is gone; the job goes on

    def _on_command(self, command: pb.Command) -> None:
        leader = self.leader
        assert leader is not None  # noqa: S101  # `Supervise` refuses followers
        now = time.time()
        match command.verb:
            case "pause":
                self._carry_out(leader.pause(now))
            case "resume":
                self._carry_out(leader.resume(now))
            case "cancel":
                self._carry_out(leader.cancel(now))
            case "retire":
                self._carry_out(leader.retire(command.worker, now))

    def _tell(self, add: Callable[[pb.SupervisionMessage], object]) -> None:
        with self._news:
            add(self._report)
            self._news.notify()

    def _tell_record(self, record: StepRecord) -> None:
        self._tell(lambda r: r.records.append(convert.record_to_proto(record)))

    def _tell_evaluation(self, evaluation: pb.Evaluation) -> None:
        self._tell(lambda r: r.evaluations.append(evaluation))

    def _tell_members(self, worker: str, change: str) -> None:
        self._tell(lambda r: r.members.append(pb.MembershipChanged(worker=worker, change=change)))

    def _tell_phase(self, change: PhaseChanged) -> None:
        leader = self.leader
        assert leader is not None  # noqa: S101  # phases are the leader's
        failure = convert.failure_to_proto(change.failure) if change.failure is not None else None
        phase = pb.PhaseChanged(
            phase=change.phase, reason=change.reason, step=leader.step, failure=failure, worker=change.worker
        )
        self._tell(lambda r: r.phases.append(phase))

    def _break(self, message: str) -> None:
        """Something of ours failed: end this server rather than hang; the controller starts a new incarnation."""
        self._problem = message
        self._ended.set()
