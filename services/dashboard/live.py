"""Sends what is new to open pages, as server-sent events; pages that have seen the same are served by one reading."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import orjson

from services.dashboard.views import LIVE_RECORDS, Cursor, Views

TICK_SECONDS = 0.5
PAGES_A_TICK, MOST_SLOWER = 100, 4  # from so many open pages on, ticks are twice as long, and so on
READERS = 2  # threads; all pages ask at once, and more of them would only wait for each other
QUIET_SECONDS = 15.0  # after which a comment shows that the stream is alive
OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS

_News = tuple[bytes, Cursor, bool]  # JSON, the cursor after it, whether nothing more will come


class Live:
    """The streams of all open pages. is_closing: whether the service stops."""

    def __init__(self, views: Views, is_closing: Callable[[], bool]) -> None:
        self._views = views
        self._is_closing = is_closing
        self._num_open = 0
        self._readers = ThreadPoolExecutor(READERS, "live")
        self._shared: dict[tuple[str, Cursor], tuple[float, asyncio.Future[_News]]] = {}

    async def job(self, job: str, cursor: Cursor) -> AsyncIterator[bytes]:
        """What is new of one job, until it has ended; Starlette ends it when the page is closed."""
        before = b""
        said = time.monotonic()
        with self._opened():
            while not self._is_closing():
                seen = cursor.step
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
                if cursor.step - seen < LIVE_RECORDS:  # else there is more than was sent
                    await self._next_tick()

    async def jobs(self) -> AsyncIterator[bytes]:
        """All jobs, whenever they have changed, until the page is closed."""
        before = b""
        said = time.monotonic()
        with self._opened():
            while not self._is_closing():
                data, _, _ = await self._share("", Cursor(), self._read_jobs)
                if data != before:
                    before, said = data, time.monotonic()
                    yield b"data: " + data + b"\n\n"
                elif time.monotonic() - said > QUIET_SECONDS:
                    said = time.monotonic()
                    yield b": still here\n\n"
                await self._next_tick(2)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    async def _next_tick(self, ticks: int = 1) -> None:
        """Wait for the next multiple of a tick: pages that have seen the same then ask at the same time.

        The more pages are open, the longer a tick is, so that they cost the service no more than a part of a core.
        """
        seconds = ticks * TICK_SECONDS * min(MOST_SLOWER, 1 + self._num_open // PAGES_A_TICK)
        await asyncio.sleep(seconds - time.monotonic() % seconds)

    async def _share(self, job: str, cursor: Cursor, read: Callable[[], _News]) -> _News:
        """Read once for all pages that ask for the same at a tick."""
        now = time.monotonic()
        kept = self._shared.get((job, cursor))
        if kept is None or now - kept[0] >= TICK_SECONDS / 2:
            self._shared = {key: each for key, each in self._shared.items() if now - each[0] < TICK_SECONDS / 2}
            kept = self._shared[job, cursor] = now, asyncio.get_running_loop().run_in_executor(self._readers, read)
        return await asyncio.shield(kept[1])

    def _read(self, job: str, cursor: Cursor) -> _News:
        is_over = self._views.has_ended(job)  # before the rest, so that all of it is there then
        news, following = self._views.news(job, cursor)
        return orjson.dumps(news, option=OPTIONS), following, is_over and following == cursor

    def _read_jobs(self) -> _News:
        return orjson.dumps(self._views.jobs()["jobs"], option=OPTIONS), Cursor(), False
