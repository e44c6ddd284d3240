"""How far every example's gradient is from central differences, in float64.

`python -m benchmarks.gradient_checks [--processes 2] [--samples 4]` checks each as `steepest check-gradients` does, on
one embedded cluster, and prints the largest relative error and how many derivatives were compared one by one.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.findings import EXAMPLES
from benchmarks.report import RESULTS, write_report
from steepest.client import Client
from steepest.embedded import running_service


def main() -> None:
    """Print a line for each example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="of a micro-batch, where an example does not say [4]")
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), metavar="EXAMPLE")
    parser.add_argument("--json", type=Path, default=RESULTS / "gradient_checks.json")
    options = parser.parse_args()
    errors: dict[str, float] = {}
    print("| example | largest relative error | derivatives, compared one by one | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        settings = {"grpc_port": 0, "http_port": 0, "num_cpus": options.processes}
        with (
            running_service(Path(directory), **settings) as service,
            Client(f"127.0.0.1:{service.grpc_port}") as client,
        ):
            for task in options.examples:
                began = time.perf_counter()
                data = EXAMPLES[task].get("data", {"global_batch": options.samples, "micro_batch": options.samples})
                found = client.check_gradients(task, processes=options.processes, data=data)
                errors[task] = found.max_relative_error
                seconds = time.perf_counter() - began
                compared = f"{found.entries:,}, {found.entries_compared:,}"
                print(f"| {task} | {found.max_relative_error:.1e} | {compared} | {seconds:.0f} |", flush=True)
    write_report(options.json, largest=errors)


if __name__ == "__main__":
    main()
