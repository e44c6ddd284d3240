"""What server 0 does besides holding a shard: it runs the leader's state machine and carries out its effects.

Everything here runs under the server's lock, in the thread that received the message.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ps.numerics.optimizer import StatePart
from ps.server.checkpoint_writer import CheckpointWriter, Saved, Snapshot
from ps.server.collection import Collection
from ps.server.control_port import ControlPort
from ps.server.guard import Guard
from ps.server.peer import Peers
from ps.server.residuals import NAME, Residuals
from ps.server.shard_links import ShardLinks
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
from ps.step.messages import Failure, Push, Round
from ps.step.signals import UpdateSignals
from ps.wire import convert
from ps.wire.chunks import chunks
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb

TICK_SECONDS = 0.5


class LeaderRunner:
    """Runs a leader. workers: the streams to them. control: tells the controller. residuals: of a compressed job."""

    def __init__(
        self,
        leader: Leader,
        shards: ShardLinks,
        workers: Peers,
        residuals: Residuals,
        writer: CheckpointWriter,
        control: ControlPort,
        guard: Guard,
    ) -> None:
        self.leader = leader
        self._shards = shards
        self._workers = workers
        self._residuals = residuals
        self._writer = writer
        self._control = control
        self._guard = guard
        self._effects: deque[Effect] = deque()
        self._is_busy = False
        self._saving: Collection | None = None  # of the checkpoint that is being gathered

    def start(self) -> None:
        """Begin to tell the leader the time."""
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self._guard.ended.wait(TICK_SECONDS):
            with self._guard.lock:
                self._run(self.leader.tick(time.time()))

    # -- workers (WorkerListener) -------------------------------------------------------------------------------------

    def join(self, worker: str, host: str) -> None:
        """See WorkerListener."""
        self._control.tell_member(worker, "joined")
        self._run(self.leader.join(worker, time.time(), host))

    def leave(self, worker: str) -> None:
        """See WorkerListener."""
        self._control.tell_member(worker, "left")
        self._run(self.leader.leave(worker, time.time()))

    def replace(self, worker: str) -> None:
        """See WorkerListener."""
        self._run(self.leader.leave(worker, time.time()))

    def push(self, worker: str, push: Push) -> None:
        """See WorkerListener."""
        self._run(self.leader.push(worker, push, time.time())[1])

    def failure(self, worker: str, failure: Failure) -> None:
        """See WorkerListener."""
        self._run(self.leader.failure(worker, failure, time.time())[1])

    def printed(self, worker: str, lines: Iterable[pb.PrintedLine]) -> None:
        """See WorkerListener."""
        self._control.tell_printed(worker, lines)

    def residual_sink(self, worker: str, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """See WorkerListener."""
        return self._residuals.sink(worker, chunk, num_bytes)

    def residual(self, worker: str, part: int) -> None:
        """See WorkerListener."""
        if self._residuals.arrived(worker, part):
            self._on_residuals()

    # -- shards -------------------------------------------------------------------------------------------------------

    def report(
        self, server: int, step: int, kind: Round, sums: NDArray[np.float64], signals: NDArray[np.float64] | None
    ) -> None:
        """A shard is reduced. signals: of its gradient."""
        self._run(self.leader.report(server, step, kind, sums, time.time(), signals)[1])

    def applied(self, server: int, step: int, clipped_sum: float, signals: UpdateSignals) -> None:
        """A shard has carried out a decision. signals: of its update."""
        self._run(self.leader.applied(server, step, clipped_sum, time.time(), signals)[1])

    def state_sink(self, server: int, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """Where a piece of a follower's state belongs. Raises StreamError for one that is not expected."""
        if self._saving is None or chunk.step != self._saving.step:
            raise StreamError(f"state of step {chunk.step} is not expected")
        return self._saving.sink(server, chunk, num_bytes)

    def state_sent(self, server: int) -> None:
        """A follower has sent all its state."""
        if self._saving is not None:
            self._saving.finish(server)
            self._write_if_complete(self._saving)

    def own_state(self, parts: Iterable[StatePart]) -> None:
        """The state of this server's own shard."""
        if self._saving is not None:
            self._saving.take(0, parts)
            self._write_if_complete(self._saving)

    # -- effects ------------------------------------------------------------------------------------------------------

    def _run(self, effects: Iterable[Effect]) -> None:
        """Carry out effects in order; what they lead to comes after them."""
        self._effects.extend(effects)
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while self._effects:
                self._carry_out(self._effects.popleft())
        finally:
            self._is_busy = False

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(worker, assign, handed):
                for part in handed:
                    self._hand_over(worker, part)
                self._workers.post(worker, pb.ServerMessage(assign=convert.assign_to_proto(assign)))
            case Dismiss(worker, reason):
                self._workers.post(worker, pb.ServerMessage(stop=pb.Stop(reason=reason)))
            case Decide(decision):
                self._shards.decide(decision)
            case Stepped(completed):
                self._control.tell_step(completed)
            case Evaluated(step, metrics, is_best):
                self._control.tell_evaluation(step, metrics, is_best=is_best)
            case Save(step, owners, waits):
                self._saving = Collection(step, self._shards.servers, waits=waits)
                self._ask_residuals(step, owners)
            case Settle(step, owners):
                self._ask_residuals(step, owners)
            case Lost(reason):
                self._guard.fail(reason)
            case Hung(worker):
                self._control.tell_member(worker, "hung")
            case PhaseChanged():
                self._control.tell_phase(effect, self.leader.step)

    # -- residuals ----------------------------------------------------------------------------------------------------

    def _hand_over(self, worker: str, part: int) -> None:
        for chunk, data in chunks(self._residuals.held.pop(part), slot=part, name=NAME):
            self._workers.post(worker, pb.ServerMessage(chunk=chunk), data)

    def _ask_residuals(self, step: int, owners: Mapping[int, str]) -> None:
        for worker, parts in self._residuals.ask(owners).items():
            self._workers.post(worker, pb.ServerMessage(collect=pb.CollectState(step=step, parts=parts)))
        if self._residuals.is_complete:
            self._on_residuals()

    def _on_residuals(self) -> None:
        """Use the residuals that have arrived: for a checkpoint, or to hand them to other workers."""
        if self._saving is not None:
            self._shards.collect(self._saving.step)
            return
        self._residuals.held.update(self._residuals.take())
        self._run(self.leader.settled(time.time()))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _write_if_complete(self, collection: Collection) -> None:
        if not collection.is_complete:
            return
        self._saving = None
        leader = self.leader
        residuals = {**self._residuals.held, **self._residuals.take()}
        snapshot = Snapshot(
            leader.standing,
            leader.buffers or b"",
            leader.constants,
            collection.parts,
            residuals,
        )
        self._writer.write(snapshot, self._control.unstored(), self._on_saved)
        if not collection.waits:
            self._run(leader.copied(time.time()))

    def _on_saved(self, saved: Saved) -> None:
        with self._guard.lock:
            self._control.tell_checkpoint(saved)
            self._run(self.leader.saved(saved.step, saved.problem, time.time()))

    # -- the controller -----------------------------------------------------------------------------------------------

    def obey(self, verb: str, worker: str) -> None:
        """Carry out a command of the controller, from any thread."""
        leader, now = self.leader, time.time()
        with self._guard.lock:
            match verb:
                case "pause":
                    self._run(leader.pause(now))
                case "resume":
                    self._run(leader.resume(now))
                case "cancel":
                    self._run(leader.cancel(now))
                case "retire":
                    self._run(leader.retire(worker, now))


class LocalLeader:
    """The leader, as the shard in its own process reaches it."""

    def __init__(self, runner: LeaderRunner) -> None:
        self._runner = runner

    def report(self, step: int, kind: Round, sums: NDArray[np.float64], signals: NDArray[np.float64] | None) -> None:
        """See LeaderLink."""
        self._runner.report(0, step, kind, sums, signals)

    def applied(self, step: int, clipped_sum: float, signals: UpdateSignals, direction: bytes) -> None:
        """See LeaderLink."""
        self._runner.leader.direction = direction
        self._runner.applied(0, step, clipped_sum, signals)

    def state(self, step: int, parts: Iterator[StatePart]) -> None:
        """See LeaderLink."""
        self._runner.own_state(parts)
