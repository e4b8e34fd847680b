"""Random changes of pictures (h, w, 3) uint8 whose 0 means that nothing is there."""

import numpy as np


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """uint8 (h, w, 3) turned about its middle, of the same size; 0 moves in."""
    import cv2

    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(np.ascontiguousarray(image), turn, (width, height))


def vary_grey(image: np.ndarray, contrast: float, gamma: float) -> np.ndarray:
    """uint8 with another contrast and gamma; only 0, which means background, is 0 afterwards."""
    import cv2

    levels = 255 * contrast * (np.arange(256) / 255) ** gamma
    levels = np.rint(levels.clip([0] + 255 * [1], 255)).astype(np.uint8)
    return cv2.LUT(np.ascontiguousarray(image), levels)


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
