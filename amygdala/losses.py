"""The losses of this task, on raw logits: adaptive Dice with cross-entropy, which may stress boundaries."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import batch_dice_loss

BACKGROUND_WEIGHT = 0.5  # of the background in the cross-entropy; 1 for each structure
LEAST_SHARE, HIGHEST_SHARE = 0.2, 0.8  # of false positives in the adaptive Dice
SMOOTH = 1e-5
SIGMA = 1.5  # voxels, how fast the weight of a boundary falls off
LOSSES = ("adaptive", "dice")


def adaptive_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - TP / (TP + a FP + (1 - a) FN) of each class over the whole batch, the background included; mean.

    a = FP / (FP + FN), anew for each batch and within [0.2, 0.8]: the kind of error that prevails costs more.

    Args:
        logits: (N, K, *spatial), before the softmax.
        target: (N, *spatial) int64.

    Source: the loss of MedFormer's training, Gao et al. 2022, arXiv:2203.00131. Differs: no gradient flows
    through a.
    """
    probs = logits.float().softmax(dim=1)
    losses = []
    for k in range(logits.shape[1]):
        inside = target == k
        found = probs[:, k]
        overlap = (found * inside).sum()
        extra, missed = found.sum() - overlap, inside.sum() - overlap
        share = (extra / (extra + missed + SMOOTH)).detach().clamp(LEAST_SHARE, HIGHEST_SHARE)
        losses.append(1 - overlap / (overlap + share * extra + (1 - share) * missed + SMOOTH))
    return torch.stack(losses).mean()


def boundary_weights(target: Tensor, weight: float) -> Tensor:
    """1 + weight * exp(-d^2 / (2 * 1.5^2)) of each voxel: 1 + weight at the boundary of a label, 1 far away.

    d counts steps of a voxel, also diagonal ones, from the voxels that have a neighbour of another label.

    Args:
        target: (N, D, H, W) labels.
    """
    labels = target[:, None].float()
    highest, lowest = F.max_pool3d(labels, 3, 1, 1), -F.max_pool3d(-labels, 3, 1, 1)
    reached = (highest != lowest).float()
    weights = torch.ones_like(labels)
    previous = torch.zeros_like(reached)
    for distance in range(int(3 * SIGMA) + 1):
        value = weight * torch.exp(torch.tensor(-(distance**2) / (2 * SIGMA**2))).item()
        weights += value * (reached - previous)
        previous, reached = reached, F.max_pool3d(reached, 3, 1, 1)
    return weights[:, 0]


def segmentation_loss(
    output: Tensor | Sequence[Tensor], target: Tensor, *, loss: str = "adaptive", boundary: float = 0.0
) -> Tensor:
    """Dice + cross-entropy; of a network that also has auxiliary outputs the mean over all of them.

    Args:
        output: logits (N, K, *spatial) or, of a network in training, a list of them on one grid.
        target: (N, *spatial) int64.
        loss: "adaptive" or "dice", the form of the Dice.
        boundary: extra weight of boundary voxels in the cross-entropy; 0 = all alike.
    """
    outputs = [output] if isinstance(output, Tensor) else list(output)
    voxels = boundary_weights(target, boundary) if boundary else None
    total = torch.zeros((), device=target.device)
    for logits in outputs:
        classes = torch.ones(logits.shape[1], device=logits.device)
        classes[0] = BACKGROUND_WEIGHT
        entropy = F.cross_entropy(logits.float(), target, reduction="none")
        weights = classes[target] if voxels is None else classes[target] * voxels
        dice = adaptive_dice_loss if loss == "adaptive" else batch_dice_loss
        total = total + dice(logits, target) + (weights * entropy).sum() / weights.sum()
    return total / len(outputs)
