"""The arithmetic of a step: canonical tree, sums, norms, clipping, schedules and optimizer steps.

*Node*: a range of micro-batches whose sum the canonical tree contains; the tree, not the order of arrival, decides the
order of addition. *Segment*: one parameter's part of one block, the unit in which norms are measured.
Pure functions of tensors; imports `ps.parameters`.
"""
