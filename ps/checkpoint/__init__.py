"""A job's state as named tensors (`named_state`), and as verified files on disk (`files`).

A checkpoint knows nothing of topology: any number of workers and servers writes and reads the same bytes.
Imports `ps.step` and below.
"""
