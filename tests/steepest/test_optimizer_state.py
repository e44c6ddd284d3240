"""An optimizer's state survives as named tensors, whatever it is made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.optimizer_state import STRUCTURE, StateKindError, counted, pack_state, unpack_state

NAMES = st.text(st.characters(codec="ascii"), min_size=1, max_size=8)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(-1e9, 1e9), max_size=4).map(torch.tensor),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(NAMES, st.integers()), inner, max_size=3),
    ),
    max_leaves=8,
)


def _same(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, float):
        return one == two or (math.isnan(one) and math.isnan(two))
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(_same(one[key], two[key]) for key in one)
    return bool(one == two)


@given(st.dictionaries(NAMES, VALUES, max_size=4), st.dictionaries(NAMES, VALUES, max_size=2))
def test_what_goes_in_comes_out(state: dict[str, Any], group: dict[str, Any]) -> None:
    named = pack_state(state, group)
    assert all(isinstance(value, torch.Tensor) and "." not in name for name, value in named.items())
    found, counts = unpack_state(named)
    assert found.keys() == state.keys()
    assert all(_same(state[key], found[key]) for key in state)
    assert counts.keys() == group.keys()
    assert all(_same(group[key], counts[key]) for key in group)


def test_tensors_of_torch_optim_keep_their_names_and_have_no_structure() -> None:
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}
    assert pack_state(state, {}) == state
    assert STRUCTURE not in pack_state(state, {})


def test_what_cannot_be_written_down_is_refused_by_its_place() -> None:
    with pytest.raises(StateKindError, match=r"a function in state\['hook'\]\[1\]"):
        pack_state({"hook": [1, lambda: None]}, {})


def test_a_transposed_matrix_stays_one() -> None:
    matrix = torch.arange(6.0).view(2, 3).t()
    state = {"Q": [matrix], "P": matrix}
    saved = {name: tensor.contiguous().clone() for name, tensor in pack_state(state, {}).items()}
    found, _ = unpack_state(saved)
    assert torch.equal(found["P"], matrix)
    assert found["P"].stride() == found["Q"][0].stride() == matrix.stride()


def test_only_what_a_group_counts_is_kept() -> None:
    before = {"params": [], "lr": 0.1, "betas": (0.9, 0.99), "k": 0, "mean": torch.ones(2)}
    now = {**before, "lr": 0.2, "k": 3, "weight_sum": 1.5}
    assert counted(before, now) == {"k": 3, "weight_sum": 1.5}
