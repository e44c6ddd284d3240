from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps.job.footprint import Footprint, explain_refusal, footprint, slots_of, state_tensors
from ps.numerics.optimizer import ShardOptimizer
from ps.numerics.tree import Node, maximal_nodes
from ps.parameters.layout import build_layout, shards
from steepest.spec import ELEMENTWISE, HYPER_PARAMETERS, TrainingJobSpec, spec_from_dict
from tests.support.models import described

LAYOUT = build_layout(described([(300, 400), (400,)]))
TASK = {"module": "m", "function": "f", "arguments": {}}


def _spec(**raw: object) -> TrainingJobSpec:
    return spec_from_dict({"steps": 1, "task": TASK, "data": {"micro_batch": 8}, **raw})


@given(st.integers(1, 40), st.data())
def test_the_slots_are_those_that_the_computation_holds(num_leaves: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, num_leaves - 1))
    high = data.draw(st.integers(low + 1, num_leaves))
    held = most = 0

    def compute(node: Node) -> None:
        """As worker.gradients.compute does it, with slots counted."""
        nonlocal held, most
        if node.is_leaf:
            held += 1
            most = max(most, held)
            return
        left, right = node.halves()
        compute(left)
        if not right.is_leaf:
            compute(right)
            held -= 1

    nodes = maximal_nodes(low, high, num_leaves)
    for node in nodes:
        compute(node)
    assert slots_of(low, high, num_leaves) == (most, len(nodes))


SCALARS = ("step", "mu_product", "eta", "mu")


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        (name, extra)
        for name in ELEMENTWISE
        for extra in ({}, {"momentum": 0.9}, {"amsgrad": True}, {"centered": True})
        if set(extra) <= set(HYPER_PARAMETERS[name])
    ],
)
def test_the_state_is_what_torch_optim_keeps(name: str, extra: dict[str, object]) -> None:
    spec = _spec(optimizer={"name": name, **extra})
    (shard,) = shards(LAYOUT, 1)
    optimizer = ShardOptimizer(spec.optimizer, shard, torch.zeros(shard.numel))
    optimizer.step(torch.ones(shard.numel), lr=0.1, divisor=1.0, coefficient=1.0, max_value=None)
    numel = sum(part.values.numel() for part in optimizer.export_state() if part.state not in SCALARS)
    assert numel == state_tensors(spec, LAYOUT.numel) * sum(p.numel for p in LAYOUT.parameters)


def test_on_one_host_nothing_is_on_the_network_and_nobody_has_a_copy() -> None:
    one, inline = (
        footprint(
            _spec(
                placement={"workers": 3, "servers": 2, "transport": name}, data={"global_batch": 32, "micro_batch": 4}
            ),
            LAYOUT,
            num_hosts=1,
        )
        for name in ("auto", "inline")
    )
    assert one.network == 0
    assert sum(s.parameters for s in one.servers) == LAYOUT.nbytes
    assert all(w.parameters == 0 for w in one.workers)
    assert inline.network == sum(w.pushed + w.pulled for w in inline.workers) >= 6 * LAYOUT.nbytes
    assert inline.total > one.total


def test_a_host_has_one_copy_and_sends_one_gradient_however_many_workers_it_has() -> None:
    for workers in (2, 4, 8):
        spec = _spec(placement={"workers": workers, "servers": 2}, data={"global_batch": 64, "micro_batch": 8})
        needed = footprint(spec, LAYOUT, num_hosts=2)
        assert [s.parameters for s in needed.servers] == [LAYOUT.nbytes] * 2
        assert all(w.parameters == w.pushed == w.pulled == 0 for w in needed.workers)
        # Each host sends the other half of its sum, and takes in the other half of the parameters.
        assert needed.network == 2 * LAYOUT.nbytes
        assert sum(s.received for s in needed.servers) == LAYOUT.nbytes


def test_hosts_without_a_shard() -> None:
    spec = _spec(placement={"workers": 5, "servers": 1}, data={"global_batch": 40, "micro_batch": 8})
    needed = footprint(spec, LAYOUT, num_hosts=3)  # two workers on the first, two on the second, one on the third
    assert [s.parameters for s in needed.servers] == [LAYOUT.nbytes] * 2  # the second is a home without a shard
    assert [s.optimizer_state > 0 for s in needed.servers] == [True, False]
    assert [w.parameters for w in needed.workers] == [0, 0, 0, 0, LAYOUT.nbytes]
    assert needed.servers[1].pulled == needed.workers[4].pulled == LAYOUT.nbytes
    assert needed.servers[0].received == needed.servers[1].pushed + needed.workers[4].pushed


@pytest.mark.parametrize(("name", "most"), [("bf16", 0.51), ("topk", 0.08), ("powersgd", 0.2)])
def test_compression_takes_less_network_and_more_memory(name: str, most: float) -> None:
    placement = {"workers": 2, "servers": 2, "transport": "inline"}
    common: dict[str, object] = {"placement": placement, "data": {"global_batch": 32, "micro_batch": 4}}
    whole = footprint(_spec(**common), LAYOUT, num_hosts=2)
    small = footprint(_spec(**common, compression={"name": name, "parts": 2}), LAYOUT, num_hosts=2)
    assert small.network <= most * whole.network
    assert all(w.residuals >= LAYOUT.nbytes for w in small.workers)
    assert sum(s.parameters for s in small.servers) == 2 * LAYOUT.nbytes
    # A part more than there are workers for has its residual too.
    eight = footprint(_spec(**common, compression={"name": name}), LAYOUT, num_hosts=2)
    assert sum(w.residuals for w in eight.workers) == 4 * sum(w.residuals for w in small.workers)


def test_more_workers_than_micro_batches_take_nothing() -> None:
    spec = _spec(placement={"workers": 12}, data={"global_batch": 8, "micro_batch": 1})
    needed = footprint(spec, LAYOUT, num_hosts=1)
    assert [w.gradients for w in needed.workers].count(0) == 4


def test_a_refusal_says_what_would_fit() -> None:
    spec = _spec(placement={"workers": 8}, optimizer={"name": "adamw"})
    needed = footprint(spec, LAYOUT, num_hosts=1)
    assert explain_refusal(needed, needed.total) == ""
    refusal = explain_refusal(needed, needed.total - 1)
    assert "7 workers" in refusal
    assert "sgd" in refusal
    assert "a smaller model" in explain_refusal(needed, 1)


def test_what_is_on_gpus_is_told_apart() -> None:
    def planned(num_hosts: int = 1, **placement: object) -> Footprint:
        spec = _spec(optimizer={"name": "adamw"}, placement={"device": "cuda", "workers": 2, **placement})
        return footprint(spec, LAYOUT, num_hosts=num_hosts)

    whole = LAYOUT.nbytes
    on_host = planned()
    assert (on_host.servers[0].gpu, on_host.servers[0].optimizer_state) == (0, 2 * whole)
    held, _ = slots_of(0, 4, 8)
    assert [(w.gradients, w.gpu) for w in on_host.workers] == [(held * whole, (1 + held) * whole)] * 2
    on_gpu = planned(server_device="cuda")
    # Adam's two moments, the sum of the other worker, and signals in float64; the parameters are the worker's.
    assert (on_gpu.servers[0].gpu, on_gpu.servers[0].optimizer_state) == (5 * whole, 0)
    assert [w.gradients for w in on_gpu.workers] == [whole, held * whole]
    assert on_gpu.gpu == 5 * whole + 2 * (1 + held) * whole
    assert on_gpu.to_dict()["gpu"] == on_gpu.gpu
    both = planned(server_device="cuda", servers=2)
    assert sum(s.gpu for s in both.servers) == 5 * whole
    apart = planned(num_hosts=2, server_device="cuda")
    assert apart.servers[0].gpu == 5 * whole  # the other one's sum comes over the network
    alone = planned(server_device="cuda", workers=1)
    assert alone.servers[0].gpu == 5 * whole
    assert planned(device="cpu").gpu == 0
