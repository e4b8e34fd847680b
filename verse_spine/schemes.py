"""Whether a mask's numbers are VerSe's, or those of another scheme that happen to lie in the same range."""

import math

import numpy as np

from verse_spine.labels import LABEL_NAMES, VERTEBRAE, mask_centres

TOP_DOWN = (*range(1, 20), 28, *range(20, 26))  # from the head on; 28 is T13
CERVICAL = range(2, 8)  # C2 to C7, whose centres lie 15 to 20 mm apart; those of lumbar vertebrae 30 to 40
MOST_CERVICAL_MM = 26.0


def why_other_scheme(labels: np.ndarray, affine: np.ndarray) -> str:
    """A sentence that names what the numbers seem to be; "" where they may well be VerSe's.

    Args:
        labels: (z, y, x) RAS+, whole numbers of VerSe's range.
        affine: (4, 4), voxel (x, y, z) to mm, as `Scan.affine`.
    """
    found = [label for label in TOP_DOWN if label in VERTEBRAE and (labels == label).any()]
    if found == [1]:
        return "holds 0 and 1 alone, a mask of bone and background rather than VerSe's numbers (1 is C1)"
    if 28 in found and not {19, 20} & set(found):
        return (
            "holds 28, a thirteenth thoracic vertebra, but neither T12 nor L1 beside it; is it L4 in the "
            "numbers of TotalSegmentator?"
        )
    centres = mask_centres(labels, affine)
    heights = [centres[label][0] for label in found]
    upwards = sum(b > a for a, b in zip(heights, heights[1:], strict=False))
    if len(found) > 2 and upwards > len(found) // 2:
        first, last = LABEL_NAMES[found[0]], LABEL_NAMES[found[-1]]
        return (
            f"its numbers rise from below, so that {last} would lie above {first}; SPIDER counts so, or the "
            "scan is upside down"
        )
    pairs = [(a, b) for a, b in zip(found, found[1:], strict=False) if b == a + 1 and {a, b} <= set(CERVICAL)]
    steps_mm = [math.dist(centres[a], centres[b]) for a, b in pairs]
    if len(steps_mm) > 1 and (apart_mm := float(np.median(steps_mm))) > MOST_CERVICAL_MM:
        return (
            f"{LABEL_NAMES[pairs[0][0]]} to {LABEL_NAMES[pairs[-1][1]]} would lie {apart_mm:.0f} mm apart, "
            "cervical vertebrae about 17; are other vertebrae counted from 1 on?"
        )
    return ""
