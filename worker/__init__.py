"""The workers: load the user's task, fetch its data, compute gradients and exchange them with the servers.

Rooms, each importing only rooms to its right: process -> analysis, rehearsal -> gradients -> task, data.
All may import `ps`.
"""
