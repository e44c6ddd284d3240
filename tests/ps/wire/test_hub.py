"""Many connections in one thread, and the end of it."""

from __future__ import annotations

import socket
import threading

from ps.wire.connection import Connection, HungUpError
from ps.wire.hub import Hub


def _pair() -> tuple[Connection[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    return Connection(ours, bytes), theirs


def test_a_connection_that_is_added_after_the_end_is_told_so() -> None:
    hub = Hub()
    hub.close()
    hub.close()
    ended: list[Exception] = []
    connection, other = _pair()
    hub.add(connection, lambda message: None, ended.append)
    assert isinstance(ended[0], HungUpError)
    connection.release()
    other.close()


def test_adding_and_closing_at_once_harms_neither() -> None:
    for _ in range(200):
        hub = Hub()
        ended: list[Exception] = []
        connection, other = _pair()
        adding = threading.Thread(target=hub.add, args=(connection, lambda message: None, ended.append))
        adding.start()
        hub.close()
        adding.join()
        assert all(isinstance(error, HungUpError) for error in ended)
        connection.release()
        other.close()
