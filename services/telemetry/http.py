"""The HTTP port: /metrics for Prometheus and /healthz for whoever restarts the service."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.registry import CollectorRegistry


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        """Say nothing of each request."""


def _bind(host: str, port: int, app: Any) -> WSGIServer:
    return make_server(host, port, app, server_class=_Server, handler_class=_Quiet)


class HttpServer:
    """Serves until stopped.

    is_healthy: whether the service can do its work. may_differ: take any free port when `port` is in use; otherwise
    raises OSError.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        is_healthy: Callable[[], bool],
        *,
        may_differ: bool = False,
    ) -> None:
        metrics = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            match environ["PATH_INFO"]:
                case "/metrics":
                    shown: Iterable[bytes] = metrics(environ, start_response)
                    return shown
                case "/healthz":
                    healthy = is_healthy()
                    start_response("200 OK" if healthy else "503 Service Unavailable", [("Content-Type", "text/plain")])
                    return [b"ok\n" if healthy else b"not ready\n"]
                case "/":
                    start_response("200 OK", [("Content-Type", "text/plain")])
                    return [b"steepest: /metrics /healthz\n"]
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"not found; there are /metrics and /healthz\n"]

        try:
            self._server = _bind(host, port, app)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not may_differ:
                raise OSError(
                    f"cannot listen on {host}:{port}: {(error.strerror or '').lower()}; choose another port"
                ) from error
            self._server = _bind(host, 0, app)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
