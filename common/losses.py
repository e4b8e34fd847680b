"""Segmentation losses on raw logits. All sums are in float32, whatever the precision of the network.

logits are (N, C, *spatial) before softmax, targets (N, *spatial) int64 in [0, C). `batch_dice_loss` and
`dice_ce_loss` also take the single logit of a binary network, (N, 1, *spatial) before the sigmoid.
"""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1e-5  # voxels, of the Dice over a batch
LEAST_SHARE, HIGHEST_SHARE = 0.2, 0.8  # of false positives in the adaptive Dice
BOUNDARY_SIGMA = 1.5  # voxels, how fast the weight of a boundary falls off
LOWEST_WEIGHT, HIGHEST_WEIGHT = 0.5, 4.0  # of a class in the cross-entropy


def _check(logits: Tensor, target: Tensor, least_classes: int = 2) -> None:
    if logits.shape[1] < least_classes or logits.shape[:1] + logits.shape[2:] != target.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} do not fit target {tuple(target.shape)}; "
            f"expected (N, C >= {least_classes}, *spatial) and (N, *spatial)"
        )


def _probs_and_onehot(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground probabilities and targets, (N, C - 1, voxels) float32 each."""
    _check(logits, target)
    probs = logits.float().softmax(dim=1)[:, 1:].flatten(2)
    classes = torch.arange(1, logits.shape[1], device=target.device).view(1, -1, 1)
    return probs, (target.flatten(1).unsqueeze(1) == classes).to(probs.dtype)


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1.0, empty_weight: float = 1.0) -> Tensor:
    """1 - soft Dice of the foreground classes, per image and class, then averaged. Scalar in [0, 1].

    `smooth`, in voxels, is added above and below the fraction line. In an image without the class, 1, 10 or
    100 false-positive voxels cost 0.50, 0.91 or 0.99: a strong penalty that saturates. An empty prediction
    there costs 0. `empty_weight` is a factor on the loss of an image without the class; the mean is over all
    images anyway. 0 leaves false positives of such images to another loss.

    Source: Milletari et al. 2016, V-Net, arXiv:1606.04797. Differs: denominator not squared.
    """
    probs, onehot = _probs_and_onehot(logits, target)
    overlap, size = (probs * onehot).sum(2), onehot.sum(2)
    loss = 1 - (2 * overlap + smooth) / (probs.sum(2) + size + smooth)
    return torch.where(size > 0, loss, empty_weight * loss).mean()


def balanced_cross_entropy(logits: Tensor, target: Tensor, *, foreground_weight: float = 0.5) -> Tensor:
    """Cross-entropy in which foreground and background of each image count alike, however small the tumour.

    With w = `foreground_weight`, each foreground voxel weighs w / number of foreground voxels of its image,
    each background voxel (1 - w) / number of background voxels. The sum over each image is averaged over the
    batch. An image without foreground has the total weight 1 - w, one without background w.
    """
    _check(logits, target)
    per_voxel = F.cross_entropy(logits.float(), target, reduction="none").flatten(1)
    foreground = (target.flatten(1) > 0).float()
    n_foreground = foreground.sum(1, keepdim=True)
    n_background = foreground.shape[1] - n_foreground
    weights = foreground * (foreground_weight / n_foreground.clamp(min=1)) + (1 - foreground) * (
        (1 - foreground_weight) / n_background.clamp(min=1)
    )
    return (per_voxel * weights).sum(1).mean()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Plain mean cross-entropy over voxels."""
    _check(logits, target)
    return F.cross_entropy(logits.float(), target)


def focal_tversky_loss(
    logits: Tensor, target: Tensor, *, fn_weight: float = 0.7, fp_weight: float = 0.3, gamma: float = 0.75
) -> Tensor:
    """(1 - Tversky index)^gamma of each foreground class over the whole batch, averaged over classes.

    Tversky index = (TP + 1) / (TP + fn_weight FN + fp_weight FP + 1).

    Source: Abraham and Khan 2019, arXiv:1810.07842, with their alpha = fn_weight and gamma = 4/3 as 0.75.
    """
    probs, onehot = _probs_and_onehot(logits, target)
    tp = (probs * onehot).sum((0, 2))
    fn = ((1 - probs) * onehot).sum((0, 2))
    fp = (probs * (1 - onehot)).sum((0, 2))
    index = (tp + 1) / (tp + fn_weight * fn + fp_weight * fp + 1)
    missing = (1 - index).clamp(min=1e-7)  # keeps the gradient of the power finite at a perfect fit
    return (missing**gamma).mean()


def batch_dice_loss(logits: Tensor, target: Tensor, *, smooth: float = SMOOTH) -> Tensor:
    """1 - soft Dice of each foreground class over the whole batch, averaged over the classes in the target.

    Classes without a target voxel are left out, as their Dice would be about 0 whatever is predicted. A batch
    without any foreground has the loss 0: its false positives are left to the cross-entropy.

    Args:
        smooth: added above and below the fraction line, in voxels.

    Source: Milletari et al. 2016, arXiv:1606.04797. Differs: over the batch, denominator not squared.
    """
    _check(logits, target, least_classes=1)
    if logits.shape[1] == 1:
        probs = logits.float().sigmoid()
        # The background's probabilities are asked for nowhere, so that those of the foreground stand in.
        return _batch_dice_loss(probs.expand(-1, 2, *probs.shape[2:]), probs[:, 0], target, smooth)
    probs = logits.float().softmax(dim=1)
    return _batch_dice_loss(probs, probs.gather(1, target.unsqueeze(1))[:, 0], target, smooth)


def _batch_dice_loss(probs: Tensor, of_target: Tensor, target: Tensor, smooth: float) -> Tensor:
    """`batch_dice_loss` from probabilities (N, C, *spatial) and, in each voxel, that of its target class.

    The overlaps need only the latter, which saves a one-hot target and passes over all classes.
    """
    totals = probs.flatten(2).sum((0, 2))
    lost_and_present = []
    for k in range(1, probs.shape[1]):
        inside = target == k
        overlap, size = (of_target * inside).sum(), inside.sum()
        lost = (1 - (2 * overlap + smooth) / (totals[k] + size + smooth)) * (size > 0)
        lost_and_present.append(torch.stack([lost, (size > 0).to(lost.dtype)]))
    lost, present = torch.stack(lost_and_present).sum(0)
    return lost / present.clamp(min=1)


def dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """`batch_dice_loss` + mean cross-entropy (binary cross-entropy for a single logit).

    Args:
        class_weights: (C,) of the classes in the cross-entropy, whose mean they weigh; None = equal.
    """
    _check(logits, target, least_classes=1)
    if logits.shape[1] == 1:
        ce = F.binary_cross_entropy_with_logits(logits[:, 0].float(), target.float())
        return dice_weight * batch_dice_loss(logits, target) + ce_weight * ce
    log_probs = F.log_softmax(logits.float(), dim=1)
    of_target = log_probs.gather(1, target.unsqueeze(1))[:, 0]
    dice = _batch_dice_loss(log_probs.exp(), of_target.exp(), target, SMOOTH)
    if class_weights is None:
        return dice_weight * dice - ce_weight * of_target.mean()
    weights = class_weights.to(of_target)[target]
    return dice_weight * dice - ce_weight * (weights * of_target).sum() / weights.sum()


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
    for distance in range(int(3 * BOUNDARY_SIGMA) + 1):
        value = weight * torch.exp(torch.tensor(-(distance**2) / (2 * BOUNDARY_SIGMA**2))).item()
        weights += value * (reached - previous)
        previous, reached = reached, F.max_pool3d(reached, 3, 1, 1)
    return weights[:, 0]


def class_weights(frequency: Tensor) -> Tensor:
    """Weights of the classes in the cross-entropy: square root of median / own frequency, from 0.5 to 4.

    Args:
        frequency: (C,) share of the voxels of the cases that have labels for the class; 0 for a class that
            never occurs, which gets the weight 1.
    """
    occurs = frequency > 0
    weights = (frequency[occurs].median() / frequency).sqrt().clamp(LOWEST_WEIGHT, HIGHEST_WEIGHT)
    return torch.where(occurs, weights, torch.ones_like(weights))


# ---- several levels, cases that lack labels of some classes ----


def labelled_mask(num_classes: int, labelled: Collection[int]) -> Tensor:
    """(num_classes,) bool: the background and these classes."""
    mask = torch.zeros(num_classes, dtype=torch.bool)
    mask[[0, *labelled]] = True
    return mask


def merge_unlabelled(logits: Tensor, labelled: Tensor) -> Tensor:
    """Marginal softmax: what is not labelled in a case counts as its background, because there it is.

    The background's logit becomes the log of the summed exponentials of itself and of the classes without
    labels, and theirs becomes -inf: the probabilities of the labelled classes stay as they are.

    Args:
        logits: (N, C, *spatial).
        labelled: (N, C) bool, whether the case has labels for the class; True for the background. On the
            CPU no GPU has to wait for it.

    Source: Shi et al. 2021, Marginal loss and exclusion loss for partially supervised multi-organ
    segmentation, doi:10.1016/j.media.2021.101979.
    """
    if labelled.all():
        return logits
    missing = ~labelled.to(logits.device).view(*labelled.shape, *(1,) * (logits.ndim - 2))
    logits = logits.float()
    others = logits.masked_fill(~missing, -torch.inf)
    others[:, :1] = logits[:, :1]
    merged = logits.masked_fill(missing, -torch.inf)
    return torch.cat([others.logsumexp(dim=1, keepdim=True), merged[:, 1:]], dim=1)


def drop_classes(logits: Tensor, classes: Tensor) -> Tensor:
    """As `merge_unlabelled` for classes that no item has labels for, but their channels go: (N, K, *spatial).

    Args:
        logits: (N, C, *spatial).
        classes: (C,) bool, which K stay; the background is one of them.
    """
    stay = classes.nonzero().flatten().to(logits.device)
    go = torch.cat([stay[:1], (~classes).nonzero().flatten().to(logits.device)])
    logits = logits.float()
    background = logits.index_select(1, go).logsumexp(dim=1, keepdim=True)
    return torch.cat([background, logits.index_select(1, stay[1:])], dim=1)


def coarser_target(target: Tensor, size: Sequence[int]) -> Tensor:
    """Labels (N, *spatial) on a grid of `size` with the same field of view: each takes the nearest one."""
    for axis, (have, want) in enumerate(zip(target.shape[1:], size, strict=True), start=1):
        if have != want:
            index = ((torch.arange(want, device=target.device) + 0.5) * have / want).long()
            target = target.index_select(axis, index)
    return target


def deep_supervision_loss(
    levels: Sequence[Tensor],
    target: Tensor,
    *,
    labelled: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """`dice_ce_loss` of every level, each coarser one counting half of the one before, divided by the shares.

    Args:
        levels: logits (N, C, *spatial) on the grid of the target, then on coarser ones; one is enough.
        target: (N, *spatial) class indices.
        labelled: as of `merge_unlabelled`; None = all.
        class_weights: as of `dice_ce_loss`.
    """
    total, shares = target.new_zeros((), dtype=torch.float32), 0.0
    if labelled is not None and not (classes := labelled.any(dim=0)).all():
        # Channels that no item needs would cost most of the time where few of many classes are labelled.
        labelled, target = labelled[:, classes], (classes.cumsum(0) - 1).to(target.device)[target]
        if class_weights is not None:
            class_weights = class_weights[classes.to(class_weights.device)]
        levels = [drop_classes(logits, classes) for logits in levels]
    for level, logits in enumerate(levels):
        if labelled is not None:
            logits = merge_unlabelled(logits, labelled)
        loss = dice_ce_loss(logits, coarser_target(target, logits.shape[2:]), class_weights=class_weights)
        total, shares = total + 0.5**level * loss, shares + 0.5**level
    return total / shares


@torch.no_grad()
def patch_errors(logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    """1 - soft Dice of each class in each patch, (N, C), from every second voxel along each axis.

    NaN for the background, for classes that are not in the patch and for those that are not labelled.

    Args:
        logits: (N, C, d, h, w).
        target: (N, d, h, w) integers.
        labelled: as of `merge_unlabelled`.
    """
    logits, target = logits[..., ::2, ::2, ::2], target[..., ::2, ::2, ::2]
    probs = merge_unlabelled(logits.float(), labelled).softmax(dim=1).flatten(2)
    onehot = F.one_hot(target.flatten(1).long(), logits.shape[1]).movedim(1, 2).to(probs.dtype)
    voxels = onehot.sum(2)
    errors = 1 - 2 * (probs * onehot).sum(2) / (probs.sum(2) + voxels)
    errors[(voxels == 0) | ~labelled.to(logits.device)] = torch.nan
    errors[:, 0] = torch.nan
    return errors
