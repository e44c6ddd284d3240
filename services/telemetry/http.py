"""The HTTP port: /metrics for Prometheus, /healthz and /readyz for whoever runs the service, and the page."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Sequence

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from services.jobs.access import Access
from services.settings import Settings
from services.telemetry.access import AccessMiddleware

STOP_SECONDS = 1
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def metrics_routes(
    registry: CollectorRegistry, is_healthy: Callable[[], bool], not_ready: Callable[[], str]
) -> list[BaseRoute]:
    """/metrics, /healthz and /readyz.

    is_healthy: whether the service lives; one that does not is to be restarted. not_ready: why it could start no job
    now, or nothing; meanwhile calls are better sent elsewhere.
    """

    def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def health(request: Request) -> Response:
        healthy = is_healthy()
        return PlainTextResponse("ok\n" if healthy else "not ready\n", 200 if healthy else 503)

    def ready(request: Request) -> Response:
        reason = not_ready()
        return PlainTextResponse(f"{reason or 'ok'}\n", 503 if reason else 200)

    return [Route("/metrics", metrics), Route("/healthz", health), Route("/readyz", ready)]


class HttpServer:
    """Holds the port from construction on, and serves from `start` to `stop`. Raises OSError when the port is taken."""

    def __init__(self, settings: Settings, access: Access) -> None:
        host, port = settings.http_host, settings.http_port
        self._settings, self._access = settings, access
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._host = host
        self._socket = socket.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            reason = (error.strerror or "").lower()
            raise OSError(f"cannot listen on {host}:{port}: {reason}; choose another port") from error
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, routes: Sequence[BaseRoute]) -> None:
        """Begin to answer.

        On loopback, requests that name another host are refused, so that no site can lead a browser here. Elsewhere a
        service has names that it does not know, and the token guards it.
        """
        names = [*LOOPBACK, self._host] if self._host in LOOPBACK or self._host == "::1" else ["*"]
        middleware = [
            Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
            Middleware(AccessMiddleware, access=self._access),
        ]
        authority = self._settings.tls_client_ca
        config = uvicorn.Config(
            Starlette(routes=routes, middleware=middleware),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=STOP_SECONDS,
            ssl_certfile=self._settings.tls_certificate,
            ssl_keyfile=self._settings.tls_key,
            ssl_ca_certs=None if authority is None else str(authority),
            ssl_cert_reqs=ssl.CERT_NONE if authority is None else ssl.CERT_REQUIRED,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(2 * STOP_SECONDS + 1)
        self._socket.close()
