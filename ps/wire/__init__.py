"""Bytes between processes: connections, the frames that cross them, and the conversion of messages to protobuf.

*Connection*: one end of a socket that carries messages and tensors. *Chunk*: a few MB of a tensor. Only `convert`
builds protobuf messages from the values of `ps.step.messages`. Imports `ps.step` and below.
"""
