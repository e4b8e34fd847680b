"""The loss of a training step: Dice and cross-entropy at every level, where labelled."""

import torch
import torch.nn.functional as F
from torch import Tensor

from amos_lha.lha_net import TrainingOutput
from amos_lha.organs import GROUPS, NUM_CLASSES
from common.losses import dice_ce_loss

ROUTER_WEIGHT = 0.1
LOWEST_WEIGHT, HIGHEST_WEIGHT = 0.5, 4.0  # of a class in the cross-entropy


def class_weights(frequency: Tensor) -> Tensor:
    """Weights of the classes in the cross-entropy: square root of median / own frequency, from 0.5 to 4.

    Args:
        frequency: (16,) share of the voxels of the cases that have labels for the class; 0 for a class that
            never occurs, which gets the weight 1.
    """
    occurs = frequency > 0
    weights = (frequency[occurs].median() / frequency).sqrt().clamp(LOWEST_WEIGHT, HIGHEST_WEIGHT)
    return torch.where(occurs, weights, torch.ones_like(weights))


def merge_unlabelled(logits: Tensor, labelled: Tensor) -> Tensor:
    """Marginal softmax: what is not labelled in a case counts as its background, because there it is.

    The background's logit becomes the log of the summed exponentials of itself and of the organs without
    labels, and theirs becomes -inf: the probabilities of the labelled organs stay as they are.

    Args:
        logits: (N, 16, *spatial).
        labelled: (N, 16) bool, whether the case has labels for the class; True for the background.

    Source: Shi et al. 2021, Marginal loss and exclusion loss for partially supervised multi-organ
    segmentation, doi:10.1016/j.media.2021.101979.
    """
    if labelled.all():
        return logits
    missing = ~labelled.view(*labelled.shape, *(1,) * (logits.ndim - 2))
    logits = logits.float()
    others = logits.masked_fill(~missing, -torch.inf)
    others[:, :1] = logits[:, :1]
    merged = logits.masked_fill(missing, -torch.inf)
    return torch.cat([others.logsumexp(dim=1, keepdim=True), merged[:, 1:]], dim=1)


def segmentation_loss(
    output: TrainingOutput | list[Tensor] | Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Dice + weighted cross-entropy of every level, each coarser one counting half of the one before.

    Args:
        output: of a network in training: logits (N, 16, d, h, w), those of several levels, or also those of
            the router.
        target: (N, d, h, w) organ numbers.
        labelled: as for `merge_unlabelled`; None = all.
        weights: (16,) of the classes in the cross-entropy; None = equal.
    """
    levels, router = levels_and_router(output)
    total, shares = target.new_zeros((), dtype=torch.float32), 0.0
    for level, logits in enumerate(levels):
        if labelled is not None:
            logits = merge_unlabelled(logits, labelled)
        loss = dice_ce_loss(logits, nearest(target, logits.shape[2:]), class_weights=weights)
        total, shares = total + 0.5**level * loss, shares + 0.5**level
    total = total / shares
    if router is not None:
        total = total + ROUTER_WEIGHT * router_loss(router, target)
    return total


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
    groups = group[nearest(target, router.shape[2:])]
    summed = F.cross_entropy(router.float(), groups, ignore_index=-1, reduction="sum")
    return summed / (groups >= 0).sum().clamp(min=1)


def nearest(target: Tensor, size: torch.Size) -> Tensor:
    """Labels (N, *spatial) on a coarser grid of the same field of view."""
    for axis, (have, want) in enumerate(zip(target.shape[1:], size, strict=True), start=1):
        if have != want:
            index = ((torch.arange(want, device=target.device) + 0.5) * have / want).long()
            target = target.index_select(axis, index)
    return target


@torch.no_grad()
def patch_errors(output: TrainingOutput | list[Tensor] | Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    """1 - soft Dice of each class in each patch, (N, 16), from every second voxel along each axis.

    NaN for the background, for classes that are not in the patch and for those that are not labelled.
    """
    levels, _ = levels_and_router(output)
    logits, target = levels[0][..., ::2, ::2, ::2], target[..., ::2, ::2, ::2]
    probs = merge_unlabelled(logits.float(), labelled).softmax(dim=1).flatten(2)
    onehot = F.one_hot(target.flatten(1).long(), NUM_CLASSES).movedim(1, 2).to(probs.dtype)
    voxels = onehot.sum(2)
    errors = 1 - 2 * (probs * onehot).sum(2) / (probs.sum(2) + voxels)
    errors[(voxels == 0) | ~labelled] = torch.nan
    errors[:, 0] = torch.nan
    return errors
