"""Signing in on the page: it leaves the token in a cookie that no script can read and no other site can send."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from services.jobs.access import BEARER, Access, Caller
from services.telemetry.access import COOKIE
from steepest.errors import SpecError, Violation

SECONDS = 30 * 24 * 3600


def sign_in(access: Access, body: Any, peer: str) -> tuple[Caller, str]:
    """(who signs in, the token). Raises SpecError, UnauthenticatedError, TooManyCallsError."""
    token = body.get("token") if isinstance(body, dict) else None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise SpecError([Violation("token", "there is none in the request")])
    return access.caller(BEARER + token.strip(), peer), token.strip()


def leave(response: Response, token: str, *, over_tls: bool) -> None:
    """Have the browser keep the token; forget it when it is empty."""
    response.set_cookie(
        COOKIE, token, max_age=SECONDS if token else 0, httponly=True, samesite="strict", secure=over_tls
    )


def described(caller: Caller) -> dict[str, str | None]:
    """Who is signed in, for the page; no name while no token is needed."""
    return {"name": caller.name or None, "role": caller.role.value}
