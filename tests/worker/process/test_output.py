from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator

from ps.step.messages import Printed
from worker.process.output import MAX_HELD, MAX_LINE, Output


@contextlib.contextmanager
def kept() -> Iterator[Output]:
    """Streams of our own, for pytest's change between a fixture and a test."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield Output()


def sent(output: Output) -> list[Printed]:
    lines: list[Printed] = []
    output._send = lines.extend
    output.flush()
    return lines


def test_whole_lines_of_both_streams_are_kept_in_order() -> None:
    with kept() as output:
        print("one", end="")
        print(" line")
        sys.stderr.write("two\nthree")
        lines = [(line.stream, line.text) for line in sent(output)]
        there = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert lines == [("stdout", "one line"), ("stderr", "two"), ("stderr", "three")]
    assert there == "one line\n"


def test_a_progress_bar_is_one_line_as_a_terminal_shows_it() -> None:
    with kept() as output:
        for share in (10, 50, 100):
            sys.stderr.write(f"\r{share} %")
        sys.stderr.write("\n")
        assert [line.text for line in sent(output)] == ["100 %"]


def test_a_flood_is_cut_and_says_how_much() -> None:
    with kept() as output:
        for index in range(MAX_HELD + 5):
            print(index)
        lines = sent(output)
        print("x" * 10 * MAX_LINE)
        [long] = sent(output)
    assert len(lines) == MAX_HELD + 1
    assert "5 lines were printed too fast" in lines[0].text
    assert lines[-1].text == str(MAX_HELD + 4)
    assert len(long.text) == MAX_LINE


def test_other_uses_of_a_stream_go_on_working() -> None:
    code = (
        "from worker.process.output import Output; import sys, logging; Output();"
        "print('a', flush=True); sys.stdout.writelines(['b\\n']); print(sys.stdout.isatty(), sys.stdout.encoding);"
        "logging.warning('c'); sys.stdout.buffer.write(b'd\\n'); sys.stdout.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["a", "b", "False", "utf-8", "d"]
    assert "c" in done.stderr
