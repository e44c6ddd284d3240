"""Jobs, their events and evaluations in SQL, the records of their steps in files; the states of a job and their moves; tokens.

What a client was told is committed here first.
"""
