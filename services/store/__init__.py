"""Jobs, their events and the history of their steps in SQL; the states of a job and the legal moves between them.

What a client was told is committed here first.
"""
