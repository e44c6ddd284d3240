"""How often one caller may ask, so that a loop gone wild leaves the service to others."""

from __future__ import annotations

from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from steepest.errors import TooManyCallsError

WINDOW_SECONDS = 5  # over which calls are counted: a burst may be so many times as large as the rate
RETRY_SECONDS = 1.0


class CallLimit:
    """Safe to use from many threads. calls_per_second: of one caller, over WINDOW_SECONDS; 0: as many as they like."""

    def __init__(self, calls_per_second: float = 0.0) -> None:
        self._rate = calls_per_second
        self._most = RateLimitItemPerSecond(max(1, round(calls_per_second * WINDOW_SECONDS)), WINDOW_SECONDS)
        self._counts = SlidingWindowCounterRateLimiter(MemoryStorage())

    def check(self, caller: str, peer: str) -> None:
        """Count a call. caller: a token's name; empty for one without, of whom the host counts. peer: HOST:PORT.

        Raises TooManyCallsError.
        """
        kind, name = ("token", caller) if caller else ("host", host_of(peer))
        if self._rate > 0 and not self._counts.hit(self._most, kind, name):
            problem = f"the {kind} {name!r} asks more than {self._rate:g} times a second"
            raise TooManyCallsError(f"{problem}; ask again after {RETRY_SECONDS:g} s, and less often", RETRY_SECONDS)


def host_of(peer: str) -> str:
    """As gRPC and HTTP name who asks: ipv4:192.0.2.7:41300, ipv6:[::1]:41300, 192.0.2.7:41300."""
    return peer.removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")[0]
