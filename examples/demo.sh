#!/bin/sh
# Starts a service, submits examples/digits.py:mlp to it over gRPC, shows its progress, fetches what it made, stops.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
runs=${STEEPEST_DEMO_DIR:-steepest-runs/demo}
mkdir -p "$runs"
log=$runs/serve.log

steepest serve --port 0 --http-port 0 --data-dir "$runs/data" 2>"$log" &
service=$!
trap 'kill $service 2>/dev/null; wait $service 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
until grep -qs '^ready' "$log"; do
    kill -0 $service 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.2
done
address=$(sed -n 's/^gRPC \([^ ]*\).*/\1/p' "$log")
web=$(sed -n 's/.*HTTP \([^ ]*\).*/\1/p' "$log")
export STEEPEST_SERVER="$address"
echo "service at $address, metrics at $web/metrics"

job=$(steepest submit "$here/digits.py:mlp" --workers 2 --steps 400 --lr 0.01 --schedule cosine --clip-norm 1 --eval-every 100)
steepest watch "$job"
steepest download "$job" --output "$runs/${job##*/}" >/dev/null
echo "metrics, while the service runs: $web/metrics"
echo "artifacts: $runs/${job##*/}  (model.safetensors, optimizer.safetensors, manifest.json)"
steepest get "$job" --json | python -c '
import json, sys
accuracy = json.load(sys.stdin)["metrics"]["accuracy"]
print(f"accuracy on the held-out digits: {accuracy:.3f}")
sys.exit(accuracy < 0.95)'
