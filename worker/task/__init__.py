"""Finds the user's function, calls it, and describes and checks the task it returns.

`load` calls it, `model` describes it. Imports nothing of `worker`; `worker.rehearsal` does both at submission.
"""
