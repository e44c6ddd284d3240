"""One caller who asks too often is refused, and nobody else."""

from __future__ import annotations

import contextlib
import time

import pytest

from services.jobs.call_limit import WINDOW_SECONDS, CallLimit, host_of
from steepest.errors import TooManyCallsError

RATE = 20.0
BURST = round(RATE * WINDOW_SECONDS)


def granted(limit: CallLimit, caller: str, peer: str, count: int) -> int:
    """How many of so many calls at once."""
    found = 0
    for _ in range(count):
        with contextlib.suppress(TooManyCallsError):
            limit.check(caller, peer)
            found += 1
    return found


def test_each_caller_has_their_own_share() -> None:
    limit = CallLimit(RATE)
    assert granted(limit, "ci", "ipv4:192.0.2.7:1", 3 * BURST) in (BURST, BURST + 1)
    assert granted(limit, "me", "ipv4:192.0.2.7:2", BURST) == BURST
    assert granted(limit, "", "ipv4:192.0.2.7:3", BURST) == BURST  # a host of that name is no token
    assert granted(limit, "", "ipv4:192.0.2.7:4", 10) <= 1
    assert granted(limit, "", "ipv4:192.0.2.8:4", 10) == 10


def test_who_waits_may_ask_again() -> None:
    limit = CallLimit(RATE)
    assert granted(limit, "ci", "", 2 * BURST) >= BURST
    time.sleep(WINDOW_SECONDS / 2 + WINDOW_SECONDS)
    assert 0 < granted(limit, "ci", "", 2 * BURST) <= BURST


def test_nought_is_no_limit() -> None:
    assert granted(CallLimit(0.0), "ci", "", 5000) == 5000


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:192.0.2.7:41300", "192.0.2.7"), ("ipv6:%5B::1%5D:41300", "%5B::1%5D"), ("192.0.2.7:41300", "192.0.2.7")],
)
def test_a_host_is_told_from_its_ports(peer: str, host: str) -> None:
    assert host_of(peer) == host
