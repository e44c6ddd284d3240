"""The Ray cluster: reserves room for a job, starts its actors there, and tells when one ends.

*Job room*: the placement groups of one job and the actors in them. *Fork server*: a process of a host that has imported
PyTorch and Ray once, and forks workers and servers. `ray_environment` is imported before Ray.
"""
