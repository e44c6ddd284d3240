"""The workers that a job should have, and those it has, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from services.cluster.kept_life import KeptLife
from services.cluster.processes import Started


class WorkerState(StrEnum):
    """What a worker is doing, as users see it."""

    STARTING = "starting"
    RUNNING = "running"
    RETIRING = "retiring"  # it leaves when it has answered


@dataclass
class Worker:
    """One worker. generation: tells it from others that have had its name."""

    generation: int
    started: Started | None = None
    state: WorkerState = WorkerState.STARTING


class Team(dict[str, Worker]):
    """The workers by name. wanted: how many there should be."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted
        self._generations = 0

    def surplus(self, goes_last: Callable[[str], bool]) -> list[str]:
        """Who is to leave, in order: the newest first. goes_last: keep these for as long as possible."""
        staying = [name for name, worker in self.items() if worker.state != WorkerState.RETIRING]
        staying.sort(key=goes_last, reverse=True)
        return staying[self.wanted :][::-1]

    def missing(self) -> list[str]:
        """Names for the workers still to be started: the lowest numbers that are free."""
        staying = sum(worker.state != WorkerState.RETIRING for worker in self.values())
        names: list[str] = []
        number = 0
        while len(names) < self.wanted - staying:
            name = f"worker-{number}"
            if name not in self:
                names.append(name)
            number += 1
        return names

    def add(self, name: str) -> Worker:
        """A worker is being started."""
        worker = Worker(self._generations)
        self._generations += 1
        self[name] = worker
        return worker

    def current(self, name: str, generation: int) -> Worker | None:
        """The worker of that name, if it is still of that generation."""
        worker = self.get(name)
        return worker if worker is not None and worker.generation == generation else None

    def take_up(self, kept: KeptLife, states: Mapping[str, str]) -> None:
        """Have the workers of a life that went on without a service. states: by name, as far as they are known."""
        for name, worker in kept.workers.items():
            known = states.get(name, "")
            state = WorkerState.RUNNING if known and known != WorkerState.STARTING else WorkerState.STARTING
            self[name] = Worker(worker.generation, worker.started, state)
        self._generations = 1 + max((worker.generation for worker in self.values()), default=-1)

    def members(self) -> list[tuple[str, str, int, str, str]]:
        """(role, id, pid, host, state) of each."""
        started = {name: worker.started or Started(0, "") for name, worker in self.items()}
        return [("worker", n, started[n].pid, started[n].host, str(worker.state)) for n, worker in self.items()]

    @property
    def is_settled(self) -> bool:
        """Whether there are as many as wanted, and all have joined. May be asked from any thread."""
        workers = list(self.values())
        return len(workers) == self.wanted and all(worker.state == WorkerState.RUNNING for worker in workers)

    def any_running(self) -> bool:
        """Whether one has joined the servers."""
        return any(worker.state == WorkerState.RUNNING for worker in self.values())


def server_name(server: int, shards: int) -> str:
    """Servers beyond the number of shards are only homes of their hosts."""
    return f"server-{server}" if server < shards else f"home-{server - shards}"
