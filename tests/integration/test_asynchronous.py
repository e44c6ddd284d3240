"""The client for asyncio, against a real service."""

from __future__ import annotations

import asyncio

import pytest

import steepest
from services.service import Service
from steepest.errors import SpecError
from steepest.jobs import Event, JobInfo, Progress
from tests.support.service import TASKS

pytestmark = pytest.mark.cluster


def test_jobs_are_submitted_watched_and_steered_at_once(service: Service) -> None:
    async def play() -> None:
        async with steepest.AsyncClient(f"127.0.0.1:{service.grpc_port}") as client:
            assert (await client.server_info()).not_ready == ""
            jobs = await asyncio.gather(*(client.submit(f"{TASKS}:regression", steps=20, seed=s) for s in (1, 2)))
            infos = await asyncio.gather(*(job.wait() for job in jobs))
            assert [info.state for info in infos] == ["SUCCEEDED", "SUCCEEDED"]
            seen = [update async for update in jobs[0].watch()]
            assert any(isinstance(update, Event) for update in seen)
            assert isinstance(seen[-1], JobInfo)
            assert [record["step"] async for record in jobs[0].history()] == list(range(20))
            assert {info.job async for info in client.list("state = SUCCEEDED")} >= {job.name for job in jobs}
            held = await client.submit(f"{TASKS}:slow", steps=100_000)
            async for update in held.watch():
                if isinstance(update, Progress):
                    break
            await held.pause()
            watching = asyncio.create_task(anext(aiter(held.logs(follow=True))))
            await asyncio.sleep(0.3)
            watching.cancel()  # nothing is printed; it must not keep the rest from going on
            await held.cancel()
            with pytest.raises(SpecError):
                await client.submit(f"{TASKS}:regression", steps=-1)
            for job in jobs:
                await job.delete()

    asyncio.run(asyncio.wait_for(play(), 120))


def test_it_connects_in_a_block(service: Service) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        steepest.AsyncClient(f"127.0.0.1:{service.grpc_port}").job("x")
