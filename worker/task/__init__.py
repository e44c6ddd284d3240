"""Finds the user's function, calls it, and describes and checks the task it returns.

`load` calls it, `model` describes it, `probe` does both in a process of its own at submission.
"""
