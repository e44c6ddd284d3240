"""What a job needs before it starts: memory of every process, and bytes on the network in every step."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ps.compression.choose import pull_codec, push_codec
from ps.job.topology import gpus_of_servers, server_places
from ps.numerics.reduce_gpu import CHUNK_NUMEL
from ps.numerics.tree import Node, maximal_nodes, parts_of_step
from ps.parameters.layout import Layout, shards
from ps.step.assignment import Dealer
from ps.step.parts import redeal
from steepest.full_batch_spec import MOST_PRODUCTS, LbfgsSpec, NewtonCgSpec
from steepest.optimizer_spec import (
    AdadeltaSpec,
    AdamaxSpec,
    AdamSpec,
    AdamwSpec,
    ClassSpec,
    MuonSpec,
    NadamSpec,
    RadamSpec,
    RmspropSpec,
    RpropSpec,
    SgdSpec,
)
from steepest.spec import TrainingJobSpec


@dataclass(frozen=True, slots=True)
class ServerFootprint:
    """Bytes of one server. received: gradients that came over the network, none on one host, and where they are added.

    parameters: all of them at the home of a host; twice, when what workers have is not what the optimizer has. pushed,
    pulled: on the network in a step, by a home for all the workers of its host. gpu: on its GPU, besides.
    """

    parameters: int
    optimizer_state: int
    received: int
    pushed: int = 0
    pulled: int = 0
    gpu: int = 0

    @property
    def total(self) -> int:
        """Its memory of the host."""
        return self.parameters + self.optimizer_state + self.received


@dataclass(frozen=True, slots=True)
class WorkerFootprint:
    """Bytes of one worker. parameters: its own copy, none where a server is on its host. pushed, pulled: on the network
    in a step, by itself. residuals: what it keeps of the parts that it compresses. gpu: on its GPU, besides.

    What the user's model takes besides (activations, data) and what each Python process takes is not known here.
    """

    parameters: int
    gradients: int
    pushed: int
    pulled: int
    residuals: int = 0
    gpu: int = 0

    @property
    def total(self) -> int:
        """Its memory of the host."""
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
        """Memory of the hosts: all servers and workers, and a checkpoint on its way to disk."""
        return sum(s.total for s in self.servers) + sum(w.total for w in self.workers) + self.checkpoint

    @property
    def gpu(self) -> int:
        """Memory of all GPUs."""
        return sum(s.gpu for s in self.servers) + sum(w.gpu for w in self.workers)

    @property
    def network(self) -> int:
        """Bytes on the network in a step."""
        return sum(s.pushed + s.pulled for s in self.servers) + sum(w.pushed + w.pulled for w in self.workers)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can carry."""
        return {**asdict(self), "total": self.total, "gpu": self.gpu, "network": self.network}


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


LBFGS_PAIRS = 100  # torch.optim's


def state_tensors(spec: TrainingJobSpec, numel: int) -> int:
    """How many tensors of a parameter's size the optimizer keeps for it, at most. numel: of all parameters."""
    match spec.optimizer:
        case AdamSpec(amsgrad=amsgrad) | AdamwSpec(amsgrad=amsgrad):
            return 3 if amsgrad else 2
        case RmspropSpec(momentum=momentum, centered=centered):
            return 1 + bool(momentum) + bool(centered)
        case SgdSpec(momentum=momentum):
            return int(bool(momentum))
        case LbfgsSpec(history_size=pairs):
            return 2 * (pairs or LBFGS_PAIRS) + 8  # differences, and what its line search knows
        case NewtonCgSpec():
            return 10 + min(numel, MOST_PRODUCTS)  # an iteration's products are kept, to make it again
        case MuonSpec() | ClassSpec():
            return 2  # AdamW's, of the parameters that Muon leaves to it; assumed, for a class
        case AdadeltaSpec() | AdamaxSpec() | NadamSpec() | RadamSpec() | RpropSpec():
            return 2
    return 1  # momentum, nesterov, adagrad, asgd; at most, for adafactor


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


def footprint(spec: TrainingJobSpec, layout: Layout, *, num_hosts: int) -> Footprint:
    """What a job takes with all its workers, equally fast and spread evenly over that many hosts."""
    places = _Places(spec, num_hosts)
    workers = _compressing_workers(spec, layout) if spec.compression.is_on else _workers(spec, layout, places)
    copies = 1 if pull_codec(spec.compression, layout, spec.seed) is None else 2
    servers = _servers(spec, layout, places, sum(worker.pushed for worker in workers), copies)
    residuals = sum(worker.residuals for worker in workers)
    checkpoint = (copies + state_tensors(spec, layout.numel) + spec.average.is_on) * layout.nbytes + residuals
    return Footprint(sum(p.numel for p in layout.parameters), servers, workers, checkpoint)


class _Places:
    """The host of every worker and server, and what its workers compute, by number."""

    def __init__(self, spec: TrainingJobSpec, num_hosts: int) -> None:
        num_workers, self.num_leaves = spec.placement.workers, spec.data.num_micro_batches
        names = [str(i) for i in range(num_workers)]
        hosts = min(num_hosts, num_workers)
        dealt = Dealer()(range(self.num_leaves), dict.fromkeys(names, 1.0))
        self.ranges = [dealt.get(name, []) for name in names]
        self.workers = [str(i * hosts // num_workers) for i in range(num_workers)]
        self.on_gpus = spec.placement.server_device == "cuda"
        self.num_servers = spec.placement.num_servers
        self.servers = server_places(self.workers, self.num_servers, inline=spec.is_inline, on_gpus=self.on_gpus)
        self.homes = {} if spec.is_inline else {host: self.servers.index(host) for host in set(self.servers)}

    def sent_by(self, host: str) -> int:
        """How many gradients leave a host whose workers add up theirs before."""
        own = [
            bound for place, ranges in zip(self.workers, self.ranges, strict=True) for bound in ranges if place == host
        ]
        return len(maximal_nodes(own[0][0], own[-1][1], self.num_leaves)) if own else 0

    def copied_on_gpu(self, server: int) -> int:
        """How many gradients of workers on its host come to a server on a GPU: those of all but the one beside it."""
        beside = gpus_of_servers(self.workers, self.num_servers)[server] if self.on_gpus else -1
        return sum(
            len(maximal_nodes(low, high, self.num_leaves))
            for worker, ranges in enumerate(self.ranges)
            for low, high in ranges
            if self.workers[worker] == self.servers[server] and self.homes and worker != beside
        )

    def stays_on_gpu(self, worker: int) -> bool:
        """Whether a server on a worker's GPU reads all that it computes there."""
        return self.on_gpus and bool(self.homes) and gpus_of_servers(self.workers, self.num_servers) == [worker]


def _servers(
    spec: TrainingJobSpec, layout: Layout, places: _Places, pushed: int, copies: int
) -> tuple[ServerFootprint, ...]:
    """pushed: by the workers themselves. copies: of the parameters at their server."""
    cut = {shard.index: shard.numel * layout.itemsize for shard in shards(layout, spec.placement.num_servers)}
    here: Counter[str] = Counter()  # bytes of the shards on a host
    for index, nbytes in cut.items():
        here[places.servers[index]] += nbytes
    sent = {host: places.sent_by(host) for host in places.homes}
    servers = []
    for index, host in enumerate(places.servers):
        nbytes = cut.get(index, 0)
        is_home = places.homes.get(host) == index
        shared = host in places.homes
        received = sum(count for other, count in sent.items() if other != host) + pushed / layout.nbytes
        elsewhere = layout.nbytes - here[host] if is_home else 0
        state = (state_tensors(spec, layout.numel) + spec.average.is_on) * nbytes
        # The parameters are its worker's, too. The initial ones come as a gradient does, and signals are in float64.
        gpu = state
        if places.on_gpus and nbytes:
            gpu += max(1, int(received) + places.copied_on_gpu(index)) * nbytes
        gpu += 8 * min(CHUNK_NUMEL, nbytes // layout.itemsize)
        servers.append(
            ServerFootprint(
                parameters=layout.nbytes if is_home else 0 if shared else copies * nbytes,
                optimizer_state=0 if places.on_gpus else state,
                received=int(received * nbytes) + int(spec.compression.is_on) * nbytes,
                pushed=sent.get(host, 0) * elsewhere,
                pulled=elsewhere,
                gpu=gpu if places.on_gpus and nbytes else 0,
            )
        )
    return tuple(servers)


def _workers(spec: TrainingJobSpec, layout: Layout, places: _Places) -> tuple[WorkerFootprint, ...]:
    workers = []
    on_gpu = spec.placement.device == "cuda"
    for index, (host, ranges) in enumerate(zip(places.workers, places.ranges, strict=True)):
        slots = [slots_of(low, high, places.num_leaves) for low, high in ranges]
        shared = host in places.homes
        gradients = max((most for most, _ in slots), default=0) * layout.nbytes
        workers.append(
            WorkerFootprint(
                parameters=0 if shared else layout.nbytes,
                # Initial parameters go by way of the host.
                gradients=min(gradients, layout.nbytes) if places.stays_on_gpu(index) else gradients,
                pushed=0 if shared else sum(count for _, count in slots) * layout.nbytes,
                pulled=0 if shared else layout.nbytes,
                gpu=layout.nbytes + gradients if on_gpu else 0,
            )
        )
    return tuple(workers)


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
            gpu=layout.nbytes + (most * layout.nbytes if count else 0) if spec.placement.device == "cuda" else 0,
        )
        for count in map(owners.count, names)
    )
