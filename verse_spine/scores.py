"""Scores of one scan's vertebrae against the truth: by class, by vertebra and of all together."""

from pathlib import Path

import numpy as np
from scipy import ndimage

from common.class_metrics import case_metrics
from common.files import read_json
from common.mask_files import load_masks
from common.messages import warn
from common.metrics import binary_counts, dice_from_counts
from common.nifti import case_name
from common.scan_files import voxel_mm3
from common.volumes import resample_labels, resampled_affine, resampled_shape
from verse_spine.cases import Case
from verse_spine.labels import (
    VERTEBRAE,
    body_centres,
    class_names,
    identification_rate,
    map_labels,
    optional_centroids,
    unmap_labels,
)
from verse_spine.schemes import why_other_scheme

TOLERANCES_MM = (1.0, 2.0)  # of the surface Dice


def score_case(
    pred: np.ndarray,
    target: np.ndarray,
    spacing_mm: tuple,
    affine: np.ndarray,
    labels: str,
    true_centres: dict[int, tuple],
    *,
    surfaces: bool = True,
) -> tuple[list[dict], dict]:
    """Scores of one scan.

    Args:
        pred: class indices of `labels`, (z, y, x).
        target: VerSe's numbers on the same grid.
        affine: of that grid, as `Scan.affine`.
        true_centres: {VerSe label: (z, y, x) mm}, for the identification rate of levels26.
        surfaces: also the distances between surfaces and the identification rate, which take longer.

    Returns:
        (one row for each class as of `case_metrics`, scores of the whole scan by name).
    """
    classes = map_labels(target, labels)
    names = dict(enumerate(class_names(labels)[1:], 1))
    rows = case_metrics(
        pred, classes, spacing_mm, names, TOLERANCES_MM, surfaces=surfaces, voxel_mm3=voxel_mm3(affine)
    )
    present = [r["dice"] for r in rows if r["status"] in ("ok", "missed")]
    tp, fp, fn, _ = binary_counts(pred > 0, classes > 0)
    summary = {
        "dice_any": dice_from_counts(tp, fp, fn),
        "dice_classes": float(np.mean(present)) if present else float("nan"),
    }
    if labels == "levels26":
        summary |= instance_scores(pred, classes)
        if surfaces:
            found = body_centres(unmap_labels(pred, labels), affine)
            # Some centroid files hold the sacrum too, which the masks do not.
            known = {label: zyx for label, zyx in true_centres.items() if label in VERTEBRAE}
            summary |= identification_rate(found, known)
    return rows, summary


def instance_scores(pred: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Scores that tell wrong names from wrong shapes.

    Args:
        pred, target: class indices of levels26, (z, y, x).

    Returns:
        dice_instance: mean over the true vertebrae of the best Dice with any predicted one, whatever its
            name. If all names are wrong by one level, it stays high while dice_classes is low.
        dice_inner: mean Dice by name of the vertebrae that the scan does not cut.
        Both are NaN without a true vertebra, dice_inner also if the scan cuts all of them.
    """
    size = int(max(pred.max(), target.max())) + 1
    joint = np.zeros(size * size, np.int64)
    for true_plane, pred_plane in zip(target, pred, strict=True):  # bincount works in int64
        both = true_plane.astype(np.intp) * size + pred_plane
        joint += np.bincount(both.ravel(), minlength=size * size)
    joint = joint.reshape(size, size)
    totals_target, totals_pred = joint.sum(1), joint.sum(0)
    dice = 2 * joint / np.maximum(totals_target[:, None] + totals_pred[None], 1)
    true = np.flatnonzero(totals_target[1:]) + 1
    if len(true) == 0:
        return {"dice_instance": np.nan, "dice_inner": np.nan}
    boxes = ndimage.find_objects(target)
    inner = [
        k
        for k in true
        if all(s.start > 0 and s.stop < n for s, n in zip(boxes[k - 1], target.shape, strict=True))
    ]
    return {
        "dice_instance": float(dice[true, 1:].max(1).mean()),
        "dice_inner": float(np.mean([dice[k, k] for k in inner])) if inner else np.nan,
    }


def score_files(pred: Path, case: Case, labels: str, grid: str) -> tuple[list[dict], dict]:
    """`score_case` of one mask file.

    Args:
        grid: "native", that of the scan, or "1mm".

    Raises:
        ValueError: it lies on another grid than the true mask, or holds other labels than `labels`.
    """
    check_labels_flag(pred, labels)
    truth, found = load_masks(case.mask, pred)
    if labels != "binary" and (reason := why_other_scheme(truth.array, truth.affine)):
        raise ValueError(f"{case.mask}: {reason}; score it with --labels binary")
    if labels == "levels26" and found.array.max() == 1 and truth.array.max() > 1:
        what = "holds 0 and 1 alone, no numbers of vertebrae"
        raise ValueError(f"{pred}: {what}; score it with --labels binary")
    centres = None
    if case.centroids is not None:
        centres, why_not = optional_centroids(case.centroids, truth)
        if why_not:
            warn(f"{case.name}: {why_not}")
    if centres is None:
        centres = body_centres(truth.array, truth.affine) if labels == "levels26" else {}
    pred_labels = map_labels(found.array, labels) if labels == "levels26" else found.array
    target, spacing_mm, affine = truth.array, truth.spacing_mm, truth.affine
    if grid == "1mm":
        shape = resampled_shape(target.shape, spacing_mm, (1.0, 1.0, 1.0))
        affine = resampled_affine(affine, target.shape, shape)
        spacing_mm = tuple(np.multiply(spacing_mm, target.shape) / shape)
        pred_labels, target = resample_labels(pred_labels, shape), resample_labels(target, shape)
    return score_case(pred_labels, target, spacing_mm, affine, labels, centres)


def check_labels_flag(mask: Path, labels: str) -> None:
    """Refuse to score, say, a binary mask as levels: predict.py noted beside the mask what it holds."""
    note = mask.with_name(f"{case_name(mask).removesuffix('_mask')}.json")
    if note.is_file():
        held = read_json(note, {"labels": str | None}).get("labels")
        if held not in (None, labels):
            raise ValueError(f"{mask}: holds {held} labels; score it with --labels {held}")
