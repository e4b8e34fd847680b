"""Cells of 16 x 16 pixels of a picture, row by row, of which two at a time belong together or do not."""

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from common.losses import coarser_target
from common.pixel_labels import IGNORE


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
