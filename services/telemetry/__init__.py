"""Metrics for Prometheus, and the HTTP port that serves them."""
