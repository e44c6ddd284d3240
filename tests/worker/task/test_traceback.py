"""What a user sees of an error of their code."""

import pytest

from worker.task.load import TaskError, user_traceback


def _users() -> None:
    try:
        raise KeyError("first")
    except KeyError as error:
        raise ValueError("second") from error


def test_the_users_chain_is_kept() -> None:
    with pytest.raises(ValueError, match="second") as caught:
        _users()
    text = user_traceback(caught.value)
    assert "KeyError: 'first'" in text
    assert text.endswith("ValueError: second")


def test_what_this_package_raised_before_is_left_out() -> None:
    def after_a_first_attempt() -> None:
        try:
            raise TaskError("task", "a first attempt failed")
        except TaskError:
            _users()

    with pytest.raises(ValueError, match="second") as caught:
        after_a_first_attempt()
    text = user_traceback(caught.value)
    assert "first attempt" not in text
    assert text.endswith("ValueError: second")
