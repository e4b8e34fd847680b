"""From a CT volume or an image file to the network's input and back: one way for train, validation and
predict.

    volume (z, y, x) HU, RAS+ -> axial slices, 8 bit -> square of the training size -> float32 in [-1, 1]

A slice is stored as a radiologist sees it: row = front to back, column = the patient's right to left.
"""

from pathlib import Path

import numpy as np
import torch

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def volume_to_slices(volume: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """HU (z, y, x) RAS+ -> uint8 (z, row, column): clipped to the window, which becomes 0..255.

    The same window for every slice of every scan, so that a grey value means one density.
    """
    low, high = window_hu
    slices = np.empty(volume.shape, np.uint8)
    for z, plane in enumerate(to_display(volume)):  # slice by slice: no float copy of a whole scan
        slices[z] = np.rint((np.clip(plane.astype(np.float32), low, high) - low) * (255 / (high - low)))
    return slices


def to_display(volume: np.ndarray) -> np.ndarray:
    """(z, y, x) RAS+ -> (z, row, column) as displayed; its own inverse. A view."""
    return volume[:, ::-1, ::-1]


def fit_to_square(image: np.ndarray, size: int, *, is_mask: bool = False) -> np.ndarray:
    """(h, w) uint8 -> (size, size): longer side scaled to `size`, the rest filled with 0 on both sides.

    Keeps the aspect ratio. Masks take the nearest value, images are averaged when shrunk.
    """
    import cv2

    if image.shape == (size, size):
        return image
    height, width, top, left = _fitted(image.shape, size)
    if is_mask:
        method = cv2.INTER_NEAREST_EXACT
    else:
        method = cv2.INTER_AREA if max(image.shape) > size else cv2.INTER_LINEAR
    square = np.zeros((size, size), image.dtype)
    resized = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method)
    square[top : top + height, left : left + width] = resized
    return square


def probs_from_square(probs: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Undo `fit_to_square` for float32 probabilities (size, size) -> (h, w), bilinear."""
    import cv2

    if probs.shape == shape:
        return probs
    height, width, top, left = _fitted(shape, probs.shape[0])
    inside = np.ascontiguousarray(probs[top : top + height, left : left + width])
    return cv2.resize(inside, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def _fitted(shape: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    scale = size / max(shape)
    height, width = (max(1, round(side * scale)) for side in shape)
    return height, width, (size - height) // 2, (size - width) // 2


def normalise(slices: np.ndarray) -> torch.Tensor:
    """uint8 (..., h, w) in 0..255 -> float32 in [-1, 1]. The only place where grey values are scaled."""
    return torch.from_numpy(np.ascontiguousarray(slices)).float().div_(127.5).sub_(1)


def read_image(path: str | Path) -> np.ndarray:
    """An image file as grey uint8 (h, w). 16-bit files: 0..65535 becomes 0..255. Colour: luminance, no alpha.

    Raises:
        FileNotFoundError, ValueError: missing, or not an image.
    """
    import cv2

    pixels = _read_pixels(path)
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / 257).astype(np.uint8)
    elif pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise ValueError(f"{path}: float image outside 0..1; save it as 8-bit or 16-bit")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{path}: pixels of type {pixels.dtype}; save it as 8-bit or 16-bit")
    if pixels.ndim == 3:
        code = {2: None, 3: cv2.COLOR_BGR2GRAY, 4: cv2.COLOR_BGRA2GRAY}.get(pixels.shape[2])
        pixels = pixels[..., 0] if code is None else cv2.cvtColor(pixels, code)
    return pixels


def read_mask(path: str | Path) -> tuple[np.ndarray, bool]:
    """A mask file as uint8 0/1 (h, w), and whether it was clean: only 0 and 1, or only 0 and 255.

    0/1 (also as float) and 0/255 are taken as they are. With other grey values up to 255 (JPEG noise,
    smoothed edges) those above 127 are tumour, and the mask counts as not clean.

    Raises:
        ValueError: several labels (e.g. 0, 1, 2): neither 0/1 nor 0/255.
    """
    pixels = _read_pixels(path)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(axis=-1)
    if pixels.dtype == np.uint16 and pixels.max() > 255:
        pixels = pixels // 257
    values = np.unique(pixels)
    if np.isin(values, (0, 1)).all():
        return (pixels > 0).astype(np.uint8), True
    if pixels.dtype.kind == "f" and 0 <= values[0] and values[-1] <= 1:
        return (pixels > 0.5).astype(np.uint8), False
    if values[-1] <= 127:
        shown = ", ".join(f"{v:g}" for v in values[:8])
        raise ValueError(f"{path}: mask values {shown}; expected 0 and 1, or 0 and 255 (one tumour class)")
    return (pixels > 127).astype(np.uint8), bool(np.isin(values, (0, 255)).all())


def _read_pixels(path: str | Path) -> np.ndarray:
    import cv2

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    # Not cv2.imread: it fails on non-ASCII paths on Windows, and prints instead of raising.
    data = np.fromfile(path, np.uint8)
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ValueError(f"{path}: not a readable image (damaged, or of another format than its name says)")
    return pixels


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """uint8 (h, w) grey or (h, w, 3) RGB to PNG under a temporary name, then renamed.

    Raises:
        OSError: disk full or no permission.
    """
    import cv2

    path = Path(path)
    if pixels.ndim == 3:
        pixels = pixels[..., ::-1]  # OpenCV writes BGR
    _, data = cv2.imencode(".png", np.ascontiguousarray(pixels))
    partial = path.with_name(f".partial_{path.name}")
    partial.write_bytes(data.tobytes())
    partial.replace(path)
