from __future__ import annotations

from pathlib import Path

from ps.step.messages import Printed
from services.jobs.job_log import READ_BYTES, JobLog


def line(text: str) -> Printed:
    return Printed(1.5, "stdout", text, "worker-0")


def test_lines_come_back_in_order_from_any_line_on(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "jobs" / "log", 1 << 20)
    assert log.read(0) == []
    lines = [line("one"), line('zwei\twith ünicode and \\ "quotes"'), line("")]
    log.append(lines[:1])
    log.append(lines[1:])
    found = log.read(0)
    assert [stored.line for stored in found] == lines
    for index, stored in enumerate(found):
        assert [later.line for later in log.read(stored.offset)] == lines[index + 1 :]


def test_a_long_log_is_read_in_pieces(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "log", 8 << 20)
    lines = [line(str(i) * 1000) for i in range(2000)]
    log.append(lines)
    assert (tmp_path / "log").stat().st_size > 2 * READ_BYTES
    found, offset = [], 0
    while piece := log.read(offset):
        found += piece
        offset = piece[-1].offset
    assert [stored.line for stored in found] == lines


def test_a_full_log_says_so_once(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "log", 1000)
    for _ in range(5):
        log.append([line("x" * 100) for _ in range(20)])
    texts = [stored.line.text for stored in log.read(0)]
    assert texts[0] == "x" * 100
    assert "the log is full" in texts[-1]
    assert sum("the log is full" in text for text in texts) == 1


def test_a_torn_line_and_an_offset_from_elsewhere_are_passed_over(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "log", 1 << 20)
    log.append([line("whole")])
    with (tmp_path / "log").open("ab") as file:
        file.write(b'[1.5, "stdout", "to')
    assert [stored.line.text for stored in log.read(0)] == ["whole"]
    assert log.read(3) == []
    assert log.read(1 << 40) == []
