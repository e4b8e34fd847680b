"""What surrounds a brain, made up, so that skull-stripped training scans stand for whole heads as well."""

import numpy as np
from scipy.ndimage import distance_transform_edt, zoom

BLANK_SHARE = 0.02  # a window with fewer blank voxels is left as it is
SKULL_MM = (2.0, 9.0)  # fluid and bone around the brain are dark
SCALP_MM = (3.0, 25.0)  # muscle, fat and skin follow, then air
TEXTURE_MM = 8.0  # size of the patches of tissue


def add_surroundings(image: np.ndarray, spacing_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Fill what skull stripping has blanked (exactly 0) with a dark skull, patchy soft tissue and noisy air.

    Args:
        image: (z, y, x) grey values, 0 outside of the brain; left as it is where there is no such outside.
        spacing_mm: side of a voxel.

    Returns:
        float32, as `image` inside of the brain.
    """
    outside = image == 0
    if outside.mean() < BLANK_SHARE or outside.all():
        return image.astype(np.float32)
    brain = image[~outside]
    bright = float(np.percentile(brain, 90))
    distance_mm = distance_transform_edt(outside) * spacing_mm
    coarse = [max(2, round(n * spacing_mm / TEXTURE_MM)) for n in image.shape]
    texture = rng.uniform(0, 1, coarse).astype(np.float32)
    texture = zoom(texture, np.divide(image.shape, coarse), order=1, grid_mode=True, mode="nearest")
    skull = rng.uniform(*SKULL_MM)
    scalp = skull + rng.uniform(*SCALP_MM)
    darkest, level, contrast = rng.uniform(0, 0.25), rng.uniform(0.2, 0.9), rng.uniform(0.2, 1.2)
    noise = np.abs(rng.normal(0, 0.03 * bright, image.shape)).astype(np.float32)
    around = np.where(distance_mm < skull, darkest * texture, level + contrast * (texture - 0.5))
    around = np.where(distance_mm < scalp, np.maximum(around, 0) * bright, 0) + noise
    return np.where(outside, around, image).astype(np.float32)
