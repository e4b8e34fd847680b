"""Optimisers by the name of a flag, and groups of parameters that learn in different ways."""

from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = ("adamw", "sgd")
HEADS_LEARN_FASTER = 10  # than a pretrained encoder


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


def encoder_and_head_groups(network: nn.Module, weight_decay: float, *, pretrained: bool) -> list[dict]:
    """Parameters of a network with an `encoder` in groups for AdamW: encoder, its norms (no decay), the rest.

    Beside a pretrained encoder, whose norms stay as they are, the rest learns ten times as fast: it has the
    "lr_scale" that `optimizer_step` in common/training.py knows. Ru et al. 2022, arXiv:2203.02664.
    """
    groups = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": weight_decay, "lr_scale": HEADS_LEARN_FASTER if pretrained else 1},
    ]
    for name, parameter in network.named_parameters():
        if not name.startswith("encoder."):
            groups[2]["params"].append(parameter)
        elif "norm" not in name:
            groups[0]["params"].append(parameter)
        elif pretrained:
            parameter.requires_grad_(False)
        else:
            groups[1]["params"].append(parameter)
    return [group for group in groups if group["params"]]
