"""Runs the gallery and rebuilds its page: `python examples/gallery/make.py [NAME...]`, or `make gallery`.

Every figure is of real jobs, run now on a service of its own; what docs/gallery.md says of one is measured with it.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import importlib
import inspect
import json
import sys
import tempfile
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "steepest"  # the same figures give the same file
mpl.rcParams["axes.grid"] = True
mpl.rcParams["grid.alpha"] = 0.3

from common import Runs
from matplotlib import pyplot

import steepest
from steepest.embedded import running_service

HERE = Path(__file__).parent
NAMES = (
    "depth", "initialization", "normalization", "residual", "memory", "clipping",
    "accumulation", "recomputing", "optimizers", "noise", "stability", "modes", "differences",
)  # fmt: skip
HEAD = """# Gallery

What a textbook says of gradients, run here. Each figure comes from the jobs of one file of
[examples/gallery](../examples/gallery), and `make gallery` runs them all and rebuilds this page. How the theory hangs
together is in [gradients](gradients.md).

"""


def draw(names: tuple[str, ...], page: Path) -> dict[str, str]:
    """Run these parts, write their figures beside the page and return what was found, by name."""
    figures = page.parent / "gallery"
    figures.mkdir(parents=True, exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        settings = {"grpc_port": 0, "http_port": 0, "num_cpus": 8}
        with running_service(Path(directory), **settings) as service:
            service.cluster.wait_ready()
            with steepest.Client(f"127.0.0.1:{service.grpc_port}") as client:
                for name in names:
                    runs, began = Runs(client), time.monotonic()
                    found[name] = importlib.import_module(name).draw(runs, pyplot)
                    pyplot.tight_layout()
                    pyplot.savefig(figures / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
                    pyplot.close("all")
                    seconds = time.monotonic() - began
                    print(f"{name}: {runs.jobs} jobs, {runs.steps:,} steps, {seconds:.0f} s. {found[name]}", flush=True)
    return found


def write(found: dict[str, str], page: Path) -> None:
    """Rebuild the page; parts that were not run keep what was found before."""
    kept = page.parent / "gallery" / "found.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    found = {name: text for name in NAMES if (text := found.get(name, before.get(name)))}
    kept.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    parts = []
    for name, text in found.items():
        title, _, body = (inspect.getdoc(importlib.import_module(name)) or "").partition("\n\n")
        parts.append(
            f"## {title.rstrip('.')}\n\n{body}\n\n![{title.rstrip('.')}](gallery/{name}.svg)\n\n{text} "
            f"([{name}.py](../examples/gallery/{name}.py))\n"
        )
    page.write_text(HEAD + "\n".join(parts))


def main() -> None:
    """Entry point."""
    names = tuple(sys.argv[1:]) or NAMES
    unknown = set(names) - set(NAMES)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: no such part; there are {', '.join(NAMES)}")
    page = HERE.parents[1] / "docs" / "gallery.md"
    write(draw(names, page), page)


if __name__ == "__main__":
    main()
