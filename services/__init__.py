"""The control plane: the gRPC and HTTP service that stores jobs and brings them to their end on a Ray cluster.

Rooms, each importing only rooms to its right:
service -> api, telemetry, dashboard -> jobs -> store, cluster -> settings. `service` wires them and does nothing else.
"""
