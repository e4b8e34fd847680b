"""Losses of the weakly supervised training, all in float32 and finite for every batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.pixel_labels import IGNORE, cam_to_label, normalise_cam, resize
from common.schedules import learning_rate


def classification_loss(logits: Tensor, cls_label: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (N, C) with labels (N, C) 0 or 1."""
    return F.binary_cross_entropy_with_logits(logits.float(), cls_label.float())


def get_seg_loss(pred: Tensor, label: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Cross-entropy over background pixels and over foreground pixels, each a mean over its own; their mean.

    Where a batch has no pixel of one kind, the mean of the other kind alone; 0 where it has neither.

    Args:
        pred: (N, K, h, w) logits, brought to the size of the label.
        label: (N, H, W) integers: 0 background, others foreground, `ignore_index` left out.
    """
    label = label.long()
    pred = resize(pred, label.shape[1:])
    per_pixel = F.cross_entropy(pred, label, ignore_index=ignore_index, reduction="none")
    kinds = [label == 0, (label > 0) & (label != ignore_index)]
    means = sum((per_pixel * kind).sum() / kind.sum().clamp(min=1) for kind in kinds)
    return means / sum(kind.any().float() for kind in kinds).clamp(min=1)


def seg_loss_by_slices(pred: Tensor, label: Tensor, cls_label: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Mean cross-entropy of labelled pixels: of slices with a class, plus half that of slices without any.

    A label that is the same all over negative slices must not drown the few pixels of the others, and inside
    of a slice foreground and background count as they are: balanced, the foreground would grow too large.

    Args:
        pred: (N, K, h, w) logits; label: (N, H, W), see `get_seg_loss`; cls_label: (N, C).
    """
    label = label.long()
    per_pixel = F.cross_entropy(
        resize(pred, label.shape[1:]), label, ignore_index=ignore_index, reduction="none"
    )
    is_positive = cls_label.any(dim=1)[:, None, None]
    is_known = label != ignore_index
    kinds = [is_known & is_positive, is_known & ~is_positive]
    with_class, without = ((per_pixel * kind).sum() / kind.sum().clamp(min=1) for kind in kinds)
    return with_class + without / 2


def affinity_loss(attn_pred: Tensor, target: Tensor) -> Tensor:
    """Mean error of the pairs of cells that belong together and of those that do not, both counting half.

    Args:
        attn_pred: (N, n, n), 0 to 1.
        target: (N, n, n): 1 together, 0 apart, other values left out.
    """
    attn_pred = attn_pred.float()
    together, apart = target == 1, target == 0
    missed = ((1 - attn_pred) * together).sum() / (together.sum() + 1)
    false = (attn_pred * apart).sum() / (apart.sum() + 1)
    return (missed + false) / 2


def negative_cam_loss(cam: Tensor, cls_label: Tensor) -> Tensor:
    """Mean of the positive values of the CAM (N, C, h, w) over slices without the class; 0 if all have it."""
    absent = (cls_label == 0).float()
    return (cam.float().relu().mean((2, 3)) * absent).sum() / absent.sum().clamp(min=1)


def token_contrast_loss(
    tokens: Tensor, aux_cam: Tensor, cls_label: Tensor, mask: Tensor, low: float = 0.25, high: float = 0.7
) -> Tensor:
    """Tokens of one label are to look alike, those of different labels not: keeps them from all being equal.

    Args:
        tokens: (N, D, h, w), of the last stage.
        aux_cam: (N, C, h, w) CAM of an earlier stage, which decides by `low` and `high` what a token is.
        cls_label: (N, C).
        mask: (n, n) bool, pairs of tokens that are near each other.

    Source: Ru et al. 2023, Token contrast, arXiv:2303.01267.
    """
    cam = normalise_cam(aux_cam.detach().float().relu())
    label = cam_to_label(cam, cls_label, low=low, high=high).flatten(1)
    first, second = label[:, :, None], label[:, None, :]
    pairs = (first != IGNORE) & (second != IGNORE) & mask.to(label.device)
    pairs = pairs & ~torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
    together, apart = pairs & (first == second), pairs & (first != second)
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float().flatten(2), dim=1)
        cosine = (unit.transpose(1, 2) @ unit).abs()
    alike = (cosine * together).sum() / (together.sum() + 1)
    confused = (cosine * apart).sum() / (apart.sum() + 1)
    return (1 - alike + confused) / 2


def high_threshold(progress: float, start: float = 0.7, end: float = 0.55) -> float:
    """CAM value above which a pixel is foreground: a cosine from `start` to `end` over `progress` 0 to 1.

    Source: Wu et al. 2024, DuPL, arXiv:2403.11184.
    """
    return learning_rate("cosine_annealing", progress, start, end)
