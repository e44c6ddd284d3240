"""A whole job against a plain PyTorch loop over the same batches, and back to plain PyTorch afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

from harness.local_job import job_config, run_here
from ps.job.config import JobConfig
from ps.numerics.optimizer import torch_class, torch_options
from ps.numerics.schedule import learning_rate
from steepest.interop import load_optimizer_state
from steepest.spec import ELEMENTWISE
from steepest.step_spec import AdaGcSpec, AgcSpec
from tests.support.choices import pairwise_first
from worker.data.sampler import Sampler
from worker.task.load import load_task

pytestmark = pytest.mark.cluster

CLIPS: dict[str, dict[str, float]] = {"none": {}, "norm": {"norm": 0.02}, "value": {"value": 0.002}}


# At its default rate of 0.01 RMSprop with a clip by value is chaotic: PyTorch itself, started one ulp away, ends 0.18
# (float32) and 6e-11 (float64) away. At 0.001 it ends 4e-7 and 9e-16 away.
LR = {"rmsprop": 0.001}


class Reference:
    """The loop that everyone writes."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.task: Any = load_task(config.spec.task, None, config.spec.seed)
        self.sampler = Sampler(config.num_samples, config.spec.data, config.spec.seed)
        self.optimizer = torch_class(config.spec.optimizer)(
            self.task.model.parameters(), **torch_options(config.spec.optimizer)
        )
        self.norms: list[float] = []
        self.means: dict[Any, float] = {}

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [self.sampler.indices(step, m) for m in range(self.config.spec.data.num_micro_batches)]
        indices = torch.cat([torch.from_numpy(p) for p in parts])
        inputs, targets = self.task.train_data.arrays
        return inputs[indices], targets[indices]

    def train(self, first: int, last: int) -> None:
        spec, parameters = self.config.spec, list(self.task.model.parameters())
        for step in range(first, last):
            inputs, targets = self.batch(step)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(spec.optimizer.base_lr, spec.schedule, step, 100)
            self.optimizer.zero_grad()
            self.task.loss(self.task.model(inputs), targets).backward()
            if spec.clip.norm is not None:
                self.norms.append(float(clip_grad_norm_(parameters, spec.clip.norm)))
            if spec.clip.value is not None:
                torch.nn.utils.clip_grad_value_(parameters, spec.clip.value)
            if spec.clip.parameter_norm is not None:
                self.norms += [float(clip_grad_norm_([p], spec.clip.parameter_norm)) for p in parameters]
            if spec.clip.agc is not None:
                self._clip_units(spec.clip.agc)
            if spec.clip.adagc is not None:
                self._clip_by_means(spec.clip.adagc, step)
            self.optimizer.step()

    def _clip_units(self, agc: AgcSpec) -> None:
        """Equation 3 of Brock et al. 2021, a unit at a time."""
        for name, p in self.task.model.named_parameters():
            if name == agc.exclude[0]:
                continue
            for weights, gradient in zip(p, p.grad, strict=True) if p.ndim > 1 else [(p, p.grad)]:
                limit = agc.clipping * max(float(weights.detach().norm()), agc.eps)
                self.norms.append(float(gradient.norm()) - limit)
                if gradient.norm() > limit:
                    gradient.mul_(limit / gradient.norm())

    def _clip_by_means(self, adagc: AdaGcSpec, step: int) -> None:
        """Algorithm 1 of Wang et al. 2025."""
        parameters = list(self.task.model.parameters())
        whole = float(torch.stack([p.grad.norm() for p in parameters]).norm())
        for p in parameters:
            if step < adagc.warmup_steps:
                p.grad.mul_(min(adagc.absolute / whole, 1.0))
                self.means[p] = min(self.means.get(p, torch.inf), float(p.grad.norm()))
                continue
            limit = adagc.relative * self.means[p]
            self.norms.append(float(p.grad.norm()) - limit)
            p.grad.mul_(min(limit / float(p.grad.norm()), 1.0))
            self.means[p] = adagc.decay * self.means[p] + (1 - adagc.decay) * float(p.grad.norm())


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Over all parameters, of the largest difference to the largest element."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in theirs)


BOUNDS = {"float32": 1e-5, "float64": 1e-12}


@pytest.mark.parametrize(
    ("optimizer", "clip", "dtype"), pairwise_first(ELEMENTWISE, tuple(CLIPS), ("float64", "float32"))
)
def test_a_hundred_steps_agree(optimizer: str, clip: str, dtype: str, tmp_path: Path) -> None:
    config = job_config(
        tmp_path,
        "tests.support.tasks:regression",
        arguments={"dtype": dtype},
        steps=100,
        data={"global_batch": 32},
        optimizer={"name": optimizer, "lr": LR.get(optimizer)},
        schedule={"name": "cosine", "warmup_steps": 5},
        clip=CLIPS[clip],
    )
    state = run_here(config)
    reference = Reference(config)
    reference.train(0, 100)
    theirs = reference.task.model.state_dict()
    assert largest_difference(state.model, theirs) <= BOUNDS[dtype]
    if clip == "norm":
        assert any(norm > 0.02 for norm in reference.norms), "the clip never acted"


BY_PARAMETER: dict[str, dict[str, Any]] = {
    "parameter_norm": {"parameter_norm": 0.1},
    "agc": {"agc": {"clipping": 0.02, "exclude": ["2.bias"]}},
    "adagc": {"adagc": {"warmup_steps": 10, "absolute": 0.5}},
}


@pytest.mark.parametrize("clip", BY_PARAMETER)
def test_a_hundred_steps_with_every_parameter_clipped_by_itself(clip: str, tmp_path: Path) -> None:
    config = job_config(
        tmp_path,
        "tests.support.tasks:regression",
        arguments={"dtype": "float64"},
        steps=100,
        data={"global_batch": 32},
        optimizer={"name": "adamw", "lr": 0.01},
        clip=BY_PARAMETER[clip],
        placement={"servers": 2},
    )
    state = run_here(config)
    reference = Reference(config)
    reference.train(0, 100)
    assert largest_difference(state.model, reference.task.model.state_dict()) <= 1e-10
    limit = BY_PARAMETER[clip].get("parameter_norm", 0.0)
    assert 0.05 < sum(norm > limit for norm in reference.norms) / len(reference.norms) < 0.95


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
def test_plain_pytorch_takes_over(optimizer: str, tmp_path: Path) -> None:
    """model.safetensors loads strictly, the optimizer's state too, and ten more steps are ten more steps of ours."""
    raw: dict[str, Any] = {
        "arguments": {"dtype": "float64"},
        "data": {"global_batch": 32},
        "optimizer": {"name": optimizer, **({} if optimizer == "rprop" else {"weight_decay": 0.01})},
    }
    short = job_config(tmp_path / "short", "tests.support.tasks:regression", steps=20, **raw)
    run_here(short)
    long = job_config(tmp_path / "long", "tests.support.tasks:regression", steps=30, **raw)
    expected = run_here(long)
    (checkpoint,) = (tmp_path / "short").iterdir()
    reference = Reference(short)
    reference.task.model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
    load_optimizer_state(checkpoint / "optimizer.safetensors", reference.task.model, reference.optimizer)
    reference.train(20, 30)
    # Their scalars are float32; load_state_dict makes them float64 with the rest, and torch goes on with that.
    tolerance = 1e-6 if optimizer in ("nadam", "asgd") else 1e-9
    assert largest_difference(expected.model, reference.task.model.state_dict()) <= 1e-3 * tolerance
    names = {id(p): n for n, p in reference.task.model.named_parameters()}
    seen = 0
    for parameter, state in reference.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                ours = expected.optimizer[f"{names[id(parameter)]}.{key}"]
                assert torch.allclose(ours.to(value.dtype), value, rtol=tolerance, atol=1e-300)
                seen += 1
    assert seen == len(expected.optimizer)


# The bias of a convolution before a batch norm has no gradient but rounding noise, which Adam would blow up.
SGD = {"optimizer": {"name": "sgd", "lr": 0.1}}


def test_the_buffers_are_those_of_the_first_micro_batch(tmp_path: Path) -> None:
    """Batch norm: a plain loop over the first micro-batch of each step, as DDP keeps rank 0's."""
    config = job_config(
        tmp_path, "examples.digits:convnet", steps=5, data={"global_batch": 64, "micro_batch": 64}, **SGD
    )
    state = run_here(config)
    reference = Reference(config)
    reference.train(0, 5)
    theirs = reference.task.model.state_dict()
    assert state.model["2.num_batches_tracked"] == theirs["2.num_batches_tracked"] == 5
    assert largest_difference(state.model, theirs) <= 1e-5
