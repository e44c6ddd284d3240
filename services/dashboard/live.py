"""Sends what is new to open pages, as server-sent events; pages that have seen the same are served by one reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import orjson
from starlette.concurrency import run_in_threadpool

from services.dashboard.views import Cursor, Views

TICK_SECONDS = 0.5
QUIET_SECONDS = 15.0  # after which a comment shows that the stream is alive
OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS

_News = tuple[bytes, Cursor, bool]  # JSON, the cursor after it, whether nothing more will come


class Live:
    """The streams of all open pages. is_closing: whether the service stops."""

    def __init__(self, views: Views, is_closing: Callable[[], bool]) -> None:
        self._views = views
        self._is_closing = is_closing
        self._shared: dict[tuple[str, Cursor], tuple[float, asyncio.Future[_News]]] = {}

    async def job(
        self, job: str, cursor: Cursor, is_disconnected: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[bytes]:
        """What is new of one job, until it has ended or the page is closed."""
        before = b""
        said = time.monotonic()
        while not self._is_closing() and not await is_disconnected():
            data, cursor, is_over = await self._share(job, cursor, partial(self._read, job, cursor))
            if data != before:
                before, said = data, time.monotonic()
                yield b"id: " + ":".join(map(str, cursor)).encode() + b"\ndata: " + data + b"\n\n"
            elif is_over:
                yield b"event: end\ndata: {}\n\n"
                return
            elif time.monotonic() - said > QUIET_SECONDS:
                said = time.monotonic()
                yield b": still here\n\n"
            await _next_tick(TICK_SECONDS)

    async def jobs(self, is_disconnected: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        """All jobs, whenever they have changed."""
        before = b""
        said = time.monotonic()
        while not self._is_closing() and not await is_disconnected():
            data, _, _ = await self._share("", Cursor(), self._read_jobs)
            if data != before:
                before, said = data, time.monotonic()
                yield b"data: " + data + b"\n\n"
            elif time.monotonic() - said > QUIET_SECONDS:
                said = time.monotonic()
                yield b": still here\n\n"
            await _next_tick(2 * TICK_SECONDS)

    async def _share(self, job: str, cursor: Cursor, read: Callable[[], _News]) -> _News:
        """Read once for all pages that ask for the same at a tick."""
        now = time.monotonic()
        kept = self._shared.get((job, cursor))
        if kept is None or now - kept[0] >= TICK_SECONDS / 2:
            self._shared = {key: each for key, each in self._shared.items() if now - each[0] < TICK_SECONDS / 2}
            kept = self._shared[job, cursor] = now, asyncio.ensure_future(run_in_threadpool(read))
        return await asyncio.shield(kept[1])

    def _read(self, job: str, cursor: Cursor) -> _News:
        is_over = self._views.has_ended(job)  # before the rest, so that all of it is there then
        news, following = self._views.news(job, cursor)
        return orjson.dumps(news, option=OPTIONS), following, is_over and following == cursor

    def _read_jobs(self) -> _News:
        return orjson.dumps(self._views.jobs()["jobs"], option=OPTIONS), Cursor(), False


async def _next_tick(seconds: float) -> None:
    """Wait for the next multiple of so many seconds: pages that have seen the same then ask at the same time."""
    await asyncio.sleep(seconds - time.monotonic() % seconds)
