"""Class activation maps (CAM) at several scales, and the pixel labels that are made of them.

A CAM is (N, C, H, W) for the C foreground classes, in float32 whatever the precision of the network; class
labels and pixel labels are as in pixel_labels.py. Ru et al. 2022, Learning affinity from attention,
arXiv:2203.02664.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.par import PAR
from common.pixel_labels import IGNORE, class_shares, in_boxes, label_from_shares, resize
from wsss_medical.affinity import get_down_size


@torch.no_grad()
def multi_scale_cam(
    network: nn.Module, image: Tensor, scales: Sequence[float] = (1.0, 0.5, 1.5)
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """CAM summed over `scales`, at each the larger one of the image and its mirror image.

    Runs in evaluation mode, so that the CAM has no dropout noise and the running statistics of the norms
    stay as they are; every module gets its own mode back afterwards.

    Args:
        network: its `cam_only(image)` gives (cam, affinity (N, n, n), attentions).
        image: (N, 3, H, W), normalised for the network.
        scales: of the image's sides; each order gives the same result.

    Returns:
        The CAM (N, C, H, W), without values below 0 and not normalised; the affinity (N, n, n) at the
        largest scale; the cells (h, w) of that scale, n = h * w.
    """
    if not scales:
        raise ValueError("multi_scale_cam: no scales; give at least one, such as 1.0")
    height, width = image.shape[2:]
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    cam, affinity = 0, None
    try:
        for scale in scales:
            size = (int(scale * height), int(scale * width))
            scaled = resize(image, size)
            found, attn_pred, _ = network.cam_only(torch.cat([scaled, scaled.flip(3)]))
            plain, mirrored = resize(found, (height, width)).chunk(2)
            cam = cam + torch.maximum(plain, mirrored.flip(3)).relu()
            if scale == max(scales):
                affinity, cells = attn_pred[: len(image)].float(), get_down_size(size)
    finally:
        for module, training in modes:
            module.training = training
    return cam, affinity, cells


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


def refined_label(
    par: PAR, image01: Tensor, cam: Tensor, cls_label: Tensor, boxes: Tensor | None, low: float, high: float
) -> Tensor:
    """Pixel label (N, H, W) int64 of a normalised CAM (N, C, H, W) that PAR moves to the image's edges.

    `low` and `high` are values of the background, 0 to 1; the rest is as of `label_from_shares`.
    """
    shares = [class_shares(cam, cls_label, background) for background in (low, high)]
    return label_from_shares(par, image01, *shares, cls_label, boxes)
