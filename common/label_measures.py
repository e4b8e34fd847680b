"""What is in a label map, and in many of them: how much of each label, where, in how many pieces; and what a
coarser grid leaves of it."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.files import listed
from common.messages import warn
from common.metrics import binary_counts, dice_from_counts
from common.nifti import Scan
from common.pixel_labels import IGNORE
from common.volumes import Box, resample_labels, resampled_shape


class LabelMeasure(NamedTuple):
    """One label of a (z, y, x) map; all in voxels.

    Attributes:
        box: smallest box around it, (start, stop), z y x, half-open.
        centre: mean of its voxels' indices, z y x.
        pieces: sizes of its connected parts, the largest first; connected also across corners.
    """

    voxels: int
    box: Box
    centre: tuple[float, float, float]
    pieces: tuple[int, ...]

    def extent_mm(self, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """Sides of the box in mm, z y x."""
        start, stop = self.box
        z, y, x = ((b - a) * mm for a, b, mm in zip(start, stop, spacing_mm, strict=True))
        return z, y, x

    def specks(self, fewer_than: int) -> tuple[int, ...]:
        """Sizes of the parts beside the largest that have fewer voxels than this."""
        return tuple(size for size in self.pieces[1:] if size < fewer_than)


def measure_labels(labels: np.ndarray) -> dict[int, LabelMeasure]:
    """{label: what there is of it} for each label above 0 that a (z, y, x) map of integers holds.

    One label after the other, each in its box, so that little memory is needed.
    """
    measures = {}
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        mask = labels[box] == label
        voxels = int(np.count_nonzero(mask))
        centre = []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            profile = np.count_nonzero(mask, axis=others)
            centre.append(box[axis].start + float(profile @ np.arange(profile.size)) / voxels)
        parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
        pieces = np.sort(np.bincount(parts[mask])[1:])[::-1]
        corners = tuple(p.start for p in box), tuple(p.stop for p in box)
        measures[label] = LabelMeasure(voxels, corners, tuple(centre), tuple(pieces.tolist()))
    return measures


def label_counts(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """(num_labels,) voxels of each label from 0 on in a (z, y, x) map of integers below `num_labels`.

    Slice by slice, because numpy's bincount makes eight bytes of each voxel.
    """
    counts = np.zeros(num_labels, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=num_labels)
    return counts


def numbers_in(labels: np.ndarray) -> list[int]:
    """The numbers above 0 in a (z, y, x) map of whole numbers, in order."""
    return (np.flatnonzero(label_counts(labels, int(labels.max()) + 1)[1:]) + 1).tolist()


def label_volumes_ml(
    labels: np.ndarray, names: Mapping[int, str], voxel_mm3: float, known: Collection[int]
) -> dict[str, float | None]:
    """{name: volume in mL} of the labels in a (z, y, x) map; None where nothing is known of a label.

    Args:
        names: {label: name}; no higher label may be in the map.
        known: labels that were looked for.
    """
    counts = label_counts(labels, 1 + max(names))
    return {name: float(counts[n] * voxel_mm3 / 1000) if n in known else None for n, name in names.items()}


def asymmetry_index(left: float, right: float) -> float | None:
    """100 * (left - right) / their mean, of two volumes: above 0 the left is larger; None without either."""
    return 200 * (left - right) / (left + right) if left + right else None


def round_trip(
    labels: np.ndarray, spacing_mm: Sequence[float], working_mm: Sequence[float]
) -> tuple[np.ndarray, dict[int, float]]:
    """What is left of labels on a grid of about `working_mm`, resampled as preprocessing and prediction do.

    Args:
        labels: (z, y, x) uint8 or uint16 with voxels of `spacing_mm`, z y x.

    Returns:
        The labels taken to the working grid and back, of the shape and type of `labels`; and
        {label above 0 that is in `labels`: Dice of the two}, which no network trained on that grid can pass.
    """
    shape = resampled_shape(labels.shape, spacing_mm, working_mm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label that is lost has a Dice of 0
        returned = resample_labels(resample_labels(labels, shape), labels.shape)
    present = [n for n, box in enumerate(ndimage.find_objects(labels), 1) if box is not None]
    counts = {n: binary_counts(returned == n, labels == n) for n in present}
    return returned, {n: dice_from_counts(tp, fp, fn) for n, (tp, fp, fn, _) in counts.items()}


def why_not_labels(labels: np.ndarray, names: Mapping[int, str], labelled: Collection[int]) -> str:
    """A phrase about the numbers in a label map that do not belong there; "" if all do.

    Args:
        labels: (z, y, x) whole numbers; 0 is the background.
        names: {number: name} of all labels of the data set.
        labelled: those of them that this map was made with.
    """
    found = numbers_in(labels)
    if unknown := [n for n in found if n not in names]:
        return (
            f"label value(s) {listed(unknown)}; expected {min(names)} to {max(names)}. Is it a label "
            "of another data set?"
        )
    if found == [1] and len(labelled) > 2 and 1 in labelled:
        return (
            f"holds 0 and 1 alone, though it was made with {len(labelled)} labels; is it a mask of something "
            f"else? If it really shows the {names[1]} only, say --labelled 1, or name it in dataset.json"
        )
    if surplus := [f"{n} ({names[n]})" for n in found if n not in labelled]:
        return (
            f"holds {', '.join(surplus)}, which --labelled or dataset.json does not name as labelled; "
            "correct the list of labels"
        )
    return ""


def structure_mask(
    labels: np.ndarray, wanted: Collection[int] | None, path: str | Path
) -> tuple[np.ndarray, list[int]]:
    """Where a label map shows one structure, whose parts may have several numbers.

    Args:
        labels: (z, y, x) whole numbers; 0 is the background.
        wanted: the numbers that count; None: all above 0.
        path: names the file in the error message.

    Returns:
        bool (z, y, x); all numbers above 0 in the map, in order.

    Raises:
        ValueError: all above 0 would count, and IGNORE is one of several numbers.
    """
    found = np.unique(labels[labels > 0]).tolist()
    if wanted is None and len(found) > 1 and IGNORE in found:
        raise ValueError(
            f"{path}: label values {', '.join(map(str, found))}; {IGNORE} beside others often means that "
            "nothing is known: say with --label_values which of them count"
        )
    return (labels > 0 if wanted is None else np.isin(labels, list(wanted))), found


def tell_structure_labels(found: Collection[int], wanted: Collection[int] | None) -> None:
    """Print which numbers of label maps were taken for the structure, where that is not plain.

    Args:
        found: all numbers above 0 in the label maps of a data set.
        wanted: as of `structure_mask`.
    """
    shown = ", ".join(map(str, sorted(found))) or "none"
    if wanted is None and len(found) > 1:
        print(f"label values {shown} all count; --label_values chooses some of them")
    elif missing := sorted(set(wanted or ()) - set(found)):
        warn(f"--label_values {missing[0]} is in no label map; there are {shown}")


# ---- statistics of a data set ----


def describe_labels(
    scan: Scan, image: np.ndarray | None = None, percentiles: Sequence[float] = (0.5, 50, 99.5)
) -> dict[int, dict[str, float]]:
    """{label: {"ml": volume, "extent_z_mm", "extent_y_mm", "extent_x_mm": sides of its box}} of one case.

    Args:
        scan: of whole numbers; 0 is the background.
        image: (z, y, x) of the same shape; then also "p0.5" and so on, the `percentiles` of its values in
            each label.
    """
    labels, described = scan.array, {}
    for label, measure in measure_labels(labels).items():
        described[label] = {"ml": measure.voxels * scan.voxel_mm3 / 1000}
        extent_mm = measure.extent_mm(scan.spacing_mm)
        described[label] |= {f"extent_{axis}_mm": mm for axis, mm in zip("zyx", extent_mm, strict=True)}
        if image is not None:
            box = tuple(slice(a, b) for a, b in zip(*measure.box, strict=True))
            values = np.percentile(image[box][labels[box] == label], percentiles)
            described[label] |= {f"p{p:g}": float(v) for p, v in zip(percentiles, values, strict=True)}
    return described


def label_rows(
    described: Sequence[Mapping[int, Mapping[str, float]]],
    names: Mapping[int, str],
    labelled: Sequence[Collection[int]] | None = None,
) -> list[dict]:
    """A row for each label: how many cases have it, and what is usual of it among them.

    Args:
        described: {label: {quantity: number}} of each case, as of `describe_labels`; "ml" is in each.
        names: {label: name}; the rows are in its order.
        labelled: the labels that each case was annotated with; None: all of `names` in all cases.

    Returns:
        label, name, scans (that have the label), labelled (scans that were annotated with it), presence
        (share of the former in the latter), mean_ml, sd_ml, and the median of each quantity under its own
        name. NaN without a scan; sd_ml, of a sample, without two; a quantity that no scan of a label has is
        NaN in its row.
    """
    quantities = {"ml": None} | dict.fromkeys(
        key for case in described for values in case.values() for key in values
    )
    rows = []
    for label, name in names.items():
        found = [case[label] for case in described if label in case]
        num_labelled = sum(label in case for case in labelled) if labelled is not None else len(described)
        volumes_ml = [values["ml"] for values in found]
        row = {
            "label": label,
            "name": name,
            "scans": len(found),
            "labelled": num_labelled,
            "presence": len(found) / num_labelled if num_labelled else math.nan,
            "mean_ml": float(np.mean(volumes_ml)) if found else math.nan,
            "sd_ml": float(np.std(volumes_ml, ddof=1)) if len(found) > 1 else math.nan,
        }
        for quantity in quantities:
            numbers = [values[quantity] for values in found if quantity in values]
            row[quantity] = float(np.median(numbers)) if numbers else math.nan
        rows.append(row)
    return rows


def label_text(row: Mapping, size: str = "") -> str:
    """A row of `label_rows` as a line: how many scans have the label, its median volume and extent.

    Args:
        size: what is said of the volume, such as " (small)".
    """
    text = f"{row['label']:2} {row['name']}: {row['scans']} of {row['labelled']}"
    if row["scans"]:
        extent = " x ".join(f"{row[f'extent_{axis}_mm']:.0f}" for axis in "zyx")
        text += f", median {row['ml']:.3g} mL{size}, {extent} mm (z y x)"
    return text
