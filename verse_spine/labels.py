"""VerSe's vertebra numbers, centroid files, and the identification rate.

A mask holds 1-7 for C1-C7, 8-19 for T1-T12, 20-25 for L1-L6 and 28 for a thirteenth thoracic vertebra. 26 and
27 (sacrum, coccyx) have numbers but VerSe does not annotate them, so a mask that holds them counts them as
background. A centroid file holds the centres of the vertebral *bodies*, in voxels of the image turned to the
orientation that the file names; here a centre in space is always (z, y, x) in mm, RAS+.

The data set's own tools mirror an axis as `size - x`, one more than the last index minus x, so positions that
went through them may be one voxel off. Here everything goes through the affine, where that cannot happen.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from common.conversion import failure_reason
from common.files import read_json, replacing
from common.nifti import NiftiFile

LABEL_NAMES = {
    **{n: f"C{n}" for n in range(1, 8)},
    **{n: f"T{n - 7}" for n in range(8, 20)},
    **{n: f"L{n - 19}" for n in range(20, 26)},
    26: "sacrum",
    27: "coccyx",
    28: "T13",
}
VERTEBRAE = (*range(1, 26), 28)  # the annotated ones
MODES = ("binary", "region3", "levels26")
# Between the centre of a vertebra's mask and of its body; files that differ by more do not belong together.
MAX_DISTANCE_MM = 25.0
HIT_DISTANCE_MM = 20.0  # within which the VerSe challenge counts a centre as found
# A voxel this deep below the surface, as a share of the largest depth, counts as body. With 0.5 the arches of
# T12 and L1 would count too.
BODY_DEPTH = 0.6

# The axis (0 z, 1 y, 2 x) that each axis code names, and its sign in RAS+.
_AXES = {"L": (2, -1), "R": (2, 1), "P": (1, -1), "A": (1, 1), "I": (0, -1), "S": (0, 1)}


@dataclass(frozen=True)
class Centroids:
    """What a centroid file holds.

    Attributes:
        direction: axis codes of the image that the voxels belong to, such as ("P", "I", "R").
        voxels: {label: (X, Y, Z)}; 0 is the centre of the first voxel.
    """

    direction: tuple[str, str, str]
    voxels: dict[int, tuple[float, float, float]]


# ---- numbers and classes ----


def class_names(mode: str) -> list[str]:
    """Names of the classes by their index; 0 is the background. See `map_labels` for the modes."""
    if mode == "binary":
        return ["background", "vertebra"]
    if mode == "region3":
        return ["background", "cervical", "thoracic", "lumbar"]
    if mode == "levels26":
        return ["background", *(LABEL_NAMES[label] for label in VERTEBRAE)]
    raise ValueError(f"label mode {mode!r} is unknown; use one of {', '.join(MODES)}")


def num_classes(mode: str) -> int:
    """How many classes there are with the background: 2, 4 or 27."""
    return len(class_names(mode))


def num_outputs(mode: str) -> int:
    """Channels of a network's logits: 1 for binary (a sigmoid), otherwise one for each class: 4 or 27."""
    return 1 if mode == "binary" else num_classes(mode)


def map_labels(labels: np.ndarray, mode: str) -> np.ndarray:
    """VerSe's numbers -> class indices, uint8, same shape.

    Args:
        labels: whole numbers, any shape.
        mode: binary (1 = any vertebra), region3 (1 cervical, 2 thoracic with T13, 3 lumbar) or levels26
            (1-25 as they are, 26 = T13). Sacrum and coccyx become 0.

    Raises:
        ValueError: an unknown mode, or numbers that VerSe does not use; lists them.
    """
    class_names(mode)
    table = np.zeros(max(LABEL_NAMES) + 1, np.uint8)
    for index, label in enumerate(VERTEBRAE, 1):
        table[label] = {"binary": 1, "region3": _region(label), "levels26": index}[mode]
    _check_range(
        labels, len(table) - 1, "VerSe uses 0-28 (1-7 C, 8-19 T, 20-25 L, 28 T13); map yours to these"
    )
    return table[labels]


def _region(label: int) -> int:
    """1 for a cervical, 2 for a thoracic, 3 for a lumbar vertebra."""
    if label < 8:
        return 1
    if label < 20 or label == 28:
        return 2
    return 3


def unmap_labels(pred: np.ndarray, mode: str) -> np.ndarray:
    """Class indices -> uint8 numbers for a file: VerSe's for levels26, the class indices otherwise."""
    _check_range(pred, num_classes(mode) - 1, f"mode {mode} has the classes 0-{num_classes(mode) - 1}")
    return np.array([0, *VERTEBRAE], np.uint8)[pred] if mode == "levels26" else pred.astype(np.uint8)


def _check_range(values: np.ndarray, highest: int, advice: str) -> None:
    if values.dtype.kind not in "iu":
        raise ValueError(f"labels of type {values.dtype}, whole numbers are needed; round them first")
    if values.size and (values.min() < 0 or values.max() > highest):
        wrong = np.unique(values[(values < 0) | (values > highest)])
        shown = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise ValueError(f"unknown label value(s) {shown}; {advice}")


# ---- centroid files ----


def read_centroids(path: str | Path) -> Centroids:
    """Read a `..._ctd.json` (`seg-subreg` or `seg-vb`, both alike); entries with NaN are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; says what is wrong.
    """
    path = Path(path)
    expected = (
        'expected a list [{"direction": ["P", "I", "R"]}, {"label": 20, "X": 1.0, "Y": 2.0, "Z": 3.0}, ...]'
    )
    items = read_json(path, list, advice=expected)
    if not items or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{path}: {expected}")
    direction = items[0].get("direction")
    if not _is_direction(direction):
        raise ValueError(f"{path}: first item {str(items[0])[:80]} names no orientation; {expected}")
    voxels = {}
    for item in items[1:]:
        if "label" not in item and not {"X", "Y", "Z"} & item.keys():
            continue  # some tools add items of their own, with a comment or a size
        try:
            label, position = item["label"], tuple(float(item[axis]) for axis in "XYZ")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: entry {str(item)[:80]} is not complete; {expected}") from error
        if type(label) not in (int, float) or label not in LABEL_NAMES:
            raise ValueError(f"{path}: label {label!r} is not a vertebra number of VerSe (1-28)")
        if any(map(math.isnan, position)):
            continue
        if int(label) in voxels or not all(map(math.isfinite, position)):
            raise ValueError(f"{path}: label {label} stands there twice or has an infinite position")
        voxels[int(label)] = position
    return Centroids(tuple(direction), voxels)


def optional_centroids(path: Path, scan: NiftiFile) -> tuple[dict[int, tuple] | None, str]:
    """(`centroids_to_mm` of a file, ""), or (None, why it cannot be read): it is not worth the case."""
    try:
        return centroids_to_mm(read_centroids(path), scan), ""
    except (ValueError, OSError) as error:
        return None, f"centroid file left out: {failure_reason(error)}"


def write_centroids(path: str | Path, centroids: Centroids) -> None:
    """Write VerSe's format; the file appears whole or not at all."""
    items: list[dict] = [{"direction": list(centroids.direction)}]
    for label, position in sorted(centroids.voxels.items()):
        items.append({"label": label, **{axis: round(v, 2) for axis, v in zip("XYZ", position, strict=True)}})
    with replacing(path) as partial:
        partial.write_text(json.dumps(items) + "\n", encoding="utf8")


def centroids_to_mm(centroids: Centroids, scan: NiftiFile) -> dict[int, tuple[float, float, float]]:
    """{label: (z, y, x) mm RAS+} of the voxels of a centroid file.

    Args:
        scan: the image or mask of the same case, whatever the orientation of its file (`affine` and
            `shape` are used, RAS+).
    """
    to_ras = _direction_to_ras(centroids.direction, scan.shape)
    return {
        label: _to_space(scan.affine, (to_ras @ [*position, 1.0])[:3])
        for label, position in centroids.voxels.items()
    }


def centroids_to_voxels(
    centres_mm: dict[int, tuple[float, float, float]],
    scan: NiftiFile,
) -> Centroids:
    """The reverse of `centroids_to_mm`, in the orientation of the scan's file."""
    direction = tuple(scan.orientation)
    from_mm = np.linalg.inv(scan.affine @ _direction_to_ras(direction, scan.shape))
    voxels = {
        label: tuple(float(v) for v in (from_mm @ [*position[::-1], 1.0])[:3])
        for label, position in centres_mm.items()
    }
    return Centroids(direction, voxels)


def _is_direction(codes: object) -> bool:
    """Whether `codes` are three axis codes, one of each axis."""
    if not isinstance(codes, (list, tuple)) or not all(isinstance(code, str) for code in codes):
        return False
    return len(codes) == 3 and sorted(_AXES[code][0] for code in codes if code in _AXES) == [0, 1, 2]


def _direction_to_ras(direction: tuple[str, str, str], shape: tuple[int, int, int]) -> np.ndarray:
    """(4, 4): voxel of the image in `direction` -> voxel (x, y, z) of the RAS+ array of `shape` (z, y, x)."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for column, code in enumerate(direction):
        axis, sign = _AXES[code]
        matrix[2 - axis, column] = sign
        matrix[2 - axis, 3] = shape[axis] - 1 if sign < 0 else 0
    return matrix


def _to_space(affine: np.ndarray, voxel_xyz: np.ndarray) -> tuple[float, float, float]:
    x, y, z = affine[:3, :3] @ voxel_xyz + affine[:3, 3]
    return float(z), float(y), float(x)


# ---- centres of masks ----


def mask_centres(labels: np.ndarray, affine: np.ndarray) -> dict[int, tuple[float, float, float]]:
    """{label: centre of mass, (z, y, x) mm RAS+} of the vertebrae in a mask.

    Args:
        labels: (z, y, x) RAS+, VerSe's numbers, uint8 or another integer type.
        affine: (4, 4), voxel (x, y, z) to mm, as `Scan.affine`.
    """
    return {
        label: _to_space(affine, (np.argwhere(mask).mean(axis=0) + start)[::-1])
        for label, mask, start in _boxes(labels)
    }


def body_centres(labels: np.ndarray, affine: np.ndarray) -> dict[int, tuple[float, float, float]]:
    """{label: estimated centre of the vertebral body, (z, y, x) mm RAS+}, the point that VerSe annotates.

    Arch and processes pull the centre of mass of a vertebra backwards by about 10 mm. The body is its
    thickest part: of the voxels whose depth below the surface is at least 0.6 of the largest, the biggest
    connected piece is taken. Its mean distance from the annotated centres was 1.1 mm for nine vertebrae of
    VerSe, 0.7 mm and 1.7 mm in two other scans; that of the masks' centres of mass 11.7, 8.4 and 14.6 mm.

    Args:
        labels: (z, y, x) RAS+, VerSe's numbers.
        affine: (4, 4), voxel (x, y, z) to mm, as `Scan.affine`.
    """
    spacing_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))[::-1]
    step = np.maximum(1 / spacing_mm, 1).astype(int)  # finer than 1 mm takes time and changes nothing
    centres = {}
    for label, mask, start in _boxes(labels):
        strides = step if mask[:: step[0], :: step[1], :: step[2]].any() else np.ones(3, int)
        coarse = mask[:: strides[0], :: strides[1], :: strides[2]]
        depth = ndimage.distance_transform_edt(np.pad(coarse, 1), sampling=spacing_mm * strides)
        pieces, _ = ndimage.label(depth[1:-1, 1:-1, 1:-1] >= BODY_DEPTH * depth.max())
        sizes = np.bincount(pieces.ravel())
        voxel = np.argwhere(pieces == 1 + sizes[1:].argmax()).mean(axis=0) * strides + start
        centres[label] = _to_space(affine, voxel[::-1])
    return centres


def _boxes(labels: np.ndarray):
    """(label, its mask in its box, first voxel of the box z y x) for each annotated vertebra."""
    found = ndimage.find_objects(labels)
    for label in VERTEBRAE:
        box = found[label - 1] if label <= len(found) else None
        if box is not None:
            yield label, labels[box] == label, [part.start for part in box]


def check_centroids(
    centres_mm: dict[int, tuple[float, float, float]], labels: np.ndarray, affine: np.ndarray
) -> tuple[list[str], list[str]]:
    """Compare a centroid file with the mask of its case, as releases of VerSe differ in their coordinates.

    Args:
        centres_mm: from `centroids_to_mm`.
        labels, affine: as `mask_centres`.

    Returns:
        problems: why the files do not belong together: a centre more than 25 mm from that of the mask, or
            not one label in common. Such a case should be set aside.
        notes: labels that only one of them has, as happens with vertebrae that the scan cuts.
    """
    in_mask = mask_centres(labels, affine)
    problems, notes = [], []
    if centres_mm and in_mask and not centres_mm.keys() & in_mask.keys():
        problems.append(f"no label in common: centroids {_names(centres_mm)}, mask {_names(in_mask)}")
    for label in sorted(centres_mm.keys() & in_mask.keys()):
        distance = math.dist(centres_mm[label], in_mask[label])
        if distance > MAX_DISTANCE_MM:
            problems.append(f"{LABEL_NAMES[label]}: centroid {distance:.0f} mm from the centre of the mask")
    if only := centres_mm.keys() - in_mask.keys():
        notes.append(f"in the centroid file only: {_names(only)}")
    if only := in_mask.keys() - centres_mm.keys():
        notes.append(f"in the mask only: {_names(only)}")
    return problems, notes


def _names(labels) -> str:
    return ", ".join(LABEL_NAMES[label] for label in sorted(labels))


def identification_rate(pred_mm: dict[int, tuple], target_mm: dict[int, tuple]) -> dict[str, float]:
    """Which vertebrae of one scan have the right name and place (Sekuboyina et al. 2021, arXiv:2001.09193).

    A label that both have is a hit if, of the true centres of such labels, its own is the nearest to the
    predicted centre, and lies within 20 mm. A missing or an additional vertebra is therefore never a hit, and
    does not spoil another one.

    Returns:
        hits, targets, predicted: counts; add them over scans for the rate of a data set.
        rate, recall: hits / targets; NaN without targets.
        precision: hits / predicted; NaN without predictions.
        d_mean_mm: mean distance of the hits; NaN without hits.
    """
    both = sorted(pred_mm.keys() & target_mm.keys())
    distances = []
    for label in both:
        to_target = {other: math.dist(pred_mm[label], target_mm[other]) for other in both}
        if to_target[label] <= min(HIT_DISTANCE_MM, *to_target.values()):
            distances.append(to_target[label])
    hits, targets, predicted = len(distances), len(target_mm), len(pred_mm)
    rate = hits / targets if targets else math.nan
    return {
        "hits": hits,
        "targets": targets,
        "predicted": predicted,
        "rate": rate,
        "recall": rate,
        "precision": hits / predicted if predicted else math.nan,
        "d_mean_mm": sum(distances) / hits if hits else math.nan,
    }
