"""From the numbers of a label file to the labels 1 and 2, and whether left and right are where they belong.

Sides are told in world coordinates, where x grows to the patient's right, never by the middle of the array.
"""

import numpy as np
from scipy import ndimage

from amygdala.structures import DataSet
from common.label_measures import label_counts, measure_labels
from common.nifti import Scan

ASEG = {18: 1, 54: 2}  # FreeSurfer's, FastSurfer's and SynthSeg's numbers of the left and the right amygdala
LABEL_MAPS = ("auto", "aseg", "manual", "one_label")
FAR_APART_MM = 20.0  # two pieces that far apart along x can be the two sides; amygdalae are 40 to 50 mm apart
SMALLEST_OTHER = 0.25  # of the larger side's volume: a smaller piece is not the other side
ACROSS = 0.1  # a piece with this share on both sides of the middle is two structures in one


def parse_label_map(text: str, data_set: DataSet) -> str | dict[int, int]:
    """The value of --label_map: a word of LABEL_MAPS, or {number in the files: label} of 1=32,2=31.

    Raises:
        ValueError: neither, or a word that does not suit the data set.
    """
    if text in LABEL_MAPS:
        if text in ("aseg", "one_label") and not data_set.sides:
            names = " and ".join(data_set.structures.names.values())
            raise ValueError(f"--label_map {text}: tells left from right, not {names}; choose manual")
        return text
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    if all(label.strip().isdecimal() and number.strip().isdecimal() for label, number in pairs):
        mapping = {int(number): int(label) for label, number in pairs}
        if sorted(mapping.values()) == [1, 2] and 0 not in mapping:
            return mapping
    raise ValueError(
        f"--label_map {text}: expected {', '.join(LABEL_MAPS)}, or which numbers of the files are the labels "
        "1 and 2, such as 1=32,2=31"
    )


def map_labels(
    drawn: np.ndarray, scan: Scan, label_map: str | dict[int, int], data_set: DataSet
) -> np.ndarray:
    """(z, y, x) uint8 with the labels 1 and 2 of a label file.

    "auto" goes by the numbers in the file: 18 and 54 are FreeSurfer's, 1 and 2 are taken as they are, and the
    sides of a single number are told by their place. A map of FreeSurfer or of one's own shows many
    structures, of which the others are left out.

    Args:
        drawn: (z, y, x) whole numbers, on the grid of the scan.
        label_map: as `parse_label_map` returns it.

    Raises:
        ValueError: numbers outside the map, nothing is labelled, or sides that cannot be told.
    """
    found = (np.flatnonzero(label_counts(drawn, int(drawn.max()) + 1)[1:]) + 1).tolist()
    if not found:
        raise ValueError("nothing is labelled in it; draw the label, or move the case away")
    if label_map == "auto":
        label_map = _map_of(found, data_set)
    if label_map == "one_label":
        if len(found) > 1:
            raise ValueError(f"holds the labels {_listed(found)}; --label_map one_label expects a single one")
        return split_sides(drawn > 0, scan)
    if label_map == "manual":
        if outside := [number for number in found if number not in (1, 2)]:
            raise ValueError(f"label value(s) {_listed(outside)} outside the map; expected 1 and 2 only")
        return drawn.astype(np.uint8)
    mapping = ASEG if label_map == "aseg" else label_map
    if not set(mapping) & set(found):
        raise ValueError(f"holds none of {_listed(list(mapping))}; found {_listed(found)}")
    new_numbers = np.zeros(max(*found, *mapping) + 1, np.uint8)
    for number, label in mapping.items():
        new_numbers[number] = label
    return new_numbers[drawn]


def _map_of(found: list[int], data_set: DataSet) -> str:
    if data_set.sides and set(ASEG) <= set(found):
        return "aseg"
    if set(found) <= {1, 2} and (2 in found or not data_set.sides):
        return "manual"
    if data_set.sides and len(found) == 1:
        return "one_label"
    raise ValueError(
        f"label value(s) {_listed(found)} fit no label map; say with --label_map which numbers the labels "
        "have, such as 1=32,2=31"
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


# ---- sides ----


def split_sides(mask: np.ndarray, scan: Scan) -> np.ndarray:
    """(z, y, x) uint8: 1 what lies left in a mask of both sides, 2 what lies right.

    The middle is halfway between the two large pieces if they lie far apart, else that of the head. Every
    piece goes to one side as a whole.

    Args:
        mask: (z, y, x) bool, on the grid of the scan.

    Raises:
        ValueError: both sides are one piece, or all of the mask lies on one side of the head.
    """
    pieces, number = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())[1:]
    centres = ndimage.center_of_mass(mask, pieces, range(1, number + 1))
    places = np.array([world_x(centre, scan.affine) for centre in centres])
    head = head_middle(scan)
    main = np.argsort(sizes)[::-1][:2]
    middle = head
    if (
        number > 1
        and sizes[main[1]] >= SMALLEST_OTHER * sizes[main[0]]
        and np.ptp(places[main]) >= FAR_APART_MM
    ):
        middle = places[main].mean()
    largest = pieces == main[0] + 1
    on_the_right = np.mean(world_x(np.argwhere(largest).T, scan.affine) > middle)
    if ACROSS < on_the_right < 1 - ACROSS:
        raise ValueError("one piece of it reaches across the middle of the head; separate the two sides")
    is_right = places > middle
    if is_right.all() or not is_right.any() or not places.min() < head < places.max():
        side = "right" if places.mean() > head else "left"
        raise ValueError(
            f"all of the mask lies {side} of the middle of the head (x = {head:.0f} mm); draw both sides, or "
            "give the sides numbers of their own"
        )
    side_of = np.concatenate([[0], np.where(is_right, 2, 1)]).astype(np.uint8)
    return side_of[pieces]


def head_middle(scan: Scan) -> float:
    """World coordinate x, mm, of the middle of what is not air."""
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


def why_exchanged(labels: np.ndarray, affine: np.ndarray, data_set: DataSet) -> str:
    """A sentence if the left one of two sides lies right of the right one, else ""."""
    measured = measure_labels(labels)
    for left, right in data_set.sides:
        if left not in measured or right not in measured:
            continue
        x_left, x_right = (float(world_x(measured[n].centre, affine)) for n in (left, right))
        if x_left >= x_right:
            names = data_set.structures.names
            return (
                f"left and right are exchanged: {names[left]} ({left}) is centred at x = {x_left:.0f} mm, "
                f"{names[right]} ({right}) at {x_right:.0f} mm, but x grows to the right; exchange the two "
                f"labels, or correct the orientation. Where all files are so: --label_map {left}={right},"
                f"{right}={left}"
            )
    return ""
