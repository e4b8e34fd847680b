"""From stored grey values to the network's input, in training, validation and prediction alike.

CT hold HU, which mean the same in every scan: all are scaled by one fingerprint of the training cases. MR
have no unit: each scan is scaled by its own values. A modality is "ct" or "mr".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CT_RANGE = (-1024.0, 1500.0)  # HU: what preprocessing keeps, so that metal does not smear
EMPTY_SHARE = 0.05  # of the voxels: where values are negative, so many zeros are background, not tissue
MR_SAMPLE = 2_000_000  # most voxels that the scaling of an MR scan looks at


class Scaling(NamedTuple):
    """Grey values are cut to [low, high], then `mean` becomes 0 and `sd` 1."""

    low: float
    high: float
    mean: float
    sd: float


def fingerprint(samples: Sequence[np.ndarray]) -> Scaling:
    """Scaling of CT from values inside of what is labelled, one array for each training case.

    Percentiles 0.5 and 99.5, then mean and standard deviation of what is cut to them.

    Raises:
        ValueError: no value at all.
    """
    values = np.concatenate([np.ravel(s) for s in samples]).astype(np.float64) if samples else np.empty(0)
    if values.size == 0:
        raise ValueError("no training case has a labelled voxel, so there are no grey values to scale by")
    return _scaling(values, values)


def mr_scaling(volume: np.ndarray) -> Scaling:
    """Scaling of one MR scan (z, y, x) by its own values; voxels that are NaN or infinite do not count.

    Percentiles 0.5 and 99.5 of the whole scan; mean and standard deviation of what is brighter than the
    scan's mean, which leaves out the air.
    Of a large scan every second, third, ... voxel along each axis is looked at.

    Raises:
        ValueError: no finite value.
    """
    step = max(1, round((volume.size / MR_SAMPLE) ** (1 / 3)))
    values = np.asarray(volume[::step, ::step, ::step], np.float64)
    values = values[np.isfinite(values)]
    if values.size == 0:
        raise ValueError("the scan holds no finite value")
    body = values[values > values.mean()]
    return _scaling(values, body if body.size else values)


def shown_range(volume: np.ndarray) -> tuple[float, float]:
    """Which grey values are black and white in pictures of an MR (z, y, x)."""
    low, high, *_ = mr_scaling(volume)
    return low, max(high, low + 1e-6)  # of a region without contrast


def to_grey(values: np.ndarray) -> np.ndarray:
    """Any numbers -> uint8 of the same shape by their own percentiles.

    Zeros, NaN and infinity are background and become 0; the rest is cut to its percentiles 0.5 and 99.5 and
    becomes 1..255, so that 0 means "nothing here". Only where values are negative and zeros are rare, as in
    CT, zero is a value like others.
    """
    values = np.where(np.isfinite(values), values, 0).astype(np.float32, copy=False)
    inside = values != 0
    if values.size and values.min() < 0 and inside.mean() > 1 - EMPTY_SHARE:
        inside[:] = True
    if not inside.any():
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(values[inside], [0.5, 99.5])
    share = (values - low) / max(high - low, 1e-6)
    return np.where(inside, np.rint(share * 255).clip(1, 255), 0).astype(np.uint8)


def _scaling(values: np.ndarray, body: np.ndarray) -> Scaling:
    low, high = np.percentile(values, [0.5, 99.5])
    inside = np.clip(body, low, high)
    return Scaling(float(low), float(high), float(inside.mean()), float(max(inside.std(), 1e-6)))


def stored_range(modality: str, scaling: Scaling | None) -> tuple[float, float]:
    """To what grey values are cut before resampling: `CT_RANGE`, or the percentiles of the MR scan."""
    if modality == "ct":
        return CT_RANGE
    return scaling.low, scaling.high


def scale(image: Tensor, scaling: Scaling | Tensor) -> Tensor:
    """Grey values (N, 1, d, h, w) -> network input, float32.

    Args:
        scaling: one for all items, or (N, 4) with a `Scaling` in each row.
    """
    values = torch.as_tensor(scaling, dtype=torch.float32, device=image.device)
    low, high, mean, sd = values.reshape(-1, 4).T.reshape(4, -1, 1, 1, 1, 1)
    return (torch.minimum(torch.maximum(image.float(), low), high) - mean) / sd


def scale_by_own_values(image: Tensor) -> Tensor:
    """Grey values (N, C, d, h, w) of MR windows -> network input, float32; each window by itself.

    Cut to percentiles 1 and 99 of what is brighter than a tenth of the window's brightest half percent, which
    leaves out the air and what skull stripping has blanked; its mean becomes 0 and its standard deviation 1.
    A window without contrast becomes 0. No statistics of the whole scan are needed: with or without skull and
    neck in the field of view, the same brain gives the same input.
    """
    flat = image.float().flatten(2)
    # Every fourth voxel is enough for percentiles and makes sorting cheap.
    ordered = flat[..., :: max(1, flat.shape[-1] // 65536)].sort(-1).values
    count = ordered.shape[-1]
    dark, bright = ordered[..., :1], ordered[..., [round(0.995 * (count - 1))]]
    inside = ordered > dark + 0.1 * (bright - dark)
    first = count - inside.sum(-1, keepdim=True)  # values are in order: those inside come last
    span = count - 1 - first
    low = ordered.gather(-1, (first + (0.01 * span).round().long()).clamp(0, count - 1))
    high = ordered.gather(-1, (first + (0.99 * span).round().long()).clamp(0, count - 1))
    number = inside.sum(-1, keepdim=True).clamp(min=1)
    cut = ordered.clamp(low, high) * inside
    mean = cut.sum(-1, keepdim=True) / number
    sd = (((cut - mean).square() * inside).sum(-1, keepdim=True) / number).sqrt()
    scaled = (flat.clamp(low, high) - mean) / sd.clamp(min=1e-6)
    return torch.where(high > low, scaled, 0.0).view(image.shape)
