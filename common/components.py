"""Clean-up of label maps: stray pieces of a structure beside its main one."""

from collections.abc import Collection

import numpy as np

MIN_CUT_SHARE = 0.01  # of the largest, from which on another piece that touches the scan's border stays
MIN_SHARE = 0.05  # of the largest: smaller pieces of a structure that may have several are removed


def remove_stray_pieces(
    labels: np.ndarray, voxel_mm3: float, *, compact: Collection[int], parted: Collection[int] = ()
) -> tuple[np.ndarray, dict[int, dict]]:
    """Remove stray pieces of each label; returns a copy of the labels and what was removed.

    Pieces are connected also across corners. Each label is looked at in its own box only.

    Args:
        labels: (z, y, x) uint8 or another integer type, of a whole scan, since its borders count.
        compact: labels of which only the largest piece stays, and what has at least 1 % of its volume and
            touches the border of the scan, which may have cut the structure in two.
        parted: labels of which all stays that has at least 5 % of the largest piece. Labels that are neither
            here nor there stay as they are.

    Returns:
        (labels, {label: {"removed_ml", "components"}}) with the labels of which something was removed.
    """
    from scipy import ndimage

    labels, report = labels.copy(), {}
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or not (label in compact or label in parted):
            continue
        view = labels[box]
        pieces, num = ndimage.label(view == label, np.ones((3, 3, 3)))
        if num < 2:
            continue
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        largest = sizes.argmax()
        goes = sizes < sizes[largest] * MIN_SHARE
        if label in compact:
            is_cut = np.zeros(num + 1, bool)
            for k, part in enumerate(ndimage.find_objects(pieces), start=1):
                is_cut[k] = any(
                    whole.start + side.start == 0 or whole.start + side.stop == size
                    for whole, side, size in zip(box, part, labels.shape, strict=True)
                )
            goes = ~is_cut | (sizes < sizes[largest] * MIN_CUT_SHARE)
        goes[[0, largest]] = False
        if goes.any():
            view[goes[pieces]] = 0
            removed_ml = float(sizes[goes].sum() * voxel_mm3 / 1000)
            report[label] = {"removed_ml": removed_ml, "components": int(goes.sum())}
    return labels, report


def smooth_mask(mask: np.ndarray) -> np.ndarray:
    """Each voxel of a mask (z, y, x) becomes what most of the 3 x 3 x 3 around it are; returns bool.

    Thin spots and single voxels go, small holes and gaps between slices close. It is what a median of the
    probabilities before their threshold would give. Beyond the border of the scan its outermost voxels go on.
    """
    from scipy import ndimage

    return ndimage.uniform_filter(mask.astype(np.float32), 3, mode="nearest") > 0.5


def lies_left_of(labels: np.ndarray, label: int, other: int) -> bool:
    """Whether the centre of one label lies left of that of another; False if one of them is missing.

    Where the body tells the sides apart, as with liver and spleen, it shows that a scan is mirrored.

    Args:
        labels: (z, y, x) integers in RAS+, where x grows to the patient's right.
    """
    from scipy import ndimage

    boxes = ndimage.find_objects(labels, max_label=max(label, other))
    if boxes[label - 1] is None or boxes[other - 1] is None:
        return False
    x, other_x = (
        boxes[n - 1][2].start + ndimage.center_of_mass(labels[boxes[n - 1]] == n)[2] for n in (label, other)
    )
    return bool(x < other_x)
