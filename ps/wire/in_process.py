"""A stream between a worker and the server in its own process: messages are handed over, and nothing is copied.

What the worker sends, the server handles at once in the worker's thread, as it would in that of a hub: between two
threads, the interpreter's lock would have to change hands for every message. What the server sends waits until the
worker reads it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic

import torch

from ps.wire.connection import HungUpError, Message, Received, no_tensors


class InProcess(Generic[Received]):
    """One end; see Connection for what is not said here. `pair` makes two.

    slot: on the server's end, gives the worker's slots on the GPU, each as a whole layout.
    """

    is_local = True

    def __init__(self) -> None:
        self.sink: Callable[[Any, int], memoryview] = no_tensors
        self.slot: Callable[[int], torch.Tensor] | None = None
        self._other: InProcess[Any] | None = None
        self._arrival = threading.Condition(threading.RLock())
        self._inbox: deque[Any] = deque()
        self._on_message: Callable[[Any], None] | None = None
        self._on_end: Callable[[Exception], None] | None = None
        self._closed = False

    def trust(self) -> None:
        """See Connection: one that is in this process is known."""

    def send(self, message: Message, tensor: memoryview | None = None) -> None:
        """Hand over a message. tensor: is copied to where the other end wants it."""
        if self._other is not None and not self._closed:
            self._other._take(message, tensor)

    def _take(self, message: Any, tensor: memoryview | None) -> None:
        with self._arrival:
            if self._closed:
                return
            try:
                if tensor is not None and len(tensor):
                    self.sink(message, len(tensor))[:] = tensor
                if self._on_message is not None:
                    self._on_message(message)
                    return
            except Exception as error:
                self._end(error)
                return
            self._inbox.append(message)
            self._arrival.notify()

    def deliver(self, on_message: Callable[[Received], None], on_end: Callable[[Exception], None]) -> None:
        """Have every message handled by `on_message` from now on, in the sender's thread.

        on_end: gets what ended the stream, a HungUpError in good order.
        """
        with self._arrival:
            self._on_end = on_end
            if self._closed:
                self._end(HungUpError("the other end is gone"))
                return
            self._on_message = on_message
            waiting, self._inbox = self._inbox, deque()
            for message in waiting:
                self._take(message, None)

    def _end(self, error: Exception) -> None:
        """No more messages come in."""
        with self._arrival:
            self._closed = True
            on_end, self._on_end, self._on_message = self._on_end, None, None
            self._arrival.notify_all()
        if on_end is not None:
            on_end(error)

    def next_message(self) -> Received | None:
        """See Connection."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._inbox or self._closed)
            return self._inbox.popleft() if self._inbox else None

    def __iter__(self) -> Iterator[Received]:
        while (message := self.next_message()) is not None:
            yield message

    def close(self) -> None:
        """Hang up, from any thread."""
        self._closed = True
        if self._on_message is None:  # this end may wait for a message
            with self._arrival:
                self._arrival.notify_all()
        if self._other is not None:
            self._other._end(HungUpError("the other end has hung up"))

    release = close

    def refuse(self, message: Message) -> None:
        """Send a last message and hang up."""
        if self._other is not None:
            self._other._take(message, None)
        self.close()


def pair() -> tuple[InProcess[Any], InProcess[Any]]:
    """Two ends of a stream."""
    one, other = InProcess[Any](), InProcess[Any]()
    one._other, other._other = other, one
    return one, other
