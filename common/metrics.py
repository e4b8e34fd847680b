"""Metrics of a case, lesion counts, tables, intervals and a paired test; empty masks are defined throughout.

Overlap: both masks empty = NaN, left out of means and counted beside them; one empty = 0.
Distances between surfaces: surfaces.py.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.files import replacing
from common.surfaces import check_grid, diagonal_mm, distances_between, summarise, surfels

NOT_METRICS = ("case", "patient", "class", "name", "status")  # columns without a metric


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


def volume_similarity(tp: float, fp: float, fn: float) -> float:
    """1 - |FN - FP| / (2 TP + FP + FN), 1 for equal volumes wherever they lie; NaN when both are empty.

    Source: Taha and Hanbury 2015 (doi:10.1186/s12880-015-0068-x).
    """
    total = 2 * tp + fp + fn
    return 1 - abs(fn - fp) / total if total else float("nan")


def case_metrics(
    pred: np.ndarray,
    target: np.ndarray,
    spacing_mm: Sequence[float],
    classes: Mapping[int, str],
    tolerances_mm: Sequence[float] = (1.0, 2.0),
    *,
    surfaces: bool = True,
    voxel_mm3: float | None = None,
) -> list[dict]:
    """A row for each class: class, name, status, dice, iou, volume_similarity, hd_mm, hd95_mm, assd_mm,
    nsd_<t>mm, target_mm3, pred_mm3.

    Args:
        pred, target: (z, y, x) label maps of integers or booleans, 0 = background.
        spacing_mm: z y x.
        classes: {label: name}, without the background.
        surfaces: False leaves the distances out, which take most of the time.
        voxel_mm3: volume of a voxel, see `voxel_mm3` in common/nifti.py. None = the product of the spacings,
            which is right only where the axes are at right angles: not after gantry tilt.

    status is "ok"; "missed": in the target only; "hallucinated": in the prediction only; "absent": in
    neither. Missed and hallucinated classes score 0 overlap and NSD, and the image's diagonal as distances;
    absent ones NaN.

    Raises:
        ValueError: two shapes, a wrong spacing, or a label that `classes` does not name.
    """
    check_grid(pred, target, spacing_mm)
    counts = _joint_counts(pred, target, list(classes))
    if voxel_mm3 is None:
        voxel_mm3 = float(np.prod(spacing_mm))
    elements = [surfels(labels, classes, spacing_mm) for labels in (pred, target) if surfaces]
    worst_mm = diagonal_mm(pred.shape, spacing_mm)
    rows = []
    for index, (label, name) in enumerate(classes.items(), start=1):
        tp, num_target, num_pred = (
            int(n) for n in (counts[index, index], counts[index].sum(), counts[:, index].sum())
        )
        fp, fn = num_pred - tp, num_target - tp
        found = {(True, True): "ok", (True, False): "missed", (False, True): "hallucinated"}
        distances = {}
        if surfaces:
            between = distances_between(*(e[label] for e in elements), pred.shape, spacing_mm)
            distances = summarise(between, worst_mm, tolerances_mm)
        rows.append(
            {
                "class": label,
                "name": name,
                "status": found.get((num_target > 0, num_pred > 0), "absent"),
                "dice": dice_from_counts(tp, fp, fn),
                "iou": iou_from_counts(tp, fp, fn),
                "volume_similarity": volume_similarity(tp, fp, fn),
                **distances,
                "target_mm3": num_target * voxel_mm3,
                "pred_mm3": num_pred * voxel_mm3,
            }
        )
    return rows


def _joint_counts(pred: np.ndarray, target: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """(1 + classes, 1 + classes) voxels by target (rows) and prediction, one pass; index 0 = background."""
    for what, labels in (("prediction", pred), ("target", target)):
        if labels.dtype.kind not in "iub" or labels.min(initial=0) < 0:
            raise ValueError(f"{what}: label maps hold integers of at least 0, got {labels.dtype}")
    if not classes or min(classes) < 1:
        raise ValueError(f"classes {list(classes)}: labels of at least 1 are needed; 0 is the background")
    size, unknown = len(classes) + 2, len(classes) + 1
    position = np.full(1 + max(*classes, int(pred.max(initial=0)), int(target.max(initial=0))), unknown)
    position[[0, *classes]] = range(unknown)
    counts = np.zeros(size * size, np.int64)
    for plane_pred, plane_target in zip(pred, target, strict=True):  # plane by plane: bincount works in int64
        some = (plane_pred != 0) | (plane_target != 0)
        joint = position[plane_target[some].astype(np.intp)] * size
        joint += position[plane_pred[some].astype(np.intp)]
        counts += np.bincount(joint, minlength=counts.size)
    counts = counts.reshape(size, size)
    for what, labels, number in (("prediction", pred, counts[:, -1]), ("target", target, counts[-1])):
        if number.any():
            other = sorted(set(np.unique(labels).tolist()) - {0, *classes})
            raise ValueError(f"{what}: label(s) {str(other[:10])[1:-1]} are not among {sorted(classes)}")
    return counts[:-1, :-1]


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
    valid = ~np.isnan(values)
    _, group_index = np.unique(groups[valid], return_inverse=True)
    num_groups = int(group_index.max()) + 1 if valid.any() else 0
    if num_groups < 2:
        return float("nan"), float("nan")
    sums = np.bincount(group_index, values[valid])
    counts = np.bincount(group_index)
    drawn = np.random.default_rng(0).integers(num_groups, size=(draws, num_groups))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summary(values: Sequence[float], groups: Sequence[str] | None = None) -> dict[str, float]:
    """mean, sd (sample), median, 95 % bootstrap interval and count of the values that are not NaN."""
    valid = np.asarray(values, float)
    valid = valid[~np.isnan(valid)]
    if valid.size == 0:
        nan = float("nan")
        return {"mean": nan, "sd": nan, "median": nan, "low": nan, "high": nan, "n": 0}
    low, high = bootstrap_interval(values, groups)
    sd = float(valid.std(ddof=1)) if valid.size > 1 else float("nan")
    mean, median = float(valid.mean()), float(np.median(valid))
    return {"mean": mean, "sd": sd, "median": median, "low": low, "high": high, "n": int(valid.size)}


def metric_columns(rows: Sequence[dict]) -> list[str]:
    """Names of the metrics in rows of `case_metrics`."""
    return [key for key in rows[0] if key not in NOT_METRICS]


def class_table(rows: Sequence[dict]) -> list[dict]:
    """A row for each class and metric over cases; "all" is the mean over a case's classes, then over cases.

    Args:
        rows: of `case_metrics`, each with "case" and, where scans share one, "patient" in front.

    Returns:
        rows of class, name, metric, mean, sd, median, low, high (95 % bootstrap interval by patient), n
        (values that are not NaN), missed, hallucinated, absent (cases; of "all": structures).
    """
    table = []
    for label in [*dict.fromkeys(r["class"] for r in rows), "all"]:
        of_class = [r for r in rows if label in (r["class"], "all")]
        status = [r["status"] for r in of_class]
        number = {key: status.count(key) for key in ("missed", "hallucinated", "absent")}
        name = "all classes" if label == "all" else of_class[0]["name"]
        patients = {r["case"]: r.get("patient", r["case"]) for r in of_class}
        for metric in metric_columns(rows):
            values = case_means(of_class, metric)
            table.append(
                {"class": label, "name": name, "metric": metric}
                | summary(list(values.values()), [patients[case] for case in values])
                | number
            )
    return table


def case_means(rows: Sequence[dict], metric: str) -> dict[str, float]:
    """{case: mean of the metric over its rows that are not NaN, NaN if there is none}."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["case"], []).extend([row[metric]] if row[metric] == row[metric] else [])
    return {case: float(np.mean(numbers)) if numbers else float("nan") for case, numbers in values.items()}


def paired_wilcoxon(
    a: Mapping[str, float], b: Mapping[str, float], patients: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Wilcoxon's signed-rank test, two-sided, of values by case; only cases of both count.

    Args:
        a, b: {case: value}. A pair with a NaN is left out.
        patients: {case: patient} for the interval; default: each case its own.

    Returns:
        mean_a, mean_b, difference (mean of b - a), its 95 % bootstrap interval low..high by patient, p, n
        (pairs), nan_pairs, unpaired (cases of one side only). p is 1 if all pairs are equal, NaN without
        any; with 5 pairs it cannot be below 0.06.
    """
    from scipy import stats

    common = [case for case in a if case in b]
    pairs = np.array([(a[case], b[case]) for case in common], float).reshape(-1, 2)
    valid = ~np.isnan(pairs).any(axis=1)
    groups = [
        (patients or {}).get(case, case) for case, is_valid in zip(common, valid, strict=True) if is_valid
    ]
    difference = pairs[valid, 1] - pairs[valid, 0]
    steps = difference.round(9)  # else noise of the last bit breaks ties and makes ranks of zeros
    p = float("nan") if not groups else float(stats.wilcoxon(steps).pvalue) if steps.any() else 1.0
    low, high = bootstrap_interval(difference, groups)
    mean_a, mean_b = pairs[valid].mean(axis=0).tolist() if groups else [float("nan")] * 2
    return {
        "mean_a": mean_a, "mean_b": mean_b, "difference": mean_b - mean_a, "low": low, "high": high, "p": p,
        "n": len(groups), "nan_pairs": len(common) - len(groups), "unpaired": len(set(a) ^ set(b)),
    }  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for testing all of them, in their order; NaN stays NaN and is not counted.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sort to the end
    adjusted = np.full(p.size, np.nan)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted.tolist()


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Rows of equal keys to CSV in one step; floats with six significant digits, NaN as an empty cell."""
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    k: ("" if np.isnan(v) else f"{v:.6g}") if isinstance(v, float | np.floating) else v
                    for k, v in row.items()
                }
            )
