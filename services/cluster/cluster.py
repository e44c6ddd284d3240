"""The connection to the Ray cluster, embedded or an existing one: what it has, and room for jobs on it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

from services.cluster.ray_environment import prepare_ray_environment

prepare_ray_environment()

import ray

from services.cluster.analysis_room import AnalysisRoom
from services.cluster.demand import demand
from services.cluster.fork_server import ForkServer
from services.cluster.fork_servers import ForkServers
from services.cluster.job_room import JobRoom, num_hosts
from services.cluster.kept_life import KeptLife
from services.cluster.kept_room import Keeper, KeptRoom
from services.settings import Settings
from steepest.errors import ServiceUnavailableError
from steepest.spec import PlacementSpec, TrainingJobSpec

log = logging.getLogger(__name__)

EMBEDDED_CPUS = 8


class Cluster:
    """The connection to the cluster, embedded or an existing one. forks: of this machine."""

    def __init__(self, settings: Settings, forks: ForkServer) -> None:
        self._settings = settings
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._problem = ""
        self._analysis: AnalysisRoom | None = None
        self.fork_servers = ForkServers(forks)
        keeps = settings.keeps_jobs and settings.ray_address is not None
        identity = f"{settings.data_directory.resolve()} {settings.database_url}"
        self._keeper = Keeper(identity) if keeps else None
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
                self.fork_servers.use_own(ray.get_runtime_context().get_node_id())
        except Exception as error:
            log.exception("Ray")
            where = f"the Ray cluster at {settings.ray_address}" if settings.ray_address else "embedded Ray"
            self._problem = f"{where} does not start: {error}"

    @property
    def not_ready(self) -> str:
        """Why no job could start now, or nothing."""
        return self._problem if self._ready.is_set() else "Ray is starting"

    def wait_ready(self) -> None:
        """Raises ServiceUnavailableError when Ray does not start or answer."""
        self._ready.wait()
        if self._problem:
            raise ServiceUnavailableError(self._problem)

    def stop(self) -> None:
        """Leave the cluster; an embedded one ends."""
        if self._keeper is not None:
            self._keeper.stop()
        self._stop.set()
        self._thread.join()

    def num_hosts(self) -> int:
        """How many hosts the cluster has now."""
        self.wait_ready()
        return num_hosts()

    def totals(self) -> dict[str, float]:
        """All resources of the cluster."""
        self.wait_ready()
        return dict(ray.cluster_resources())

    def free(self) -> dict[str, float]:
        """Resources that nothing uses."""
        self.wait_ready()
        return dict(ray.available_resources())

    def shortage(self, placement: PlacementSpec, num_workers: int, users: Sequence[str]) -> str:
        """What a job would have to wait for, or nothing. users: names of the jobs that hold resources."""
        self.wait_ready()
        totals, free = ray.cluster_resources(), ray.available_resources()
        for resource, count in demand(placement, num_workers).items():
            total, left = totals.get(resource, 0.0), free.get(resource, 0.0)
            if left >= count:
                continue
            text = f"waiting for {_number(count, resource)}: the cluster has {total:g}"
            if total < count:
                return f"{text} in all; add nodes, or use fewer workers"
            holders = [*users, *(["an analysis"] if self._analysis is not None and self._analysis.is_held else [])]
            by = f" by {', '.join(holders)}" if holders else ""
            return f"{text}, {total - left:g} are in use{by}"
        return ""

    def reserve(
        self, job: str, spec: TrainingJobSpec, num_workers: int, layout_bytes: int, code: bytes
    ) -> JobRoom | KeptRoom | None:
        """Room for all servers and workers of a job, or None when the cluster cannot grant it now."""
        self.wait_ready()
        if self._keeper is not None:
            return self._keeper.reserve(job, spec, num_workers, layout_bytes, code)
        room = JobRoom(spec.placement, layout_bytes, self.fork_servers, inline=spec.is_inline)
        return room if room.reserve(num_workers) else None

    def analysis_room(self, processes: int) -> AnalysisRoom:
        """Ask for room for an analysis, of which there is one at a time."""
        self.wait_ready()
        self._analysis = AnalysisRoom(processes, self.fork_servers)
        return self._analysis

    def kept(self) -> list[str]:
        """Jobs that went on without a service; waits for a cluster that can have such."""
        if self._keeper is None:
            return []
        self.wait_ready()
        return self._keeper.jobs()

    def adopt(self, job: str) -> tuple[KeptRoom, KeptLife] | None:
        """One of them, with its life; None, and its room is given back, when that is not whole."""
        assert self._keeper is not None  # noqa: S101  # `kept` has named the job
        return self._keeper.adopt(job)

    def give_back(self, job: str) -> None:
        """Let go of the room of one of them."""
        assert self._keeper is not None  # noqa: S101  # `kept` has named the job
        self._keeper.ask("release", job)


def _number(count: float, resource: str) -> str:
    return f"{count:g} {resource}{'s' if count != 1 else ''}"
