"""The parameter server: holds the parameters, adds up gradients, clips them and applies the optimizer step.

Rooms, each importing only rooms to its right:
server -> job, wire, checkpoint -> step -> numerics, compression -> parameters, memory.
Everything but `server` and `wire` is free of Ray, gRPC and protobuf, so that it can be run in a REPL.
"""
