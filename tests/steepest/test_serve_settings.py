"""Settings of a service: flags before the environment before the file, and each refusal says where it is from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steepest.errors import SpecError
from steepest.serve_settings import ServeSettings, read_settings


def refused(config: Path | None, **given: Any) -> str:
    with pytest.raises(SpecError) as error:
        read_settings(config, given)
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "steepest.toml"
    path.write_text('port = 1\nhttp_port = 1\ndata_dir = "kept"\n[health_actions]\ndiverging = "pause"\n')
    return path


def test_flags_come_before_the_environment_and_that_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEEPEST_HTTP_PORT", "2")
    monkeypatch.setenv("STEEPEST_PORT", "2")
    settings = read_settings(file, {"port": 3})
    assert (settings.port, settings.http_port, settings.data_dir) == (3, 2, Path("kept"))
    assert settings.health_actions == {"diverging": "pause"}
    assert settings.host == "127.0.0.1"


def test_without_a_file_there_are_the_defaults() -> None:
    assert read_settings(None, {}).model_dump() == ServeSettings().model_dump()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http_port = 99999", "steepest.toml: http_port: 99999: input should be less than or equal to 65535"),
        ('hots = "x"', "steepest.toml: hots: no setting of that name; there are: host, port"),
        (
            '[health_actions]\ndiverging = "stop"',
            "steepest.toml: health_actions.diverging: 'stop': input",
        ),
        ('[health_actions]\nfoo = "pause"', "steepest.toml: health_actions.foo: 'foo': input should be 'vanishing'"),
        ("port = ", "steepest.toml is no TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "steepest.toml"
    path.write_text(text)
    assert message in refused(path)


def test_a_wrong_flag_or_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--config: cannot read" in refused(tmp_path / "none.toml")
    assert "--health-action.foo: 'foo'" in refused(None, health_actions={"foo": "pause"})
    assert "--retention-days: -1: input should be" in refused(None, retention_days=-1)
    monkeypatch.setenv("STEEPEST_PORT", "abc")
    assert "STEEPEST_PORT: 'abc'" in refused(None)
    monkeypatch.setenv("STEEPEST_HEALTH_ACTIONS", "{x")
    assert "STEEPEST_HEALTH_ACTIONS: is no JSON object" in refused(None, port=1)
