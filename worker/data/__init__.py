"""Which samples a micro-batch has (`sampler`) and how they become a batch (`sources`).

The order of the data is a pure function of (seed, epoch): nothing about it needs saving.
"""
