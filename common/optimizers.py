"""Optimisers by the name of a flag."""

from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = ("adamw", "sgd")


def make_optimizer(
    name: str, parameters: Iterable, lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.99.

    Args:
        parameters: tensors, or groups such as those of `decay_groups`.
        weight_decay: of parameters whose group has none of its own.

    Raises:
        ValueError: another name.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.99, nesterov=True, weight_decay=weight_decay)
    raise ValueError(f"unknown optimiser {name!r}; take one of {', '.join(OPTIMIZERS)}")


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters of a network in two groups: norms and biases, which have one axis, do not decay."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
