"""One server of a job: wires its shard, its host's home and, on server 0, the leader to the sockets.

Messages are handled one at a time, under one lock, in the thread that received them. Server 0 also leads
(ps.server.leader_runner); the others (followers) report to it. The first server of every host is that host's home: its
memory holds the parameters for all workers there, and it speaks for those workers with servers on other hosts
(ps.server.home). A server beyond the job's number of shards has none, and is a home only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ps.checkpoint.files import newest_valid
from ps.checkpoint.named_state import Restored, master_of, residuals_of, restore
from ps.job.config import JobConfig
from ps.job.topology import home_of
from ps.memory.gpu import Device
from ps.memory.host import host_identity
from ps.memory.segment import Segment, constant_start
from ps.numerics.whole_optimizer import evaluates_average
from ps.parameters.layout import shards
from ps.server.checkpoint_writer import CheckpointWriter
from ps.server.control_port import ControlPort
from ps.server.doorman import Doorman
from ps.server.follower import RemoteLeader
from ps.server.follower_streams import FollowerStreams
from ps.server.guard import Guard
from ps.server.home import Home
from ps.server.leader_runner import LeaderRunner, LocalLeader
from ps.server.links import Bystander, WorkerListener
from ps.server.peer import Peer, Peers
from ps.server.residuals import Residuals
from ps.server.shard_host import NoShard, ShardHost
from ps.server.shard_links import ShardLinks
from ps.server.worker_streams import Stream, WorkerStreams
from ps.step.best import Standing
from ps.step.leader import Leader
from ps.step.shard import ShardState
from ps.wire.address import ServerAddress
from ps.wire.connection import Connection, Role
from ps.wire.in_process import InProcess, pair
from ps.wire.listener import Listener, Service
from steepest.v1 import exchange_pb2 as pb


class ParameterServer:
    """Listens from construction on; `connect` gives it the other servers, and opens it to workers.

    bind: the IP address to listen on. device: the GPU to hold the shard on, None for the host's memory; then
    `gpu_parameters` there, shape (layout.numel,), hold the shard's part of them, and a worker in this process may use
    the rest for those of other servers.
    """

    def __init__(self, config: JobConfig, index: int, bind: str, device: Device | None = None) -> None:
        self.config = config
        self.index = index
        self.layout = config.layout()
        self.leader: Leader | None = None  # on server 0, once it is connected
        self._device = device
        self.gpu_parameters: torch.Tensor | None = None
        if device is not None:
            self.gpu_parameters = torch.zeros(self.layout.numel, dtype=self.layout.dtype, device=device.torch_device)
        self._guard = Guard()
        self._doorman = Doorman(config)
        self._peers, self._relays = Peers(), Peers()  # workers, and homes of other hosts
        # Workers share their frozen parameters behind the others; where there are none, that takes no memory.
        room = constant_start(self.layout.nbytes) + config.model.constant_places()[1]
        self._segment = Segment.create(room, f"parameters-{config.job}")
        self._closers: list[Any] = []  # everything with a `close`, in the order in which they are to end
        control = ""
        if index == 0:
            telemetry = config.spec.telemetry
            layout = self.layout if telemetry.parameter_norms else None
            self._control = ControlPort(
                bind,
                self._doorman.refusal,
                record_every=telemetry.every,
                layout=layout,
                credentials=config.credentials,
            )
            control = self._control.address
        self._worker_streams: WorkerStreams | None = None
        self._follower_streams: FollowerStreams | None = None
        services: dict[Role, Service[Any]] = {
            Role.WORKER: Service(pb.WorkerMessage.FromString, self._serve_worker),
            Role.RELAY: Service(pb.WorkerMessage.FromString, self._serve_relay),
            Role.FOLLOWER: Service(pb.FollowerMessage.FromString, self._serve_follower),
        }
        self._listeners = (Listener(services, bind, config.credentials), Listener(services))
        network, local = (listener.address for listener in self._listeners)
        self.address = ServerAddress(control, network, local, host_identity(), self._segment.reference)

    # -- start and end ------------------------------------------------------------------------------------------------

    def connect(self, addresses: Sequence[ServerAddress]) -> None:
        """Meet the other servers; returns when this one is ready for workers. addresses: of all, the leader first."""
        config, own_host = self.config, self.address.host
        hosts = [address.host for address in addresses]
        home = home_of(hosts, own_host)
        if home is not None and home != self.index:
            self._share(addresses[home])
        self._flat = self._segment.tensor(self.layout.dtype, self.layout.numel)
        num_threads = max(1, (os.cpu_count() or 1) // hosts.count(own_host))
        remote = self._enlist(addresses[0]) if 0 < self.index < config.num_servers else None
        shard: ShardHost | NoShard = NoShard()
        listener: WorkerListener = Bystander()
        if self.index < config.num_servers:
            host, restored = self._open(num_threads)
            if remote is None:
                listener = self._lead(host, restored)
            else:
                host.report_to(remote)
                remote.follow(host, self._guard)
            shard = host
        cut = zip(shards(self.layout, config.num_servers), addresses, strict=False)
        elsewhere = {shard: address for shard, address in cut if address.host != own_host}
        if home != self.index or config.spec.is_inline:
            elsewhere = {}
        own_home = Home(config, f"server-{self.index}", elsewhere, self._flat, self._peers, self._guard)
        self._worker_streams = WorkerStreams(
            self.layout, self._segment.reference, shard, own_home, listener, self._peers, self._guard
        )
        self._closers += [own_home, self._worker_streams]
        self._doorman.open()

    def _share(self, home: ServerAddress) -> None:
        """Have the parameters in the memory of this host's home."""
        segment = Segment.open(home.parameters)
        if segment is None:
            raise RuntimeError(f"server {self.index} cannot map the memory of another server on its host")
        self._segment.close()
        self._segment = segment

    def _enlist(self, leader: ServerAddress) -> RemoteLeader:
        remote = RemoteLeader(self.config, self.index, leader)
        self._closers.append(remote)
        return remote

    def _open(self, num_threads: int) -> tuple[ShardHost, Restored | None]:
        """Make the shard, from the newest checkpoint if there is one; that is returned, too."""
        config, plan = self.config, self.config.plan()
        own = shards(self.layout, config.num_servers)[self.index]
        here = slice(own.start, own.stop)
        parameters = self._flat[here]
        found = newest_valid(config.checkpoint_directory)
        restored = None
        if found is not None:
            restored = restore(config.model, self.layout, found[1])
            parameters.copy_(restored.flat[here])
        shard = ShardState(
            own,
            parameters,
            config.spec.optimizer,
            num_leaves=plan.num_leaves,
            clip=plan.clip,
            step=0 if restored is None else restored.state.step,
            initialized=restored is not None,
            num_threads=num_threads,
            push=config.push_codec(),
            pull=config.pull_codec(),
            device=self._device,
            master=None if self.gpu_parameters is None else self.gpu_parameters[here],
            average=config.spec.average,
            signals_every=config.signals_every,
            histograms_every=config.histograms_every,
        )
        if restored is not None:
            shard.optimizer.import_state(restored.state.optimizer)
            master = master_of(self.layout, restored.state.compression)
            if master is not None:
                shard.master.copy_(master[here])
            if shard.average is not None and restored.average is not None:
                shard.average.restore(restored.average[here])
        return ShardHost(shard, self._device, self._connected), restored

    def _connected(self) -> Iterable[Peer]:
        return [*self._peers.values(), *self._relays.values()]

    def _lead(self, own: ShardHost, restored: Restored | None) -> LeaderRunner:
        config, codec = self.config, own.state.push_codec
        averages = evaluates_average(config.spec.average, config.spec.optimizer)  # its class is there on servers only
        state = None if restored is None else restored.state
        held = {} if state is None else residuals_of(self.layout, state.compression)
        self.leader = Leader(
            replace(config.plan(), evaluates_average=averages),
            Standing() if state is None else state.standing,
            buffers=None if restored is None else restored.buffers,
            constants=b"" if restored is None else restored.constants,
            initialized=state is not None,
            kept=held,
        )
        self.leader.direction = own.state.direction
        numel = self.layout.numel + (0 if codec is None else codec.state_numel)
        links = ShardLinks(own)
        runner = LeaderRunner(
            self.leader,
            links,
            self._peers,
            Residuals(numel, self.layout.dtype, held),
            CheckpointWriter(config, self.layout),
            self._control,
            self._guard,
        )
        own.report_to(LocalLeader(runner))
        self._follower_streams = FollowerStreams(runner, links, self._doorman, self._guard)
        self._control.start(runner.obey)
        self._closers.append(self._control)
        runner.start()
        return runner

    def stop(self) -> None:
        """End all streams."""
        self._guard.ended.set()
        for listener in self._listeners:
            listener.close()
        for peer in self._connected():
            peer.end()
        for closer in self._closers:
            closer.close()

    def wait(self) -> None:
        """Block until `stop`. Raises RuntimeError when this server failed."""
        self._guard.wait()

    def call_from_here(self, slot: Callable[[int], torch.Tensor]) -> InProcess[pb.ServerMessage]:
        """The stream of a worker in this process, on the GPU of this server.

        slot: gives the worker's slots there, each as a whole layout, by its number.
        """
        here, there = pair()
        here.slot = slot
        threading.Thread(target=self._serve_worker, args=(here,), daemon=True).start()
        return there

    # -- calls --------------------------------------------------------------------------------------------------------

    def _serve_worker(self, connection: Stream) -> None:
        hello = self._doorman.greet(connection)
        if hello is not None and self._worker_streams is not None:
            self._worker_streams.serve(hello, connection)

    def _serve_relay(self, connection: Connection[pb.WorkerMessage]) -> None:
        hello = self._doorman.greet(connection)
        if hello is not None and self._worker_streams is not None:
            self._worker_streams.serve_relay(hello, connection, self._relays)

    def _serve_follower(self, connection: Connection[pb.FollowerMessage]) -> None:
        self._doorman.wait_open()
        if self._follower_streams is None:
            connection.refuse(pb.LeaderMessage(refusal=pb.Refusal(reason=f"server {self.index} does not lead")))
        else:
            self._follower_streams.serve(connection)
