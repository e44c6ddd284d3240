"""What can be asked of a task's gradients and curvature besides training: checks in float64, and Hessian products.

`subject` is a task at one point, `team` spreads passes over processes and adds them along the canonical tree, the rest
is mathematics on top. `run` is the process that a command or the service starts.
"""
