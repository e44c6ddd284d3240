"""Lets in who may ask over HTTP: a token in a header, or in the cookie that the page's sign-in leaves."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.jobs.access import BEARER, Access, Caller
from services.jobs.audit import Call
from steepest.errors import TooManyCallsError, UnauthenticatedError

COOKIE = "steepest_token"
# Whether the service lives, and the page's own files and sign-in, which tell nothing of jobs.
OPEN = ("/healthz", "/readyz", "/", "/api/sign-in", "/api/sign-out")
OPEN_BELOW = ("/static/", "/jobs/")


class AccessMiddleware:
    """Stands before all routes; who asks is in the request's state."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["path"] not in OPEN and not scope["path"].startswith(OPEN_BELOW):
            asked = HTTPConnection(scope)
            call = Call(f"{scope['method']} {scope['path']}", peer_of(asked))
            try:
                with self._access.audit.of(call, changes=False):
                    caller = await run_in_threadpool(self._access.caller, _authorization(asked), call.peer)
            except UnauthenticatedError as error:
                refusal = JSONResponse({"error": str(error)}, 401, {"WWW-Authenticate": BEARER.strip()})
                await refusal(scope, receive, send)
                return
            except TooManyCallsError as error:
                refusal = JSONResponse({"error": str(error)}, 429, {"Retry-After": f"{error.retry_seconds:.0f}"})
                await refusal(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def peer_of(connection: HTTPConnection) -> str:
    """Where a request comes from, for the audit log."""
    return f"{connection.client.host}:{connection.client.port}" if connection.client else ""


def caller_of(request: Any) -> Caller:
    """Who asks."""
    caller: Caller = request.state.caller
    return caller


def _authorization(connection: HTTPConnection) -> str:
    said = connection.headers.get("authorization")
    if said is None and (token := connection.cookies.get(COOKIE)):
        said = BEARER + token
    return said or ""
