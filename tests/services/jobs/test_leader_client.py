"""A controller's streams to leaders, over real sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from ps.server.control_port import ControlPort
from ps.step.messages import Decision, Round
from ps.step.record import CompletedStep
from ps.wire.address import REPORT_SECONDS
from services.jobs.leader_client import REPORTS_A_SECOND, LeaderClient, Report

CONFIG: Any = SimpleNamespace(job="digits", incarnation=1, token="secret", credentials=None)  # what a hello takes of it


@contextmanager
def leading() -> Iterator[ControlPort]:
    port = ControlPort("127.0.0.1", lambda fence, token: "", record_every=1, layout=None)
    port.start(lambda verb, worker: None)
    try:
        yield port
    finally:
        port.close()


@contextmanager
def supervised(port: ControlPort, on_report: Callable[[Report], None]) -> Iterator[LeaderClient]:
    client = LeaderClient(port.address, CONFIG, on_report)
    try:
        yield client
    finally:
        client.close()


def completed(step: int) -> CompletedStep:
    now = time.time()
    decision = Decision(step, Round.TRAIN, apply=True)
    return CompletedStep(decision, 1.0, 1.0, 16.0, 16, 1, np.zeros(0), 1.0, None, now, now, now, now)


def shortest_pause(port: ControlPort, arrived: list[float]) -> float:
    """Between reports of steps, of four while steps are made all the time."""
    arrived.clear()
    while len(arrived) < 5:
        port.tell_step(completed(0))
        time.sleep(0.01)
    return min(later - earlier for earlier, later in pairwise(arrived[1:]))  # the first wait began before


def test_leaders_report_the_less_often_the_more_of_them_there_are() -> None:
    arrived: list[float] = []
    others = [LeaderClient("127.0.0.1:1", CONFIG, lambda report: None) for _ in range(2 * REPORTS_A_SECOND)]
    try:
        with leading() as port, supervised(port, lambda report: arrived.append(time.monotonic())):
            assert shortest_pause(port, arrived) > 1.9
            while others:
                others.pop().close()
            assert REPORT_SECONDS * 0.9 < shortest_pause(port, arrived) < 1.9
    finally:
        for other in others:
            other.close()
