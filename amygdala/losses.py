"""The losses of this task, on raw logits: adaptive Dice with cross-entropy, which may stress boundaries."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import adaptive_dice_loss, batch_dice_loss, boundary_weights

BACKGROUND_WEIGHT = 0.5  # of the background in the cross-entropy; 1 for each structure
LOSSES = ("adaptive", "dice")


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
