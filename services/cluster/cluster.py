"""Ray: reserves room for a job by placement groups, starts its actors there, and tells when one ends."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from services.cluster.ray_environment import prepare_ray_environment

prepare_ray_environment()

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
from services.cluster.fork_servers import ForkServers
from services.settings import Settings
from steepest.errors import ServiceUnavailableError
from steepest.spec import PlacementSpec, TrainingJobSpec
from worker.process.actor import WorkerActor

log = logging.getLogger(__name__)

GROUP_SECONDS = 10.0
PLACING_SECONDS = 1.0  # more than it takes where there is room
EMBEDDED_CPUS = 8
# A server holds its shard's parameters, two moments of each, and scratch.
SERVER_COPIES = 4
MIN_SERVER_BYTES = 1 << 20
NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class Exit:
    """An actor has ended. kind: "done", "refused" (the user's code cannot be loaded) or "died"."""

    kind: str
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """An actor runs."""

    pid: int
    host: str


class Scheduler:
    """The connection to the cluster, embedded or an existing one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._problem = ""
        self.fork_servers = ForkServers()
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)

    def start(self) -> None:
        """Start or join Ray in a thread; `wait_ready` waits for it."""
        self._thread.start()

    def _run(self) -> None:
        """Ray's processes die with the thread that started them, so it lives as long as they are to."""
        self._join_cluster()
        self._ready.set()
        self._stop.wait()
        ray.shutdown()

    def _join_cluster(self) -> None:
        settings = self._settings
        logging.getLogger("ray").setLevel(logging.ERROR)
        common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        try:
            if settings.ray_address is not None:
                ray.init(address=settings.ray_address, **common)
            else:
                cpus = settings.num_cpus or max(EMBEDDED_CPUS, os.cpu_count() or 1)
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
                self.fork_servers.start(node["NodeID"] for node in ray.nodes())  # ready by the first job
        except Exception as error:
            log.exception("Ray")
            where = f"the Ray cluster at {settings.ray_address}" if settings.ray_address else "embedded Ray"
            self._problem = f"{where} does not start: {error}"

    def wait_ready(self) -> None:
        """Raises ServiceUnavailableError when Ray cannot be had."""
        self._ready.wait()
        if self._problem:
            raise ServiceUnavailableError(self._problem)

    def stop(self) -> None:
        """Leave the cluster; an embedded one ends."""
        self._stop.set()
        self._thread.join()

    def num_hosts(self) -> int:
        """How many hosts the cluster has now."""
        self.wait_ready()
        return _num_hosts()

    def totals(self) -> dict[str, float]:
        """All resources of the cluster."""
        self.wait_ready()
        return dict(ray.cluster_resources())

    def shortage(self, placement: PlacementSpec, num_workers: int, users: Sequence[str]) -> str:
        """What a job would have to wait for, or nothing. users: names of the jobs that hold resources."""
        self.wait_ready()
        totals, free = ray.cluster_resources(), ray.available_resources()
        for resource, count in _demand(placement, num_workers).items():
            total, left = totals.get(resource, 0.0), free.get(resource, 0.0)
            if left >= count:
                continue
            text = f"waiting for {_number(count, resource)}: the cluster has {total:g}"
            if total < count:
                return f"{text} in all; add nodes, or use fewer workers"
            by = f" by {', '.join(users)}" if users else ""
            return f"{text}, {total - left:g} are in use{by}"
        return ""

    def reserve(self, spec: TrainingJobSpec, num_workers: int, layout_bytes: int) -> Placement | None:
        """Room for all servers and workers of a job, or None when it cannot be had now."""
        self.wait_ready()
        placed = Placement(spec.placement, layout_bytes, self.fork_servers, inline=spec.is_inline)
        for _ in range(num_workers):
            placed.add_group()
        if placed.wait(GROUP_SECONDS) and placed.add_servers(GROUP_SECONDS):
            self.fork_servers.start(placed.nodes())
            return placed
        placed.release()
        return None


# Of the GPU of a worker that a server is on, what each of the two is given: what counts is that Ray then shows both the
# same one, and nobody else that.
SHARE_OF_GPU = 0.5


def _demand(placement: PlacementSpec, num_workers: int) -> dict[str, float]:
    demand = {"CPU": float(placement.threads_per_worker * num_workers)}
    if placement.device == "cuda":
        demand["GPU"] = float(num_workers)
    return demand


def _num_hosts() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def _number(count: float, resource: str) -> str:
    return f"{count:g} {resource}{'s' if count != 1 else ''}"


def _nodes_of(group: PlacementGroup) -> list[str | None]:
    """The node of each bundle, None for as long as it has none."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[index] or None for index in range(len(nodes))]


class Placement:
    """The room of one job and the actors in it. Callbacks come in threads of Ray."""

    def __init__(self, placement: PlacementSpec, layout_bytes: int, fork_servers: ForkServers, *, inline: bool) -> None:
        self._placement = placement
        self._fork_servers = fork_servers
        self._inline = inline
        self._layout_bytes = layout_bytes
        self._server_group: PlacementGroup | None = None
        self._server_memory: list[int] = []  # of each server, in bytes
        self._on_gpus: list[PlacementGroup] = []  # of each server on a GPU: the room of a worker, whose GPU it is on
        self._spare: list[PlacementGroup] = []
        self._workers: dict[str, tuple[Any, PlacementGroup]] = {}
        self._servers: list[Any] = []
        self._code: Any = None

    def add_group(self) -> None:
        """Ask for room for one more worker."""
        self._spare.append(placement_group([_demand(self._placement, 1)]))

    @property
    def _servers_on_gpus(self) -> bool:
        return self._placement.server_device == "cuda"

    def wait(self, seconds: float) -> bool:
        """Whether all the room asked for the workers is there."""
        return all(group.wait(seconds) for group in self._spare)

    def add_servers(self, seconds: float) -> bool:
        """Room for the servers, on the hosts of the workers if there is any, else where there is; whether it is had."""
        placement = self._placement
        home = max(MIN_SERVER_BYTES, self._layout_bytes)
        own = max(MIN_SERVER_BYTES, SERVER_COPIES * self._layout_bytes // placement.num_servers)
        if self._servers_on_gpus:  # the rest of what it has is there
            own = home
        workers = [str(*_nodes_of(group)) for group in self._spare]
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
        return {node for group in groups for node in _nodes_of(group) if node}

    def set_code(self, code: bytes) -> None:
        """The code bundle that every worker gets."""
        self._code = ray.put(code)

    def start_servers(
        self, config: JobConfig, on_exit: Callable[[int, Exit], None]
    ) -> list[tuple[ServerAddress, Started]]:
        """Start all servers, connected to each other; their (address, where), the leader first."""
        # On a cluster of one host nothing needs to be reachable from outside it.
        bind = "127.0.0.1" if _num_hosts() == 1 else ""
        assert self._server_group is not None  # noqa: S101  # `reserve` has seen to it
        for index, memory in enumerate(self._server_memory):
            group, bundle = self._server_group, index
            resources: dict[str, float] = {"memory": memory}
            if index < len(self._on_gpus):
                group, bundle, resources = self._on_gpus[index], 0, {"num_gpus": SHARE_OF_GPU}
            actor = ServerActor.options(  # type: ignore[attr-defined]
                num_cpus=0,
                **resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
                max_concurrency=4,
                runtime_env=self._fork_servers.runtime_env(_nodes_of(group)[bundle]),
            ).remote(config, index, bind)
            self._servers.append(actor)
            _watch(actor.wait.remote(), partial(on_exit, index))
        described = ray.get([actor.describe.remote() for actor in self._servers])
        addresses = [address for address, _, _ in described]
        ray.get([actor.connect.remote(addresses) for actor in self._servers])
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
        """Start a worker in room that was asked for, or ask for some; it starts when there is any."""
        if not self._spare:
            self.add_group()
        group = min(self._spare, key=lambda room: self._on_gpus.index(room) if room in self._on_gpus else math.inf)
        self._spare.remove(group)
        group.wait(PLACING_SECONDS)  # a fork needs to know where
        resources = _demand(self._placement, 1)
        actor = WorkerActor.options(  # type: ignore[attr-defined]
            num_cpus=resources["CPU"],
            num_gpus=SHARE_OF_GPU if group in self._on_gpus else resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            runtime_env=self._fork_servers.runtime_env(*_nodes_of(group)),
        ).remote()
        self._workers[worker] = (actor, group)

        def started(future: Any) -> None:
            if future.exception() is None:
                on_start(Started(*future.result()))

        actor.describe.remote().future().add_done_callback(started)
        _watch(actor.run.remote(config, worker, generation, self._code, list(addresses)), on_exit)

    def has_server(self, worker: str) -> bool:
        """Whether a server is on a worker's GPU."""
        return worker in self._workers and self._workers[worker][1] in self._on_gpus

    def stop_worker(self, worker: str, *, keep_room: bool) -> None:
        """Kill a worker if it still runs. keep_room: for another one in its place."""
        actor, group = self._workers.pop(worker, (None, None))
        if actor is None or group is None:
            return
        _kill(actor)
        if keep_room or group in self._on_gpus:
            self._spare.append(group)
        else:
            _remove(group)

    def stop_actors(self) -> None:
        """Kill everything, but keep the room."""
        for worker in list(self._workers):
            self.stop_worker(worker, keep_room=True)
        for actor in self._servers:
            _kill(actor)
        self._servers = []

    def release(self) -> None:
        """Kill everything and give back the room."""
        self.stop_actors()
        for group in [self._server_group, *self._spare]:
            if group is not None:
                _remove(group)
        self._server_group, self._spare, self._on_gpus = None, [], []


def _kill(actor: Any) -> None:
    if ray.is_initialized():  # else the cluster has been left, and ends it; to ask would join again
        ray.kill(actor)


def _remove(group: PlacementGroup) -> None:
    if ray.is_initialized():
        remove_placement_group(group)


def _watch(reference: Any, on_exit: Callable[[Exit], None]) -> None:
    def ended(future: Any) -> None:
        error = future.exception()
        if error is None:
            result = future.result()
            on_exit(Exit("refused", *result) if result else Exit("done"))
        else:
            on_exit(Exit("died", _short(error)))

    reference.future().add_done_callback(ended)


def _short(error: BaseException) -> str:
    """What matters of Ray's long messages."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return " ".join(kept[:4])[:600]
