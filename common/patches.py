"""Which patch to draw next: strata of places from a case's index (common/hdf5.py); no volume is scanned."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from common.hdf5 import CaseFile

STRATA = ("class", "boundary", "hard_negative", "ends", "box", "uniform")

Triple = tuple[int, int, int]


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


def draw_patch(
    case: CaseFile,
    patch_shape: Sequence[int],
    weights: dict[str, float],
    rng: np.random.Generator,
    *,
    jitter: float = 0.25,
    box: tuple[Sequence[int], Sequence[int]] | None = None,
    classes: Iterable[int] | None = None,
    ends_mm: float = 40.0,
) -> tuple[Triple, str]:
    """Draw one patch: first a stratum by weight, then a place in it.

    Strata:
        class: a voxel of a label; each label that the case has is equally likely, whatever its size.
        boundary, hard_negative: a voxel of that part of the index.
        box: centred on any voxel of `box`.
        ends: centred on a voxel of the first or last `ends_mm` along z of `box` (without one, of the volume).
        uniform: every patch that lies inside the volume is equally likely, the first and last included.

    Args:
        patch_shape: z y x.
        weights: by stratum, not negative; need not add up to 1.
        jitter: patches of the first three strata are moved at random by up to this share of their size along
            each axis, so that the object is not always in the middle. Below 0.5: it stays in the patch.
        box: (start, stop) z y x, stop not included; cut to the volume.
        classes: labels that the stratum `class` may draw; None for all.

    Returns:
        start (z y x; negative where the volume is smaller than the patch) and the stratum. It is "uniform" if
        the case has nothing of the stratum drawn: no such voxel in the index, or no box.

    Raises:
        ValueError: an unknown stratum, weights that are negative or add up to 0, a jitter out of 0 to 0.5.
    """
    unknown = sorted(set(weights) - set(STRATA))
    total = sum(weights.values())
    if unknown or not total > 0 or min(weights.values()) < 0:
        raise ValueError(f"patch weights {weights}: expected {', '.join(STRATA)}, at least one above 0")
    if not 0 <= jitter < 0.5:
        raise ValueError(f"jitter {jitter}: expected at least 0 and below 0.5")
    volume = case.shape
    name = str(rng.choice(list(weights), p=np.array(list(weights.values())) / total))

    if name in ("class", "boundary", "hard_negative"):
        place = _draw_place(case, name, rng, classes)
        if place is not None:
            reach = [int(jitter * n) for n in patch_shape]
            centre = [int(c) + int(rng.integers(-r, r + 1)) for c, r in zip(place, reach, strict=True)]
            return patch_start(centre, patch_shape, volume), name
    elif name in ("ends", "box"):
        low, high = _cut_box(box, volume)
        if (box is not None or name == "ends") and all(a < b for a, b in zip(low, high, strict=True)):
            if name == "ends":
                depth = min(max(round(ends_mm / case.spacing_mm[0]), 1), high[0] - low[0])
                first = rng.random() < 0.5
                low[0], high[0] = (low[0], low[0] + depth) if first else (high[0] - depth, high[0])
            return patch_start(rng.integers(low, high), patch_shape, volume), name
    last = [max(v - n, 0) for v, n in zip(volume, patch_shape, strict=True)]
    centre = [int(rng.integers(n + 1)) + p // 2 for n, p in zip(last, patch_shape, strict=True)]
    return patch_start(centre, patch_shape, volume), "uniform"


def histogram(names: Iterable[str] | dict[str, int]) -> dict[str, float]:
    """Share of each stratum among the names that `draw_patch` returned, or their counts, in the order of
    STRATA."""
    counts = Counter(names)
    return {name: counts[name] / counts.total() for name in STRATA if name in counts}


def _draw_place(
    case: CaseFile, name: str, rng: np.random.Generator, classes: Iterable[int] | None
) -> np.ndarray | None:
    """A place (3,) of the index of this kind; None where the case has none."""
    names = [n for n in case.index_names if n == name or (name == "class" and n.startswith("class_"))]
    if name == "class" and classes is not None:
        wanted = {f"class_{n}" for n in classes}
        names = [n for n in names if n in wanted]
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
