"""The gRPC channel of a client: with or without TLS, and with the token on every call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from steepest.errors import SpecError, Violation

HTTPS = "https://"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPTIONS = [("grpc.enable_retries", 0)]


def open_channel(
    address: str, tls_ca: str | Path | None, token: str, certificate: tuple[str | Path, str | Path] | None = None
) -> grpc.Channel:
    """A channel to a service. certificate: the caller's own and its key, PEM files, for a service that asks for one.

    Raises SpecError for a file that cannot be read, or a token that would be overheard.
    """
    if tls_ca or address.startswith(HTTPS):
        authorities = _content("--tls-ca", tls_ca) if tls_ca else None
        chain = _content("certificate", certificate[0]) if certificate else None
        key = _content("certificate", certificate[1]) if certificate else None
        credentials = grpc.ssl_channel_credentials(authorities, key, chain)
        return grpc.secure_channel(address.removeprefix(HTTPS), credentials, options=OPTIONS)
    if token and address.rpartition(":")[0] not in LOOPBACK:
        problem = (
            f"it would go to {address} for all to read; give --tls-ca FILE, or an address that begins with https://"
        )
        raise SpecError([Violation("--token", problem)])
    return grpc.insecure_channel(address, options=OPTIONS)


def _content(option: str, path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SpecError([Violation(option, f"cannot read {path}: {error.strerror}")]) from None


def with_token(channel: grpc.Channel, token: str) -> grpc.Channel:
    """The channel, with the token on every call."""
    return grpc.intercept_channel(channel, _Bearer(token)) if token else channel


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: list[tuple[str, str]]
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """gRPC's own call credentials are for encrypted channels alone; a service on loopback may have none."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _call(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._entry]
        more = details.credentials, details.wait_for_ready, details.compression
        return continuation(_Details(details.method, details.timeout, metadata, *more), request)

    intercept_unary_unary = intercept_stream_unary = _call  # type: ignore[assignment]
    intercept_unary_stream = intercept_stream_stream = _call  # type: ignore[assignment]
