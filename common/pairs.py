"""A scan and the label map that was drawn on it: read together, and checked against each other."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.conversion import failure_reason
from common.label_measures import why_not_labels
from common.nifti import NiftiFile, Scan, load_label, load_nifti, open_nifti
from common.nifti_forms import grid_difference

MIN_SIDE_MM = 10.0  # a thinner scan is a single slice or a localiser: nothing to train on


def load_pair(image: Path | None, label: Path | None) -> tuple[Scan, Scan]:
    """Scan and label map, both (z, y, x) RAS+ on one grid.

    Raises:
        FileNotFoundError, ValueError: what `load_nifti` and `load_label` raise; one of the two is None,
            because the data set does not have it; they lie on different grids; or the scan is thinner than
            MIN_SIDE_MM.
    """
    if image is None or label is None:
        missing, there = ("label", image) if label is None else ("scan", label)
        raise ValueError(f"{there}: has no {missing} of the same name; add it, or move this file away")
    scan, labels = load_nifti(image), load_label(label)
    if reason := why_not_a_pair(scan, labels) or why_too_thin(scan):
        raise ValueError(reason)
    return scan, labels


def load_labelled(
    image: Path | None,
    label: Path | None,
    names: Mapping[int, str],
    labelled: Collection[int],
    *,
    label_alone: bool = False,
) -> tuple[Scan | None, Scan]:
    """`load_pair`, with labels that the data set may hold.

    Args:
        image, label: None for one that the data set does not have.
        names: {number: name} of all labels of the data set.
        labelled: those that this case was annotated with.
        label_alone: whether the scan may be missing; it is None then.

    Raises:
        FileNotFoundError, ValueError: as `load_pair`; or the label map holds others.
    """
    is_alone = label_alone and image is None and label is not None
    scan, target = (None, load_label(label)) if is_alone else load_pair(image, label)
    if reason := why_not_labels(target.array, names, labelled):
        raise ValueError(f"{label}: {reason}")
    return scan, target


def why_not_a_pair(scan: NiftiFile, label: NiftiFile) -> str:
    """A sentence that names both grids if they differ, else ""."""
    difference = grid_difference(label, scan)
    if not difference:
        return ""
    return (
        f"{label.path}: lies on another grid than {scan.path.name} ({difference}; label {label.orientation}, "
        f"scan {scan.orientation}); take the file that was drawn on this scan, or resample it to it"
    )


def why_too_thin(scan: NiftiFile) -> str:
    """A sentence with the scan's size if a side is below MIN_SIDE_MM, else ""."""
    extent_mm = np.multiply(scan.shape, scan.spacing_mm)
    if min(extent_mm) >= MIN_SIDE_MM:
        return ""
    return f"{scan.path}: only {' x '.join(f'{mm:.0f}' for mm in extent_mm)} mm (z y x); a single slice?"


def median_spacing(images: Sequence[Path]) -> tuple[float, float, float]:
    """Median over the scans along each axis, in mm, z y x, to 0.001; reads headers only.

    Scans that cannot be read are passed over, since reading them whole will tell why.

    Raises:
        ValueError: none can be read.
    """
    spacings, problems = [], []
    for path in images:
        try:
            spacings.append(open_nifti(path).spacing_mm)
        except (ValueError, OSError) as error:
            problems.append(failure_reason(error))
    if not spacings:
        raise ValueError(f"none of {len(images)} scan(s) can be read: {'; '.join(problems[:3])}")
    z, y, x = np.median(spacings, axis=0).round(3).tolist()
    return z, y, x


def refuse_copies(entries: Sequence[Mapping]) -> dict[str, str]:
    """{case: reason} for each scan that another subject has, too: training and test could share it.

    Args:
        entries: of the cases, each with "name", "subject" and "content", the `content_hash` of its scan.
    """
    first: dict[str, Mapping] = {}
    copies = {}
    for entry in entries:
        earlier = first.setdefault(entry["content"], entry)
        if earlier["subject"] != entry["subject"]:
            copies[entry["name"]] = (
                f"the same scan as {earlier['name']}, but of subject {entry['subject']} instead of "
                f"{earlier['subject']}; remove one of them, or give both one subject with --subjects"
            )
    return copies


def content_hash(volume: np.ndarray) -> str:
    """Hash of the values of a (z, y, x) volume, however its file is named, compressed or typed.

    Whole numbers give the same hash in every type that holds them.
    """
    digest = hashlib.blake2b(repr(volume.shape).encode(), digest_size=16)
    for plane in volume:  # a copy of one slice at a time
        digest.update(np.ascontiguousarray(plane, np.float32))
    return digest.hexdigest()
