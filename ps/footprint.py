"""What a job needs before it starts: memory of every process, and bytes on the network in every step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ps.assignment import Dealer
from ps.codec import pull_codec, push_codec
from ps.layout import Layout, shards
from ps.ownership import redeal
from ps.tree import Node, maximal_nodes, parts_of_step
from steepest.spec import TrainingJobSpec


@dataclass(frozen=True, slots=True)
class ServerFootprint:
    """Bytes of one server. received: gradients that came over the network, none on one host, and where they are added.

    parameters: twice, when what workers have is not what the optimizer has.
    """

    parameters: int
    optimizer_state: int
    received: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer_state + self.received


@dataclass(frozen=True, slots=True)
class WorkerFootprint:
    """Bytes of one worker. parameters: its own copy, none on the servers' host. pushed, pulled: on the network, a step.
    residuals: what it keeps of the parts that it compresses.

    What the user's model takes besides (activations, data) and what each Python process takes is not known here.
    """

    parameters: int
    gradients: int
    pushed: int
    pulled: int
    residuals: int = 0

    @property
    def total(self) -> int:
        """Its memory."""
        return self.parameters + self.gradients + self.residuals


@dataclass(frozen=True, slots=True)
class Footprint:
    """A whole job's. checkpoint: bytes that the leader takes besides while it writes one."""

    num_parameters: int
    servers: tuple[ServerFootprint, ...]
    workers: tuple[WorkerFootprint, ...]
    checkpoint: int

    @property
    def total(self) -> int:
        """Memory of all servers and workers, and of a checkpoint on its way to disk."""
        return sum(s.total for s in self.servers) + sum(w.total for w in self.workers) + self.checkpoint

    @property
    def network(self) -> int:
        """Bytes on the network in a step."""
        return sum(w.pushed + w.pulled for w in self.workers)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can carry."""
        return {**asdict(self), "total": self.total, "network": self.network}


def explain_refusal(needed: Footprint, available: int) -> str:
    """Why a job cannot fit into `available` bytes, and what would; nothing when it does fit."""
    if needed.total <= available:
        return ""
    remedies = []
    state = sum(s.optimizer_state for s in needed.servers)
    if state and needed.total - state - needed.checkpoint < available:
        remedies.append("an optimizer with less state (sgd, momentum)")
    gradients = sum(w.gradients for w in needed.workers)
    if len(needed.workers) > 1 and needed.total - gradients < available:
        fewer = max(1, int((available - needed.total + gradients) * len(needed.workers) // max(gradients, 1)))
        remedies.append(f"{fewer} worker{'s' if fewer > 1 else ''}")
    remedies += ["a smaller model", "more memory"]
    return (
        f"the job needs {needed.total / 1e9:.2f} GB, and there are {available / 1e9:.2f} GB; "
        f"what would fit: {', or '.join(remedies)}"
    )


def state_tensors(spec: TrainingJobSpec) -> int:
    """How many tensors of a parameter's size the optimizer keeps for it."""
    optimizer = spec.optimizer
    match optimizer.name:
        case "adam" | "adamw":
            return 3 if optimizer.amsgrad else 2
        case "momentum" | "nesterov" | "adagrad":
            return 1
        case "rmsprop":
            return 1 + bool(optimizer.momentum) + bool(optimizer.centered)
        case _:
            return int(bool(optimizer.momentum))


def slots_of(low: int, high: int, num_leaves: int) -> tuple[int, int]:
    """(gradients held at most, gradients pushed) by a worker that computes the micro-batches [low, high)."""

    def held(node: Node) -> int:
        if node.is_leaf:
            return 1
        left, right = node.halves()
        # A leaf on the right is added as it is made; any other right half grows beside the left one.
        return held(left) if right.is_leaf else max(held(left), 1 + held(right))

    most = pushed = 0
    for node in maximal_nodes(low, high, num_leaves):
        most = max(most, pushed + held(node))
        pushed += 1
    return most, pushed


def footprint(spec: TrainingJobSpec, layout: Layout, *, one_host: bool) -> Footprint:
    """What a job takes with all its workers, equally fast. one_host: whether tensors go through shared memory."""
    workers = _compressing_workers(spec, layout) if spec.compression.is_on else _workers(spec, layout, one_host)
    received = sum(worker.pushed for worker in workers) / layout.nbytes
    copies = 1 if pull_codec(spec.compression, layout, spec.seed) is None else 2
    scratch = int(spec.compression.is_on)
    servers = []
    for shard in shards(layout, spec.placement.num_servers):
        nbytes = shard.numel * layout.itemsize
        in_slots = int(received * nbytes) + scratch * nbytes
        servers.append(ServerFootprint(copies * nbytes, state_tensors(spec) * nbytes, in_slots))
    residuals = sum(worker.residuals for worker in workers)
    checkpoint = (copies + state_tensors(spec)) * layout.nbytes + residuals
    return Footprint(sum(p.numel for p in layout.parameters), tuple(servers), workers, checkpoint)


def _workers(spec: TrainingJobSpec, layout: Layout, one_host: bool) -> tuple[WorkerFootprint, ...]:
    placement = spec.placement
    shared = one_host and not spec.is_inline
    num_leaves = spec.data.num_micro_batches
    names = [str(i) for i in range(placement.workers)]
    parts = Dealer()(range(num_leaves), dict.fromkeys(names, 1.0))
    slots = [[slots_of(low, high, num_leaves) for low, high in parts.get(name, [])] or [(0, 0)] for name in names]
    held = [max(most for most, _ in ranges) for ranges in slots]
    pushed = [sum(count for _, count in ranges) for ranges in slots]
    return tuple(
        WorkerFootprint(
            parameters=0 if shared else layout.nbytes,
            gradients=most * layout.nbytes,
            pushed=0 if shared else count * layout.nbytes,
            pulled=0 if shared else layout.nbytes,
        )
        for most, count in zip(held, pushed, strict=True)
    )


def _compressing_workers(spec: TrainingJobSpec, layout: Layout) -> tuple[WorkerFootprint, ...]:
    push, pull = (make(spec.compression, layout, spec.seed) for make in (push_codec, pull_codec))
    assert push is not None  # noqa: S101  # the caller has looked
    num_leaves = spec.data.num_micro_batches
    names = [str(i) for i in range(spec.placement.workers)]
    parts = parts_of_step(num_leaves, spec.part_leaves)
    owners = redeal([None] * len(parts), names)
    payload = push.span(0, layout.numel)[1]
    most, _ = slots_of(*parts[0], num_leaves)
    return tuple(
        WorkerFootprint(
            parameters=layout.nbytes,
            gradients=most * layout.nbytes if count else 0,
            pushed=count * payload,
            pulled=layout.nbytes if pull is None else pull.span(0, layout.numel)[1],
            residuals=count * (layout.nbytes + push.state_numel * layout.itemsize + payload),
        )
        for count in map(owners.count, names)
    )
