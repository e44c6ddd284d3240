"""One job's room on the cluster: the placement groups it holds and the actors in them.

Imported by `services.cluster.cluster`, which prepares Ray's environment first.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ps.job.config import JobConfig
from ps.job.topology import gpus_of_servers, server_places
from ps.server.actor import ServerActor
from ps.wire.address import ServerAddress
from services.cluster.demand import demand
from services.cluster.fork_servers import ForkServers
from services.cluster.processes import Exit, ExitKind, Started, explain_status
from steepest.spec import PlacementSpec
from worker.process.actor import GpuActor, WorkerActor

log = logging.getLogger(__name__)

GROUP_SECONDS = 10.0  # that room may take to be granted
STOPPING_SECONDS = 10.0
PLACING_SECONDS = 1.0  # more than it takes where there is room
# A server holds its shard's parameters, two moments of each, and scratch.
SERVER_COPIES = 4
MIN_SERVER_BYTES = 1 << 20
NODE_LABEL = "ray.io/node-id"


def num_hosts() -> int:
    """How many nodes the cluster has now."""
    return sum(node["Alive"] for node in ray.nodes())


def nodes_of(group: PlacementGroup) -> list[str | None]:
    """The node of each bundle, None for as long as it has none."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[index] or None for index in range(len(nodes))]


@dataclass(eq=False)
class _Process:
    """A server or a worker of the job; on a GPU, one actor is both.

    node: Ray's id of it. started: None until it answered. stopped: this room has killed it. ended: what it lives for is
    over. beside: of a worker, the server in the same process.
    """

    actor: Any
    group: PlacementGroup
    node: str | None
    started: Started | None = None
    stopped: bool = False
    ended: bool = False
    beside: _Process | None = None

    def stop(self) -> None:
        """Kill it without reporting its end."""
        self.stopped = True
        if ray.is_initialized():  # else the cluster has been left, and ends it; to ask would join again
            ray.kill(self.actor)


class JobRoom:
    """The resources of one job and the actors in them. Callbacks come in threads of Ray.

    layout_bytes: of the parameters. inline: no memory is shared between processes.
    """

    def __init__(self, placement: PlacementSpec, layout_bytes: int, fork_servers: ForkServers, *, inline: bool) -> None:
        self._placement = placement
        self._fork_servers = fork_servers
        self._inline = inline
        self._layout_bytes = layout_bytes
        self._server_group: PlacementGroup | None = None
        self._server_memory: list[int] = []  # of each server, in bytes
        self._on_gpus: list[PlacementGroup] = []  # of each server on a GPU: the room of a worker, whose GPU it is on
        self._spare: list[PlacementGroup] = []
        self._workers: dict[str, _Process] = {}
        self._servers: list[_Process] = []
        self._stopping: list[_Process] = []
        self._early: dict[PlacementGroup, _Process] = {}  # processes that are no worker yet, by their room
        self._code: Any = None

    def add_group(self) -> None:
        """Ask for room for one more worker."""
        self._spare.append(placement_group([demand(self._placement, 1)]))

    def reserve(self, num_workers: int) -> bool:
        """Get room for all servers and workers; whether it was granted in time, else nothing is held."""
        for _ in range(num_workers):
            self.add_group()
        if self.wait(GROUP_SECONDS) and self.add_servers(GROUP_SECONDS):
            self._fork_servers.start(self.nodes())
            return True
        self.release()
        return False

    @property
    def _servers_on_gpus(self) -> bool:
        return self._placement.server_device == "cuda"

    def wait(self, seconds: float) -> bool:
        """Whether all room requested for the workers has been granted."""
        return all(group.wait(seconds) for group in self._spare)

    def add_servers(self, seconds: float) -> bool:
        """Ask for room for the servers, on the workers' hosts if possible; whether it was granted in time."""
        placement = self._placement
        home = max(MIN_SERVER_BYTES, self._layout_bytes)
        own = max(MIN_SERVER_BYTES, SERVER_COPIES * self._layout_bytes // placement.num_servers)
        if self._servers_on_gpus:  # the rest of what it has is there
            own = home
        workers = [str(*nodes_of(group)) for group in self._spare]
        places = server_places(workers, placement.num_servers, inline=self._inline, on_gpus=self._servers_on_gpus)
        self._server_memory = [own] * placement.num_servers + [home] * (len(places) - placement.num_servers)
        bundles = [{"memory": memory} for memory in self._server_memory]
        group = placement_group(bundles, bundle_label_selector=[{NODE_LABEL: node} for node in places])
        if not group.wait(seconds):
            remove_placement_group(group)
            del self._server_memory[placement.num_servers :]
            group = placement_group(bundles[: placement.num_servers], strategy="SPREAD")
        self._server_group = group
        if self._servers_on_gpus:
            self._on_gpus = [self._spare[index] for index in gpus_of_servers(workers, placement.num_servers)]
        return bool(group.wait(seconds))

    def nodes(self) -> set[str]:
        """All that have room for something of the job."""
        groups = [*self._spare, *([self._server_group] if self._server_group else [])]
        return {node for group in groups for node in nodes_of(group) if node}

    def set_code(self, code: bytes) -> None:
        """The code bundle that every process gets."""
        self._code = ray.put(code)

    def start_servers(
        self, config: JobConfig, on_exit: Callable[[int, Exit], None]
    ) -> list[tuple[ServerAddress, Started]]:
        """Start all servers, connected to each other; their (address, where), the leader first."""
        # On a cluster of one host nothing needs to be reachable from outside it.
        bind = "127.0.0.1" if num_hosts() == 1 else ""
        assert self._server_group is not None  # noqa: S101  # `reserve` has seen to it
        for index, memory in enumerate(self._server_memory):
            group, bundle = self._server_group, index
            kind: Any = ServerActor
            resources: dict[str, float] = {"num_cpus": 0, "memory": memory}
            if index < len(self._on_gpus):
                group, bundle, kind = self._on_gpus[index], 0, GpuActor
                resources = {"num_cpus": self._placement.threads_per_worker, "num_gpus": 1}
            actor = kind.options(
                **resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
                max_concurrency=4,
                runtime_env=self._fork_servers.runtime_env(node := nodes_of(group)[bundle]),
            ).remote(config, index, bind, self._code)
            server = _Process(actor, group, node)
            self._servers.append(server)
            self._watch(server, actor.wait.remote(), partial(on_exit, index))
        # Their processes start beside those of the servers, whose addresses they learn later.
        self._early = {group: self._new_worker(group) for group in self._spare if group not in self._on_gpus}
        described = ray.get([server.actor.describe.remote() for server in self._servers])
        addresses = [address for address, _, _ in described]
        for server, (_, pid, host) in zip(self._servers, described, strict=True):
            server.started = Started(pid, host)
        ray.get([server.actor.connect.remote(addresses) for server in self._servers])
        return [(address, Started(pid, host)) for address, pid, host in described]

    def start_worker(
        self,
        config: JobConfig,
        worker: str,
        generation: int,
        addresses: Sequence[ServerAddress],
        on_start: Callable[[Started], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        """Start a worker in free room of this job, or request more; the worker starts once the room is granted."""
        if not self._spare:
            self.add_group()
        group = min(self._spare, key=lambda room: self._on_gpus.index(room) if room in self._on_gpus else math.inf)
        self._spare.remove(group)
        if group in self._on_gpus:
            server = self._servers[self._on_gpus.index(group)]
            process = _Process(server.actor, group, server.node, server.started, beside=server)
        else:
            process = self._early.pop(group) if group in self._early else self._new_worker(group)
        self._workers[worker] = process

        def started(future: Any) -> None:
            if future.exception() is None:
                process.started = Started(*future.result()[-2:])
                on_start(process.started)

        process.actor.describe.remote().future().add_done_callback(started)
        self._watch(process, process.actor.run.remote(config, worker, generation, self._code, list(addresses)), on_exit)

    def _new_worker(self, group: PlacementGroup) -> _Process:
        """A process for a worker, which does not know yet for which."""
        group.wait(PLACING_SECONDS)  # a fork needs to know where
        resources = demand(self._placement, 1)
        actor = WorkerActor.options(  # type: ignore[attr-defined]
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            runtime_env=self._fork_servers.runtime_env(node := nodes_of(group)[0]),
        ).remote()
        return _Process(actor, group, node)

    def _watch(self, process: _Process, reference: Any, on_exit: Callable[[Exit], None]) -> None:
        """Tell how a process ended, unless this room has killed it. reference: of the call that it lives for."""

        def ended(future: Any) -> None:
            error = future.exception()
            process.ended = True
            if process.stopped or (process.beside is not None and isinstance(error, ray.exceptions.RayActorError)):
                return  # the end of a process with a server is reported as that
            if error is None:
                result = future.result()
                on_exit(Exit(ExitKind.REFUSED, *result) if result else Exit(ExitKind.DONE))
                return
            # Ray's thread must not wait for an answer from Ray.
            threading.Thread(
                target=lambda: on_exit(Exit(ExitKind.DIED, self._what_happened(process, error))), daemon=True
            ).start()

        reference.future().add_done_callback(ended)

    def _what_happened(self, process: _Process, error: BaseException) -> str:
        """How a process died, as a clause: by an exception of its own, a signal, or an exit status."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, BaseException):
            return f"failed: {cause}" if type(cause) is RuntimeError else f"failed: {type(cause).__name__}: {cause}"
        log.info("Ray says of an actor: %s", error)
        status = None
        if process.started is not None:
            status = self._fork_servers.exit_status(process.node, process.started.pid)
        return explain_status(status)

    def has_server(self, worker: str) -> bool:
        """Whether a server is on a worker's GPU."""
        return worker in self._workers and self._workers[worker].group in self._on_gpus

    def stop_worker(self, worker: str, *, keep_room: bool) -> None:
        """Kill a worker if it still runs. keep_room: for another one in its place."""
        process = self._workers.pop(worker, None)
        if process is None:
            return
        if process.beside is None:
            process.stop()
        elif not process.ended and not process.beside.stopped and ray.is_initialized():
            ray.kill(process.actor)  # and with it the server, whose end is reported
        if keep_room or process.group in self._on_gpus:
            self._spare.append(process.group)
        else:
            _remove(process.group)

    def stop_actors(self) -> None:
        """Kill everything, but keep the room."""
        for process in (*self._servers, *self._early.values()):
            process.stop()
        self._early = {}
        for worker in list(self._workers):
            self.stop_worker(worker, keep_room=True)
        self._stopping, self._servers = self._servers, []

    def wait_stopped(self) -> None:
        """See services.jobs.room.Room."""
        deadline = time.monotonic() + STOPPING_SECONDS
        while any(not server.ended for server in self._stopping) and time.monotonic() < deadline:
            time.sleep(0.01)

    def release(self) -> None:
        """Kill everything and give back the room."""
        self.stop_actors()
        for group in [self._server_group, *self._spare]:
            if group is not None:
                _remove(group)
        self._server_group, self._spare, self._on_gpus = None, [], []

    def leave(self) -> None:
        """See services.jobs.room.Room: nothing outlives the service."""
        self.release()

    def listen(self, *_: Any) -> None:
        """See services.jobs.room.Room: this one has started all its processes itself."""

    @property
    def is_gone(self) -> bool:
        """See services.jobs.room.Room."""
        return False


def _remove(group: PlacementGroup) -> None:
    if ray.is_initialized():
        remove_placement_group(group)
