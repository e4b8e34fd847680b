"""Cells of 16 x 16 pixels of a picture, row by row, of which two at a time belong together or do not.

The affinity (N, n, n) of the n = h * w cells says how much they do; along it a class activation map (CAM)
spreads to what looks alike. Ru et al. 2022, Learning affinity from attention, arXiv:2203.02664.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from common.losses import coarser_target
from common.par import PAR
from common.pixel_labels import IGNORE, class_shares, label_from_shares, resize

BACKGROUND = 0.35  # value of the background beside a CAM that is propagated for a prediction


def get_down_size(ori_shape: Sequence[int] = (512, 512), stride: int = 16) -> tuple[int, int]:
    """Cells (h, w) of an image of (H, W) pixels; a cell that begins counts."""
    return ceil(ori_shape[0] / stride), ceil(ori_shape[1] / stride)


@lru_cache(maxsize=16)
def get_mask_by_radius(h: int = 20, w: int = 20, radius: int = 8) -> Tensor:
    """(n, n) bool: pairs of cells that are at most `radius` rows and at most `radius` columns apart.

    The tensor is kept for later calls and must not be changed.
    """
    rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    near = [(place[:, None] - place[None, :]).abs() <= radius for place in (rows, columns)]
    return near[0] & near[1]


def affinity_target(label: Tensor, mask: Tensor, size: Sequence[int]) -> Tensor:
    """(N, n, n) uint8: 1 where two cells have one label, 0 where they differ, 255 where this is unknown.

    Args:
        label: (N, H, W) pixel label, 255 = undecided; a cell takes that of the pixel nearest to its middle.
        mask: (n, n) bool, pairs that are near each other; the others are 255.
        size: cells (h, w).
    """
    cells = coarser_target(label, size).flatten(1)
    first, second = cells[:, :, None], cells[:, None, :]
    unknown = (first == IGNORE) | (second == IGNORE) | ~mask.to(label.device)
    return (first == second).to(torch.uint8).masked_fill_(unknown, IGNORE)


@torch.no_grad()
def propagate(
    cam: Tensor, attn_pred: Tensor, mask: Tensor, cls_label: Tensor, background: float, size: Sequence[int]
) -> Tensor:
    """Shares of background and classes (N, 1 + C, h, w) after one step along the affinity.

    Each cell takes the mean of the cells around it, weighted by the squared affinity. The shares of a cell
    sum to a little less than 1, the more so the fewer cells it resembles.

    Args:
        cam: (N, C, H, W) normalised.
        attn_pred: (N, n, n), 0 to 1; stays as it is.
        mask: (n, n) bool, pairs that are near each other.
        background: value of the background, 0 to 1, among those of the CAM.
        size: cells (h, w).
    """
    shares = class_shares(resize(cam, size), cls_label, background)
    weights = (attn_pred.float() * mask.to(attn_pred.device)).square_()
    weights /= weights.sum(1, keepdim=True) + 0.1
    with torch.autocast(cam.device.type, enabled=False):
        return (shares.flatten(2) @ weights).unflatten(2, tuple(size))


def propagated_cam(cam: Tensor, attn_pred: Tensor, radius: int) -> Tensor:
    """CAM (N, 1, H, W) in [0, 1] after it was propagated along `attn_pred` (N, n, n) of its cells, on the
    same scale: above BACKGROUND the structure is more likely than the background."""
    size = get_down_size(cam.shape[2:])
    mask = get_mask_by_radius(*size, radius).to(cam.device)
    is_present = cam.new_ones(len(cam), 1)  # slices without the structure are told apart by their score
    shares = propagate(cam, attn_pred, mask, is_present, BACKGROUND, size).clamp(min=1e-30)  # 0: like nothing
    background, structure = shares.split(1, dim=1)
    # The shares are a softmax over both; back to the CAM, whose range would else be from 0.41 to 0.66.
    return resize(structure.log() - background.log() + BACKGROUND, cam.shape[2:]).clamp(0, 1)


def propagated_label(
    par: PAR,
    image01: Tensor,
    cam: Tensor,
    attn_pred: Tensor,
    mask: Tensor,
    cls_label: Tensor,
    boxes: Tensor | None,
    low: float,
    high: float,
    size: Sequence[int],
) -> Tensor:
    """Pixel label (N, H, W) int64 of a CAM that is propagated along the affinity, then refined by PAR.

    Arguments as of `propagate` and `label_from_shares`; `low` and `high` are values of the background.
    """
    image_size = image01.shape[2:]
    shares = [
        resize(propagate(cam, attn_pred, mask, cls_label, background, size), image_size)
        for background in (low, high)
    ]
    return label_from_shares(par, image01, *shares, cls_label, boxes)
