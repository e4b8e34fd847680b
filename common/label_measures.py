"""What is in a label map: how much of each label, where, in how many pieces; what a coarser grid leaves."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.metrics import binary_counts, dice_from_counts
from common.volumes import Box, resample_labels, resampled_shape


class LabelMeasure(NamedTuple):
    """One label of a (z, y, x) map; all in voxels.

    Attributes:
        box: smallest box around it, (start, stop), z y x, half-open.
        centre: mean of its voxels' indices, z y x.
        pieces: sizes of its connected parts, the largest first; connected also across corners.
    """

    voxels: int
    box: Box
    centre: tuple[float, float, float]
    pieces: tuple[int, ...]

    def extent_mm(self, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """Sides of the box in mm, z y x."""
        start, stop = self.box
        z, y, x = ((b - a) * mm for a, b, mm in zip(start, stop, spacing_mm, strict=True))
        return z, y, x

    def specks(self, fewer_than: int) -> tuple[int, ...]:
        """Sizes of the parts beside the largest that have fewer voxels than this."""
        return tuple(size for size in self.pieces[1:] if size < fewer_than)


def measure_labels(labels: np.ndarray) -> dict[int, LabelMeasure]:
    """{label: what there is of it} for each label above 0 that a (z, y, x) map of integers holds.

    One label after the other, each in its box, so that little memory is needed.
    """
    measures = {}
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        mask = labels[box] == label
        voxels = int(np.count_nonzero(mask))
        centre = []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            profile = np.count_nonzero(mask, axis=others)
            centre.append(box[axis].start + float(profile @ np.arange(profile.size)) / voxels)
        parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
        pieces = np.sort(np.bincount(parts[mask])[1:])[::-1]
        corners = tuple(p.start for p in box), tuple(p.stop for p in box)
        measures[label] = LabelMeasure(voxels, corners, tuple(centre), tuple(pieces.tolist()))
    return measures


def label_counts(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """(num_labels,) voxels of each label from 0 on in a (z, y, x) map of integers below `num_labels`.

    Slice by slice, because numpy's bincount makes eight bytes of each voxel.
    """
    counts = np.zeros(num_labels, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=num_labels)
    return counts


def round_trip(
    labels: np.ndarray, spacing_mm: Sequence[float], working_mm: Sequence[float]
) -> tuple[np.ndarray, dict[int, float]]:
    """What is left of labels on a grid of about `working_mm`, resampled as preprocessing and prediction do.

    Args:
        labels: (z, y, x) uint8 or uint16 with voxels of `spacing_mm`, z y x.

    Returns:
        The labels taken to the working grid and back, of the shape and type of `labels`; and
        {label above 0 that is in `labels`: Dice of the two}, which no network trained on that grid can pass.
    """
    shape = resampled_shape(labels.shape, spacing_mm, working_mm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label that is lost has a Dice of 0
        returned = resample_labels(resample_labels(labels, shape), labels.shape)
    present = [n for n, box in enumerate(ndimage.find_objects(labels), 1) if box is not None]
    counts = {n: binary_counts(returned == n, labels == n) for n in present}
    return returned, {n: dice_from_counts(tp, fp, fn) for n, (tp, fp, fn, _) in counts.items()}
