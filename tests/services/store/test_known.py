"""What a store remembers of rows it has read."""

from __future__ import annotations

from services.store.known import MOST_KEPT, Known


def test_a_row_is_kept_until_it_is_written() -> None:
    known = Known[int]()
    known.keep("a", 1, known.reading)
    assert known.get("a") == 1
    known.written("a")
    assert known.get("a") is None


def test_what_was_read_before_a_write_is_not_kept_after_it() -> None:
    known = Known[int]()
    reading = known.reading
    known.written("a")
    known.keep("a", 1, reading)
    assert known.get("a") is None


def test_no_more_than_so_many_rows_are_kept() -> None:
    known = Known[int]()
    for number in range(3 * MOST_KEPT):
        known.keep(str(number), number, known.reading)
    assert sum(known.get(str(number)) is not None for number in range(3 * MOST_KEPT)) <= MOST_KEPT
    assert known.get(str(3 * MOST_KEPT - 1)) == 3 * MOST_KEPT - 1
