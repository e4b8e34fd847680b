"""Left and right in a head, told in world coordinates, where x grows to the patient's right.

The middle of the array tells nothing: a head may lie in one half of it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from common.label_measures import measure_labels
from common.nifti import Scan

FAR_APART_MM = 20.0  # two pieces that far apart along x can be the two sides; amygdalae are 40 to 50 mm apart
SMALLEST_OTHER = 0.25  # of the larger side's volume: a smaller piece is not the other side
ACROSS = 0.1  # a piece with this share on both sides of the middle is two structures in one


def split_sides(mask: np.ndarray, affine: np.ndarray, scan: Scan | None) -> np.ndarray:
    """(z, y, x) uint8: 1 what lies left in a mask of both sides, 2 what lies right.

    The middle is halfway between the two large pieces if they lie far apart, else that of the head. Every
    piece goes to one side as a whole.

    Args:
        mask: (z, y, x) bool.
        affine: of x, y, z to world coordinates.
        scan: of the head, on the same grid; None: only two large pieces that lie far apart can be told.

    Raises:
        ValueError: both sides are one piece, or all of the mask lies on one side of the head; without the
            scan, what is not two large pieces far apart.
    """
    pieces, number = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())[1:]
    centres = ndimage.center_of_mass(mask, pieces, range(1, number + 1))
    places = np.array([world_x(centre, affine) for centre in centres])
    main = np.argsort(sizes)[::-1][:2]
    are_apart = (
        number > 1
        and sizes[main[1]] >= SMALLEST_OTHER * sizes[main[0]]
        and np.ptp(places[main]) >= FAR_APART_MM
    )
    if scan is None and not are_apart:
        raise ValueError(
            f"its two sides cannot be told: they are not two pieces at least {FAR_APART_MM:.0f} mm apart; "
            "give the sides numbers of their own and name them with --label_map"
        )
    head = places[main].mean() if scan is None else head_middle(scan)
    middle = places[main].mean() if are_apart else head
    largest = pieces == main[0] + 1
    on_the_right = np.mean(world_x(np.argwhere(largest).T, affine) > middle)
    if ACROSS < on_the_right < 1 - ACROSS:
        raise ValueError("one piece of it reaches across the middle of the head; separate the two sides")
    is_right = places > middle
    if is_right.all() or not is_right.any() or not places.min() < head < places.max():
        side = "right" if places.mean() > head else "left"
        raise ValueError(
            f"all of the mask lies {side} of the middle of the head (x = {head:.0f} mm); draw both sides, or "
            "give the sides numbers of their own and name them with --label_map"
        )
    side_of = np.concatenate([[0], np.where(is_right, 2, 1)]).astype(np.uint8)
    return side_of[pieces]


def head_middle(scan: Scan) -> float:
    """World coordinate x, mm, of the middle of what is not air in a scan of a head.

    Raises:
        ValueError: all voxels have about the same value.
    """
    step = [max(1, n // 64) for n in scan.shape]
    values = scan.array[:: step[0], :: step[1], :: step[2]].astype(np.float32)
    low, high = values.min(), np.percentile(values, 99.5)
    inside = np.argwhere(values > low + 0.1 * (high - low))
    if not len(inside):
        raise ValueError(f"{scan.path.name} shows nothing, all voxels have about the same value")
    return float(world_x(inside.mean(0) * step, scan.affine))


def world_x(place: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """World coordinate x, mm, of a voxel z, y, x, or of many as (3, n)."""
    z, y, x = place
    return affine[0, 0] * x + affine[0, 1] * y + affine[0, 2] * z + affine[0, 3]


def why_exchanged(
    labels: np.ndarray, affine: np.ndarray, sides: Sequence[tuple[int, int]], names: Mapping[int, str]
) -> str:
    """A sentence if the left one of two sides lies right of the right one, else "".

    Args:
        labels: (z, y, x) whole numbers.
        affine: of x, y, z to world coordinates.
        sides: pairs (left, right) of labels.
        names: {label: name}.
    """
    measured = measure_labels(labels)
    for left, right in sides:
        if left not in measured or right not in measured:
            continue
        x_left, x_right = (float(world_x(measured[n].centre, affine)) for n in (left, right))
        if x_left >= x_right:
            return (
                f"left and right are exchanged: {names[left]} ({left}) is centred at x = {x_left:.0f} mm, "
                f"{names[right]} ({right}) at {x_right:.0f} mm, but x grows to the right; exchange the two "
                "labels, or correct the orientation"
            )
    return ""
