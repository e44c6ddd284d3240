from __future__ import annotations

from ps.job.topology import Contact, contacts, gpus_of_servers, home_of, server_places


def test_on_one_host_a_worker_shares_memory_with_all() -> None:
    assert contacts(["a", "a"], "a", 2, inline=False) == {0: Contact.SHARED, 1: Contact.SHARED}


def test_a_worker_talks_to_its_own_host_and_to_the_leader() -> None:
    where = ["a", "b", "a", "b"]
    assert contacts(where, "a", 4, inline=False) == {0: Contact.SHARED, 2: Contact.SHARED}
    assert contacts(where, "b", 4, inline=False) == {0: Contact.CONTROL, 1: Contact.SHARED, 3: Contact.SHARED}
    assert next(iter(contacts(where, "b", 4, inline=False))) == 0
    assert (home_of(where, "a"), home_of(where, "b"), home_of(where, "c")) == (0, 1, None)


def test_a_worker_that_is_alone_on_its_host_talks_to_all_over_the_network() -> None:
    assert contacts(["a", "b"], "c", 2, inline=False) == {0: Contact.INLINE, 1: Contact.INLINE}


def test_a_home_without_a_shard_serves_its_host_and_nobody_else() -> None:
    where = ["a", "b"]
    assert contacts(where, "b", 1, inline=False) == {0: Contact.CONTROL, 1: Contact.SHARED}
    assert contacts(where, "c", 1, inline=False) == {0: Contact.INLINE}


def test_inline_uses_no_shared_memory() -> None:
    assert contacts(["a", "a"], "a", 2, inline=True) == {0: Contact.INLINE, 1: Contact.INLINE}


def test_servers_on_gpus_are_with_workers() -> None:
    workers = ["a", "b", "b"]
    assert server_places(workers, 2, inline=False) == ["b", "a"]
    assert gpus_of_servers(workers, 2) == [1, 0]
    assert server_places(workers, 2, inline=False, on_gpus=True) == ["b", "a"]
    assert server_places(workers, 1, inline=False, on_gpus=True) == ["b"]
    assert gpus_of_servers(workers, 3) == [1, 0, 2]
    assert gpus_of_servers(["a", "a", "b", "b", "b"], 4) == [2, 0, 3, 1]
