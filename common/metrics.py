"""Overlap metrics, lesion counts and intervals, with the empty cases defined.

Overlap: both masks empty = NaN, left out of means and counted beside them; one empty = 0.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def binary_counts(pred: np.ndarray, target: np.ndarray) -> tuple[int, int, int, int]:
    """(tp, fp, fn, tn) of two boolean masks of one shape."""
    _check_shapes(pred, target)
    pred, target = pred.astype(bool, copy=False), target.astype(bool, copy=False)
    tp = int(np.count_nonzero(pred & target))
    fp, fn = int(np.count_nonzero(pred)) - tp, int(np.count_nonzero(target)) - tp
    return tp, fp, fn, pred.size - tp - fp - fn


def _check_shapes(pred: np.ndarray, target: np.ndarray) -> None:
    if pred.shape != target.shape:
        raise ValueError(f"prediction {pred.shape} and target {target.shape} differ in shape")


def dice_from_counts(tp: float, fp: float, fn: float) -> float:
    """2 TP / (2 TP + FP + FN); NaN when both masks are empty."""
    total = 2 * tp + fp + fn
    return 2 * tp / total if total else float("nan")


def iou_from_counts(tp: float, fp: float, fn: float) -> float:
    """TP / (TP + FP + FN); NaN when both masks are empty."""
    total = tp + fp + fn
    return tp / total if total else float("nan")


def lesion_counts(pred: np.ndarray, target: np.ndarray) -> dict[str, int]:
    """Lesion-wise hits of two boolean (z, y, x) masks of one shape.

    A lesion is a connected component, with neighbours across edges and corners too.

    Returns:
        target_lesions; found_lesions: those touched by at least one predicted voxel; pred_lesions;
        true_lesions: predicted components that touch a target voxel.
    """
    from scipy import ndimage

    _check_shapes(pred, target)
    corners = np.ones((3,) * target.ndim)
    target_components, num_target = ndimage.label(target, corners)
    pred_components, num_pred = ndimage.label(pred, corners)
    touched = pred.astype(bool) & target.astype(bool)
    return {
        "target_lesions": int(num_target),
        "found_lesions": len(np.unique(target_components[touched])),
        "pred_lesions": int(num_pred),
        "true_lesions": len(np.unique(pred_components[touched])),
    }


def largest_component(mask: np.ndarray) -> np.ndarray:
    """`mask` with only its largest component (connected also across corners); empty stays empty."""
    from scipy import ndimage

    components, num = ndimage.label(mask, np.ones((3,) * mask.ndim))
    if num < 2:
        return mask
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    return mask * (components == sizes.argmax())


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[str] | None = None, *, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the mean when whole groups (patients) are drawn with replacement.

    NaN values are left out; with fewer than two groups left the interval is (NaN, NaN). Repeatable: fixed
    seed.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13.
    """
    values = np.asarray(values, float)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    kept = ~np.isnan(values)
    _, group_index = np.unique(groups[kept], return_inverse=True)
    num_groups = int(group_index.max()) + 1 if kept.any() else 0
    if num_groups < 2:
        return float("nan"), float("nan")
    sums = np.bincount(group_index, values[kept])
    counts = np.bincount(group_index)
    drawn = np.random.default_rng(0).integers(num_groups, size=(draws, num_groups))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summary(values: Sequence[float], groups: Sequence[str] | None = None) -> dict[str, float]:
    """mean, sd (sample), median, 95 % bootstrap interval and count of the values that are not NaN."""
    kept = np.asarray(values, float)
    kept = kept[~np.isnan(kept)]
    if kept.size == 0:
        nan = float("nan")
        return {"mean": nan, "sd": nan, "median": nan, "low": nan, "high": nan, "n": 0}
    low, high = bootstrap_interval(values, groups)
    sd = float(kept.std(ddof=1)) if kept.size > 1 else float("nan")
    return {"mean": float(kept.mean()), "sd": sd, "median": float(np.median(kept)), "low": low, "high": high,
            "n": int(kept.size)}  # fmt: skip


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Rows of equal keys to CSV; floats with six significant digits, NaN as an empty cell."""
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    with Path(path).open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    k: ("" if np.isnan(v) else f"{v:.6g}") if isinstance(v, float | np.floating) else v
                    for k, v in row.items()
                }
            )
