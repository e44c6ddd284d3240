"""The state machines of one step, free of clocks, threads and I/O: same state and message, same new state and effects.

*Leader*: deals micro-batches and makes one decision for all shards. *Shard*: holds nodes of the tree, adds them up and
applies the decision. *Round*: one pass of assign, push, report, decide, apply. *Effect*: what the leader wants done;
`ps.server` carries it out. Imports `ps.numerics`, `ps.compression` and below.
"""
