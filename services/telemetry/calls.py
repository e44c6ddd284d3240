"""What Prometheus sees of the gRPC calls, under the names that gRPC's own middleware has made common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import CollectorRegistry

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class CallMetrics:
    """Counts calls by method and status, and times those with one answer. One series for each method that is called."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._handled = Counter(
            "grpc_server_handled", "Calls that have ended, by status.", ["grpc_method", "grpc_code"], registry=registry
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds", "Time to answer calls that have one answer.", ["grpc_method"],
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self._open = Gauge(
            "grpc_server_open_streams", "Streams of answers that are open.", ["grpc_method"], registry=registry
        )

    def single(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call that returns one answer."""

        def call(request: Any, context: grpc.ServicerContext) -> Any:
            began = time.perf_counter()
            try:
                return behaviour(request, context)
            finally:
                self._seconds.labels(method).observe(time.perf_counter() - began)
                self._count(method, context)

        return call

    def stream(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call that yields many."""

        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self._open.labels(method).inc()
            try:
                yield from behaviour(request, context)
            finally:
                self._open.labels(method).dec()
                self._count(method, context)

        return call

    def _count(self, method: str, context: grpc.ServicerContext) -> None:
        code = context.code()  # type: ignore[attr-defined]  # of the implementation; None: it ended well
        name = "OK" if code is None else code.name
        self._handled.labels(method, name if context.is_active() or code is not None else "CANCELLED").inc()
