"""The Ray workers: they compute gradients of their share of every step."""
