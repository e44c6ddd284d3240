"""The routes of the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from services.dashboard.actions import ForbiddenError, act, check_origin
from services.dashboard.live import OPTIONS, Live
from services.dashboard.sign_in import described, leave, sign_in
from services.dashboard.views import GRADIENT_NORM, Cursor, Views
from services.jobs.access import Access, Need
from services.jobs.audit import Call
from services.jobs.operations import Operations
from services.settings import Settings
from services.store.store import Store
from services.telemetry.access import caller_of, peer_of
from steepest.errors import (
    ConflictError,
    NotFoundError,
    PermissionDeniedError,
    ServiceUnavailableError,
    SpecError,
    SteepestError,
    TooManyCallsError,
    UnauthenticatedError,
    Violation,
)

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STATUS: dict[type[Exception], int] = {
    SpecError: 400,
    NotFoundError: 404,
    ConflictError: 409,
    ForbiddenError: 403,
    PermissionDeniedError: 403,
    UnauthenticatedError: 401,
    ServiceUnavailableError: 503,
    TooManyCallsError: 429,
}
_CURSOR = re.compile(r"\d{1,18}:\d{1,18}:\d{1,18}")
DEFAULT_POINTS = 600


class Page:
    """Answers the page's requests."""

    def __init__(
        self, operations: Operations, store: Store, settings: Settings, access: Access, is_closing: Callable[[], bool]
    ) -> None:
        self._operations = operations
        self._access = access
        self._over_tls = settings.tls_certificate is not None
        self._views = Views(store, settings)
        self._live = Live(self._views, is_closing)

    def routes(self) -> list[BaseRoute]:
        """All of them."""
        return [
            Route("/", self._page),
            Route("/jobs/{job}", self._page),
            Route("/api/session", lambda request: self._answer(lambda: described(caller_of(request)))),
            Route("/api/sign-in", self._sign_in, methods=["POST"]),
            Route("/api/sign-out", self._sign_out, methods=["POST"]),
            Route("/api/jobs", lambda request: self._answer(self._views.jobs)),
            Route("/api/live", self._live_jobs),
            Route("/api/jobs/{job}", lambda request: self._answer(lambda: self._views.job(_job(request)))),
            Route("/api/jobs/{job}/series", self._series),
            Route("/api/jobs/{job}/layers", self._layers),
            Route("/api/jobs/{job}/noise", self._noise),
            Route("/api/jobs/{job}/curvature", self._curvature),
            Route("/api/jobs/{job}/histograms", self._histograms),
            Route("/api/jobs/{job}/live", self._live_job),
            Route("/api/jobs/{job}/{verb}", self._act, methods=["POST"]),
            Mount("/static", _Static(directory=STATIC)),
        ]

    def _page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    def _answer(self, make: Callable[[], Any]) -> Response:
        try:
            return _json(make())
        except (SteepestError, ForbiddenError) as error:
            return _refused(error)

    def _series(self, request: Request) -> Response:
        def make() -> Any:
            first, last, points = _range(request)
            names = [name for name in request.query_params.get("names", "").split(",") if name]
            return self._views.series(_job(request), names, first, last, points)

        return self._answer(make)

    def _layers(self, request: Request) -> Response:
        def make() -> Any:
            first, last, points = _range(request)
            name, signal = request.query_params.get("name"), request.query_params.get("signal", GRADIENT_NORM)
            if name is not None:
                return self._views.layer(_job(request), name, first, last, points, signal)
            return self._views.layers(_job(request), first, last, points, signal)

        return self._answer(make)

    def _noise(self, request: Request) -> Response:
        return self._answer(lambda: self._views.noise(_job(request), *_range(request)))

    def _curvature(self, request: Request) -> Response:
        return self._answer(lambda: self._views.curvature(_job(request), *_range(request)))

    def _histograms(self, request: Request) -> Response:
        def make() -> Any:
            return self._views.histograms(_job(request), request.query_params.get("name", ""), *_range(request))

        return self._answer(make)

    async def _live_jobs(self, request: Request) -> Response:
        return _stream(self._live.jobs())

    async def _live_job(self, request: Request) -> Response:
        job = _job(request)
        try:
            self._views.has_ended(job)
            seen = request.headers.get("last-event-id") or request.query_params.get("cursor") or "0:0:0"
            if not _CURSOR.fullmatch(seen):
                raise SpecError([Violation("cursor", f"{seen!r} does not come from this service")])
        except SteepestError as error:
            return _refused(error)
        cursor = Cursor(*map(int, seen.split(":")))
        return _stream(self._live.job(job, cursor))

    async def _act(self, request: Request) -> Response:
        raw = await request.body()

        def make() -> Any:
            call = Call(str(request.path_params["verb"]), peer_of(request), f"trainingJobs/{_job(request)}")
            with self._access.audit.of(call, changes=True):
                body, caller = _body(request, raw), caller_of(request)
                call.caller = caller.name
                self._access.check(caller, Need.OWN, _job(request))
                row = act(self._operations, _job(request), call.method, body)
            return {"state": row.state, "reason": row.reason}

        return await run_in_threadpool(self._answer, make)

    async def _sign_in(self, request: Request) -> Response:
        raw = await request.body()

        def make() -> Response:
            try:
                with self._access.audit.of(Call("sign-in", peer_of(request)), changes=True) as call:
                    caller, token = sign_in(self._access, _body(request, raw), peer_of(request))
                    call.caller = caller.name
            except (SteepestError, ForbiddenError) as error:
                return _refused(error)
            response = _json(described(caller))
            leave(response, token, over_tls=self._over_tls)
            return response

        return await run_in_threadpool(make)

    async def _sign_out(self, request: Request) -> Response:
        try:
            _body(request, b"")
        except ForbiddenError as error:
            return _refused(error)
        response = _json({})
        leave(response, "", over_tls=self._over_tls)
        return response


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """With the page's headers."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value, option=OPTIONS), status, HEADERS, "application/json")


def _refused(error: Exception) -> Response:
    return _json({"error": str(error)}, _STATUS.get(type(error), 500))


def _stream(events: Any) -> Response:
    return StreamingResponse(events, headers=HEADERS, media_type="text/event-stream")


def _body(request: Request, raw: bytes) -> Any:
    """What the page has sent. Raises ForbiddenError for a request of another site's, SpecError for no JSON."""
    check_origin(dict(request.headers))
    try:
        return orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError as error:
        raise SpecError([Violation("body", f"is no JSON: {error}")]) from None


def _job(request: Request) -> str:
    return str(request.path_params["job"])


def _range(request: Request) -> tuple[int, int | None, int]:
    """(first step, last step, points) of a query. Raises SpecError."""
    found: dict[str, int | None] = {"first": 0, "last": None, "points": DEFAULT_POINTS}
    for name in found:
        raw = request.query_params.get(name)
        if raw is None:
            continue
        if not raw.isascii() or not raw.isdigit() or len(raw) > 18 or (name == "points" and int(raw) < 1):
            raise SpecError([Violation(name, f"{raw!r} is no number that makes sense here")])
        found[name] = int(raw)
    return found["first"] or 0, found["last"], found["points"] or DEFAULT_POINTS
