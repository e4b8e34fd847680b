"""Overlap of two masks, lesions, yes-or-no decisions, means with intervals by patient, a paired test, tables.

Both masks empty = NaN, left out of means and counted beside them; one empty = 0. Several classes:
class_metrics.py; distances between surfaces: surfaces.py.
"""

from collections.abc import Mapping, Sequence

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


def classification_scores(
    probs: Sequence[float], labels: Sequence[int], threshold: float = 0.5
) -> dict[str, float]:
    """Scores of a yes-or-no classification, from counts pooled over all items.

    Args:
        probs: predicted probabilities.
        labels: 1 for positive, 0 for negative.
        threshold: above it an item is called positive.

    Returns:
        f1, accuracy, balanced_accuracy (mean of the shares found among positives and among negatives),
        precision, recall, auroc, prevalence. NaN where nothing is divided by nothing: balanced accuracy and
        AUROC without both classes, precision without a positive call, recall without a positive, F1 without
        either, all without an item.

    Raises:
        ValueError: lengths differ, a probability is not finite or a label is neither 0 nor 1.
    """
    probs, labels = np.asarray(probs, float), np.asarray(labels)
    if probs.shape != labels.shape or probs.ndim != 1:
        raise ValueError(
            f"probabilities {probs.shape} do not fit labels {labels.shape}; give one for each item"
        )
    if not np.isfinite(probs).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(probs))} of {len(probs)} probabilities are not finite"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels {sorted(set(labels.tolist()) - {0, 1})} are neither 0 nor 1")
    tp, fp, fn, tn = binary_counts(probs > threshold, labels == 1)
    recall = _share(tp, tp + fn)
    return {
        "f1": dice_from_counts(tp, fp, fn),
        "accuracy": _share(tp + tn, len(labels)),
        "balanced_accuracy": (recall + _share(tn, tn + fp)) / 2,
        "precision": _share(tp, tp + fp),
        "recall": recall,
        "auroc": auroc(probs, labels == 1),
        "prevalence": _share(tp + fn, len(labels)),
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative item in which the positive one has the higher score.

    Equal scores count half; NaN without both classes. This is the area under the ROC curve.
    """
    values, place = np.unique(scores, return_inverse=True)
    negatives = np.bincount(place[~positive], minlength=len(values))
    below = negatives.cumsum() - negatives / 2  # negatives below each value, and half of those that equal it
    return _share(float(below[place[positive]].sum()), int(positive.sum()) * int((~positive).sum()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def presence(num_target: int, num_pred: int) -> str:
    """ok; missed: in the target only; hallucinated: in the prediction only; absent: in neither."""
    if num_target:
        return "ok" if num_pred else "missed"
    return "hallucinated" if num_pred else "absent"


def volume_similarity(tp: float, fp: float, fn: float) -> float:
    """1 - |FN - FP| / (2 TP + FP + FN), 1 for equal volumes wherever they lie; NaN when both are empty.

    Source: Taha and Hanbury 2015 (doi:10.1186/s12880-015-0068-x).
    """
    total = 2 * tp + fp + fn
    return 1 - abs(fn - fp) / total if total else float("nan")


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
    patients = patients or {}
    groups = [patients.get(case, case) for case, is_valid in zip(common, valid, strict=True) if is_valid]
    difference = pairs[valid, 1] - pairs[valid, 0]
    steps = difference.round(9)  # else noise of the last bit breaks ties and makes ranks of zeros
    mean_a = mean_b = p = float("nan")
    if groups:
        mean_a, mean_b = pairs[valid].mean(axis=0).tolist()
        p = float(stats.wilcoxon(steps).pvalue) if steps.any() else 1.0
    low, high = bootstrap_interval(difference, groups)
    return {
        "mean_a": mean_a,
        "mean_b": mean_b,
        "difference": mean_b - mean_a,
        "low": low,
        "high": high,
        "p": p,
        "n": len(groups),
        "nan_pairs": len(common) - len(groups),
        "unpaired": len(set(a) ^ set(b)),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for testing all of them, in their order; NaN stays NaN and is not counted.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sort to the end
    adjusted = np.full(p.size, np.nan)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted.tolist()
