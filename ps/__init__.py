"""The parameter server: layout, reduction, clip, optimizer, step state machine, checkpoint."""
