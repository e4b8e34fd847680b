"""Axial slices of a volume as pictures: turned as a radiologist sees them, resized, written as PNG.

Row = front to back, column = the patient's right to left.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import check_keys, check_names, check_numbers, open_npy, replacing
from common.intensity import to_grey
from common.nifti import NiftiFile, load_nifti
from common.nifti_checks import check_memory
from common.nifti_forms import grid_difference

# What is noted of slices so that other scans can be turned into such ones; None: somebody else's slices.
NOTES = {"dataset": str | None, "channels": list | None, "channel_numbers": list | None}
NOTES |= {"pixel_mm": float | int | None, "step": int | None}


def check_slice_notes(notes: dict, where: str) -> None:
    """Refuse NOTES, of slices or of a checkpoint, with which no scan could be turned into slices.

    Raises:
        ValueError: one has another type or no meaning; `where` stands in front.
    """
    check_keys(notes, NOTES, where)
    check_names(notes["channels"] or [], f'{where}: "channels"')
    if (pixel_mm := notes["pixel_mm"]) is not None:
        check_numbers([pixel_mm], 1, f'{where}: "pixel_mm"')
        if pixel_mm <= 0:
            raise ValueError(f'{where}: "pixel_mm" is {pixel_mm}, a size above 0 is needed')


def to_display(volume: np.ndarray) -> np.ndarray:
    """(z, y, x) RAS+ -> (z, row, column) as displayed; its own inverse. A view."""
    return volume[:, ::-1, ::-1]


def to_pixel_size(
    image: np.ndarray, pixel_size_mm: tuple[float, float], pixel_mm: float, *, is_mask: bool = False
) -> np.ndarray:
    """(h, w) with pixels of `pixel_size_mm` (row, column) -> square pixels of `pixel_mm`, same field of view.

    The pixel size really got is off by half a pixel of the side at most, since the field of view is kept.
    """
    return resize(image, shape_at(image.shape, pixel_size_mm, pixel_mm), is_mask=is_mask)


def to_pixel_mm(
    slices: np.ndarray, spacing_mm: Sequence[float], pixel_mm: float | None, *, is_mask: bool = False
) -> np.ndarray:
    """Slices (z, row, column[, 3]) of a scan with `spacing_mm` (z y x) -> square pixels, the same view."""
    if pixel_mm is None:
        return slices
    shape = shape_at(slices.shape[1:3], spacing_mm[1:], pixel_mm)
    return np.stack([resize(plane, shape, is_mask=is_mask) for plane in slices])


def shape_at(shape: tuple[int, int], pixel_size_mm: tuple[float, float], pixel_mm: float) -> tuple[int, int]:
    """Rows and columns of square pixels of `pixel_mm` in the field of view of `shape` old pixels."""
    rows, columns = (
        max(1, round(num * old / pixel_mm)) for num, old in zip(shape, pixel_size_mm, strict=True)
    )
    return rows, columns


def resize(image: np.ndarray, shape: tuple[int, int], *, is_mask: bool = False) -> np.ndarray:
    """(h, w) -> `shape` with the field of view kept: linear where a side grows, the mean of the pixels that
    fall into one where it shrinks; masks take the nearest value."""
    import cv2

    if image.shape == tuple(shape):
        return image
    image = np.ascontiguousarray(image)
    if is_mask:
        return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    # One after the other: INTER_AREA takes no means where the other side grows.
    smaller = min(shape[0], image.shape[0]), min(shape[1], image.shape[1])
    image = cv2.resize(image, smaller[::-1], interpolation=cv2.INTER_AREA)
    return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_LINEAR)


def volume_to_slices(volume: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """A volume (z, y, x) RAS+, or a list of three as channels -> uint8 (z, row, column[, 3]) by `to_grey`.

    Percentiles of the volume, not of each slice, keep the slices of a patient comparable. `to_display` turns
    slices back.
    """
    channels = [volume] if isinstance(volume, np.ndarray) else list(volume)
    grey = [to_display(to_grey(channel)) for channel in channels]
    return np.ascontiguousarray(grey[0] if len(grey) == 1 else np.stack(grey, axis=-1))


def read_scan(
    images: Sequence[tuple[Path, int | None]], pixel_mm: float | None = None
) -> tuple[np.ndarray, NiftiFile]:
    """A scan as slices for a 2-D network: one way for preprocessing and prediction.

    Args:
        images: (file, channel of a 4-D file or None), one or three.
        pixel_mm: side of the square pixels that the slices are resampled to; None keeps their own.

    Returns:
        uint8 (z, row, column[, 3]); the scan, for `to_scan_grid`.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, the channels lie on different grids, or the
            slices would not fit into memory.
    """
    scans = [load_nifti(path, channel) for path, channel in images]
    for scan in scans[1:]:
        if difference := grid_difference(scan, scans[0]):
            raise ValueError(f"{scan.path}: lies on another grid than {scans[0].path} ({difference})")
    if pixel_mm is not None:
        rows, columns = shape_at(scans[0].shape[1:], scans[0].spacing_mm[1:], pixel_mm)
        check_memory(
            f"{scans[0].path}: turning it into slices with pixels of {pixel_mm:g} mm",
            2 * len(scans) * scans[0].shape[0] * rows * columns,  # once as a list, once as an array
            "cut the scan to the part that matters, or use larger pixels",
        )
    slices = volume_to_slices([scan.array for scan in scans])
    return to_pixel_mm(slices, scans[0].spacing_mm, pixel_mm), scans[0]


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
    array = np.array(open_npy(file_path))
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


def read_npy_mask(file_path: str | Path, shape: Sequence[int] | None = None) -> np.ndarray:
    """A mask from a .npy file as uint8 (h, w) of 0 and 1; of 0 and 255 the latter becomes 1.

    Args:
        shape: of its slice, (h, w); None: any.

    Raises:
        OSError: no such file.
        ValueError: no .npy file, another shape, or other values, such as several classes or one to be
            ignored.
    """
    array = open_npy(file_path)
    if array.ndim != 2 or array.dtype.kind not in "buif":
        raise ValueError(f"{file_path}: {array.dtype} of shape {array.shape}; a mask is (h, w) of numbers")
    if shape is not None and array.shape != tuple(shape):
        raise ValueError(f"{file_path}: mask {array.shape} and slice {tuple(shape)} differ in shape")
    values = np.unique(array)
    if not any(np.isin(values, pair).all() for pair in ((0, 1), (0, 255))):
        shown = ", ".join(f"{v:g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
        raise ValueError(
            f"{file_path}: mask values {shown}; expected 0 and 1, or 0 and 255: make masks of one structure"
        )
    return (array > 0).astype(np.uint8)


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """uint8 (h, w) grey or (h, w, 3) RGB to PNG, written in one step.

    Raises:
        OSError: disk full or no permission.
    """
    import cv2

    if pixels.ndim == 3:
        pixels = pixels[..., ::-1]  # OpenCV writes BGR
    _, data = cv2.imencode(".png", np.ascontiguousarray(pixels))
    with replacing(path) as partial:
        partial.write_bytes(data.tobytes())
