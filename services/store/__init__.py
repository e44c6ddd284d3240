"""Jobs, their events and evaluations, and tokens in SQL, the records of steps in files; states and their moves.

What a client was told is committed here first.
"""
