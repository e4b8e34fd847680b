"""Axial, coronal and sagittal slices of a scan with its labels, in true proportions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.hu import window
from common.plots import outline, overlay, save_panels
from common.volumes import Box, box_of, crop, expand_box, resample

PLANES = ("axial", "coronal", "sagittal")  # across z, y, x
EDGES = ("RL", "RL", "AP")  # what lies at the left and at the right edge of their pictures
FALSE_POSITIVE, FALSE_NEGATIVE = (255, 160, 0), (60, 120, 255)  # RGB
ERROR_TITLE = "too much (orange), missed (blue)"


def middle(mask: np.ndarray) -> tuple[int, int, int]:
    """The voxel through which the three planes go: the median of the mask, or the volume's middle if the mask
    is empty."""
    centre = []
    for axis in range(3):
        below = np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})).cumsum()
        centre.append(int(np.searchsorted(below, below[-1] / 2)) if below[-1] else mask.shape[axis] // 2)
    return tuple(centre)


def fullest(mask: np.ndarray) -> tuple[int, int, int]:
    """The voxel whose three planes each cut most of the mask, or the volume's middle if the mask is empty.

    The `middle` of two structures, such as a left and a right one, may lie between them, this does not.
    """
    if not np.any(mask):
        return middle(mask)
    counts = (np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})) for axis in range(3))
    z, y, x = (int(np.argmax(of_axis)) for of_axis in counts)
    return z, y, x


def plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """The plane `index` across `axis` as it is shown: head up (in axial planes the front up), the patient's
    right on the left."""
    picture = np.take(volume, index, axis)
    # Indices grow upwards, to the front and to the right, but pictures from the upper left corner. In the
    # sagittal plane the front is on the left.
    return picture[::-1, ::-1]


def true_plane(
    volume: np.ndarray,
    axis: int,
    index: int,
    spacing_mm: Sequence[float],
    voxel_mm: float,
    labels: bool = False,
) -> np.ndarray:
    """As `plane`, but with square pixels of `voxel_mm`; images are interpolated, labels take the nearest.

    Only this plane is resampled: a resampled CT of the whole body would take half a GB.
    """
    picture = plane(volume, axis, index)
    sides_mm = [n * s for n, s in zip(picture.shape, np.delete(spacing_mm, axis), strict=True)]
    shape = [max(1, round(mm / voxel_mm)) for mm in sides_mm]
    if not labels:
        return resample(picture[None], (1, *shape))[0]
    rows, columns = ((np.arange(n) + 0.5) * m // n for n, m in zip(shape, picture.shape, strict=True))
    return picture[np.ix_(rows.astype(int), columns.astype(int))]


def grey_picture(image: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """HU or other grey values -> uint8: the lower end of `value_range` is black, the upper one white."""
    return (window(image, *value_range) * 255).round().astype(np.uint8)


def error_picture(grey: np.ndarray, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The picture `grey` (h, w) in RGB with the errors of `pred` against `target`: blue where a structure is
    missed, orange where one is found that is not there or is another one."""
    rgb = overlay(grey, (pred != target) & (pred > 0), FALSE_POSITIVE, 0.7)
    missed = (pred != target) & (target > 0) & (pred == 0)
    rgb[missed] = (0.3 * rgb[missed] + 0.7 * np.array(FALSE_NEGATIVE)).astype(np.uint8)
    return rgb


def color_overlay(
    grey: np.ndarray, labels: np.ndarray, palette: np.ndarray, alpha: float = 0.5
) -> np.ndarray:
    """The picture `grey` (h, w) in RGB with each label in its colour.

    Args:
        palette: (n, 3) RGB of the labels from 1 on; after the last one it begins again.
    """
    rgb = np.repeat(grey[..., None], 3, -1).astype(np.float32)
    inside = labels > 0
    rgb[inside] = (1 - alpha) * rgb[inside] + alpha * palette[(labels[inside] - 1) % len(palette)]
    return rgb.round().astype(np.uint8)


def legend_of(labels: np.ndarray, names: Mapping[int, str], colors: np.ndarray) -> dict[str, tuple]:
    """{name: RGB} of the labels above 0 that are in a map; `colors` are those of the labels from 0 on."""
    present = np.unique(labels[labels > 0]).tolist()
    return {names[n]: tuple(colors[n].tolist()) for n in present}


def close_up_box(mask: np.ndarray, spacing_mm: Sequence[float], margin_mm: float) -> Box:
    """(start, stop), z y x, around a mask with a margin; the whole volume if the mask is empty."""
    if not np.any(mask):
        return (0, 0, 0), mask.shape
    margin = np.ceil(np.divide(margin_mm, spacing_mm)).astype(int)
    return expand_box(*box_of(mask), margin, mask.shape)


def save_planes(
    path: Path,
    image: np.ndarray,
    spacing_mm: Sequence[float],
    pred: np.ndarray,
    target: np.ndarray | None = None,
    *,
    palette: np.ndarray,
    value_range: Sequence[float],
    voxel_mm: float = 1.0,
    title: str = "",
    legend: Mapping[str, Sequence[int]] | None = None,
    margin_mm: float | None = None,
    names: Sequence[str] = PLANES,
) -> None:
    """Three planes through the labels: the scan, the prediction, with a target also that and the error.

    They go through the middle of the labels; in a close-up where each of them shows most.

    Args:
        image: HU or other grey values, (z, y, x).
        pred, target: labels on the same grid.
        palette, value_range: as of `color_overlay` and `grey_picture`.
        voxel_mm: side of the pictures' pixels.
        title: stands above the first picture, behind the name of the plane.
        legend: {name: RGB}, on the right.
        margin_mm: a close-up of the labels with so much around them; None: the whole image.
        names: of the planes across z, y and x, where the file may not tell rightly how the patient lay; then
            there are no letters of sides at the edges either.
    """
    if margin_mm is not None:
        box = close_up_box(pred > 0 if target is None else (pred > 0) | (target > 0), spacing_mm, margin_mm)
        image, pred, target = (None if a is None else crop(a, *box) for a in (image, pred, target))
    labels = pred if target is None or not target.any() else target
    centre = middle(labels) if margin_mm is None else fullest(labels)
    rows, titles = [], []
    for axis, name in enumerate(names):
        grey = grey_picture(true_plane(image, axis, centre[axis], spacing_mm, voxel_mm), value_range)
        pred_plane = true_plane(pred, axis, centre[axis], spacing_mm, voxel_mm, labels=True)
        row, row_titles = [grey], [f"{name} {title}" if axis == 0 else name]
        if target is not None:
            target_plane = true_plane(target, axis, centre[axis], spacing_mm, voxel_mm, labels=True)
            row.append(color_overlay(grey, target_plane, palette))
            row_titles.append("truth")
        row.append(color_overlay(grey, pred_plane, palette))
        row_titles.append("prediction")
        if target is not None:
            row.append(error_picture(grey, pred_plane, target_plane))
            row_titles.append(ERROR_TITLE)
        rows.append(row)
        titles.append(row_titles)
    edges = [[EDGES[axis]] * len(row) for axis, row in enumerate(rows)] if names is PLANES else None
    save_panels(path, rows, titles, legend=legend, edges=edges)


def contour_pictures(
    image: np.ndarray,
    spacing_mm: Sequence[float],
    pred: np.ndarray,
    target: np.ndarray,
    label: int,
    *,
    palette: np.ndarray,
    value_range: Sequence[float],
    margin_mm: float = 40.0,
    side: int = 240,
) -> list[np.ndarray]:
    """Axial, coronal and sagittal plane through one label with contours, and the axial one with the errors.

    Contours of the target are solid, those of the prediction dashed, each label in its colour.

    Args:
        image, pred, target: (z, y, x) on one grid.
        label: must be in `pred` or `target`; the planes go through its middle in the target, if it is there.
        palette, value_range: as of `color_overlay` and `grey_picture`.
        margin_mm: what is shown around the label.
        side: pixels of the longest side.
    """
    box = close_up_box((pred == label) | (target == label), spacing_mm, margin_mm)
    image, pred, target = (crop(array, *box) for array in (image, pred, target))
    centre = middle(target == label if (target == label).any() else pred == label)
    voxel_mm = float(np.multiply(image.shape, spacing_mm).max()) / side
    pictures = []
    for axis in range(3):
        grey = grey_picture(true_plane(image, axis, centre[axis], spacing_mm, voxel_mm), value_range)
        target_plane, pred_plane = (
            true_plane(labels, axis, centre[axis], spacing_mm, voxel_mm, labels=True)
            for labels in (target, pred)
        )
        rgb = np.repeat(grey[..., None], 3, -1)
        for plane_labels, is_dashed in ((target_plane, False), (pred_plane, True)):
            for number in np.unique(plane_labels[plane_labels > 0]).tolist():
                color = palette[(number - 1) % len(palette)]
                rgb = outline(rgb, plane_labels == number, color, is_dashed)
        pictures.append(rgb)
        if axis == 0:
            errors = error_picture(grey, pred_plane, target_plane)
    return [*pictures, errors]
