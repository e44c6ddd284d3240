"""Metrics for Prometheus, and the HTTP port."""
