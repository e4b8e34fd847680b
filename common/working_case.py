"""One case on its way from the scan's grid to the one that is trained on, and what is noted of it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from common.label_measures import label_counts
from common.nifti import Scan
from common.volumes import (
    Box,
    body_box,
    box_of,
    crop,
    crop_affine,
    resample,
    resample_labels,
    resampled_affine,
    resampled_shape,
)

Spacing = tuple[float, float, float]  # mm, z y x
FEWEST_LEVELS = 200  # an image with fewer grey levels than this is not rounded to whole numbers


def resolve_spacing(
    words: Sequence[str], presets: Mapping[str, Spacing], median_mm: Spacing | None = None
) -> Spacing:
    """Millimetres z y x that the words of a flag ask for: a preset, "median" or three numbers.

    Args:
        presets: {word: spacing}.
        median_mm: of the data set along each axis; None = the word is not allowed.

    Raises:
        ValueError: neither a preset nor three numbers above zero.
    """
    named = dict(presets) if median_mm is None else {**presets, "median": median_mm}
    if len(words) == 1 and words[0] in named:
        return named[words[0]]
    try:
        z, y, x = (float(word) for word in words)
        if all(0 < mm < 1000 for mm in (z, y, x)):
            return z, y, x
    except ValueError:
        pass
    raise ValueError(
        f"spacing {' '.join(map(str, words))}: expected {', '.join([*named, 'or three'])} millimetres above "
        "zero (z y x)"
    )


def body_and_labels(scan: Scan, labels: np.ndarray, threshold_hu: float, margin_mm: float) -> Box:
    """Box of the body in a CT with a margin, grown where a labelled voxel lies outside of it.

    Tissue around what is labelled may be blanked out, and no label may be lost.

    Args:
        labels: (z, y, x) on the grid of the scan.
        threshold_hu: what is denser counts as body; see `body_box`.
    """
    margin = np.ceil(np.divide(margin_mm, scan.spacing_mm)).astype(int)
    start, stop = body_box(scan.array, threshold_hu, margin)
    if labelled := box_of(labels):
        start, stop = np.minimum(start, labelled[0]), np.maximum(stop, labelled[1])
    return tuple(map(int, start)), tuple(map(int, stop))


class WorkingCase(NamedTuple):
    """A case on the grid that is trained on; image and labels are (z, y, x).

    Attributes:
        image: as `stored_values` leaves it.
        labels: uint8.
        affine: (4, 4), voxel (x, y, z) to mm.
        lost: numbers of labels that are too small for the voxels, and therefore gone.
    """

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    lost: list[int]


def to_working_grid(
    scan: Scan, labels: np.ndarray, box: Box, spacing_mm: Spacing, value_range: tuple[float, float]
) -> WorkingCase:
    """Crop a scan and its labels to a box, and resample them to voxels of about `spacing_mm`.

    Args:
        labels: (z, y, x) whole numbers below 256, on the grid of the scan.
        value_range: what the image is cut to before it is resampled.
    """
    start, stop = box
    image, inside = crop(scan.array, start, stop), crop(labels, start, stop)
    shape = resampled_shape(image.shape, scan.spacing_mm, spacing_mm)
    affine = resampled_affine(crop_affine(scan.affine, start), image.shape, shape)
    voxels = stored_values(resample(image, shape, value_range=value_range), value_range)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # labels that are lost, which the caller names
        numbers = resample_labels(inside, shape).astype(np.uint8)
    counts, left = label_counts(inside, 256), label_counts(numbers, 256)
    lost = np.flatnonzero((counts > 0) & (left == 0)).tolist()
    return WorkingCase(voxels, numbers, affine, lost)


def stored_values(image: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Grey values as they are stored: rounded to int16; float32 where that would coarsen or cut them.

    Args:
        value_range: within which all values of this image lie; HU of CT always become int16.
    """
    low, high = value_range
    limits = np.iinfo(np.int16)
    if high - low < FEWEST_LEVELS or low < limits.min or high > limits.max:
        return image.astype(np.float32)
    return np.rint(image).astype(np.int16)


def sample_inside(image: np.ndarray, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Up to `most` values of the image where labels are above 0, drawn without repetition.

    Args:
        image, labels: (z, y, x) of one shape.
    """
    inside = np.flatnonzero(labels)
    chosen = np.random.default_rng(seed).choice(inside, min(most, inside.size), replace=False)
    return image.ravel()[chosen]


def grid_attributes(scan: Scan, box: Box, affine: np.ndarray) -> dict:
    """What the file of a case notes of its grid and of the scan that it was cut from, to find the way back.

    Args:
        affine: of the working grid, as in `WorkingCase`.
    """
    return {
        "spacing_mm": np.linalg.norm(affine[:3, :3], axis=0)[::-1],  # as whole voxels leave it
        "affine": affine,
        "source_image": scan.path.name,
        "source_shape": scan.array.shape,
        "source_spacing_mm": scan.spacing_mm,
        "source_affine": scan.affine,
        "source_orientation": scan.orientation,
        "crop_start": box[0],
        "crop_stop": box[1],
    }
