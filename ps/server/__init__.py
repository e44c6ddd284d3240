"""The server process: carries messages between sockets and the state machines of `ps.step`.

*Leader*: server 0, which decides. *Follower*: every other server, which reports to it. *Home*: the first server on a
host. The only room of `ps` that starts threads, tells the time and, in `actor`, touches Ray.
"""
