"""Synthetic heads in the Decathlon's layout with a bright lesion in about half of their slices.

They are as easy as the demo needs: what the lesion looks like, and 0 outside of the head, is all that there
is to learn. Scores on them mean nothing for patients.
"""

from pathlib import Path

import numpy as np

from common.phantoms import PhantomCase, oval_mm, paint, smooth_field, voxel_axes_mm, write_data_set

NUM_PATIENTS = 8
SHAPE, SPACING_MM = (16, 64, 64), (5.0, 3.0, 3.0)


def make_head(index: int) -> PhantomCase:
    """The patient of this number: a lesion of 6 to 9 slices in a noisy head."""
    rng = np.random.default_rng(index)
    axes = voxel_axes_mm(SHAPE, SPACING_MM)
    z, y, x = np.ix_(*axes)
    head_mm = oval_mm(y, x, rng.uniform(75, 88), rng.uniform(62, 74)) + 0 * z
    image = 300 + 40 * smooth_field(rng, axes, 25) + 45 * rng.standard_normal(SHAPE, np.float32)
    first, length = rng.integers(1, 7), rng.integers(6, 10)
    middle = rng.uniform(-25, 25, 2)
    bulge = 1 - ((z - z[first]) / (z[first + length - 1] - z[first]) - 0.5) ** 2  # thickest in its middle
    lesion_mm = oval_mm(y - middle[0], x - middle[1], rng.uniform(20, 30), rng.uniform(20, 30), scale=bulge)
    inside = np.zeros(SHAPE, bool)
    inside[first : first + length] = True
    lesion_mm = np.where(inside, lesion_mm, 1e3)
    paint(image, lesion_mm, rng.uniform(560, 640) + 45 * rng.standard_normal(SHAPE, np.float32), 3.0)
    image = np.where(head_mm < 0, image.clip(1, 2000), 0)
    label = ((lesion_mm < 0) & (head_mm < 0)).astype(np.uint8)
    return PhantomCase(f"head_{index + 1:03d}", np.int16(image), label, SPACING_MM, (0.0, 0.0, 0.0), "LPS")


def write_wsss_phantoms(folder: Path) -> Path:
    """imagesTr, labelsTr and dataset.json with NUM_PATIENTS heads; the same ones whenever it is called."""
    contents = {"description": "heads with a lesion", "patients": NUM_PATIENTS, "shape": list(SHAPE)}
    return write_data_set(folder, contents, "heads", ["Tr"] * NUM_PATIENTS, {1: "lesion"}, make_head, "MRI")
