"""What the records of a job say of its health: rules over the last steps, each with evidence and what to try.

Pure: records in, findings out, in the order of steps. A rule speaks once, when what it looks for has lasted a few
steps, and again only after it was gone for a while. Thresholds are those of the literature where it names one; the
others are set so that healthy jobs are left alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ps.numerics.explosion import Explosions
from ps.step.messages import StepRecord
from ps.step.signals import NAMES as SIGNALS
from services.jobs.blame import outlier
from steepest.jobs import Finding

LASTING_STEPS = 5  # that a condition must hold before it is a finding
FORGET_STEPS = 200  # without it, after which it may be found again
WINDOW = 100  # steps that a running median is over
VANISHING = 1e-7  # mean magnitude of a layer's gradient; SageMaker Debugger's rule VanishingGradient has the same
VANISHING_SHARE = 1e-4  # of the largest layer's, so that a job that has converged is not called so
CONVERGED = 0.1  # of the loss that the job began with
DIVERGING = 3.0  # times the loss that the job began with
STALLED_STEPS = 300  # without a better loss than 0.99 of the first one
INPUT_BOUND = 0.5  # share of a step spent waiting for samples
OVERFITTING = 1.1  # times the best evaluation, while the training loss still falls
OVERFITTING_EVALUATIONS = 3
# Of the update's norm to the parameter's; "somewhere around 1e-3" is usual (CS231n course notes, "Neural networks 3",
# ratio of weights to updates), and the bounds are far from that.
LARGE_UPDATE, HUGE_UPDATE = 0.1, 1.0
SMALL_UPDATE = 1e-5  # of the whole network
SPIKE = 10.0  # times the running median of the update's norm
STRAGGLING = 2.0  # times the median of the other workers' time for a micro-batch
STRAGGLING_STEPS, STRAGGLING_SECONDS = 10, 0.002  # in a row; of steps that take at least so long to compute
# Of a weight's root mean square times the root of its fan-in: 1 for Xavier, 1.4 for He, 0.6 for torch's own default.
LARGE_WEIGHTS, SMALL_WEIGHTS = 10.0, 0.01
SATURATED = 0.8  # of a layer's outputs
MEASURED_STEPS = 10  # in a row with a condition, of those in which signals are measured


@dataclass
class _Lasting:
    """A condition that must hold for some steps in a row."""

    needed: int
    held: int = 0
    found_at: int | None = None  # the last step at which it was a finding

    def holds(self, step: int, *, now: bool) -> bool:
        """Whether it has become a finding with this step."""
        self.held = self.held + 1 if now else 0
        if self.held < self.needed:
            return False
        is_new = self.found_at is None or step - self.found_at > FORGET_STEPS
        self.found_at = step
        return is_new


@dataclass
class Health:
    """Watches one job. names, shapes: of its parameters. fan_in: of the weights for which that is known, by name.

    activations: names of the model's activation functions, as records have them. has_gradients: and updates, in every
    step.
    """

    names: Sequence[str]
    shapes: Sequence[Sequence[int]]
    fan_in: Mapping[str, int] = field(default_factory=dict)
    activations: Sequence[str] = ()
    has_gradients: bool = True
    _updates: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _last_lr: float = 0.0
    _explosions: Explosions = field(default_factory=Explosions)
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=LASTING_STEPS))
    _waiting: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    _first_losses: list[float] = field(default_factory=list)
    _best_loss: float = math.inf
    _slowest: int = -1
    _from_start: bool = False  # else what the job has learned before is not known
    _best_evaluation: tuple[int, float, float] | None = None  # step, loss, training loss then
    _conditions: dict[str, _Lasting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._roots = np.sqrt([max(1, math.prod(shape)) for shape in self.shapes])
        # Biases may have no gradient for good reasons: before a batch normalization, and those of attention's keys.
        self._watched = np.array([len(shape) > 1 for shape in self.shapes], bool)
        self._growing = np.zeros(len(self.shapes), bool)
        self._shares = np.zeros(len(self.activations))  # as each was seen last

    def observe(self, records: Iterable[StepRecord]) -> list[Finding]:
        """Look at the records of steps, in order."""
        found: list[Finding] = []
        of_gradients = (self._layers, self._norm, self._signals) if self.has_gradients else ()
        rules = (*of_gradients, self._loss, self._input, self._straggler, self._units, self._outlier)
        for record in records:
            for rule in rules:
                found += rule(record)
        return found

    def layer_norms(self, record: StepRecord, most: int) -> dict[str, float]:
        """The gradient norm of at most `most` groups of neighbouring parameters, by the name of each group's first."""
        norms = np.frombuffer(record.parameter_norms, "<f8")
        if len(norms) != len(self.names):
            return {}
        starts = np.unique(np.linspace(0, len(norms), min(most, len(norms)), endpoint=False).astype(int))
        sums = np.add.reduceat(norms**2, starts)
        return {self.names[start]: float(total) for start, total in zip(starts, np.sqrt(sums), strict=True)}

    def observe_evaluation(self, step: int, loss: float) -> list[Finding]:
        """Look at an evaluation."""
        training = self._smooth_loss()
        best = self._best_evaluation
        if not math.isfinite(loss):
            return []
        if best is None or loss < best[1]:
            self._best_evaluation = step, loss, training
            self._condition("overfitting", OVERFITTING_EVALUATIONS).held = 0
            return []
        rising = loss > OVERFITTING * best[1] and training < best[2]
        if not self._condition("overfitting", OVERFITTING_EVALUATIONS).holds(step, now=rising):
            return []
        return [
            Finding(
                "overfitting", "warning", step,
                f"the evaluation's loss rose from {best[1]:.4g} at step {best[0]} to {loss:.4g}, while the training "
                f"loss fell from {best[2]:.4g} to {training:.4g}: stop at the best evaluation (--patience), or use "
                "more data, augmentation, dropout or weight decay",
            )
        ]  # fmt: skip

    def _condition(self, name: str, needed: int = LASTING_STEPS) -> _Lasting:
        return self._conditions.setdefault(name, _Lasting(needed))

    def _smooth_loss(self) -> float:
        return median(self._losses) if self._losses else math.nan

    @property
    def _has_converged(self) -> bool:
        """Whether little of the loss is left, so that small gradients are as they should be."""
        return 0.0 <= self._smooth_loss() < CONVERGED * min(self._first_losses, default=0.0)

    def _layers(self, record: StepRecord) -> list[Finding]:
        """Vanishing and dead layers, by the root mean square of each parameter's gradient."""
        norms: NDArray[np.float64] = np.frombuffer(record.parameter_norms, "<f8")
        if len(norms) != len(self.names) or not np.isfinite(norms).all() or not norms.any():
            return []
        magnitudes = norms / self._roots
        largest = float(magnitudes.max())
        found = []
        dead = np.flatnonzero(self._watched & (magnitudes == 0.0))
        if self._condition("dead_units").holds(record.step, now=bool(len(dead))):
            found.append(
                Finding(
                    "dead_units", "critical", record.step,
                    f"no gradient at all reaches {self._some(dead)}, for {LASTING_STEPS} steps: units that are off for "
                    "every sample (ReLU after a step too large, or a bad initialization). Try a smaller learning rate, "
                    "LeakyReLU or GELU, He initialization",
                    self.names[int(dead[0])],
                )
            )  # fmt: skip
        below = (magnitudes > 0) & (magnitudes < min(VANISHING, VANISHING_SHARE * largest))
        below &= not self._has_converged
        small = np.flatnonzero(self._watched & below)
        if self._condition("vanishing").holds(record.step, now=bool(len(small))):
            worst = int(small[np.argmin(magnitudes[small])])
            found.append(
                Finding(
                    "vanishing", "critical", record.step,
                    f"the gradient of {self.names[worst]} has a mean magnitude of {magnitudes[worst]:.2g}, "
                    f"{largest / magnitudes[worst]:.1g} times less than the largest layer's, for {LASTING_STEPS} steps "
                    f"({len(small)} of {len(self.names)} parameters are below {VANISHING:g}). Try ReLU or GELU in the "
                    "place of sigmoid or tanh, residual connections, normalization, Xavier or He initialization",
                    self.names[worst],
                )
            )  # fmt: skip
        return found

    def _norm(self, record: StepRecord) -> list[Finding]:
        norm = record.gradient_norm
        if record.skipped and not math.isfinite(norm):
            if record.weight == 0 or not self._condition("nonfinite", 1).holds(record.step, now=True):
                return []
            message = f"the gradient of step {record.step} was not finite, and the step was skipped"
            return [Finding("nonfinite", "critical", record.step, message)]
        exploding = math.isfinite(norm) and self._explosions.take(norm)
        if not self._condition("exploding", 1).holds(record.step, now=exploding or record.skipped):
            return []
        usual = self._explosions.usual
        known = math.isfinite(usual)  # else to the leader alone, which has seen more steps
        than = f"{norm / usual:.0f} times the median {usual:.4g} of" if known else "a hundred times and more that of"
        taken = ", and the step was not taken" if record.skipped else ""
        bound = f" {usual * 2:.1g}" if known else ""
        return [
            Finding(
                "exploding", "critical", record.step,
                f"the gradient's norm is {norm:.4g}, {than} the steps before{taken}. Try clipping "
                f"(--clip-norm{bound}), a smaller learning rate, or a warm-up",
                self._largest(record),
            )
        ]  # fmt: skip

    def _loss(self, record: StepRecord) -> list[Finding]:
        loss = record.loss
        if not math.isfinite(loss):
            return []
        self._losses.append(loss)
        if len(self._first_losses) < LASTING_STEPS:
            self._first_losses.append(loss)
            return []
        first, now = min(self._first_losses), self._smooth_loss()
        self._best_loss = min(self._best_loss, now)
        found = []
        diverging = now > first + (DIVERGING - 1) * abs(first) and now >= self._best_loss
        if self._condition("diverging", 1).holds(record.step, now=diverging):
            found.append(
                Finding(
                    "diverging", "critical", record.step,
                    f"the loss is {now:.4g}, and the job began with {first:.4g}: the learning rate {record.lr:.3g} is "
                    "probably too large. Try a tenth of it, a warm-up, or clipping by norm",
                )
            )  # fmt: skip
        stalled = record.step >= STALLED_STEPS and self._best_loss > first - 0.01 * abs(first) and not diverging
        if self._condition("stalled", 1).holds(record.step, now=stalled):
            found.append(
                Finding(
                    "stalled", "warning", record.step,
                    f"after {record.step} steps the loss is {now:.4g}, and it began with {first:.4g}: nothing is "
                    f"learned. Try a larger learning rate (it is {record.lr:.3g}), another initialization, or look at "
                    "the data",
                )
            )  # fmt: skip
        return found

    def _input(self, record: StepRecord) -> list[Finding]:
        if not record.step_seconds > 0:
            return []
        self._waiting.append(record.data_seconds / record.step_seconds)
        share = median(self._waiting)
        waiting = len(self._waiting) == self._waiting.maxlen and share > INPUT_BOUND
        if not self._condition("input_bound", 1).holds(record.step, now=waiting):
            return []
        return [
            Finding(
                "input_bound", "warning", record.step,
                f"workers wait for samples during {share:.0%} of a step: read ahead in processes of their own "
                "(data.readers), keep the data nearer, or do less to each sample",
            )
        ]  # fmt: skip

    def _straggler(self, record: StepRecord) -> list[Finding]:
        slow = record.slowest_ratio > STRAGGLING and record.compute_seconds >= STRAGGLING_SECONDS
        slow = slow and record.slowest_worker >= 0
        condition = self._condition("straggler", STRAGGLING_STEPS)
        if record.slowest_worker != self._slowest:
            self._slowest = record.slowest_worker
            condition.held = 0
        if not condition.holds(record.step, now=slow):
            return []
        worker = f"worker-{record.slowest_worker}"
        return [
            Finding(
                "straggler", "warning", record.step,
                f"{worker} takes {record.slowest_ratio:.1f} times as long for a micro-batch as the other workers, for "
                f"{STRAGGLING_STEPS} steps. It is given less to compute, so it costs little; look at what else runs on "
                "its host",
                worker=worker,
            )
        ]  # fmt: skip

    def _units(self, record: StepRecord) -> list[Finding]:
        """Activation functions whose outputs are mostly at their bounds, or 0 for all samples."""
        shares = np.frombuffer(record.activations, "<f8")[: len(self.activations)]
        if not len(shares) or 16 * len(shares) != len(record.activations):
            return []
        self._shares = np.where(np.isnan(shares), self._shares, shares)
        worst = int(np.argmax(self._shares))
        share = self._shares[worst]
        if not self._condition("saturated", LASTING_STEPS).holds(record.step, now=bool(share > SATURATED)):
            return []
        return [
            Finding(
                "saturated", "warning", record.step,
                f"{share:.0%} of the outputs of {self.activations[worst]} are at the end of their range, where "
                "almost no gradient passes (of a ReLU: of its units are off for all samples of a micro-batch). Try a "
                "smaller initialization (Xavier, He), normalization, or a smaller learning rate",
                self.activations[worst],
            )
        ]  # fmt: skip

    def _outlier(self, record: StepRecord) -> list[Finding]:
        is_new = self._condition("outlier", 1).holds(record.step, now=bool(record.outlier))
        return [outlier(record)] if is_new else []

    # -- signals of parameters ------------------------------------------------------------------------------------

    def _signals(self, record: StepRecord) -> list[Finding]:
        values = np.frombuffer(record.signals, "<f8")
        if not len(values) or len(values) != len(SIGNALS) * len(self.names):
            return []
        signals = dict(zip(SIGNALS, values.reshape(len(SIGNALS), -1), strict=True))
        found = self._initialization(record, signals) if record.step == 0 else []
        return found + self._update_ratio(record, signals) + self._update_spike(record, signals)

    def _initialization(self, record: StepRecord, signals: Mapping[str, NDArray[np.float64]]) -> list[Finding]:
        """How large weights are before the first step, to what keeps the variance of activations."""
        fan_in = np.array([self.fan_in.get(name, 0) for name in self.names])
        scales = signals["parameter_norm"] / self._roots * np.sqrt(fan_in)
        large, small = scales > LARGE_WEIGHTS, (scales > 0) & (scales < SMALL_WEIGHTS)
        bad = np.flatnonzero(large | small)
        if not len(bad):
            return []
        worst = int(bad[np.argmax(np.abs(np.log(scales[bad])))])
        size = "large" if scales[worst] > 1 else "small"
        return [
            Finding(
                "initialization", "warning", record.step,
                f"the weights of {self._some(bad)} are too {size} to begin with: their standard deviation is "
                f"{scales[worst]:.2g} / sqrt(fan-in), where 1 (Xavier, for tanh) or 1.4 (He, for ReLU) keeps "
                "activations and gradients from growing or vanishing from layer to layer. Try "
                "torch.nn.init.xavier_uniform_ or kaiming_normal_",
                self.names[worst],
            )
        ]  # fmt: skip

    def _update_ratio(self, record: StepRecord, signals: Mapping[str, NDArray[np.float64]]) -> list[Finding]:
        updates, norms = signals["update_norm"], signals["parameter_norm"]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(self._watched & (norms > 0), updates / norms, 0.0)
        if record.step == 0:
            self._growing = norms == 0.0
            self._from_start = True
        # What begins at zero, as adapters do, is changed by more than its norm until it has grown.
        self._growing = self._growing & ((ratios > LARGE_UPDATE / 2) | (norms == 0.0))
        ratios = np.where(self._growing, 0.0, ratios)
        worst = int(np.argmax(ratios))
        is_huge = self._condition("huge_update", 3).holds(record.step, now=bool(ratios[worst] > HUGE_UPDATE))
        is_large = self._condition("large_update", MEASURED_STEPS).holds(
            record.step, now=bool(ratios[worst] > LARGE_UPDATE)
        )
        if is_huge or is_large:
            return [
                Finding(
                    "update_ratio", "critical" if is_huge else "warning", record.step,
                    f"a step changes {self.names[worst]} by {ratios[worst]:.2g} of its norm, and 0.001 is usual: the "
                    f"learning rate {record.lr:.3g} is probably too large. Try a tenth of it, or a warm-up",
                    self.names[worst],
                )
            ]  # fmt: skip
        whole = float(np.sqrt((updates[self._watched] ** 2).sum()))
        norm = float(np.sqrt((norms[self._watched] ** 2).sum()))
        warming_up, self._last_lr = record.lr > self._last_lr > 0.0, record.lr
        learned = self._smooth_loss() < 0.99 * min(self._first_losses, default=math.inf)
        tiny = 0.0 < whole < SMALL_UPDATE * norm and self._from_start and not warming_up and not learned
        if not self._condition("small_update", MEASURED_STEPS).holds(record.step, now=tiny):
            return []
        return [
            Finding(
                "update_ratio", "warning", record.step,
                f"a step changes the parameters by {whole / norm:.1g} of their norm, where 0.001 is usual, and the "
                f"loss does not fall: the learning rate {record.lr:.3g} is probably too small",
            )
        ]  # fmt: skip

    def _update_spike(self, record: StepRecord, signals: Mapping[str, NDArray[np.float64]]) -> list[Finding]:
        updates = signals["update_norm"]
        norm = float(np.sqrt((updates**2).sum()))
        usual = median(self._updates) if len(self._updates) >= 2 * LASTING_STEPS else math.nan
        spike = norm > SPIKE * usual > 0.0
        if not spike:
            self._updates.append(norm)
        if not self._condition("update_spike", 1).holds(record.step, now=spike):
            return []
        layer = self.names[int(np.argmax(updates))]
        return [
            Finding(
                "update_spike", "warning", record.step,
                f"the step changed the parameters by {norm:.4g}, {norm / usual:.0f} times the median {usual:.4g} "
                f"before, most of all {layer}. The loss may follow: try clipping (--clip-norm), a smaller learning "
                "rate, or a larger beta2 of Adam",
                layer,
            )
        ]  # fmt: skip

    def _largest(self, record: StepRecord) -> str | None:
        norms = np.frombuffer(record.parameter_norms, "<f8")
        return self.names[int(np.argmax(norms))] if len(norms) == len(self.names) and len(norms) else None

    def _some(self, indices: NDArray[np.intp]) -> str:
        shown = ", ".join(self.names[int(index)] for index in indices[:3])
        return shown + (f" and {len(indices) - 3} more" if len(indices) > 3 else "")
