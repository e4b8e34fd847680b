"""A coarse copy of a scan that is still in its file, and where the body lies in it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.nifti import NiftiFile
from common.volumes import Box, Triple, body_box

OVERVIEW_MM = 3.0  # largest voxels of the copy, unless those of the scan are larger


class Overview(NamedTuple):
    """Means over blocks of `factors` (z y x) voxels of a scan; `image` is (z, y, x) float32."""

    image: np.ndarray
    factors: Triple


def read_overview(file: NiftiFile, value_range: Sequence[float] | None) -> Overview:
    """The copy, from one pass over the file; values are cut to `value_range` before they are averaged."""
    z, y, x = (max(1, int(OVERVIEW_MM / s)) for s in file.spacing_mm)
    return Overview(file.read_reduced((z, y, x), value_range), (z, y, x))


def find_body(overview: Overview, file: NiftiFile, threshold_hu: float, margin_mm: float) -> tuple[Box, Box]:
    """Box of the body as in `body_box`, with a margin: in voxels of the overview, and of the scan."""
    factors = overview.factors
    margin = tuple(map(int, np.ceil(margin_mm / np.multiply(file.spacing_mm, factors))))
    low, high = body_box(overview.image, threshold_hu, margin)
    start = np.multiply(low, factors)
    stop = np.minimum(np.multiply(high, factors), file.shape)
    return (low, high), (tuple(start.tolist()), tuple(stop.tolist()))
