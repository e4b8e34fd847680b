"""What the synthetic scans of the tasks have in common: shapes, paint, noise, and a folder written whole.

A shape is given by distances in mm that are negative inside. `axes_mm` are three arrays with the centres of
the voxels along z, y and x in mm; `np.ix_(*axes_mm)` makes an open grid of them.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scipy import ndimage

LOWEST_HU, HIGHEST_HU = -1024, 3071  # what a CT scanner stores


# ---- shapes ----


def voxel_axes_mm(
    shape: Sequence[int], spacing_mm: Sequence[float], middle_mm: Sequence[float] = (0.0, 0.0, 0.0)
) -> list[np.ndarray]:
    """Centres of the voxels along z, y and x, float32; `middle_mm` is the position of the volume's middle."""
    return [
        np.float32((np.arange(n) - (n - 1) / 2) * s + m)
        for n, s, m in zip(shape, spacing_mm, middle_mm, strict=True)
    ]


def box_between(
    axes_mm: Sequence[np.ndarray], low_mm: Sequence[float], high_mm: Sequence[float], margin: int = 0
) -> tuple[slice, ...]:
    """Slices of the voxels whose centres lie from `low_mm` to `high_mm` (z y x), and of `margin` more voxels
    on each side. They may be empty."""
    ends = [np.searchsorted(a, (low, high)) for a, low, high in zip(axes_mm, low_mm, high_mm, strict=True)]
    return tuple(slice(max(int(first) - margin, 0), int(last) + margin) for first, last in ends)


def oval_mm(
    y: np.ndarray,
    x: np.ndarray,
    half_y: float | np.ndarray,
    half_x: float | np.ndarray,
    power: float = 2.0,
    scale: float | np.ndarray = 1.0,
) -> np.ndarray:
    """Distance to an oval column along the rays from its axis.

    Args:
        y, x: coordinates from the axis in mm, arrays that broadcast.
        half_y, half_x: half axes in mm.
        power: 2 for an ellipse; higher ones approach a rectangle.
        scale: factor on both half axes, such as one for each slice.
    """
    radius = np.hypot(y, x) + 1e-3
    outline = np.abs(y / half_y) ** power + np.abs(x / half_x) ** power
    return radius * (1 - scale * np.maximum(outline, 1e-6) ** (-1 / power))


def tube_mm(
    points: Sequence[np.ndarray],
    start: Sequence[float],
    end: Sequence[float],
    radius: float,
    end_radius: float | None = None,
) -> np.ndarray:
    """Distance to a rounded tube between two points, which may taper from `radius` to `end_radius`.

    Args:
        points: coordinates in mm, one array for each axis, that broadcast; two or three of them.
        start, end: coordinates of both ends in the same order.
    """
    end_radius = radius if end_radius is None else end_radius
    axis = [float(e - s) for s, e in zip(start, end, strict=True)]
    offsets = [p - float(s) for p, s in zip(points, start, strict=True)]
    along = sum(o * a for o, a in zip(offsets, axis, strict=True)) / (sum(a * a for a in axis) + 1e-6)
    along = along.clip(0, 1)
    squares = sum((o - along * a) ** 2 for o, a in zip(offsets, axis, strict=True))
    return np.sqrt(squares) - radius - along * (end_radius - radius)


# ---- voxels ----


def paint(image: np.ndarray, distance_mm: np.ndarray, hu: float | np.ndarray, edge_mm: float) -> None:
    """Blend `hu` into `image` in place where the distance is negative, over an edge `edge_mm` wide."""
    image += (hu - image) * np.clip(0.5 - distance_mm / edge_mm, 0, 1)


def noisy_hu(
    rng: np.random.Generator, image: np.ndarray, noise_hu: float, blur: float | Sequence[float]
) -> np.ndarray:
    """The scan as it is stored: noise added, cut to what a scanner stores, rounded; int16.

    Args:
        noise_hu: standard deviation of the noise; 0 for none.
        blur: sigma in voxels of the filter that correlates the noise of neighbours.
    """
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), blur)
    image = image + noise * (noise_hu / noise.std())
    return np.rint(image.clip(LOWEST_HU, HIGHEST_HU)).astype(np.int16)


# ---- folders ----


def already_written(folder: Path, index_name: str, contents: dict) -> bool:
    """Whether `folder` holds the phantoms that `contents` describe, by its file `index_name` (JSON).

    Raises:
        FileExistsError: it holds something else, or phantoms of other arguments.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    index = folder / index_name
    if index.exists() and json.loads(index.read_text(encoding="utf8")) == contents:
        return True
    description = contents.get("description", contents)
    raise FileExistsError(
        f"{folder}: holds something else than {description}; remove it or name another folder"
    )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write to; it becomes `folder` when the block ends without an error.

    `folder` may be there if it is empty. After an error nothing is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.partial_") as partial:
        root = Path(partial) / folder.name
        root.mkdir()
        yield root
        if folder.exists():
            folder.rmdir()
        root.rename(folder)
