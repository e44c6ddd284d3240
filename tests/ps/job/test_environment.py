"""Variables of a job's code, and what is hidden of those that are secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.job.environment import HIDDEN, hidden, hide, set_variables, with_variables

PEM = "-----BEGIN KEY-----\nQUJDREVGRw==abcdefg\nab=\n-----END KEY-----\n"


@given(st.text(), st.text(min_size=8).filter(lambda s: len(s.strip()) >= 8), st.text())
def test_no_text_has_a_secret(before: str, secret: str, after: str) -> None:
    assert secret.strip() not in hide(before + secret + after, [secret]).replace(HIDDEN, "\0")


def test_lines_of_a_secret_are_hidden_but_for_short_ones() -> None:
    assert hide("it says QUJDREVGRw==abcdefg, ab=", [PEM]) == f"it says {HIDDEN}, ab="
    assert hide(PEM.replace("\n", "\r\n"), [PEM]) == f"{HIDDEN}\r\n{HIDDEN}\r\nab=\r\n{HIDDEN}\r\n"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=8).filter(lambda s: len(s.strip()) >= 8))
def test_other_ways_to_write_it_are_hidden(secret: str) -> None:
    secret = secret.strip()
    for said in (repr(secret)[1:-1], json.dumps(secret)[1:-1], urllib.parse.quote(secret, safe="")):
        assert hide(f"<{said}>", [secret]) == f"<{HIDDEN}>"


def test_a_secret_within_another_leaves_nothing_of_it() -> None:
    assert hide("abcdefgh-12345678", ["abcdefgh", "abcdefgh-12345678"]) == HIDDEN


def test_processes_that_are_started_have_them_and_hide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REGION", "API_KEY", "STEEPEST_SECRETS"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
    assert hidden("correct horse") == "correct horse"
    set_variables({"REGION": "north"}, {"API_KEY": "correct horse"})
    assert (os.environ["REGION"], os.environ["API_KEY"]) == ("north", "correct horse")
    del os.environ["API_KEY"]  # as user code may
    assert hidden("correct horse, north") == f"{HIDDEN}, north"
    say = "import os; from ps.job.environment import hidden; print(hidden(os.environ['A'] + os.environ['B']))"
    environment = with_variables(os.environ, {"B": "south"}, {"A": "battery staple"})
    done = subprocess.run([sys.executable, "-c", say], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{HIDDEN}south\n"
    set_variables({}, {})
    assert hidden("correct horse") == "correct horse"
