"""Pixel labels of slices that are made of class activation maps (CAM).

Ru et al. 2022, Learning affinity from attention, arXiv:2203.02664.
"""

from torch import Tensor

from common.par import PAR
from common.pixel_labels import class_shares, label_from_shares


def refined_label(
    par: PAR, image01: Tensor, cam: Tensor, cls_label: Tensor, boxes: Tensor | None, low: float, high: float
) -> Tensor:
    """Pixel label (N, H, W) int64 of a normalised CAM (N, C, H, W) that PAR moves to the image's edges.

    `low` and `high` are values of the background, 0 to 1; the rest is as of `label_from_shares`.
    """
    shares = [class_shares(cam, cls_label, background) for background in (low, high)]
    return label_from_shares(par, image01, *shares, cls_label, boxes)
