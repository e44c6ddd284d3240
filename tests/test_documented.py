"""Every message of docs/operations.md is produced by some test."""

from __future__ import annotations

from pathlib import Path

import pytest

from steepest.client import Client
from steepest.errors import ServiceUnavailableError
from tests.support.documented import documented_messages, is_documented
from tests.support.service import free_port


def test_a_service_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.client.CONNECT_SECONDS", 0.5)
    with pytest.raises(ServiceUnavailableError) as raised:
        Client(f"127.0.0.1:{free_port()}")
    assert is_documented("no service answers", str(raised.value))


def test_each_is_produced_by_a_test() -> None:
    code = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert [failure for failure in documented_messages() if f'"{failure}"' not in code] == []
