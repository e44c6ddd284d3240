"""The control plane: job API, lifecycle, store, scheduler, telemetry."""
