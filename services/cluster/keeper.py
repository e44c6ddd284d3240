"""An actor that keeps the rooms of jobs on an existing cluster, so that jobs go on while there is no service.

What an actor starts lives as long as that actor, and this one is detached: it outlives the service that started it. The
next service on the same data finds it by its name, and goes on with the jobs that it keeps.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import ray

from ps.job.config import JobConfig
from ps.wire.address import ServerAddress
from services.cluster.fork_servers import ForkServers
from services.cluster.job_room import JobRoom
from services.cluster.kept_life import KeptLife, KeptWorker
from services.cluster.processes import Exit, Started
from steepest.spec import PlacementSpec

CALLS_AT_ONCE = 200
MAX_EVENTS = 10_000

Key = tuple[str, str, int]  # ("server", "", number), or ("started" or "ended", name of a worker, generation)


class Told(NamedTuple):
    """Something happened to a process of a job. number: counts up from 1."""

    number: int
    job: str
    key: Key
    what: Started | Exit


@dataclass
class Kept:
    """What is known of a job's life. happened: of its present processes."""

    config: JobConfig | None = None
    addresses: tuple[ServerAddress, ...] = ()
    servers: tuple[Started, ...] = ()
    workers: dict[str, int] = field(default_factory=dict)  # generation by name
    happened: dict[Key, Started | Exit] = field(default_factory=dict)

    def life(self) -> KeptLife | None:
        """All of it; None when the servers are not all there."""
        if self.config is None or not self.addresses:
            return None
        ends = {key[2]: what for key, what in self.happened.items() if key[0] == "server" and isinstance(what, Exit)}
        workers = {}
        for name, generation in self.workers.items():
            started, end = (
                self.happened.get(("started", name, generation)),
                self.happened.get(("ended", name, generation)),
            )
            workers[name] = KeptWorker(
                generation,
                started if isinstance(started, Started) else None,
                end if isinstance(end, Exit) else None,
            )
        return KeptLife(self.config, self.addresses, self.servers, ends, workers)


class KeptRooms:
    """The rooms by job. Safe to use from many threads; each job is spoken for by one controller."""

    def __init__(self) -> None:
        self._fork_servers = ForkServers()
        self._rooms: dict[str, JobRoom] = {}
        self._kept: dict[str, Kept] = {}
        self._news = threading.Condition()
        self._told: list[Told] = []
        self._number = 0

    # -- a service looks ----------------------------------------------------------------------------------------------

    def jobs(self) -> tuple[str, list[str], int]:
        """(version of this package, the jobs that have a room, the number of the last thing told)."""
        with self._news:
            return version("steepest"), list(self._rooms), self._number

    def life(self, job: str) -> KeptLife | None:
        """A job's life; None when its servers are not all there."""
        with self._news:
            kept = self._kept.get(job)
            return None if kept is None else kept.life()

    def told(self, after: int, seconds: float) -> list[Told]:
        """What happened after that number; waits for something."""
        with self._news:
            self._news.wait_for(lambda: self._number > after, seconds)
            return [told for told in self._told if told.number > after]

    def _tell(self, job: str, key: Key, what: Started | Exit) -> None:
        with self._news:
            self._number += 1
            self._told.append(Told(self._number, job, key, what))
            del self._told[:-MAX_EVENTS]
            if job in self._kept:
                self._kept[job].happened[key] = what
            self._news.notify_all()

    # -- rooms --------------------------------------------------------------------------------------------------------

    def reserve(
        self, job: str, placement: PlacementSpec, num_workers: int, layout_bytes: int, code: bytes, *, inline: bool
    ) -> bool:
        """Whether a job could be given room. In place of what it had, if it had any."""
        self.release(job)
        room = JobRoom(placement, layout_bytes, self._fork_servers, inline=inline)
        if not room.reserve(num_workers):
            return False
        room.set_code(code)
        with self._news:
            self._rooms[job], self._kept[job] = room, Kept()
        return True

    def start_servers(self, job: str, config: JobConfig) -> list[tuple[ServerAddress, Started]]:
        """See Room."""
        kept = self._kept[job] = Kept(config)
        started = self._rooms[job].start_servers(config, lambda index, end: self._tell(job, ("server", "", index), end))
        with self._news:
            kept.addresses = tuple(address for address, _ in started)
            kept.servers = tuple(where for _, where in started)
        return started

    def start_worker(
        self, job: str, config: JobConfig, worker: str, generation: int, addresses: list[ServerAddress]
    ) -> None:
        """See Room."""
        with self._news:
            self._kept[job].workers[worker] = generation
        self._rooms[job].start_worker(
            config, worker, generation, addresses,
            lambda started: self._tell(job, ("started", worker, generation), started),
            lambda end: self._tell(job, ("ended", worker, generation), end),
        )  # fmt: skip

    def has_server(self, job: str, worker: str) -> bool:
        """See Room."""
        return self._rooms[job].has_server(worker)

    def stop_worker(self, job: str, worker: str, *, keep_room: bool) -> None:
        """See Room."""
        with self._news:
            kept = self._kept[job]
            kept.workers.pop(worker, None)
            kept.happened = {key: what for key, what in kept.happened.items() if key[1] != worker}
        self._rooms[job].stop_worker(worker, keep_room=keep_room)

    def stop_actors(self, job: str) -> None:
        """See Room."""
        with self._news:
            self._kept[job] = Kept()
        self._rooms[job].stop_actors()

    def wait_stopped(self, job: str) -> None:
        """See Room."""
        self._rooms[job].wait_stopped()

    def release(self, job: str) -> None:
        """See Room."""
        with self._news:
            room = self._rooms.pop(job, None)
            self._kept.pop(job, None)
        if room is not None:
            room.release()


KeeperActor: Any = ray.remote(KeptRooms)  # with options of CALLS_AT_ONCE
