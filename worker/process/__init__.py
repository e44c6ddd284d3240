"""The worker process: joins the servers, answers assignments until it is dismissed.

Only `exchange` knows the wire; only `actor` touches Ray.
"""
