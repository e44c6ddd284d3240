"""All settings of the service, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from steepest.telemetry_spec import Action, Rule


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a service runs.

    http_port, grpc_port: 0 takes any free one. ray_address: an existing Ray cluster; None starts
    Ray in this process tree. num_cpus: of embedded Ray. tls_certificate, tls_key: PEM files, the
    certificate with its chain; without them neither port is encrypted. tls_client_ca: of the authority that
    has to have signed the certificate of every caller, if they need one. database: URL of a PostgreSQL
    to keep jobs in; empty: SQLite, beside the rest. retention_days: how long jobs are kept after they
    ended; 0: until they are deleted. keeps_jobs: whether jobs on an existing Ray cluster go on while there
    is no service, which takes one that comes back. preemption: whether a running job gives its room to a waiting one of
    higher priority. secrets_directory: with a file for every secret that jobs may name.
    allows_requirements: whether jobs may name packages that go along with their code. calls_per_second: of one
    caller; 0: as many as they like. exchange_tls: whether what the processes of a job tell each other between hosts is
    under TLS. health_actions: by rule, of
    jobs whose spec does not name it.
    """

    data_directory: Path
    database: str = ""
    grpc_host: str = "127.0.0.1"
    grpc_port: int = 50051
    http_host: str = "127.0.0.1"
    http_port: int = 8080
    ray_address: str | None = None
    num_cpus: int | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    probe_timeout_seconds: float = 300.0
    cancel_grace_seconds: float = 20.0
    max_code_bytes: int = 256 << 20
    max_log_bytes: int = 64 << 20
    retention_days: float = 0.0
    keeps_jobs: bool = False
    preemption: bool = False
    secrets_directory: Path | None = None
    allows_requirements: bool = True
    calls_per_second: float = 0.0
    exchange_tls: bool = False
    health_actions: Mapping[Rule, Action] = field(default_factory=dict)

    @property
    def database_url(self) -> str:
        """Where jobs, their events and tokens are."""
        return self.database or f"sqlite:///{self.data_directory / 'steepest.db'}"

    @property
    def audit_log(self) -> Path:
        """Where it is written who has changed what."""
        return self.data_directory / "audit.jsonl"

    def directory_of(self, job: str) -> Path:
        """Where all that is kept of a job lies, but for the database."""
        return self.data_directory / "jobs" / job

    def history_of(self, job: str) -> Path:
        """Where the records of a job's steps are kept."""
        return self.directory_of(job) / "history"

    def log_of(self, job: str) -> Path:
        """Where what a job's user code prints is kept."""
        return self.directory_of(job) / "log.jsonl"

    def checkpoints_of(self, job: str) -> Path:
        """Where the checkpoints of a job lie."""
        return self.directory_of(job) / "checkpoints"
