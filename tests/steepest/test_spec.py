from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.numerics.optimizer import torch_class
from steepest.convert import spec_from_proto, spec_to_proto
from steepest.errors import SpecError
from steepest.spec import (
    ELEMENTWISE,
    HYPER_PARAMETERS,
    OPTIMIZER_NAMES,
    SCHEDULE_NAMES,
    TrainingJobSpec,
    spec_from_dict,
)
from steepest.submission import check_submission

TASK = {"module": "train", "function": "digits"}


def spec(**raw: Any) -> TrainingJobSpec:
    return spec_from_dict({"task": TASK, "steps": 10, **raw})


@pytest.mark.parametrize(
    ("raw", "field", "words"),
    [
        ({"optimizer": {"name": "adagard"}}, "optimizer.name", ["adagard", "adagrad", "sgd"]),
        ({"optimizer": {"lr": 0.0}}, "optimizer.lr", ["0.0", "greater than 0"]),
        ({"optimizer": {"lr": -1}}, "optimizer.lr", ["-1", "greater than 0"]),
        ({"optimizer": {"lr": math.nan}}, "optimizer.lr", ["nan", "finite"]),
        ({"optimizer": {"lr": math.inf}}, "optimizer.lr", ["inf", "finite"]),
        ({"optimizer": {"name": "adam", "momentum": 0.9}}, "optimizer.momentum", ["no such field of adam", "betas"]),
        ({"optimizer": {"name": "nesterov", "momentum": 0}}, "optimizer.momentum", ["0", "greater than 0"]),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate", ["no such field", "lr"]),
        ({"schedule": {"name": "cosin"}}, "schedule.name", ["cosin", "cosine"]),
        ({"schedule": {"warmup_steps": 10}}, "spec", ["schedule.warmup_steps = 10", "0 to 9"]),
        ({"clip": {"norm": 0}}, "clip.norm", ["0", "greater than 0"]),
        ({"clip": {"value": -1}}, "clip.value", ["-1", "greater than 0"]),
        ({"clip": {"norm": 1, "value": 1}}, "clip", ["at most one"]),
        ({"placement": {"workers": 0}}, "placement.workers", ["0", "greater than or equal to 1"]),
        ({"placement": {"servers": 1.5}}, "placement.servers", ["1.5"]),
        ({"placement": {"device": "tpu"}}, "placement.device", ["tpu", "cpu", "cuda"]),
        ({"placement": {"server_device": "tpu"}}, "placement.server_device", ["tpu", "cpu", "cuda"]),
        ({"placement": {"server_device": "cuda"}}, "placement", ["server_device = 'cuda'", "device = 'cuda'", "'cpu'"]),
        (
            {"placement": {"device": "cuda", "server_device": "cuda", "workers": 2, "servers": 3}},
            "placement",
            ["servers = 3", "1 to 2"],
        ),
        (
            {"placement": {"device": "cuda", "server_device": "cuda"}, "compression": {"name": "topk"}},
            "spec",
            ["compression.name = 'topk'", "server_device = 'cuda'", "none"],
        ),
        ({"data": {"global_batch": 8, "micro_batch": 9}}, "data", ["micro_batch = 9", "global_batch = 8", "1 to 8"]),
        ({"steps": None}, "spec", ["steps, epochs", "neither"]),
        ({"epochs": 3}, "spec", ["steps = 10", "epochs = 3", "exactly one"]),
        ({"stesp": 3}, "stesp", ["no such field", "steps"]),
        ({"lr": 0.1}, "lr", ["did you mean optimizer.lr?"]),
        ({"workers": 2}, "workers", ["did you mean placement.workers?"]),
        ({"schedule": "cosine"}, "schedule", ["'cosine' is no table of fields", "name, warmup_steps"]),
        ({"clip": {"agc": 3}}, "clip.agc", ["3 is no table of fields", "clipping"]),
        ({"optimizer": 3}, "optimizer.name", ["'3' is not an optimizer"]),
        ({"sync": {"mode": "async"}}, "sync.mode", ["async", "sync"]),
        ({"sync": {"staleness": 2}}, "sync.staleness", ["2", "less than or equal to 0"]),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(
    raw: dict[str, Any], field: str, words: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        spec(**raw)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert all(word in violation.problem for word in words), violation.problem


def test_all_bad_fields_are_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        spec(optimizer={"lr": -1}, placement={"workers": 0})
    assert {v.field for v in caught.value.violations} == {"optimizer.lr", "placement.workers"}


def test_the_default_micro_batch_does_not_depend_on_the_workers() -> None:
    for workers in (1, 5):
        it = spec(data={"global_batch": 60}, placement={"workers": workers})
        assert (it.data.micro_batch_size, it.data.num_micro_batches) == (30, 2)
    for most, micro_batches in ((1, 1), (2, 2), (3, 4), (8, 8), (100, 60)):
        cut = spec(data={"global_batch": 60}, placement={"max_workers": most}).data
        assert cut.num_micro_batches == micro_batches
    accumulated = spec(data={"global_batch": 60, "accumulate": 4}).data
    assert (accumulated.micro_batch_size, accumulated.num_micro_batches) == (15, 4)
    with pytest.raises(SpecError, match="one of the two"):
        spec(data={"accumulate": 4, "micro_batch": 4})
    explicit = spec(data={"global_batch": 60, "micro_batch": 10}, placement={"max_workers": 2})
    assert explicit.data.num_micro_batches == 6
    assert spec_from_dict(spec(placement={"max_workers": 4}).model_dump()).data.num_micro_batches == 4


def test_length_in_epochs_counts_the_short_step() -> None:
    it = spec_from_dict({"task": TASK, "epochs": 2, "data": {"global_batch": 10}})
    assert it.total_steps(101) == 22


SPECS = st.fixed_dictionaries(
    {"task": st.just({**TASK, "arguments": {"a": 1, "b": [1.5, None], "c": {"d": "x"}}}), "steps": st.integers(50, 60)},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "optimizer": st.one_of(
            st.fixed_dictionaries({"name": st.sampled_from(OPTIMIZER_NAMES)}, optional={"lr": st.floats(1e-9, 1e9)}),
            st.just({"name": "adamw", "betas": [0.0, 0.5], "weight_decay": 0.0, "amsgrad": False}),
            st.just({"name": "rmsprop", "centered": True, "momentum": 0.0}),
        ),
        "schedule": st.fixed_dictionaries(
            {"name": st.sampled_from(SCHEDULE_NAMES)}, optional={"warmup_steps": st.integers(0, 49)}
        ),
        "clip": st.one_of(
            st.fixed_dictionaries({"norm": st.floats(1e-9, 1e9)}), st.fixed_dictionaries({"value": st.just(0.5)})
        ),
        "placement": st.fixed_dictionaries({}, optional={"workers": st.integers(1, 1024), "device": st.just("cuda")}),
        "on_nonfinite": st.just("skip"),
        "precision": st.just("bf16"),
        "compression": st.sampled_from(
            [
                {"name": "topk", "ratio": 0.5, "parts": 3},
                {"name": "powersgd", "rank": 2, "pull": "none"},
                {"name": "bf16"},
            ]
        ),
    },
)


@given(SPECS)
def test_a_spec_survives_the_wire_and_json(raw: dict[str, Any]) -> None:
    it = spec_from_dict(raw)
    assert spec_from_proto(spec_to_proto(it)) == it
    assert TrainingJobSpec.model_validate_json(it.model_dump_json()) == it


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_hyper_parameters_are_those_of_torch_optim(name: str) -> None:
    it = spec(optimizer={"name": name}).optimizer
    assert it.name == name
    taken = set(inspect.signature(torch_class(it).__init__).parameters)
    assert set(HYPER_PARAMETERS[name]) <= taken
    assert it.hyper_parameters == {}


def test_a_null_hyper_parameter_is_none() -> None:
    assert spec(optimizer={"name": "adam", "momentum": None, "lr": None}) == spec(optimizer={"name": "adam"})
    assert spec(optimizer={"name": None}).optimizer.name == "adamw"


@pytest.mark.parametrize("servers", ["auto", None, 3])
def test_the_number_of_servers_may_be_left_open(servers: Any) -> None:
    made = spec(placement={"servers": servers})
    assert made.placement.servers == (None if servers == "auto" else servers)
    assert spec_from_proto(spec_to_proto(made)) == made


@pytest.mark.parametrize(
    ("compression", "words"),
    [
        ({"name": "gzip"}, "compression.name: 'gzip' must be 'none', 'bf16', 'fp16', 'topk', 'powersgd' or 'twobit'"),
        ({"name": "topk", "ratio": 0.7}, "compression.ratio: 0.7 must be less than or equal to 0.5"),
        ({"name": "bf16", "ratio": 0.1}, "ratio = 0.1 is of topk; name = bf16 takes none"),
        ({"name": "topk", "rank": 2}, "rank = 2 is of powersgd; name = topk takes none"),
        ({"pull": "bf16"}, "pull = bf16 is of no use without name"),
        ({"parts": 2}, "parts = 2 is of no use without name"),
        ({"name": "powersgd", "pull": "powersgd"}, "compression.pull: 'powersgd' must be"),
    ],
)
def test_a_compression_that_makes_no_sense_is_refused(compression: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(compression=compression)
    assert words in str(caught.value)


@given(st.integers(1, 200), st.integers(1, 16))
def test_parts_are_nodes_of_the_tree_and_no_more_than_asked_for(num_micro_batches: int, parts: int) -> None:
    size = spec(compression={"name": "bf16", "parts": parts}).compression.part_leaves(num_micro_batches)
    assert size.bit_count() == 1
    assert -(-num_micro_batches // size) <= parts
    assert size == 1 or -(-num_micro_batches // (size // 2)) > parts


def test_a_name_alone_is_an_optimizer_with_its_defaults() -> None:
    raw = {"task": {"module": "m", "function": "f"}, "steps": 1}
    assert spec_from_dict({**raw, "optimizer": "adam"}) == spec_from_dict({**raw, "optimizer": {"name": "adam"}})


def test_a_task_that_is_no_text_is_refused() -> None:
    with pytest.raises(SpecError, match="is no text; name the function as"):
        check_submission(print, {}, {"steps": 1})  # type: ignore[arg-type]
