"""The loss of a training step: Dice and cross-entropy at every level, and that of the router."""

import torch
import torch.nn.functional as F
from torch import Tensor

from amos_lha.lha_net import TrainingOutput
from amos_lha.organs import GROUPS, NUM_CLASSES
from common.losses import coarser_target, deep_supervision_loss

ROUTER_WEIGHT = 0.1


def segmentation_loss(
    output: TrainingOutput | list[Tensor] | Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`deep_supervision_loss`, and a tenth of `router_loss` for a network that has a router.

    Args:
        output: of a network in training: logits (N, 16, d, h, w), those of several levels, or also those of
            the router.
        target: (N, d, h, w) organ numbers.
        labelled: (N, 16) bool, whether the case has labels for the organ; None = all.
        weights: (16,) of the classes in the cross-entropy; None = equal.
    """
    levels, router = levels_and_router(output)
    loss = deep_supervision_loss(levels, target, labelled=labelled, class_weights=weights)
    return loss if router is None else loss + ROUTER_WEIGHT * router_loss(router, target)


def levels_and_router(output: TrainingOutput | list[Tensor] | Tensor) -> TrainingOutput:
    """What any network returns in training, in one form."""
    if isinstance(output, TrainingOutput):
        return output
    return TrainingOutput(output if isinstance(output, list) else [output], None)


def router_loss(router: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the size group of every organ's voxel; 0 without any.

    Args:
        router: (N, 3, *coarse) logits of the groups in the order of GROUPS.
        target: (N, *spatial) organ numbers.
    """
    group = torch.full((NUM_CLASSES,), -1, device=target.device)
    for number, organs in enumerate(GROUPS.values()):
        group[list(organs)] = number
    groups = group[coarser_target(target, router.shape[2:])]
    summed = F.cross_entropy(router.float(), groups, ignore_index=-1, reduction="sum")
    return summed / (groups >= 0).sum().clamp(min=1)
