"""TrainingJobService over gRPC: messages to operations and back, errors to statuses. `access` lets callers in."""
