"""Writes the Grafana dashboards, with Grafana's own SDK: `python deploy/grafana/make_dashboard.py`.

steepest.json shows jobs, one or several; fleet.json all jobs of a service; service.json the service itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
JOB = '{job=~"$job"}'
RATE = "[$__rate_interval]"
HERE = Path(__file__).parent
Queries = dict[str, str]  # expressions by legend


def query(number: int, legend: str, expression: str) -> prometheus.Dataquery:
    """One line, or several."""
    made = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
    return made.datasource(SOURCE).range()


def lines(
    title: str, unit: str, queries: Queries, *, about: str = "", log: bool = False, stacked: bool = False
) -> timeseries.Panel:
    """Lines over time."""
    made = timeseries.Panel().title(title).unit(unit).span(12).height(8).datasource(SOURCE).description(about)
    made = (
        made.line_width(1.5)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.TABLE)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull"])
        )
    )
    if log:
        made = made.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    if stacked:
        made = made.fill_opacity(60).stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    for number, (legend, expression) in enumerate(queries.items()):
        made = made.with_target(query(number, legend, expression))
    return made


def number(title: str, unit: str, expression: str, *, about: str = "") -> stat.Panel:
    """A number as it is now."""
    made = stat.Panel().title(title).unit(unit).span(4).height(4).datasource(SOURCE).description(about)
    return made.with_target(query(0, "{{job}}", expression))


def layers() -> heatmap.Panel:
    """The gradient norm of every group of layers over time."""
    made = heatmap.Panel().title("Gradient norm by layer").span(24).height(9).datasource(SOURCE)
    made = made.description("At most 16 groups of neighbouring layers; the colour is the logarithm of the norm.")
    made = made.color(
        heatmap.HeatmapColorOptions()
        .mode(HeatmapColorMode.SCHEME).scheme("Viridis").scale(HeatmapColorScale.EXPONENTIAL).exponent(0.3).steps(64)
    )  # fmt: skip
    rows = query(0, "{{layer}}", f"steepest_job_layer_gradient_norm{JOB}")
    return made.with_target(rows.format(PromQueryFormat.TIME_SERIES))


def board(uid: str, title: str, *, by_job: bool) -> dashboards.Dashboard:
    """An empty dashboard. by_job: with a choice of jobs."""
    made = dashboards.Dashboard(title).uid(uid).refresh("5s").time("now-30m", "now").readonly().tags(["steepest"])
    made = made.with_variable(dashboards.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    if by_job:
        found = f"steepest_job_findings{JOB}"
        jobs = dashboards.QueryVariable("job").label("Job").datasource(SOURCE)
        jobs = jobs.query({"query": "label_values(steepest_job_step, job)", "refId": "job"})
        made = made.with_variable(jobs.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True).include_all(True))
        made = made.annotation(
            dashboards.AnnotationQuery()
            .name("Findings").datasource(SOURCE).enable(True).icon_color("red")
            .expr(f"({found} unless {found} offset 1m) or changes({found}[1m]) > 0")
        )  # fmt: skip
    return made


def job() -> dashboards.Dashboard:
    """One job, or several."""
    steps = f"rate(steepest_job_steps_total{JOB}{RATE})"
    clipped = f"rate(steepest_job_clipped_steps_total{JOB}{RATE}) / {steps}"
    part = f"rate(steepest_job_step_part_seconds_total{JOB}{RATE}) / on(job) group_left {steps}"
    left = f"(steepest_job_planned_steps{JOB} - steepest_job_step{JOB}) / rate(steepest_job_steps_total{JOB}[5m])"
    panels = [
        number("Progress", "percentunit", f"steepest_job_step{JOB} / steepest_job_planned_steps{JOB}"),
        number("Time left", "s", left, about="At the speed of the last five minutes."),
        number("Loss", "none", f"steepest_job_loss{JOB}"),
        number("Samples a second", "none", f"rate(steepest_job_samples_total{JOB}{RATE})"),
        number("Workers", "none", f"steepest_job_workers{JOB}"),
        number("Findings", "none", f"sum by (job) (steepest_job_findings{JOB})", about="What health rules have found."),
        lines(
            "Loss", "none",
            {"{{job}}": f"steepest_job_loss{JOB}", "{{job}} {{metric}}": f"steepest_job_evaluation{JOB}"},
        ),
        lines(
            "Gradient norm, raw and clipped", "none",
            {
                "{{job}} raw": f"steepest_job_gradient_norm{JOB}",
                "{{job}} clipped": f"steepest_job_clipped_gradient_norm{JOB}",
            },
            log=True,
        ),
        layers(),
        lines(
            "Steps that are clipped", "percentunit",
            {"{{job}}": clipped, "{{job}} ratio": f"steepest_job_clip_ratio{JOB}"},
        ),
        lines("Learning rate", "sci", {"{{job}}": f"steepest_job_learning_rate{JOB}"}),
        lines(
            "Where a step's time goes", "s", {"{{job}} {{part}}": part}, stacked=True,
            about="data: waiting for samples. straggler: waiting for the slowest worker. network: messages, gradients "
            "and parameters on their way. reduce, apply: the servers.",
        ),
        lines(
            "Step time", "s",
            {
                f"{{{{job}}}} {name}": f"histogram_quantile({q}, rate(steepest_job_step_seconds_bucket{JOB}{RATE}))"
                for name, q in (("median", 0.5), ("99th percentile", 0.99))
            },
        ),
        lines("Findings", "none", {"{{job}} {{rule}}": f"steepest_job_findings{JOB}"}),
        lines(
            "Trouble in the last hour", "none",
            {
                "{{job}} workers replaced": f"increase(steepest_job_replaced_workers_total{JOB}[1h])",
                "{{job}} steps skipped": f"increase(steepest_job_skipped_steps_total{JOB}[1h])",
                "{{job}} rollbacks": f"increase(steepest_job_rollbacks_total{JOB}[1h])",
            },
        ),
    ]  # fmt: skip
    return with_panels(board("steepest", "steepest: jobs", by_job=True), panels)


def fleet() -> dashboards.Dashboard:
    """All jobs of a service."""
    panels = [
        number("Running", "none", 'steepest_jobs{state="RUNNING"}'),
        number("Queued", "none", 'steepest_jobs{state="QUEUED"}'),
        number("Failed", "none", 'steepest_jobs{state="FAILED"}'),
        number("Workers", "none", "sum(steepest_job_workers)"),
        number("Samples a second", "none", f"sum(rate(steepest_job_samples_total{RATE}))"),
        number("Findings of live jobs", "none", "sum(steepest_job_findings)"),
        lines("Jobs by state", "none", {"{{state}}": "steepest_jobs"}, stacked=True),
        lines("Workers by job", "none", {"{{job}}": "steepest_job_workers"}, stacked=True),
        lines("Progress", "percentunit", {"{{job}}": "steepest_job_step / steepest_job_planned_steps"}),
        lines("Samples a second", "none", {"{{job}}": f"rate(steepest_job_samples_total{RATE})"}),
        lines("Findings", "none", {"{{job}} {{rule}}": "steepest_job_findings"}),
        lines(
            "Workers replaced in the last hour", "none",
            {"{{job}}": "increase(steepest_job_replaced_workers_total[1h])"},
        ),
    ]  # fmt: skip
    return with_panels(board("steepest-fleet", "steepest: all jobs", by_job=False), panels)


def service() -> dashboards.Dashboard:
    """The service itself."""
    calls = f"(rate(grpc_server_handled_total{RATE}))"
    bucket = f"sum by (le, grpc_method) (rate(grpc_server_handling_seconds_bucket{RATE}))"
    panels = [
        number("Memory", "bytes", "process_resident_memory_bytes"),
        number("Processor", "percentunit", f"rate(process_cpu_seconds_total{RATE})", about="Of one core."),
        number("Open files", "none", "process_open_fds"),
        number("Calls a second", "none", f"sum {calls}"),
        number("Open streams", "none", "sum(grpc_server_open_streams)"),
        number("Up for", "s", "time() - process_start_time_seconds"),
        lines("Calls by method", "none", {"{{grpc_method}}": f"sum by (grpc_method) {calls}"}),
        lines("Calls by status", "none", {"{{grpc_code}}": f"sum by (grpc_code) {calls}"}),
        lines("Time to answer, 99th percentile", "s", {"{{grpc_method}}": f"histogram_quantile(0.99, {bucket})"}),
        lines("Open streams", "none", {"{{grpc_method}}": "grpc_server_open_streams"}),
        lines("Memory", "bytes", {"resident": "process_resident_memory_bytes"}),
        lines("Processor", "percentunit", {"of one core": f"rate(process_cpu_seconds_total{RATE})"}),
    ]
    return with_panels(board("steepest-service", "steepest: the service", by_job=False), panels)


def with_panels(made: dashboards.Dashboard, panels: list[Any]) -> dashboards.Dashboard:
    """A dashboard with panels, placed from left to right and top to bottom."""
    for each in panels:  # the builder places them
        made = made.with_panel(each)
    return made


BOARDS = {"steepest.json": job, "fleet.json": fleet, "service.json": service}


def text_of(name: str) -> str:
    """What is to be in a file."""
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(BOARDS[name]().build())), indent=2) + "\n"


if __name__ == "__main__":
    for name in BOARDS:
        (HERE / name).write_text(text_of(name))
