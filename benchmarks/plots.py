"""Draws the figures of docs/performance.md from what the benchmarks wrote: `python -m benchmarks.plots`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "steepest"  # the same figures give the same file

from matplotlib import pyplot  # after the choice of its output

HERE = Path(__file__).parent
TARGET = HERE.parent / "docs" / "plots"


def _results(name: str) -> list[dict[str, Any]]:
    path = HERE / "results" / f"{name}.json"
    return list(json.loads(path.read_text())["results"]) if path.exists() else []


def _save(name: str) -> None:
    TARGET.mkdir(exist_ok=True)
    pyplot.savefig(TARGET / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close()


def scaling() -> None:
    """Step time against workers, servers and parameters."""
    results = _results("scaling")
    rows = list(dict.fromkeys(r["row"] for r in results))
    if not rows:
        return
    _, axes = pyplot.subplots(1, len(rows), figsize=(4 * len(rows), 3), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        own = [r for r in results if r["row"] == row]
        axis.plot([r["value"] for r in own], [1e3 * statistics.median(r["seconds"]) for r in own], marker="o")
        if row == "parameters":
            axis.set_xscale("log")
            axis.set_yscale("log")
        else:
            axis.set_xscale("log", base=2)
            axis.set_xticks([r["value"] for r in own], [str(r["value"]) for r in own])
            axis.set_ylim(bottom=0)
        axis.set_xlabel(row)
        axis.set_ylabel("ms a step")
        axis.grid(visible=True, alpha=0.3)
    pyplot.tight_layout()
    _save("scaling")


def bars(name: str, label: str, value: str, title: str) -> None:
    """One bar a result."""
    results = _results(name)
    if not results:
        return
    pyplot.figure(figsize=(6, 0.5 * len(results) + 1))
    labels = [f"{r['size'].strip()}, {r[label]}" if "size" in r else str(r[label]) for r in results]
    drawn = pyplot.barh(labels, [r[value] for r in results])
    pyplot.bar_label(drawn, fmt="%.2f", padding=3)
    pyplot.gca().invert_yaxis()
    pyplot.margins(x=0.15)
    pyplot.axvline(1.0, color="black", linewidth=0.8)
    pyplot.xlabel(title)
    _save(name)


def main() -> None:
    scaling()
    bars("step_time", "against", "ratio", "our step time / the peer's")
    bars("compression", "compression", "gain", "times as fast as without, at 100 Mbit/s")


if __name__ == "__main__":
    main()
