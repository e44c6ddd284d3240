"""From a downloaded job back to plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def load_optimizer_state(path: str | Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load `optimizer.safetensors` into an optimizer over the parameters of `model`, of the class that the job had.

    Any parameter groups will do. A job with muon has two classes: load it into either, over the parameters that this
    one trains. A parameter without saved state (no step was taken) keeps none.

    Raises KeyError for a parameter of the optimizer that the model does not have.
    """
    from safetensors.torch import load_file

    from steepest.optimizer_state import unpack_state

    saved = load_file(path)
    names = {parameter: name for name, parameter in model.named_parameters()}
    state_dict = optimizer.state_dict()
    own = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(own):
        prefix = names[parameter] + "."
        entries = {key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)}
        entries = {key: value for key, value in entries.items() if "." not in key}
        if entries:
            state[index], counts = unpack_state(entries)
            group = next(g for g in state_dict["param_groups"] if index in g["params"])
            group.update(counts)
    state_dict["state"] = state
    optimizer.load_state_dict(state_dict)
