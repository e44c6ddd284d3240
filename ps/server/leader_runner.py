"""What server 0 does besides holding a shard: it carries out what the leader's state machine asks for.

Everything here runs under the server's lock, in the thread that received the message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from ps.checkpoint.files import write_checkpoint
from ps.checkpoint.named_state import assemble, compression_state
from ps.job.config import JobConfig
from ps.parameters.layout import Layout
from ps.server.collection import MASTER, Collection, parts_of
from ps.server.control_port import Supervisor
from ps.server.residuals import NAME, Residuals
from ps.step.effects import (
    Decide,
    Dismiss,
    Effect,
    Evaluated,
    Hung,
    Lost,
    PhaseChanged,
    Save,
    Send,
    Settle,
    Stepped,
)
from ps.step.leader import Leader
from ps.step.messages import Decision, Failure, Push, Round
from ps.step.shard import ShardServer
from ps.wire import convert
from ps.wire.chunks import chunks
from ps.wire.connection import Connection, StreamError
from steepest.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5


class Leading:
    """Leads a job. flat: the whole layout, of which `shard` owns a part.

    residuals: those of a job that compresses. post: sends a message to a worker by name, with the bytes of a tensor if
    there are any. apply: carries out a decision on this server's own shard. fail: ends this server, with the reason.
    refusal: why a peer is not let in, or nothing.
    """

    def __init__(
        self,
        config: JobConfig,
        layout: Layout,
        leader: Leader,
        shard: ShardServer,
        flat: torch.Tensor,
        bind: str,
        lock: threading.RLock,
        residuals: Residuals,
        *,
        post: Callable[[str, pb.ServerMessage, memoryview | None], None],
        apply: Callable[[Decision], float],
        fail: Callable[[str], None],
        refusal: Callable[[pb.Fence, str], str],
    ) -> None:
        self.leader = leader
        self._config = config
        self._layout = layout
        self._shard = shard
        self._flat = flat
        self._residuals = residuals
        self._lock = lock
        self._post = post
        self._apply = apply
        self._fail = fail
        self._refusal = refusal
        self._followers: dict[int, Callable[[pb.LeaderMessage], None]] = {}
        self._collection: Collection | None = None
        self._ended = threading.Event()
        self._supervisor = Supervisor(
            bind,
            refusal,
            self._on_command,
            record_every=config.spec.telemetry.every,
            layout=layout if config.spec.telemetry.parameter_norms else None,
        )
        self.control_address = self._supervisor.address
        threading.Thread(target=self._tick, daemon=True).start()

    def stop(self) -> None:
        """End."""
        self._ended.set()
        self._supervisor.stop()

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                self._carry_out(self.leader.tick(time.time()))

    # -- workers ------------------------------------------------------------------------------------------------------

    def join(self, worker: str, host: str) -> None:
        """A worker is there."""
        self._supervisor.tell_member(worker, "joined")
        self._carry_out(self.leader.join(worker, time.time(), host))

    def leave(self, worker: str) -> None:
        """A worker is gone."""
        self._supervisor.tell_member(worker, "left")
        self._carry_out(self.leader.leave(worker, time.time()))

    def replace(self, worker: str) -> None:
        """A newer generation of a worker is there before the older one was seen to go."""
        self._carry_out(self.leader.leave(worker, time.time()))

    def push(self, worker: str, push: Push) -> None:
        """A worker's answer."""
        self._carry_out(self.leader.push(worker, push, time.time())[1])

    def failure(self, worker: str, failure: Failure) -> None:
        """A worker's user code failed."""
        self._carry_out(self.leader.failure(worker, failure, time.time())[1])

    def report(self, server: int, step: int, kind: Round, sums: NDArray[np.float64]) -> None:
        """A shard is reduced."""
        self._carry_out(self.leader.report(server, step, kind, sums, time.time())[1])

    def residual_sink(self, worker: str, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """Where a piece of a residual belongs."""
        return self._residuals.sink(worker, chunk, num_bytes)

    def residual(self, worker: str, part: int) -> None:
        """A worker has handed in the residual of a part."""
        self._residuals.arrived(worker, part)

    # -- effects ------------------------------------------------------------------------------------------------------

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        leader = self.leader
        for effect in effects:
            match effect:
                case Send(worker, assign, handed):
                    for part in handed:
                        self._hand_over(worker, part)
                    self._post(worker, pb.ServerMessage(assign=convert.assign_to_proto(assign)), None)
                case Dismiss(worker, reason):
                    self._post(worker, pb.ServerMessage(stop=pb.Stop(reason=reason)), None)
                case Decide(decision):
                    self._decide(decision)
                case Stepped(completed):
                    self._supervisor.tell_step(completed)
                case Evaluated(step, metrics):
                    self._supervisor.tell_evaluation(step, metrics)
                case Save():
                    self._save(effect)
                case Settle(step, owners):
                    self._collect_residuals(step, owners, self._settle)
                case Lost(reason):
                    self._fail(reason)
                case Hung(worker):
                    self._supervisor.tell_member(worker, "hung")
                case PhaseChanged():
                    self._supervisor.tell_phase(effect, leader.step)

    def _decide(self, decision: Decision) -> None:
        if self._followers:
            message = pb.LeaderMessage(decision=convert.decision_to_proto(decision))
            for send in self._followers.values():
                send(message)
        clamped = self._apply(decision)
        self._carry_out(self.leader.applied(0, decision.step, clamped, time.time())[1])

    # -- residuals ----------------------------------------------------------------------------------------------------

    def _hand_over(self, worker: str, part: int) -> None:
        for chunk, data in chunks(self._residuals.held.pop(part), slot=part, name=NAME):
            self._post(worker, pb.ServerMessage(chunk=chunk), data)

    def _collect_residuals(
        self, step: int, owners: Mapping[int, str], then: Callable[[dict[int, torch.Tensor]], None]
    ) -> None:
        for worker, parts in self._residuals.await_from(owners, then).items():
            self._post(worker, pb.ServerMessage(collect=pb.CollectState(step=step, parts=parts)), None)

    def _settle(self, arrived: dict[int, torch.Tensor]) -> None:
        self._residuals.held.update(arrived)
        self._carry_out(self.leader.settled(time.time()))

    # -- followers ----------------------------------------------------------------------------------------------------

    def serve_follower(self, connection: Connection[pb.FollowerMessage]) -> None:
        """A follower's stream."""
        server = -1
        try:
            for message in connection:
                if server >= 0:
                    with self._lock:
                        self._on_follower_message(server, message)
                    continue
                enlist = message.enlist
                refusal = self._refusal(enlist.fence, enlist.token)
                if refusal:
                    connection.refuse(pb.LeaderMessage(refusal=pb.Refusal(reason=refusal)))
                    return
                server = enlist.server
                self._enlist(server, connection)
        except Exception as error:  # its end needs no word: the controller sees it and starts a new incarnation
            log.exception("message of server %d", server)
            self._fail(f"the leader failed on a message of server {server}: {error!r}")
        connection.release()

    def _enlist(self, server: int, connection: Connection[pb.FollowerMessage]) -> None:
        def sink(message: pb.FollowerMessage, num_bytes: int) -> memoryview:
            collection = self._collection
            if collection is None or message.state.step != collection.step:
                raise StreamError(f"state of step {message.state.step} is not expected")
            return collection.sink(server, message.state, num_bytes)

        connection.sink = sink
        with self._lock:
            self._followers[server] = connection.send
            connection.send(pb.LeaderMessage(enlisted=pb.Enlisted()))

    def _on_follower_message(self, server: int, message: pb.FollowerMessage) -> None:
        match message.WhichOneof("message"):
            case "report":
                report = message.report
                self.report(server, report.step, Round(report.kind), convert.sums_from_bytes(report.segment_sums))
            case "applied":
                applied = message.applied
                self._carry_out(self.leader.applied(server, applied.step, applied.clipped_sum, time.time())[1])
            case "state" if not message.state.name and self._collection is not None:
                self._collection.finish(server)
                if self._collection.is_complete:
                    self._write(self._collection)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, save: Save) -> None:
        """Collect every shard's state, then write it in a thread of its own; the leader waits in phase SAVING."""
        self._collect_residuals(save.step, save.owners, lambda arrived: self._collect_shards(save, arrived))

    def _collect_shards(self, save: Save, residuals: dict[int, torch.Tensor]) -> None:
        collection = Collection(save.step, self._followers, self._layout.dtype, {**self._residuals.held, **residuals})
        self._collection = collection
        for send in self._followers.values():
            send(pb.LeaderMessage(collect=pb.CollectState(step=save.step)))
        if collection.is_complete:
            self._write(collection)

    def _write(self, collection: Collection) -> None:
        self._collection = None
        leader, step = self.leader, collection.step
        wholes = {"": self._flat.clone()}  # of the layout, by the name of what they are
        states = []
        for part in [*parts_of(self._shard), *collection.parts]:
            if part.parameter:
                states.append(part)
                continue
            if part.state not in wholes:
                wholes[part.state] = torch.zeros_like(self._flat)
            wholes[part.state][part.offset : part.offset + part.values.numel()] = part.values
        state = assemble(
            self._config.model,
            self._layout,
            wholes[""],
            leader.buffers or b"",
            states,
            step=step,
            updates=leader.updates,
            compression=compression_state(self._layout, wholes.get(MASTER), collection.residuals),
        )
        records = self._supervisor.unstored()

        def write() -> None:
            problem = ""
            try:
                written = write_checkpoint(
                    self._config.checkpoint_directory, state, records=records, incarnation=self._config.incarnation
                )
                saved = pb.CheckpointSaved(
                    step=written.step,
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

    # -- the controller -----------------------------------------------------------------------------------------------

    def _on_command(self, command: pb.Command) -> None:
        leader, now = self.leader, time.time()
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
