"""From a CT volume or an image file to the network's input and back: one way for train, validation and
predict.

    volume (z, y, x) HU, RAS+ -> axial slices, 8 bit -> square of the training size -> float32 in [-1, 1]

A slice is stored as a radiologist sees it: row = front to back, column = the patient's right to left.
"""

from pathlib import Path

import numpy as np
import torch

from common.hu import window
from common.slices import resize, to_display

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
TOPS_16_BIT = (255, 4095, 65535)
ONE_CLASS = "expected 0 and 1, or 0 and 255 (one tumour class); make such masks of them"
MOST_CLASSES = 12  # a mask with more values has smoothed edges or noise rather than classes


def volume_to_slices(volume: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """HU (z, y, x) RAS+ -> uint8 (z, row, column): clipped to the window, which becomes 0..255.

    The same window for every slice of every scan, so that a grey value means one density.
    """
    slices = np.empty(volume.shape, np.uint8)
    for z, plane in enumerate(to_display(volume)):  # slice by slice: no float copy of a whole scan
        slices[z] = np.rint(window(plane, *window_hu) * 255)
    return slices


def fit_to_square(
    image: np.ndarray, size: int, scale: float | None = None, *, cut: bool = False, is_mask: bool = False
) -> np.ndarray:
    """(h, w) uint8 -> (size, size): scaled, put into the middle, the rest filled by `fill_around`.

    Args:
        scale: new pixels for an old one, the same for all slices of a data set, so that the network sees one
            pixel size. None, where pixel sizes are not known: the longer side becomes `size`.
        cut: whether a slice that is larger than the square is cut, as much on either side (for training,
            where all squares have one size). Otherwise the square grows along the axes that need it to the
            next multiple of 16, and need not be one any more.
    """
    rows, columns = _scaled(image.shape, size, scale)
    height, width = (size, size) if cut else (_side(rows, size), _side(columns, size))
    image = resize(image, (rows, columns), is_mask=is_mask)
    top, left = max(0, rows - height) // 2, max(0, columns - width) // 2
    return fill_around(image[top : top + height, left : left + width], height, width)


def probs_from_square(
    probs: np.ndarray, shape: tuple[int, int], size: int, scale: float | None = None
) -> np.ndarray:
    """Undo `fit_to_square` (without `cut`) of an image of `shape` for float32 probabilities -> (h, w)."""
    rows, columns = _scaled(shape, size, scale)
    top, left = (probs.shape[0] - rows) // 2, (probs.shape[1] - columns) // 2
    return resize(probs[top : top + rows, left : left + columns], shape)


def _scaled(shape: tuple[int, int], size: int, scale: float | None) -> tuple[int, int]:
    factor = size / max(shape) if scale is None else scale
    rows, columns = (max(1, round(num * factor)) for num in shape)
    return rows, columns


def _side(pixels: int, size: int) -> int:
    return size if pixels <= size else -(-pixels // 16) * 16


def fill_around(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) -> (height, width) with the image, or mask, in the middle: what the network sees beyond a slice.

    The edge is repeated: where a field of view cuts the body, the body goes on, and air would be wrong.
    """
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    around = (top, height - image.shape[0] - top), (left, width - image.shape[1] - left)
    return np.pad(image, around, mode="edge") if any(sum(around, ())) else image


def normalise(slices: np.ndarray) -> torch.Tensor:
    """uint8 (..., h, w) in 0..255 -> float32 in [-1, 1]. The only place where grey values are scaled."""
    return torch.from_numpy(np.ascontiguousarray(slices)).float().div_(127.5).sub_(1)


def read_image(path: str | Path) -> np.ndarray:
    """An image file as grey uint8 (h, w). Colour: luminance, no alpha.

    Of 16-bit files the range counts that they really use: 0..255, 0..4095 (12 bits, as scanners have them) or
    0..65535, whichever the highest value needs, becomes 0..255.

    Raises:
        FileNotFoundError, ValueError: missing, or not an image.
    """
    import cv2

    pixels = _read_pixels(path)
    if pixels.dtype == np.uint16:
        top = next(top for top in TOPS_16_BIT if pixels.max() <= top)
        pixels = np.rint(pixels * (255 / top)).astype(np.uint8)
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
    """A mask file as uint8 0/1 (h, w), and whether it was clean: only 0 and 1, or only 0 and 255 (65535).

    0/1 (also as float) and 0/255 are taken as they are. With other grey values (JPEG noise, smoothed edges)
    those above the middle are tumour, and the mask counts as not clean.

    Raises:
        ValueError: several classes, whether as grey values, as colours or with a value to be ignored. What
            they mean cannot be known here, and taking all or some of them for tumour would be a guess.
    """
    pixels = _read_pixels(path)
    is_exact = Path(path).suffix.lower() not in (".jpg", ".jpeg")
    if pixels.ndim == 3:
        pixels = _grey_mask(pixels, path, is_exact)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError(f"{path}: holds NaN or infinite mask values; {ONE_CLASS}")
    values = np.unique(pixels)
    top = 65535 if pixels.dtype == np.uint16 and values[-1] > 255 else 255
    shown = ", ".join(f"{v:g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
    if np.isin(values, (0, 1)).all():
        return (pixels > 0).astype(np.uint8), True
    if pixels.dtype.kind == "f" and 0 <= values[0] and values[-1] <= 1:
        return (pixels > 0.5).astype(np.uint8), False
    if values[0] < 0 or values[-1] > top or values[-1] <= top // 2:
        raise ValueError(f"{path}: mask values {shown}; {ONE_CLASS}")
    if is_exact and len(values) <= MOST_CLASSES:
        between = [v for v in values if 0 < v < top]
        # Of two values the higher one is tumour, except that 1 and 255 may be tumour and to be ignored.
        is_unclear = len(values) > 2 and any(_has_area(pixels == v) for v in between)
        if is_unclear or list(values) in ([0, 1, top], [1, top]):
            raise ValueError(
                f"{path}: mask values {shown} are several classes, or one to be ignored; {ONE_CLASS}"
            )
    return (pixels > top // 2).astype(np.uint8), bool(np.isin(values, (0, top)).all())


def _grey_mask(pixels: np.ndarray, path: str | Path, is_exact: bool) -> np.ndarray:
    """(h, w) of a mask in colour: the largest of its three values. Several colours are refused."""
    colours, alpha = pixels[..., : 1 if pixels.shape[2] == 2 else 3], pixels[..., 3:]
    if alpha.size and alpha.min() < alpha.max() and colours.min() == colours.max():
        raise ValueError(f"{path}: the mask lies in its transparency alone; {ONE_CLASS}")
    grey = colours.max(axis=-1)
    if is_exact and (colours.min(axis=-1) < grey).any():
        kinds = np.unique(colours[grey > 0], axis=0)
        if 1 < len(kinds) <= MOST_CLASSES:
            shown = "; ".join(" ".join(map(str, kind[::-1])) for kind in kinds[:4])
            what = f"{len(kinds)} colours (red green blue: {shown}) are several classes"
            raise ValueError(f"{path}: {what}; {ONE_CLASS}")
    return grey


def _has_area(mask: np.ndarray) -> bool:
    """Whether (h, w) holds a square of 3 x 3: the pixels of a smoothed edge never lie so close together."""
    rows = mask[2:] & mask[1:-1] & mask[:-2]
    return bool((rows[:, 2:] & rows[:, 1:-1] & rows[:, :-2]).any())


def _read_pixels(path: str | Path) -> np.ndarray:
    import cv2

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    # Not cv2.imread: it fails on non-ASCII paths on Windows, and prints instead of raising.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the errors below say it better
    data = np.fromfile(path, np.uint8)
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ValueError(f"{path}: not a readable image (damaged, or of another format than its name says)")
    return pixels
