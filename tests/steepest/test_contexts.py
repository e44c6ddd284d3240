"""Services by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steepest import contexts
from steepest.errors import SpecError
from tests.support.command import run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_the_first_is_in_use_until_another_is() -> None:
    assert contexts.read().address == contexts.DEFAULT_ADDRESS
    assert contexts.add("home", "127.0.0.1:50051").current == "home"
    assert contexts.add("lab", "lab.example:443").current == "home"
    assert contexts.use("lab").address == "lab.example:443"
    assert contexts.read() == contexts.Contexts({"home": "127.0.0.1:50051", "lab": "lab.example:443"}, "lab")
    assert contexts.remove("lab").address == contexts.DEFAULT_ADDRESS


@pytest.mark.parametrize(
    ("name", "address"),
    [("", "a:1"), ("a b", "a:1"), ("../a", "a:1"), ("a", "a"), ("a", "a:b"), ("a", ":1"), ("a", "a:0")],
)
def test_what_makes_no_sense_is_refused(name: str, address: str) -> None:
    with pytest.raises(SpecError):
        contexts.add(name, address)
    assert contexts.read() == contexts.Contexts({})


def test_a_name_that_is_not_known_is_refused_with_those_that_are() -> None:
    contexts.add("home", "127.0.0.1:50051")
    for call in (contexts.use, contexts.remove):
        with pytest.raises(SpecError, match="there are: home"):
            call("away")


@pytest.mark.parametrize("text", ["", "[]", '{"addresses": 3}', '{"addresses": {}, "current": "x"}'])
def test_a_file_that_makes_no_sense_is_none(text: str, home: Path) -> None:
    contexts.path().parent.mkdir(parents=True)
    contexts.path().write_text(text)
    assert contexts.read().address == contexts.DEFAULT_ADDRESS


def test_the_command() -> None:
    assert run("context", "add", "home", "127.0.0.1:1").stdout == "home is 127.0.0.1:1, in use\n"
    run("context", "add", "lab", "lab.example:443")
    assert run("context", "use", "lab").stdout == "using lab: lab.example:443\n"
    assert run("context", "list").stdout == "  home  127.0.0.1:1\n* lab  lab.example:443\n"
    listed = json.loads(run("context", "list", "--json").stdout)
    assert listed == {"current": "lab", "contexts": {"home": "127.0.0.1:1", "lab": "lab.example:443"}}
    refused = run("context", "use", "nowhere")
    assert refused.returncode == 2
    assert "there are: home, lab" in refused.stderr
    assert run("context", "remove", "lab").returncode == 0
