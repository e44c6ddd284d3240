"""What Prometheus sees: bounded series, the label `job` for live jobs only, gone when the job ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.jobs.controller import Controller
from services.store.lifecycle import JobState

# (name, help, value of a controller's newest record), for jobs that have made a step
_RECORD_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("steepest_job_loss", "Training loss of the last step: the mean over its samples or tokens.", "loss"),
    ("steepest_job_learning_rate", "Learning rate of the last step.", "lr"),
    ("steepest_job_gradient_norm", "Global L2 norm of the last step's gradient before the clip.", "gradient_norm"),
    (
        "steepest_job_clipped_gradient_norm",
        "Global L2 norm of the last step's gradient after the clip.",
        "clipped_norm",
    ),
    ("steepest_job_clip_ratio", "Norm after the clip over norm before it, in the last step.", "clip_coefficient"),
    ("steepest_job_workers", "Workers that took part in the last step.", "workers"),
)
_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("steepest_job_steps", "Steps made, steps made again after a recovery included.", "steps"),
    ("steepest_job_samples", "Samples trained on.", "samples"),
    ("steepest_job_clipped_steps", "Steps whose gradient was clipped.", "clipped"),
    ("steepest_job_skipped_steps", "Steps that were not applied.", "skipped"),
    ("steepest_job_replaced_workers", "Workers that died and were replaced.", "replaced_workers"),
)


class JobCollector(Collector):
    """Reads the controllers whenever Prometheus asks."""

    def __init__(
        self, controllers: Callable[[], Sequence[Controller]], states: Callable[[], dict[JobState, int]]
    ) -> None:
        self._controllers = controllers
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """All metric families."""
        jobs = GaugeMetricFamily("steepest_jobs", "Jobs by state.", labels=["state"])
        counts = self._states()
        for state in JobState:
            jobs.add_metric([state.value], counts.get(state, 0))
        yield jobs
        controllers = list(self._controllers())
        step = GaugeMetricFamily("steepest_job_step", "Steps the job has behind it.", labels=["job"])
        total = GaugeMetricFamily("steepest_job_planned_steps", "Steps the job is to make.", labels=["job"])
        seconds = HistogramMetricFamily("steepest_job_step_seconds", "Duration of a step.", labels=["job"])
        for controller in controllers:
            step.add_metric([controller.job], controller.ledger.result.step)
            total.add_metric([controller.job], controller.total_steps)
            histogram = controller.totals.step_seconds
            seconds.add_metric([controller.job], buckets=histogram.buckets(), sum_value=histogram.total)
        yield from (step, total, seconds)
        for name, text, attribute in _RECORD_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["job"])
            for controller in controllers:
                record = controller.ledger.record
                if record is not None:
                    gauge.add_metric([controller.job], getattr(record, attribute))
            yield gauge
        for name, text, attribute in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["job"])
            for controller in controllers:
                counter.add_metric([controller.job], getattr(controller.totals, attribute))
            yield counter
        parts = CounterMetricFamily(
            "steepest_job_step_part_seconds",
            "Seconds of steps by part: data, compute, straggler, network, reduce, apply.",
            labels=["job", "part"],
        )
        rollbacks = CounterMetricFamily("steepest_job_rollbacks", "Times that a rule sent it back.", labels=["job"])
        for controller in controllers:
            for part, value in controller.totals.parts.items():
                parts.add_metric([controller.job, part], value)
            rollbacks.add_metric([controller.job], controller.ledger.result.rollbacks)
        yield from (parts, rollbacks)
        layers = GaugeMetricFamily(
            "steepest_job_layer_gradient_norm",
            "L2 norm of the last step's gradient before the clip, by group of neighbouring parameters: at most 16.",
            labels=["job", "layer"],
        )
        for controller in controllers:
            for layer, norm in controller.ledger.layer_norms().items():
                layers.add_metric([controller.job, layer], norm)
        yield layers
        findings = GaugeMetricFamily(
            "steepest_job_findings", "What was found of the job's health, by rule.", labels=["job", "rule"]
        )
        for controller in controllers:
            for rule, count in Counter(f.rule for f in controller.ledger.result.findings).items():
                findings.add_metric([controller.job, rule], count)
        yield findings
        memory = GaugeMetricFamily(
            "steepest_job_micro_batch_bytes",
            "Memory that the tensors of one micro-batch's forward and backward pass take at most.",
            labels=["job"],
        )
        for controller in controllers:
            memory.add_metric([controller.job], controller.description.peak_bytes)
        yield memory
        evaluation = GaugeMetricFamily(
            "steepest_job_evaluation", "Last evaluation, by metric.", labels=["job", "metric"]
        )
        for controller in controllers:
            for metric, value in controller.ledger.result.metrics.items():
                evaluation.add_metric([controller.job, metric], value)
        yield evaluation
