"""Planes along the curve of the spine, drawn as if it were straight."""

from collections.abc import Sequence

import numpy as np


def curved_planar(
    volume: np.ndarray,
    points_zyx: np.ndarray,
    spacing_mm: Sequence[float],
    half_width_mm: float = 60.0,
    *,
    plane: str = "sagittal",
    pixel_mm: float = 1.0,
    beyond_mm: float = 25.0,
    order: int = 1,
    fill: float = -1024,
) -> np.ndarray:
    """A curved structure as if it were straight: each row lies across a smooth curve through the points.

    Args:
        volume: (z, y, x) image, or labels with order=0.
        points_zyx: (n, 3) voxels, two or more points along the structure, beginning at either end.
        half_width_mm: how far the picture reaches on both sides of the curve.
        plane: sagittal (the front is on the left) or coronal (the patient's right is on the left).
        pixel_mm: side of a pixel.
        beyond_mm: length by which the curve goes on straight beyond its first and last point.
        order: of the interpolation; 0 takes the nearest voxel, 1 is linear.
        fill: value outside the volume.

    Returns:
        (h, w) in the volume's type; the upper end of the curve is at the top.

    Raises:
        ValueError: fewer than two points, points at one place, or an unknown plane.
    """
    from scipy import ndimage
    from scipy.interpolate import CubicSpline

    if plane not in ("sagittal", "coronal"):
        raise ValueError(f"plane {plane!r} is unknown; use sagittal or coronal")
    points_mm = np.asarray(points_zyx, float).reshape(-1, 3) * spacing_mm
    lengths = np.linalg.norm(np.diff(points_mm, axis=0), axis=1)
    if len(points_mm) < 2 or not lengths.all():
        raise ValueError(f"a curve needs two or more points, all at different places, got {len(points_mm)}")
    if points_mm[0, 0] < points_mm[-1, 0]:
        points_mm, lengths = points_mm[::-1], lengths[::-1]
    knots = np.concatenate([[0], np.cumsum(lengths)])
    # A natural spline does not bend at its ends, where the curve goes on straight.
    spline = CubicSpline(knots, points_mm, bc_type="natural")
    along = np.arange(-beyond_mm, knots[-1] + beyond_mm, pixel_mm)
    within = np.clip(along, 0, knots[-1])
    tangents = spline(within, 1)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    centres = spline(within) + (along - within)[:, None] * tangents
    across = np.array([0.0, -1, 0] if plane == "sagittal" else [0.0, 0, -1])
    across = across - (tangents @ across)[:, None] * tangents  # at right angles to the curve
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    sideways = np.arange(-half_width_mm, half_width_mm + pixel_mm / 2, pixel_mm)
    places = (centres[:, None] + sideways[:, None] * across[:, None]) / spacing_mm
    return ndimage.map_coordinates(volume, places.transpose(2, 0, 1), order=order, cval=fill, prefilter=False)
