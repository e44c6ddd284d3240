from __future__ import annotations

import inspect
import logging

import pytest
from google.rpc import code_pb2, error_details_pb2

from services.api.errors import CATALOGUE, status_of
from steepest import errors
from steepest.errors import SpecError, SteepestError, Violation

# Raised by the client when it waited; a service never sends it.
CLIENT_ONLY = {errors.SteepestError, errors.JobFailedError}


def test_the_catalogue_is_complete_and_its_reasons_are_unique() -> None:
    tree = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, SteepestError)}
    assert set(CATALOGUE) == tree - CLIENT_ONLY
    assert len({reason for _, reason in CATALOGUE.values()}) == len(CATALOGUE)


def test_a_refused_spec_carries_every_field() -> None:
    status = status_of(SpecError([Violation("optimizer.lr", "too small"), Violation("steps", "missing")]))
    assert status.code == code_pb2.INVALID_ARGUMENT
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert info.reason == "INVALID_SPEC"
    assert status.details[1].Unpack(bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("optimizer.lr", "too small"),
        ("steps", "missing"),
    ]


def test_an_unexpected_error_keeps_its_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status = status_of(ZeroDivisionError("secret detail"))
    assert status.code == code_pb2.INTERNAL
    assert "secret" not in status.message
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.metadata["reference"] in status.message
    assert info.metadata["reference"] in caplog.text
