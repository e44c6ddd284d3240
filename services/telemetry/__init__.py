"""Metrics for Prometheus, and the HTTP port; `access` lets in who may ask there."""
