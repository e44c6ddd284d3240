"""One analysis on the cluster: the room that it takes, and the actors in it.

Imported by `services.cluster.cluster`, which prepares Ray's environment first.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from services.cluster.fork_servers import ForkServers
from services.cluster.job_room import nodes_of
from services.cluster.processes import Started, explain_status, named
from worker.analysis.question import Question, Refusal
from worker.process.analyst import AnalystActor

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2


class AnalysisRoom:
    """Processes of one CPU each, on as few hosts as have room for them."""

    def __init__(self, processes: int, fork_servers: ForkServers) -> None:
        self._fork_servers = fork_servers
        self._group = placement_group([{"CPU": 1.0}] * processes)
        self._actors: list[Any] = []
        self._started: list[Started] = []
        self._nodes: list[str | None] = []
        self.is_held = False  # granted, and not given back

    def wait(self, seconds: float) -> bool:
        """Whether the room has been granted."""
        self.is_held = bool(self._group.wait(seconds))
        return self.is_held

    def answer(
        self, question: Question, code: bytes, secrets: Mapping[str, str]
    ) -> Iterator[str | dict[str, Any] | Refusal]:
        """What the processes say, line by line, and at last the answer.

        code: the bundle that the task is in, or nothing. secrets: by variable, which the code finds in its environment.
        """
        self._nodes = nodes_of(self._group)
        self._fork_servers.start({node for node in self._nodes if node})
        self._actors = [self._new_actor(index, node) for index, node in enumerate(self._nodes)]
        try:
            described = ray.get([actor.describe.remote() for actor in self._actors])
            self._started = [Started(pid, host) for pid, host in described]
            bundle = ray.put(code)
            prepared = [actor.prepare.remote(question, bundle, dict(secrets)) for actor in self._actors]
            refusals = yield from self._followed(prepared)
            refused = next((refusal for refusal in refusals if refusal is not None), None)
            if refused is not None:
                yield refused
                return
            [found] = yield from self._followed([self._actors[0].answer.remote(self._actors[1:])])
            yield found
        except ray.exceptions.RayError as error:
            log.info("Ray says of an analysis: %s", error)
            yield Refusal("task", self._what_happened(error))

    def _new_actor(self, index: int, node: str | None) -> Any:
        return AnalystActor.options(  # type: ignore[attr-defined]
            num_cpus=1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
            runtime_env=self._fork_servers.runtime_env(node),
        ).remote()

    def _followed(self, calls: list[Any]) -> Generator[str, None, list[Any]]:
        """Wait for calls, and return their results; what the first process says meanwhile."""
        while True:
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=POLL_SECONDS)
            if len(done) < len(calls):
                ray.get(done)  # one that has failed is not waited for together with the others
            yield from ray.get(self._actors[0].said.remote())
            if len(done) == len(calls):
                results: list[Any] = ray.get(calls)
                return results  # for `yield from`

    def _what_happened(self, error: BaseException) -> str:
        """Which process died, and how."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception) and not isinstance(cause, ray.exceptions.RayError):
            return f"the analysis failed: {type(cause).__name__}: {cause}"
        for started, node in zip(self._started, self._nodes, strict=False):
            status = self._fork_servers.exit_status(node, started.pid)
            if status is not None:
                return f"{named('a process of the analysis', started)} {explain_status(status)}"
        return f"a process of the analysis {explain_status(None)}"

    def release(self) -> None:
        """Kill everything and give back the room; may be called again."""
        self.is_held = False
        if ray.is_initialized():
            remove_placement_group(self._group)
