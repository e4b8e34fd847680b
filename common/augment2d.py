"""Random changes of pictures (h, w, 3) uint8 whose 0 means that nothing is there."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.slices import resize


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


class Move(NamedTuple):
    """A change of place, the same one for a picture and its labels; see `draw_move`.

    Attributes:
        shape: (h, w) that the picture is resized to.
        is_flipped: left and right exchanged after that; degrees: by which it is turned then.
        size, source, target: how a square is cut out of it at last, see `cut_square`.
    """

    shape: tuple[int, int]
    is_flipped: bool
    degrees: float
    size: int
    source: tuple[slice, slice]
    target: tuple[slice, slice]

    def applied(self, picture: np.ndarray, fill: int = 0, *, is_mask: bool = False) -> np.ndarray:
        """uint8 (h, w) or (h, w, 3) -> a square of side `size`, `fill` where the picture does not reach."""
        picture = resize(picture, self.shape, is_mask=is_mask)
        if self.is_flipped:
            picture = picture[:, ::-1]
        if self.degrees:
            picture = rotate(picture, self.degrees, fill=fill, is_mask=is_mask)
        return cut_square(picture, self.size, self.source, self.target, fill)

    @property
    def box(self) -> list[int]:
        """y0 y1 x0 x1 of the picture in the square, the ends not included."""
        return [end for place in self.target for end in (place.start, place.stop)]


def draw_move(
    shape: tuple[int, ...],
    size: int,
    rng: np.random.Generator,
    *,
    scale_range: Sequence[float],
    flip: float,
    rotate_deg: float,
) -> Move:
    """A random square of side `size` out of a picture of `shape` (h, w, ...).

    Args:
        scale_range: factors on the sides of the picture, drawn evenly.
        flip: probability of a mirror image.
        rotate_deg: largest rotation to either side.
    """
    scale = rng.uniform(*scale_range)
    shape = tuple(max(1, int(scale * side)) for side in shape[:2])
    is_flipped, degrees = rng.random() < flip, rng.uniform(-rotate_deg, rotate_deg)
    return Move(shape, is_flipped, degrees, size, *random_square(shape, size, rng))
