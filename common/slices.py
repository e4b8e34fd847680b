"""Axial slices of a volume as pictures: turned as a radiologist sees them, resized, written as PNG.

Row = front to back, column = the patient's right to left.
"""

from pathlib import Path

import numpy as np

from common.files import replacing


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
