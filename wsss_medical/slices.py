"""From scans and .npy files to the network's input and back: one way for preprocessing, training and predict.

    scan (z, y, x) RAS+ -> grey values 0..255 by percentiles of the volume -> axial slices, uint8 -> float32

A slice is stored as a radiologist sees it: row = front to back, column = the patient's right to left.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.intensity import to_grey
from common.nifti import NiftiFile, load_nifti
from common.slices import resize, to_display, to_pixel_mm
from common.slices import robust_read_npy as robust_read_npy  # slices come from files as well

MEAN, SD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, which encoders are trained on


def volume_to_slices(volume: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """A volume (z, y, x) RAS+, or a list of three as channels -> uint8 (z, row, column[, 3]) by `to_grey`.

    Percentiles of the volume, not of each slice, keep the slices of a patient comparable. `to_display` of
    common/slices.py turns slices back.
    """
    channels = [volume] if isinstance(volume, np.ndarray) else list(volume)
    grey = [to_display(to_grey(channel)) for channel in channels]
    return np.ascontiguousarray(grey[0] if len(grey) == 1 else np.stack(grey, axis=-1))


def read_scan(
    images: Sequence[tuple[Path, int | None]], pixel_mm: float | None = None
) -> tuple[np.ndarray, NiftiFile]:
    """The slices of a scan as preprocessing stores them and predict needs them.

    Args:
        images: (file, channel of a 4-D file or None), one or three.
        pixel_mm: side of the square pixels that the slices are resampled to; None keeps their own.

    Returns:
        uint8 (z, row, column[, 3]); the scan, for `to_scan_grid`.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, or the channels differ in shape.
    """
    scans = [load_nifti(path, channel) for path, channel in images]
    for scan in scans[1:]:
        if scan.shape != scans[0].shape:
            raise ValueError(f"{scan.path}: shape {scan.shape}, but {scans[0].path} has {scans[0].shape}")
    slices = volume_to_slices([scan.array for scan in scans])
    return to_pixel_mm(slices, scans[0].spacing_mm, pixel_mm), scans[0]


def to_scan_grid(maps: np.ndarray, scan: NiftiFile) -> np.ndarray:
    """Undo the turning and resampling of `read_scan`: float (z, row, column) -> (z, y, x) of the scan."""
    return to_display(np.stack([resize(plane, scan.shape[1:]) for plane in maps]))


def image01(image: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> float32 in [0, 1]."""
    return image.float() / 255


def to_network_input(image: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> float32 with the mean and deviation of ImageNet, on the tensor's device."""
    mean, sd = (torch.tensor(v, device=image.device).reshape(1, 3, 1, 1) for v in (MEAN, SD))
    return (image.float() - mean) / sd
