"""Where servers go and who talks to whom, as pure functions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from enum import StrEnum


class Contact(StrEnum):
    """What a worker has to do with a server."""

    SHARED = "shared"  # on its host: each maps the other's memory
    INLINE = "inline"  # elsewhere: gradients and parameters go over the network
    CONTROL = "control"  # the leader, elsewhere; gradients and parameters go by way of the home


def home_of(hosts: Sequence[str], host: str) -> int | None:
    """The server whose memory holds the parameters on a host and that speaks for its workers, or None.

    hosts: of all servers, in order.
    """
    return next((index for index, other in enumerate(hosts) if other == host), None)


def contacts(hosts: Sequence[str], host: str, num_shards: int, *, inline: bool) -> dict[int, Contact]:
    """Which servers a worker on `host` talks to, in order, the leader first.

    hosts: of all servers; those beyond `num_shards` are homes without a shard. inline: use no shared memory.
    """
    if inline or home_of(hosts, host) is None:
        return dict.fromkeys(range(num_shards), Contact.INLINE)
    here = {index: Contact.SHARED for index, other in enumerate(hosts) if other == host}
    return here if 0 in here else {0: Contact.CONTROL, **here}


def server_places(workers: Sequence[str], num_servers: int, *, inline: bool, on_gpus: bool = False) -> list[str]:
    """The node of every server: round the nodes with workers, those with most first; the leader comes to the first.

    on_gpus: every server is on the GPU of a worker, see `gpus_of_servers`.

    Then come the nodes with several workers and no server: a home there, without a shard, adds up what they push and
    takes in the parameters for all. inline: no memory is shared, so a home would be of no use.

    workers: the node of each.
    """
    if on_gpus:
        places = [workers[index] for index in gpus_of_servers(workers, num_servers)]
    else:
        nodes = [node for node, _ in Counter(workers).most_common()]
        places = [nodes[index % len(nodes)] for index in range(num_servers)]
    homes = [node for node, count in Counter(workers).items() if count > 1 and node not in places and not inline]
    return places + homes


def gpus_of_servers(workers: Sequence[str], num_servers: int) -> list[int]:
    """Which worker's GPU every server is on: round the nodes with workers, those with most first, and no GPU twice.

    workers: the node of each, no fewer than servers.
    """
    free = {node: deque(i for i, at in enumerate(workers) if at == node) for node, _ in Counter(workers).most_common()}
    chosen: list[int] = []
    while len(chosen) < num_servers:
        chosen += [left.popleft() for left in free.values() if left]
    return chosen[:num_servers]
