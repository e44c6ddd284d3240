"""What a service says of itself."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any, Protocol

from services.api.convert import timestamp
from services.jobs.access import Access, current_caller
from services.settings import Settings
from services.store.store import Store
from steepest.v1 import training_jobs_pb2 as pb


class Resources(Protocol):
    """The cluster. Asked only when `not_ready` is empty."""

    @property
    def not_ready(self) -> str:
        """Why no job could start now, or nothing."""

    def totals(self) -> dict[str, float]:
        """All resources, by name."""

    def free(self) -> dict[str, float]:
        """Those that nobody uses."""

    def num_hosts(self) -> int:
        """How many hosts there are."""


class ServerFacts:
    """Of one service. max_page_size: of lists."""

    def __init__(self, store: Store, cluster: Resources, settings: Settings, access: Access) -> None:
        self._store = store
        self._cluster = cluster
        self._settings = settings
        self._access = access
        self._started = time.time()

    def message(self, max_page_size: int) -> pb.ServerInfo:
        """All of it, for the caller of this call."""
        settings, caller = self._settings, current_caller()
        not_ready = self._cluster.not_ready
        found: dict[str, Any] = {}
        if not not_ready:
            found = {
                "resources": _shown(self._cluster.totals()),
                "free_resources": _shown(self._cluster.free()),
                "hosts": self._cluster.num_hosts(),
            }
        return pb.ServerInfo(
            version=version("steepest"),
            start_time=timestamp(self._started),
            not_ready=not_ready,
            jobs={str(state): count for state, count in self._store.count_states().items()},
            needs_token=self._access.is_closed(),
            tls=settings.tls_certificate is not None,
            caller=caller.name,
            role=caller.role,
            max_code_bytes=settings.max_code_bytes,
            max_page_size=max_page_size,
            retention_days=settings.retention_days,
            calls_per_second=settings.calls_per_second,
            allows_requirements=settings.allows_requirements,
            exchange_tls=settings.exchange_tls,
            **found,
        )


def _shown(resources: dict[str, float]) -> dict[str, float]:
    """Without Ray's own marks of single nodes."""
    return {name: value for name, value in resources.items() if ":" not in name and not name.startswith("bundle_")}
