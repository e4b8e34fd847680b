"""Random changes of pictures (h, w, 3) uint8 whose 0 means that nothing is there."""

import numpy as np


def rotate(image: np.ndarray, degrees: float, *, fill: int = 0, is_mask: bool = False) -> np.ndarray:
    """uint8 (h, w) or (h, w, 3) turned about its middle, of the same size; `fill` moves in. Masks take the
    nearest value."""
    import cv2

    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    flags = cv2.INTER_NEAREST if is_mask else cv2.INTER_LINEAR
    return cv2.warpAffine(
        np.ascontiguousarray(image), turn, (width, height), flags=flags, borderValue=(fill,) * 3
    )


def vary_grey(image: np.ndarray, contrast: float, gamma: float, shift: float = 0.0) -> np.ndarray:
    """uint8 with another gamma, contrast about 30 % of the range, and `shift` of the range added; only 0,
    which means background, is 0 afterwards."""
    import cv2

    levels = (np.arange(256) / 255) ** gamma
    levels = 255 * ((levels - 0.3) * contrast + 0.3 + shift)
    levels = np.rint(levels.clip(1, 255)).astype(np.uint8)
    levels[0] = 0
    return cv2.LUT(np.ascontiguousarray(image), levels)


def random_square(
    shape: tuple[int, ...], size: int, rng: np.random.Generator
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a picture of `shape` (h, w, ...) is cut so that it fills a square of side `size`; where it is
    smaller, a random place in the square.

    Returns:
        (rows, columns) of the picture, and those of the square that they fill; for `cut_square`.
    """
    source, target = [], []
    for side in shape[:2]:
        length, start = min(side, size), int(rng.integers(abs(side - size) + 1))
        source.append(slice(start, start + length) if side > size else slice(0, length))
        target.append(slice(start, start + length) if side < size else slice(0, length))
    return tuple(source), tuple(target)


def cut_square(
    image: np.ndarray, size: int, source: tuple[slice, slice], target: tuple[slice, slice], fill: int = 0
) -> np.ndarray:
    """(size, size, ...) with `image[source]` at `target` and `fill` around it."""
    square = np.full((size, size, *image.shape[2:]), fill, image.dtype)
    square[target] = image[source]
    return square
