"""What the health rules say of healthy jobs: nothing, it is hoped.

`python -m benchmarks.findings [--steps 600] [--json FILE]` trains every example with settings that work, through one
service, and prints the steps and the findings of each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from steepest.client import Client
from steepest.embedded import running_service

ADAMW: dict[str, Any] = {"name": "adamw", "lr": 1e-3}
EXAMPLES: dict[str, dict[str, Any]] = {
    "examples/digits.py:logistic": {},
    "examples/digits.py:mlp": {"clip": {"norm": 1.0}},
    "examples/digits.py:convnet": {},
    "examples/tabular.py:breast_cancer": {},
    "examples/tabular.py:diabetes": {},
    "examples/analytic.py:logistic": {},
    "examples/charlm.py:gru": {"clip": {"norm": 1.0}},
    "examples/charlm.py:transformer": {"schedule": {"name": "cosine", "warmup_steps": 50}},
    "examples/from_scripts/digits.py:task": {},
    "examples/from_scripts/gpt2.py:task": {},
    "examples/from_scripts/bert.py:task": {},
    "examples/from_scripts/resnet.py:task": {},
    "examples/from_scripts/gcn.py:task": {"data": {"global_batch": 200}},
    "examples/from_scripts/vae.py:task": {},
    "examples/from_scripts/lstm.py:task": {"data": {"global_batch": 16, "micro_batch": 16, "shuffle": False}},
    "examples/from_scripts/recommender.py:task": {"optimizer": {"name": "sgd", "lr": 0.1}},
    "examples/from_scripts/lora.py:task": {},
    "examples/from_scripts/lightning_module.py:task": {},
}


def main() -> None:
    """Print a line for each example, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        settings = {"grpc_port": 0, "http_port": 0, "num_cpus": 2}
        with (
            running_service(Path(directory), **settings) as service,
            Client(f"127.0.0.1:{service.grpc_port}") as client,
        ):
            service.cluster.wait_ready()
            for example, spec in EXAMPLES.items():
                eval_every = max(1, options.steps // 10)
                job = client.submit(
                    example, **{"optimizer": ADAMW, "eval_every": eval_every, **spec}, steps=options.steps
                )
                info = job.wait()
                found[example] = [f"{each.rule} at step {each.step}: {each.message}" for each in info.findings]
                print(f"{example:44} {info.step:6} steps, loss {info.loss:.4g}", *found[example], sep="\n    ")
    total = len(found) * options.steps
    findings = sum(map(len, found.values()))
    print(f"{findings} findings in {total:,} healthy steps")
    if options.json is not None:
        options.json.write_text(json.dumps({"steps": total, "findings": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
