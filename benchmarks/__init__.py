"""Measurements against peers and against floors; each runs with `python -m benchmarks.NAME`."""
