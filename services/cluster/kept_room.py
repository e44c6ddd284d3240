"""The service's side of the rooms that an actor keeps for it; see services.cluster.keeper."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import ray

from ps.job.config import JobConfig
from ps.wire.address import ServerAddress
from services.cluster.keeper import CALLS_AT_ONCE, KeeperActor, Key
from services.cluster.kept_life import KeptLife
from services.cluster.processes import Exit, ExitKind, Started
from steepest.errors import ServiceUnavailableError
from steepest.spec import TrainingJobSpec

log = logging.getLogger(__name__)

NAMESPACE = "steepest"
ANSWER_SECONDS = 120.0  # a host that gives room to many jobs at once starts their processes in turn
LISTEN_SECONDS, POLL_SECONDS = 10.0, 0.2

Callback = Callable[[Any], None]


class KeeperGoneError(ServiceUnavailableError):
    """What keeps the rooms of jobs is gone, and with it their processes."""


class Keeper:
    """The actor of this name, which is found or started, and what it tells of processes. identity: of the data."""

    def __init__(self, identity: str) -> None:
        self._name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._lock = threading.Lock()
        self._actor: Any = None
        self._rooms: dict[str, KeptRoom] = {}
        self._listener: threading.Thread | None = None
        self._stopped = False

    def jobs(self) -> list[str]:
        """Those that have a room, as of an earlier service."""
        return list(self.ask("jobs")[1])

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the actor. Raises KeeperGoneError, and what the method does."""
        actor = self._current()
        try:
            return ray.get(getattr(actor, method).remote(*arguments, **named), timeout=ANSWER_SECONDS)
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except Exception as error:
            self._lose(actor, error)
            raise KeeperGoneError(f"the process that keeps the jobs of this service is gone: {error}") from error

    def _current(self) -> Any:
        with self._lock:
            if self._actor is None:
                try:
                    actor, after = self._found()
                except Exception as error:
                    problem = f"waiting for the process that keeps jobs, which does not start: {error}"
                    raise KeeperGoneError(problem) from error
                self._actor = actor
                self._listener = threading.Thread(target=self._listen, args=(actor, after), daemon=True)
                self._listener.start()
            return self._actor

    def _found(self) -> tuple[Any, int]:
        """The actor, and the number of the last thing that it has told."""
        options: dict[str, Any] = {"name": self._name, "namespace": NAMESPACE, "lifetime": "detached"}
        options |= {"get_if_exists": True, "num_cpus": 0, "max_concurrency": CALLS_AT_ONCE}
        for _ in range(2):
            actor = KeeperActor.options(**options).remote()
            its_version, _, after = ray.get(actor.jobs.remote(), timeout=ANSWER_SECONDS)
            if its_version == version("steepest"):
                return actor, after
            log.info("jobs are kept by version %s, and go on from their checkpoints with this one", its_version)
            ray.kill(actor)
            with contextlib.suppress(ray.exceptions.RayActorError):
                ray.get(actor.jobs.remote(), timeout=ANSWER_SECONDS)
        raise ValueError(f"this service is version {version('steepest')}, and the cluster's hosts have {its_version}")

    def _listen(self, actor: Any, after: int) -> None:
        """Pass on what the actor tells, for as long as it lives."""
        while not self._stopped:
            try:
                answer = actor.told.remote(after, LISTEN_SECONDS)
                while not ray.wait([answer], timeout=POLL_SECONDS)[0]:
                    if self._stopped:
                        return
                for told in ray.get(answer):
                    after = told.number
                    room = self._rooms.get(told.job)
                    if room is not None:
                        room.hear(told.key, told.what)
            except Exception as error:
                self._lose(actor, error)
                return

    def _lose(self, actor: Any, error: BaseException) -> None:
        with self._lock:
            if self._stopped or self._actor is not actor:
                return
            self._actor = None
            rooms, self._rooms = self._rooms, {}
        log.warning("the process that keeps jobs is gone: %s", error)
        for room in rooms.values():
            room.lose()

    def reserve(
        self, job: str, spec: TrainingJobSpec, num_workers: int, layout_bytes: int, code: bytes
    ) -> KeptRoom | None:
        """Room for a job, or None when there is none now."""
        if not self.ask("reserve", job, spec.placement, num_workers, layout_bytes, code, inline=spec.is_inline):
            return None
        room = self._rooms[job] = KeptRoom(self, job)
        return room

    def adopt(self, job: str) -> tuple[KeptRoom, KeptLife] | None:
        """The room of a job with its life; None, and the room is given back, when that is not whole."""
        room = self._rooms[job] = KeptRoom(self, job)
        life: KeptLife | None = self.ask("life", job)
        if life is None:
            room.release()
            return None
        return room, life

    def forget(self, job: str) -> None:
        """A room is not this service's any more."""
        self._rooms.pop(job, None)

    def stop(self) -> None:
        """Listen no more; all goes on. Nothing of this may ask Ray once it has been left."""
        self._stopped = True
        if self._listener is not None:
            self._listener.join()


class KeptRoom:
    """See services.jobs.room.Room: one that outlives the service."""

    def __init__(self, keeper: Keeper, job: str) -> None:
        self._keeper = keeper
        self._job = job
        self._lock = threading.Lock()
        self._callbacks: dict[Key, Callback] = {}
        self._server_exit: Callable[[int, Exit], None] | None = None
        self._others: Callable[[Key, Any], None] | None = None  # for processes that this service has not started
        self._early: list[tuple[Key, Any]] = []  # what was heard before anybody listened
        self.is_gone = False

    def hear(self, key: Key, what: Started | Exit) -> None:
        """Something happened to a process."""
        with self._lock:
            callback = self._callbacks.get(key)
            others = self._others
            if callback is None and others is None:
                self._early.append((key, what))
        if callback is not None:
            callback(what)
        elif others is not None:
            others(key, what)

    def lose(self) -> None:
        """All is gone, with what kept it."""
        self.is_gone = True
        if self._server_exit is not None:
            self._server_exit(0, Exit(ExitKind.DIED, "is gone with the process that kept the jobs of this service"))

    def set_code(self, code: bytes) -> None:
        """See Room: it has it from the beginning."""

    def listen(
        self,
        on_server_exit: Callable[[int, Exit], None],
        on_start: Callable[[str, int, Started], None],
        on_exit: Callable[[str, int, Exit], None],
    ) -> None:
        """See Room."""

        def others(key: Key, what: Any) -> None:
            kind, name, number = key
            match kind:
                case "server":
                    on_server_exit(number, what)
                case "started":
                    on_start(name, number, what)
                case _:
                    on_exit(name, number, what)

        with self._lock:
            self._server_exit, self._others = on_server_exit, others
            early, self._early = self._early, []
        for key, what in early:
            others(key, what)

    def start_servers(
        self, config: JobConfig, on_exit: Callable[[int, Exit], None]
    ) -> list[tuple[ServerAddress, Started]]:
        """See Room."""
        with self._lock:
            self._server_exit, self._early = on_exit, []
            self._others = lambda key, what: on_exit(key[2], what) if key[0] == "server" else None
        found: list[tuple[ServerAddress, Started]] = self._keeper.ask("start_servers", self._job, config)
        return found

    def start_worker(
        self,
        config: JobConfig,
        worker: str,
        generation: int,
        addresses: Sequence[ServerAddress],
        on_start: Callable[[Started], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        """See Room."""
        with self._lock:
            self._callbacks["started", worker, generation] = on_start
            self._callbacks["ended", worker, generation] = on_exit
        self._ask("start_worker", config, worker, generation, list(addresses))

    def has_server(self, worker: str) -> bool:
        """See Room."""
        return bool(self._ask("has_server", worker))

    def stop_worker(self, worker: str, *, keep_room: bool) -> None:
        """See Room."""
        with self._lock:
            self._callbacks = {key: callback for key, callback in self._callbacks.items() if key[1] != worker}
        self._ask("stop_worker", worker, keep_room=keep_room)

    def stop_actors(self) -> None:
        """See Room."""
        with self._lock:
            self._callbacks, self._server_exit, self._others = {}, None, None
        self._ask("stop_actors")

    def wait_stopped(self) -> None:
        """See Room."""
        self._ask("wait_stopped")

    def release(self) -> None:
        """See Room."""
        self._ask("release")
        self._keeper.forget(self._job)

    def leave(self) -> None:
        """See Room: all goes on."""
        self._keeper.forget(self._job)

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Nothing, of a room that is gone: its end has been told."""
        if self.is_gone:
            return None
        try:
            return self._keeper.ask(method, self._job, *arguments, **named)
        except KeeperGoneError:
            return None
