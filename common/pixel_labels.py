"""Pixel labels of slices whose classes are known: where a class beats the background.

A class label (N, C) holds 1 for the foreground classes in the slice; a pixel label (N, H, W) int64 holds 0
for background, c + 1 for class c, 255 for undecided.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.par import PAR

IGNORE = 255


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, H, W) brought to `size` by linear interpolation, as float32."""
    x = x.float()
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def in_boxes(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """(N, H, W) bool: pixels within boxes (N, 4) of rows and columns y0 y1 x0 x1, the ends not included."""
    y0, y1, x0, x1 = boxes[:, :, None, None].unbind(1)
    y = torch.arange(size[0], device=boxes.device)[None, :, None]
    x = torch.arange(size[1], device=boxes.device)[None, None, :]
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def normalise_cam(cam_raw: Tensor) -> Tensor:
    """Each map (N, C, H, W) from 0 to just below 1; a map of one value becomes 0.

    However weak its evidence, every slice gets a peak near 1: take the class label or the predicted
    probability into account before the map is believed.
    """
    cam = cam_raw - cam_raw.amin((2, 3), keepdim=True)
    return cam / (cam.amax((2, 3), keepdim=True) + 1e-5)


def cam_to_label(
    cam: Tensor,
    cls_label: Tensor,
    boxes: Tensor | None = None,
    *,
    background: float | None = None,
    low: float | None = None,
    high: float | None = None,
    ignore: int = IGNORE,
) -> Tensor:
    """Pixel label (N, H, W) int64 of a normalised CAM.

    Args:
        cam: (N, C, H, W), 0 to 1; classes that are not in the slice count as 0.
        cls_label: (N, C).
        boxes: (N, 4) pixels that come from the slice, see `in_boxes`; the rest is `ignore`.
        background: up to this value a pixel is background.
        low, high: instead of `background`: background up to `low`, `ignore` from there up to `high`.
    """
    if (background is None) == (low is None or high is None):
        raise ValueError("cam_to_label: give either background or both low and high")
    value, label = (cam * cls_label[:, :, None, None]).max(dim=1)
    label = label + 1
    if background is None:
        label[value <= high] = ignore
        background = low
    label[value <= background] = 0
    return label if boxes is None else label.masked_fill(~in_boxes(boxes, label.shape[1:]), ignore)


def slice_peaks_at_1(probs: Tensor) -> Tensor:
    """Probabilities (N, 1, H, W) divided by the one that 1 % of the pixels of a slice exceed, at most 1.

    How sure a network is differs from scan to scan, with brightness and noise; where in a slice it is surest
    does not. Slices without the structure are told apart by their score.
    """
    peaks = probs.flatten(1).quantile(0.99, dim=1).clamp(min=0.02)
    return (probs / peaks.view(-1, 1, 1, 1)).clamp(max=1)


def class_shares(cam: Tensor, cls_label: Tensor, background: float) -> Tensor:
    """(N, 1 + C, H, W): softmax over `background` and the CAM of the classes that are in the slice."""
    absent = cls_label[:, :, None, None] == 0
    cam = cam.float().masked_fill(absent, -torch.inf)
    return F.pad(cam, (0, 0, 0, 0, 1, 0), value=background).softmax(dim=1)


@torch.no_grad()
def label_from_shares(
    par: PAR, image01: Tensor, low: Tensor, high: Tensor, cls_label: Tensor, boxes: Tensor | None
) -> Tensor:
    """Pixel label (N, H, W) of two sets of shares of background and classes, refined at half the resolution.

    A class where it wins against the higher background, background where none wins against the lower one,
    255 between them and outside the boxes. Slices without a class are background and not refined.

    PAR is linear, so that it refines by how much each class beats the background, one map less.

    Args:
        image01: (N, 3, H, W), 0 to 1.
        low, high: (N, 1 + C, h, w) shares against the lower and the higher background.
        cls_label: (N, C).
        boxes: as of `in_boxes`; None = the whole image comes from the slice.
    """
    num, _, height, width = image01.shape
    label = torch.zeros(num, height, width, dtype=torch.int64, device=image01.device)
    chosen = cls_label.any(dim=1).nonzero().flatten()
    if len(chosen):
        half = resize(image01[chosen], (max(height // 2, 1), max(width // 2, 1)))
        margins = torch.cat([shares[chosen, 1:] - shares[chosen, :1] for shares in (low, high)], dim=1)
        refined = resize(par(half, margins), (height, width))
        at_low, at_high = (_winner(part) for part in refined.chunk(2, dim=1))
        label[chosen] = torch.where((at_high == 0) & (at_low > 0), IGNORE, at_high)
    return label if boxes is None else label.masked_fill(~in_boxes(boxes, (height, width)), IGNORE)


def refined_label(
    par: PAR, image01: Tensor, cam: Tensor, cls_label: Tensor, boxes: Tensor | None, low: float, high: float
) -> Tensor:
    """Pixel label (N, H, W) int64 of a normalised CAM (N, C, H, W) that PAR moves to the image's edges.

    `low` and `high` are values of the background, 0 to 1; the rest is as of `label_from_shares`.
    """
    shares = [class_shares(cam, cls_label, background) for background in (low, high)]
    return label_from_shares(par, image01, *shares, cls_label, boxes)


def _winner(margin: Tensor) -> Tensor:
    value, label = margin.max(dim=1)
    return torch.where(value > 0, label + 1, 0)


def zero_pixels_background(label: Tensor, image01: Tensor, boxes: Tensor | None = None) -> Tensor:
    """`label` with background wherever all channels are exactly 0: no tissue, as after skull stripping.

    With `boxes` only within them, so that the border that a crop adds stays undecided.
    """
    empty = (image01 == 0).all(dim=1)
    if boxes is not None:
        empty &= in_boxes(boxes, label.shape[1:])
    return label.masked_fill(empty, 0)
