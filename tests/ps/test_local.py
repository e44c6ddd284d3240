from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from ps.local import Connection, Listener, connect


class Text:
    """Stands for a protobuf message."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self) -> bytes:
        return self.data


@pytest.fixture
def listener() -> Iterator[tuple[Listener[Text], SimpleQueue[Connection[Text]]]]:
    taken: SimpleQueue[Connection[Text]] = SimpleQueue()
    made = Listener(Text, taken.put)
    yield made, taken
    made.close()


def _pair(listener: Any) -> tuple[Connection[Text], Connection[Text]]:
    made, taken = listener
    ours = connect(made.name, Text)
    assert ours is not None
    return ours, taken.get(timeout=5)


def test_messages_arrive_whole_and_in_order(listener: Any) -> None:
    ours, theirs = _pair(listener)
    sent = [b"", b"a", b"x" * 70_000, bytes(range(256))]
    for data in sent:
        ours.send(Text(data))
    incoming = iter(theirs)
    assert [next(incoming).data for _ in sent] == sent
    theirs.send(Text(b"back"))
    assert next(iter(ours)).data == b"back"


def test_sending_never_blocks_though_nobody_reads(listener: Any) -> None:
    ours, theirs = _pair(listener)
    sent = [bytes([i]) * 100_000 for i in range(100)]
    done = threading.Event()

    def send() -> None:
        for data in sent:
            ours.send(Text(data))
        done.set()

    threading.Thread(target=send, daemon=True).start()
    assert done.wait(5), "send waited for a reader"
    incoming = iter(theirs)
    assert [next(incoming).data for _ in sent] == sent


def test_hanging_up_ends_the_other_side(listener: Any) -> None:
    ours, theirs = _pair(listener)
    ours.send(Text(b"last"))
    ours.close()
    assert [m.data for m in theirs] == [b"last"]
    theirs.send(Text(b"into the void"))


def test_nobody_listens() -> None:
    assert connect("steepest-nobody", Text) is None


def test_a_closed_listener_takes_nobody(listener: Any) -> None:
    made, _ = listener
    made.close()
    assert connect(made.name, Text) is None
