"""What a job is to its processes: its configuration, who talks to whom, and how much memory and network it takes.

*Home*: the first server of a host, in whose memory the parameters lie for every process there. Pure.
"""
