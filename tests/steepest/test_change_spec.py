"""What is done otherwise from a step on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from steepest.change_spec import ChangeSpec, lr_scale_at, with_change
from steepest.convert import change_from_proto, change_to_proto, spec_from_proto, spec_to_proto
from steepest.spec import spec_from_dict

CHANGES = st.builds(
    ChangeSpec,
    step=st.integers(0, 100),
    lr_scale=st.floats(0.01, 1.0),
    skip_samples=st.lists(st.integers(0, 2**53), max_size=4).map(tuple),
)


def test_learning_rates_multiply_from_their_steps_on() -> None:
    changes = [ChangeSpec(step=10, lr_scale=0.5), ChangeSpec(step=4, lr_scale=0.1), ChangeSpec(step=0)]
    assert [lr_scale_at(changes, step) for step in (0, 3, 4, 9, 10, 99)] == [1.0, 1.0, 0.1, 0.1, 0.05, 0.05]


@given(st.lists(CHANGES, max_size=5), CHANGES)
def test_going_back_keeps_all_that_was_changed(changes: list[ChangeSpec], change: ChangeSpec) -> None:
    found = with_change(changes, change)
    assert found[-1] == change
    assert [(c.lr_scale, c.skip_samples) for c in found[:-1]] == [(c.lr_scale, c.skip_samples) for c in changes]
    assert all(c.step <= change.step for c in found)
    for step in range(change.step):  # what was before the step stays as it was
        assert lr_scale_at(found, step) == lr_scale_at(changes, step)


@given(st.lists(CHANGES, max_size=5))
def test_changes_go_over_the_wire(changes: list[ChangeSpec]) -> None:
    spec = spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 3, "changes": changes})
    assert spec_from_proto(spec_to_proto(spec)).changes == tuple(changes)
    assert [change_from_proto(change_to_proto(change)) for change in changes] == changes
