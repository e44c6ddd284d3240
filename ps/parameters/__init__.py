"""What the parameters are and how they lie in memory.

*Layout*: the flat order of all parameters, each aligned to 64 bytes. *Block*: 65,536 elements of it. *Shard*: the
consecutive blocks that one server owns. Imports nothing of `ps`.
"""
