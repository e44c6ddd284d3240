"""Memory that processes of one host share, on the CPU (segments) and on a GPU, and how a process knows its host.

Imports nothing of `ps`.
"""
