"""The client for programs that use asyncio: the same calls, awaited. They run in threads of the client."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from steepest.analyses import GradientCheck
from steepest.client import Client
from steepest.job import Job
from steepest.jobs import JobInfo
from steepest.server_info import ServerInfo

CALLS_AT_ONCE = 256  # threads at most; each watch has one for as long as it waits
AT_ONCE = 1000  # records that a thread fetches in one go

P = ParamSpec("P")
T = TypeVar("T")


class _Threads:
    """Where calls run."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="steepest")

    async def run(self, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """In a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, functools.partial(call, *arguments, **named))

    async def each(self, items: Iterator[T], at_once: int) -> AsyncIterator[T]:
        """What an iterator gives that has to be waited for."""
        while True:
            piece = await self.run(lambda: list(islice(items, at_once)))
            for item in piece:
                yield item
            if len(piece) < at_once:
                return

    def close(self) -> None:
        """Start no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _awaited(method: Callable[Concatenate[Job, P], T]) -> Callable[Concatenate[AsyncJob, P], Awaitable[T]]:
    def call(self: AsyncJob, /, *arguments: P.args, **named: P.kwargs) -> Awaitable[T]:
        return self._threads.run(method, self._job, *arguments, **named)

    functools.update_wrapper(call, method)
    return call


def _iterated(
    method: Callable[Concatenate[Job, P], Iterator[T]], at_once: int = 1
) -> Callable[Concatenate[AsyncJob, P], AsyncIterator[T]]:
    def call(self: AsyncJob, /, *arguments: P.args, **named: P.kwargs) -> AsyncIterator[T]:
        return self._threads.each(method(self._job, *arguments, **named), at_once)

    functools.update_wrapper(call, method)
    return call


class AsyncJob:
    """As Job; its methods are awaited, or iterated over with `async for`. Made by an AsyncClient.

    A watch that is given up keeps its thread until the next item, or until the client is closed.
    """

    def __init__(self, job: Job, threads: _Threads) -> None:
        self.name = job.name
        self._job = job
        self._threads = threads

    get = _awaited(Job.get)
    wait = _awaited(Job.wait)
    cancel = _awaited(Job.cancel)
    pause = _awaited(Job.pause)
    resume = _awaited(Job.resume)
    scale = _awaited(Job.scale)
    set_priority = _awaited(Job.set_priority)
    events = _awaited(Job.events)
    evaluations = _awaited(Job.evaluations)
    checkpoints = _awaited(Job.checkpoints)
    download = _awaited(Job.download)
    curvature = _awaited(Job.curvature)
    delete = _awaited(Job.delete)
    watch = _iterated(Job.watch)
    logs = _iterated(Job.logs)
    history = _iterated(Job.history, AT_ONCE)
    histograms = _iterated(Job.histograms, AT_ONCE)


class AsyncClient:
    """As Client, with the same arguments: `async with steepest.AsyncClient(ADDRESS) as client`."""

    def __init__(
        self,
        address: str = "",
        *,
        token: str | None = None,
        tls_ca: str | Path | None = None,
        certificate: tuple[str | Path, str | Path] | None = None,
    ) -> None:
        self._connect = functools.partial(Client, address, token=token, tls_ca=tls_ca, certificate=certificate)
        self._threads = _Threads()
        self._opened: Client | None = None

    async def __aenter__(self) -> Self:
        """Connect. Raises what Client does."""
        self._opened = await self._threads.run(self._connect)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def _client(self) -> Client:
        if self._opened is None:
            raise RuntimeError("an AsyncClient connects in `async with steepest.AsyncClient(ADDRESS) as client:`")
        return self._opened

    async def close(self) -> None:
        """Close the connection; watches end."""
        if self._opened is not None:
            self._opened.close()
        self._threads.close()

    async def submit(self, task: str, **spec: Any) -> AsyncJob:
        """See Client.submit."""
        return AsyncJob(await self._threads.run(self._client.submit, task, **spec), self._threads)

    async def replay(self, job: str, **changes: Any) -> AsyncJob:
        """See Client.replay."""
        return AsyncJob(await self._threads.run(self._client.replay, job, **changes), self._threads)

    async def check_gradients(self, task: str, **asked: Any) -> GradientCheck:
        """See Client.check_gradients."""
        return await self._threads.run(self._client.check_gradients, task, **asked)

    def job(self, name: str) -> AsyncJob:
        """See Client.job."""
        return AsyncJob(self._client.job(name), self._threads)

    def list(self, filter: str = "", order_by: str = "") -> AsyncIterator[JobInfo]:  # noqa: A002  # the API's own word
        """See Client.list."""
        return self._threads.each(self._client.list(filter, order_by), AT_ONCE)

    def server_info(self) -> Awaitable[ServerInfo]:
        """See Client.server_info."""
        return self._threads.run(self._client.server_info)
