"""Where patches are worth drawing, and which to draw next.

`location_index` lists places of each kind once, in preprocessing; common/hdf5.py keeps them with the case.
`draw_patch` draws from them in training, which never has to look through a volume.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from common.hdf5 import CaseFile

# The most places of each kind that the index keeps.
MOST_PER_CLASS = 10_000
MOST_BOUNDARY = 5_000
MOST_HARD_NEGATIVES = 5_000

STRATA = ("class", "boundary", "hard_negative", "ends", "box", "uniform")

# Patches around a place of the index are moved at random by up to this share of their size along each axis,
# so that the object is not always in the middle. Below 0.5: it stays in the patch.
JITTER = 0.25
ENDS_MM = 40.0  # along z: how far the first and the last part of a box reach
Triple = tuple[int, int, int]


def location_index(
    label: np.ndarray,
    image: np.ndarray | None = None,
    *,
    hard_negative_above: float | None = None,
    boundary_per_class: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Random places of each kind, so that training never has to look through a volume; repeatable by `seed`.

    Args:
        label: (z, y, x) integers; 0 is background.
        image: (z, y, x), needed for hard negatives only.
        hard_negative_above: background brighter than this is a hard negative, e.g. 150 HU beside vertebrae:
            ribs, pelvis, metal. None: the index has no `hard_negative`.
        boundary_per_class: also list the boundary of each label by itself, so that that of a small organ is
            not lost among those of large ones.

    Returns:
        (n, 3) uint16 places z y x: `class_<n>` for each value above 0 found, `boundary` (a voxel of a label,
        one of its 6 neighbours has another value), `boundary_<n>` if asked for, `hard_negative`. All but the
        first may be empty. Of each kind there are at most MOST_PER_CLASS, MOST_BOUNDARY (of each label) and
        MOST_HARD_NEGATIVES.

    Raises:
        ValueError: a label of another type or too large, an image that is missing or of another shape.
    """
    if label.ndim != 3 or max(label.shape) > 65_536 or label.dtype.kind not in "ui" or label.min() < 0:
        raise ValueError(
            f"label {label.dtype} {label.shape}: expected (z, y, x), integers from 0, sides up to 65,536"
        )
    rng = np.random.default_rng(seed)

    def pick(flat: np.ndarray, most: int) -> np.ndarray:
        if len(flat) > most:
            flat = np.sort(rng.choice(flat, most, replace=False, shuffle=False))
        return np.stack(np.unravel_index(flat, label.shape), axis=1).astype(np.uint16)

    foreground = np.flatnonzero(label)
    numbers = label.ravel()[foreground]
    found = np.unique(numbers)
    index = {f"class_{n}": pick(foreground[numbers == n], MOST_PER_CLASS) for n in found}

    edge = np.zeros(label.shape, bool)
    for axis in range(3):
        values, edges = np.moveaxis(label, axis, 0), np.moveaxis(edge, axis, 0)
        changes = values[1:] != values[:-1]
        edges[1:] |= changes
        edges[:-1] |= changes
    is_edge = edge.ravel()[foreground]
    index["boundary"] = pick(foreground[is_edge], MOST_BOUNDARY)
    if boundary_per_class:
        for n in found:
            index[f"boundary_{n}"] = pick(foreground[is_edge & (numbers == n)], MOST_BOUNDARY)

    if hard_negative_above is not None:
        if image is None or image.shape != label.shape:
            shape = None if image is None else image.shape
            raise ValueError(f"hard negatives need an image of the label's shape {label.shape}, got {shape}")
        bright = np.flatnonzero((label == 0) & (image > hard_negative_above))
        index["hard_negative"] = pick(bright, MOST_HARD_NEGATIVES)
    return index


def patch_start(centre: Sequence[int], patch_shape: Sequence[int], volume_shape: Sequence[int]) -> Triple:
    """First voxel of the patch around `centre`, moved into the volume; all z y x, in voxels.

    Along an axis where the volume is smaller than the patch the volume lies in the middle of the patch, so
    the start is negative.
    """
    start = []
    for c, patch, volume in zip(centre, patch_shape, volume_shape, strict=True):
        room = volume - patch  # the last offset
        start.append(min(max(int(c) - patch // 2, 0), room) if room >= 0 else -(-room // 2))
    return tuple(start)


def start_near(
    place: Sequence[int],
    patch_shape: Sequence[int],
    volume_shape: Sequence[int],
    rng: np.random.Generator,
    *,
    jitter: float | None = None,
) -> Triple:
    """First voxel of a patch around `place`, moved at random; see `patch_start`.

    Args:
        jitter: largest move along each axis, as a share below 0.5 of the patch's side; None = JITTER.
    """
    share = JITTER if jitter is None else jitter
    reach = [int(share * n) for n in patch_shape]
    centre = [int(c) + int(rng.integers(-r, r + 1)) for c, r in zip(place, reach, strict=True)]
    return patch_start(centre, patch_shape, volume_shape)


def uniform_start(
    patch_shape: Sequence[int], volume_shape: Sequence[int], rng: np.random.Generator
) -> Triple:
    """First voxel of a patch inside the volume; each is equally likely, the first and the last included."""
    last = [max(v - n, 0) for v, n in zip(volume_shape, patch_shape, strict=True)]
    centre = [int(rng.integers(n + 1)) + p // 2 for n, p in zip(last, patch_shape, strict=True)]
    return patch_start(centre, patch_shape, volume_shape)


def draw_patch(
    case: CaseFile,
    patch_shape: Sequence[int],
    weights: dict[str, float],
    rng: np.random.Generator,
    *,
    box: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[Triple, str]:
    """Draw one patch: first a stratum by weight, then a place in it.

    Strata:
        class: a voxel of a label; each label that the case has is equally likely, whatever its size.
        boundary, hard_negative: a voxel of that part of the index. These three move by JITTER.
        box: centred on any voxel of `box`.
        ends: centred on a voxel of the first or last ENDS_MM along z of `box` (without one, of the volume).
        uniform: every patch that lies inside the volume is equally likely, the first and last included.

    Args:
        patch_shape: z y x.
        weights: by stratum, not negative; need not add up to 1.
        box: (start, stop) z y x, stop not included; cut to the volume.

    Returns:
        start (z y x; negative where the volume is smaller than the patch) and the stratum. It is "uniform" if
        the case has nothing of the stratum drawn: no such voxel in the index, or no box.

    Raises:
        ValueError: an unknown stratum, or weights that are negative or add up to 0.
    """
    unknown = sorted(set(weights) - set(STRATA))
    total = sum(weights.values())
    if unknown or not total > 0 or min(weights.values()) < 0:
        raise ValueError(f"patch weights {weights}: expected {', '.join(STRATA)}, at least one above 0")
    volume = case.shape
    name = str(rng.choice(list(weights), p=np.array(list(weights.values())) / total))

    if name in ("class", "boundary", "hard_negative"):
        place = _draw_place(case, name, rng)
        if place is not None:
            return start_near(place, patch_shape, volume, rng), name
    elif name in ("ends", "box"):
        low, high = _cut_box(box, volume)
        if (box is not None or name == "ends") and all(a < b for a, b in zip(low, high, strict=True)):
            if name == "ends":
                depth = min(max(round(ENDS_MM / case.spacing_mm[0]), 1), high[0] - low[0])
                first = rng.random() < 0.5
                low[0], high[0] = (low[0], low[0] + depth) if first else (high[0] - depth, high[0])
            return patch_start(rng.integers(low, high), patch_shape, volume), name
    return uniform_start(patch_shape, volume, rng), "uniform"


def histogram(names: Iterable[str] | dict[str, int]) -> dict[str, float]:
    """Share of each stratum among the names that `draw_patch` returned, or their counts, in the order of
    STRATA."""
    counts = Counter(names)
    return {name: counts[name] / counts.total() for name in STRATA if name in counts}


def _draw_place(case: CaseFile, name: str, rng: np.random.Generator) -> np.ndarray | None:
    """A place (3,) of the index of this kind; None where the case has none."""
    names = [n for n in case.index_names if n == name or (name == "class" and n.startswith("class_"))]
    if not names:
        return None
    places = case.locations(names[rng.integers(len(names))])
    return places[rng.integers(len(places))] if len(places) else None


def _cut_box(
    box: tuple[Sequence[int], Sequence[int]] | None, volume: Sequence[int]
) -> tuple[list[int], list[int]]:
    if box is None:
        return [0, 0, 0], list(volume)
    return [max(int(a), 0) for a in box[0]], [min(int(b), v) for b, v in zip(box[1], volume, strict=True)]
