"""The whole service: wires store, cluster, jobs, the gRPC port and the HTTP port, and does nothing else."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import IO

from prometheus_client.registry import CollectorRegistry

from services.api.server import GrpcServer
from services.api.servicer import TrainingJobServicer
from services.cluster.cluster import Cluster
from services.cluster.fork_server import ForkServer
from services.dashboard.app import Page
from services.jobs.admission import Admission
from services.jobs.analysis import Analyses
from services.jobs.code_bundles import CodeStore
from services.jobs.operations import Operations
from services.jobs.running import Running
from services.jobs.task_probe import TaskProbe
from services.settings import Settings
from services.store.store import Store
from services.telemetry.http import HttpServer, metrics_routes
from services.telemetry.metrics import JobCollector


class Service:
    """Runs from construction to `stop`. Raises OSError when a port is taken.

    forks: starts the processes of jobs on this machine; it ends with the service.
    """

    def __init__(self, settings: Settings, forks: ForkServer) -> None:
        settings.data_directory.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(settings.data_directory)
        self.settings = settings
        self._closing = threading.Event()
        wake = threading.Event()
        registry = CollectorRegistry()
        self._http = HttpServer(settings.http_host, settings.http_port)
        try:
            self._grpc = GrpcServer(settings.grpc_host, settings.grpc_port)
        except BaseException:
            self._http.stop()
            self._lock_file.close()
            raise
        self._forks = forks
        forks.start_early()
        self.cluster = Cluster(settings, forks)
        self.cluster.start()
        self.store = Store(settings.database_url)
        self.running = Running()
        bundles = CodeStore(settings.data_directory / "code", settings.max_code_bytes)
        probe = TaskProbe(forks)
        operations = Operations(self.store, bundles, probe, self.cluster, self.running, settings, wake)
        self._admission = Admission(self.store, bundles, self.cluster, self.running, settings, wake)
        registry.register(JobCollector(self.running.all, self.store.count_states))
        self._admission.start()
        analyses = Analyses(bundles, settings)
        self._grpc.start(TrainingJobServicer(operations, self.store, settings, analyses, self._closing))
        page = Page(operations, self.store, settings, self._closing.is_set)
        self._http.start([*metrics_routes(registry, lambda: not self._closing.is_set()), *page.routes()])

    @property
    def grpc_port(self) -> int:
        """Where gRPC is served."""
        return self._grpc.port

    @property
    def http_port(self) -> int:
        """Where HTTP is served."""
        return self._http.port

    def stop(self) -> None:
        """Stop everything. Running jobs go on from their last checkpoint when a service next starts here."""
        self._closing.set()
        self._grpc.stop()
        self._http.stop()
        self._admission.stop()
        self.cluster.stop()
        self._forks.close()
        self.store.close()
        self._lock_file.close()


def _lock(directory: Path) -> IO[str]:
    """Keep other services out of a data directory. Raises OSError when one is in it."""
    file = (directory / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError(f"another service uses the data directory {directory}; choose another with --data-dir") from error
    return file
