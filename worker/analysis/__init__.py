"""What can be asked of a task's gradients and curvature besides training: checks in float64, and Hessian products.

`question` is what can be asked, `subject` a task at one point; `team` spreads passes over processes and adds them along
the canonical tree, and `answer` brings these together. The rest is mathematics on top. The processes are actors of
worker.process.analyst.
"""
