"""Gradients of micro-batches, added up where the servers read them.

*Engine*: computes the gradient of one micro-batch. *Backend*: the device it runs on. *Slot*: memory of the worker, a
whole layout, in which one sum grows. Free of Ray, gRPC and protobuf. Imports `worker.task`, `worker.data`.
"""
