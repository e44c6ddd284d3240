"""The whole service: wires store, cluster, jobs, the gRPC port and the HTTP port, and does nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import ssl
import threading
from pathlib import Path
from typing import IO

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.registry import CollectorRegistry

from services.api.server import GrpcServer
from services.api.server_info import ServerFacts
from services.api.servicer import TrainingJobServicer
from services.cluster.cluster import Cluster
from services.cluster.fork_server import ForkServer
from services.dashboard.app import Page
from services.jobs.access import Access
from services.jobs.admission import Admission
from services.jobs.analysis import Analyses
from services.jobs.audit import Audit
from services.jobs.call_limit import CallLimit
from services.jobs.code_bundles import CodeStore
from services.jobs.operations import Operations
from services.jobs.retention import Retention
from services.jobs.running import Running
from services.jobs.task_probe import TaskProbe
from services.settings import Settings
from services.store.store import Store
from services.telemetry.calls import CallMetrics
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
        with contextlib.ExitStack() as stack:  # undone if a port is taken
            stack.callback(self._lock_file.close)
            self.store = Store(settings.database_url, lost=lambda: os.kill(os.getpid(), signal.SIGTERM))
            stack.callback(self.store.close)
            audit = Audit(settings.audit_log)
            stack.callback(audit.close)
            access = Access(self.store, audit, CallLimit(settings.calls_per_second))
            _check_exposure(settings, access)
            self._http = HttpServer(settings, access)
            stack.callback(self._http.stop)
            self._grpc = GrpcServer(settings, access, CallMetrics(registry))
            stack.pop_all()
        self._forks = forks
        forks.start_early()
        self.cluster = Cluster(settings, forks)
        self.cluster.start()
        self.running = Running()
        bundles = CodeStore(settings.data_directory / "code", settings.max_code_bytes)
        probe = TaskProbe(forks)
        operations = Operations(self.store, bundles, probe, self.cluster, self.running, settings, wake)
        self._admission = Admission(self.store, bundles, self.cluster, self.running, settings, wake)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):  # of this process, as is usual
            collector(registry=registry)
        registry.register(JobCollector(self.running.all, self.store.count_states))
        self._admission.start()
        self._retention = Retention(self.store, bundles, operations, settings.retention_days)
        self._retention.start()
        analyses = Analyses(operations, bundles, self.cluster, self.running, settings)
        facts = ServerFacts(self.store, self.cluster, settings, access)
        self._grpc.start(TrainingJobServicer(operations, self.store, settings, analyses, facts, self._closing))
        page = Page(operations, self.store, settings, access, self._closing.is_set)
        metrics = metrics_routes(registry, lambda: not self._closing.is_set(), self._not_ready)
        self._http.start([*metrics, *page.routes()])

    @property
    def grpc_port(self) -> int:
        """Where gRPC is served."""
        return self._grpc.port

    @property
    def http_port(self) -> int:
        """Where HTTP is served."""
        return self._http.port

    def _not_ready(self) -> str:
        return "the service is stopping" if self._closing.is_set() else self.cluster.not_ready

    def stop(self) -> None:
        """Stop. Jobs on an existing cluster go on; others do from their checkpoint when a service next starts here."""
        self._closing.set()
        self._forks.end_commands()  # a rehearsal may take minutes, and its call would be waited for
        self._grpc.stop()
        self._http.stop()
        self._retention.stop()
        self._admission.stop()
        self.cluster.stop()
        self._forks.close()
        self.store.close()
        self._lock_file.close()


def _check_exposure(settings: Settings, access: Access) -> None:
    """Raises OSError for a service that others than this machine could reach without TLS and a token."""
    _check_tls(settings)
    hosts = {settings.grpc_host, settings.http_host}
    if hosts <= {"127.0.0.1", "localhost", "::1"}:
        return
    missing = [] if settings.tls_certificate else ["TLS (--tls-cert and --tls-key)"]
    if not access.is_closed():
        missing.append("a token (steepest token create NAME --role admin)")
    if missing:
        raise OSError(f"--host {', '.join(sorted(hosts))} is reached from outside, which takes {' and '.join(missing)}")


def _check_tls(settings: Settings) -> None:
    """Raises OSError for a certificate and a key that do not make a pair."""
    certificate, key = settings.tls_certificate, settings.tls_key
    authority = settings.tls_client_ca
    if authority is not None and certificate is None:
        raise OSError("--tls-client-ca takes --tls-cert and --tls-key: without TLS nobody shows a certificate")
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise OSError("--tls-cert and --tls-key come together: one of the two is missing")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except FileNotFoundError:
        raise OSError(f"--tls-cert {certificate} or --tls-key {key} is not there") from None
    except ssl.SSLError as error:
        raise OSError(f"{certificate} and {key} are no certificate and its key: {error.reason}") from None
    try:
        if authority is not None:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise OSError(f"--tls-client-ca {authority} holds no certificate: {error}") from None


def _lock(directory: Path) -> IO[str]:
    """Keep other services out of a data directory. Raises OSError when one is in it."""
    file = (directory / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError(f"another service uses the data directory {directory}; choose another with --data-dir") from error
    return file
