"""From scans and .npy files to the network's input and back: one way for preprocessing, training and predict.

    scan (z, y, x) RAS+ -> grey values 0..255 by percentiles of the volume -> axial slices, uint8 -> float32

A slice is stored as a radiologist sees it: row = front to back, column = the patient's right to left.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.nifti import NiftiFile, load_nifti
from common.slices import resize, shape_at, to_display

MEAN, SD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, which encoders are trained on
PERCENTILES = (0.5, 99.5)
EMPTY_SHARE = 0.05  # of the voxels: where values are negative, so many zeros are background, not tissue


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
    low, high = np.percentile(values[inside], PERCENTILES)
    share = (values - low) / max(high - low, 1e-6)
    return np.where(inside, np.rint(share * 255).clip(1, 255), 0).astype(np.uint8)


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


def to_pixel_mm(
    slices: np.ndarray, spacing_mm: Sequence[float], pixel_mm: float | None, *, is_mask: bool = False
) -> np.ndarray:
    """Slices (z, row, column[, 3]) of a scan with `spacing_mm` (z y x) -> square pixels, the same view."""
    if pixel_mm is None:
        return slices
    shape = shape_at(slices.shape[1:3], spacing_mm[1:], pixel_mm)
    return np.stack([resize(plane, shape, is_mask=is_mask) for plane in slices])


def to_scan_grid(maps: np.ndarray, scan: NiftiFile) -> np.ndarray:
    """Undo the turning and resampling of `read_scan`: float (z, row, column) -> (z, y, x) of the scan."""
    return to_display(np.stack([resize(plane, scan.shape[1:]) for plane in maps]))


def robust_read_npy(file_path: str | Path) -> np.ndarray:
    """A slice from a .npy file of whatever type as uint8 (h, w, 3).

    uint8 is taken as it is, booleans and floats within 0..1 times 255, everything else by `to_grey`. Shapes:
    (h, w), (h, w, 1), (h, w, 3), (1, h, w) and (3, h, w).

    Raises:
        ValueError: an object array (which could run code), another shape, or no .npy file.
    """
    try:
        array = np.load(file_path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file_path}: not a .npy file of plain numbers ({error})") from error
    shape = array.shape
    if array.ndim == 3 and shape[-1] not in (1, 3) and shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or array.dtype.kind not in "buif" or 0 in shape:
        raise ValueError(
            f"{file_path}: {array.dtype} of shape {shape}; a slice is (h, w) or (h, w, 3) of real numbers"
        )
    if array.dtype.kind == "f":
        array = np.where(np.isfinite(array), array, 0)
    if array.dtype.kind in "bf" and array.min() >= 0 and array.max() <= 1:
        array = np.rint(array * np.float32(255)).astype(np.uint8)
    elif array.dtype != np.uint8:
        array = to_grey(array)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else np.ascontiguousarray(array)


def image01(image: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> float32 in [0, 1]."""
    return image.float() / 255


def to_network_input(image: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> float32 with the mean and deviation of ImageNet, on the tensor's device."""
    mean, sd = (torch.tensor(v, device=image.device).reshape(1, 3, 1, 1) for v in (MEAN, SD))
    return (image.float() - mean) / sd


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """uint8 (h, w, 3) turned about its middle, of the same size; 0 moves in."""
    import cv2

    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(np.ascontiguousarray(image), turn, (width, height))


def vary_grey(image: np.ndarray, contrast: float, gamma: float) -> np.ndarray:
    """uint8 with another contrast and gamma; only 0, which means background, is 0 afterwards."""
    values = 255 * contrast * (np.arange(256) / 255) ** gamma
    return np.rint(values.clip([0] + 255 * [1], 255)).astype(np.uint8)[image]


def random_crop(
    image: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A square of (h, w, 3); where a side is shorter than `size` the image lies at a random place in 0.

    Returns:
        (size, size, 3); y0 y1 x0 x1 of the image in it.
    """
    square, source, target = np.zeros((size, size, image.shape[2]), image.dtype), [], []
    for side in image.shape[:2]:
        length, start = min(side, size), int(rng.integers(abs(side - size) + 1))
        source.append(slice(start, start + length) if side > size else slice(0, length))
        target.append(slice(start, start + length) if side < size else slice(0, length))
    square[tuple(target)] = image[tuple(source)]
    return square, tuple(end for place in target for end in (place.start, place.stop))
