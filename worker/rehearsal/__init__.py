"""What a job will do, done once at submission on one micro-batch: so that what cannot work is refused before it starts.

`probe` runs in a process of its own; `rehearse` goes through the steps, with `passes` of the task, `conduct` of its
tensors and the `comparison` of a step in parts; `hidden_state` and `fingerprint` are what it compares.
"""
