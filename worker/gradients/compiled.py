"""A model compiled by torch.compile, with the same result in every worker.

Every shape of a batch gets code of its own: code for any shape would be made once two have been seen, so that the order
in which a worker meets them would show in the bits. Random numbers are those of the model as it is.
"""

from __future__ import annotations

from torch import nn

MOST_SHAPES = 256  # of one module; a job with more fails, for which of them are compiled would depend on their order


def compile_model(model: nn.Module) -> None:
    """Have the model compiled when it is first called. torch._dynamo takes two seconds and 100 MB."""
    import torch._dynamo.config
    import torch._inductor.config

    torch._inductor.config.fallback_random = True
    torch._inductor.config.compile_threads = 1  # each worker compiles for itself, or finds it compiled on disk
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # model.compile() leaves torch's own modules as they are: of nn.Sequential, nothing would be compiled.
    model.forward = torch.compile(model.forward, dynamic=False)
