"""How well slices are classified, and how well maps of scores overlap with true masks at every threshold."""

from collections.abc import Sequence

import numpy as np

from common.metrics import dice_from_counts, iou_from_counts

THRESHOLDS = np.arange(1, 50) / 50
IGNORE = 255


def classification_scores(
    probs: Sequence[float], labels: Sequence[int], threshold: float = 0.5
) -> dict[str, float]:
    """Scores of a binary classification, from counts pooled over all slices.

    Args:
        probs: predicted probabilities.
        labels: 1 for positive, 0 for negative.
        threshold: above it a slice is called positive.

    Returns:
        f1, accuracy, balanced_accuracy (mean of the shares found among positives and among negatives),
        precision, recall, auroc (pairs of equal probability count half), prevalence. NaN where nothing is
        divided by nothing: balanced accuracy and AUROC without both classes, precision without a positive
        call, recall without a positive, F1 without either, all without a slice.

    Raises:
        ValueError: lengths differ, a probability is not finite or a label is neither 0 nor 1.
    """
    probs, labels = np.asarray(probs, float), np.asarray(labels)
    if probs.shape != labels.shape or probs.ndim != 1:
        raise ValueError(f"{probs.shape} probabilities do not fit {labels.shape} labels")
    if not np.isfinite(probs).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(probs))} of {len(probs)} probabilities are not finite"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels {sorted(set(labels.tolist()) - {0, 1})} are neither 0 nor 1")
    called, true = probs > threshold, labels == 1
    tp, fp = np.count_nonzero(called & true), np.count_nonzero(called & ~true)
    fn = np.count_nonzero(true) - tp
    tn = len(true) - tp - fp - fn
    return {
        "f1": dice_from_counts(tp, fp, fn),
        "accuracy": _share(tp + tn, len(true)),
        "balanced_accuracy": (_share(tp, tp + fn) + _share(tn, tn + fp)) / 2,
        "precision": _share(tp, tp + fp),
        "recall": _share(tp, tp + fn),
        "auroc": auroc(probs, true),
        "prevalence": _share(tp + fn, len(true)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def auroc(probs: np.ndarray, positive: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative in which the positive has the higher probability.

    Equal probabilities count half; NaN without both classes.
    """
    values, place = np.unique(probs, return_inverse=True)
    num_negative = np.bincount(place[~positive], minlength=len(values))
    below = np.cumsum(num_negative) - num_negative / 2  # negatives below each value, and half of its own
    return _share(below[place[positive]].sum(), positive.sum() * (~positive).sum())


class Sweep:
    """Overlap of score maps with true masks at many thresholds at once, one slice after the other.

    A pixel is predicted where its score is above the threshold; pixels of the mask with 255 are left out.
    Slices whose mask is empty have no Dice of their own; predictions in them are counted as false alarms and
    lower the Dice of the volume.
    """

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS) -> None:
        self.thresholds = np.sort(np.asarray(thresholds, np.float32))
        self.patients: dict[str, np.ndarray] = {}  # of each (tp, fp, fn) x thresholds
        # Sums of Dice and of IoU over the slices with tissue, and alarms in those without; numbers of both.
        self.sums = np.zeros((3, len(self.thresholds)))
        self.num_positive = self.num_negative = 0

    def _above(self, scores: np.ndarray) -> np.ndarray:
        """How many scores are above each threshold."""
        exceeded = np.searchsorted(self.thresholds, scores.astype(np.float32, copy=False), side="left")
        counts = np.bincount(exceeded, minlength=len(self.thresholds) + 1)
        return counts[::-1].cumsum()[::-1][1:]

    def add(self, score_map: np.ndarray, mask: np.ndarray, patient: str) -> None:
        """Count a slice: scores (H, W), mask (H, W) of 0 and 1."""
        if score_map.shape != mask.shape:
            raise ValueError(
                f"patient {patient}: scores {score_map.shape} and mask {mask.shape} differ in shape"
            )
        inside = mask == 1
        tp = self._above(score_map[inside])
        fp = self._above(score_map[mask == 0])
        counts = np.stack([tp, fp, np.count_nonzero(inside) - tp])
        self.patients[patient] = self.patients.get(patient, 0) + counts
        if inside.any():
            self.num_positive += 1
            self.sums[0] += 2 * tp / (2 * tp + fp + counts[2])
            self.sums[1] += tp / counts.sum(0)
        else:
            self.num_negative += 1
            self.sums[2] += fp > 0

    def merge(self, other: "Sweep") -> None:
        """Take over what another process has counted with the same thresholds."""
        if not np.array_equal(self.thresholds, other.thresholds):
            raise ValueError("two sweeps with different thresholds cannot be merged")
        for patient, counts in other.patients.items():
            self.patients[patient] = self.patients.get(patient, 0) + counts
        self.sums = self.sums + other.sums
        self.num_positive += other.num_positive
        self.num_negative += other.num_negative

    def rows(self) -> list[dict[str, float]]:
        """One row for each threshold: threshold, means over slices with tissue, means over volumes, alarms.

        dice_slices and iou_slices are NaN without such a slice; dice_volumes and iou_volumes are means over
        the volumes in which anything is true or predicted; false_alarms is the share of the slices without
        tissue in which any pixel is predicted.
        """
        rows = []
        for i, threshold in enumerate(self.thresholds):
            volumes = [counts[:, i].tolist() for counts in self.patients.values()]
            rows.append(
                {
                    "threshold": round(float(threshold), 6),
                    "dice_slices": _share(self.sums[0, i], self.num_positive),
                    "iou_slices": _share(self.sums[1, i], self.num_positive),
                    "dice_volumes": _mean([dice_from_counts(*counts) for counts in volumes]),
                    "iou_volumes": _mean([iou_from_counts(*counts) for counts in volumes]),
                    "false_alarms": _share(self.sums[2, i], self.num_negative),
                }
            )
        return rows

    def volume_dice(self, threshold: float) -> dict[str, float]:
        """Dice of each patient's volume at one of the thresholds; NaN where nothing is true or predicted."""
        i = int(np.abs(self.thresholds - threshold).argmin())
        return {name: dice_from_counts(*counts[:, i].tolist()) for name, counts in self.patients.items()}

    def best(self, metric: str = "dice_volumes") -> dict[str, float]:
        """The row in which `metric` is highest, the lowest threshold of several; NaN never is.

        Raises:
            ValueError: no threshold has a value, for instance because no slice has a mask.
        """
        rows = [row for row in self.rows() if not np.isnan(row[metric])]
        if not rows:
            raise ValueError(f"no threshold has a {metric}: no slice with tissue in its mask was counted")
        return max(rows, key=lambda row: row[metric])


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return _share(sum(known), len(known))
