"""How well maps of scores overlap with true masks at many thresholds at once."""

from collections.abc import Sequence

import numpy as np

from common.metrics import dice_from_counts, iou_from_counts

THRESHOLDS = np.arange(1, 50) / 50


class Sweep:
    """Overlap of score maps with true masks at each threshold, counted one slice after the other.

    A pixel is predicted where its score is above the threshold; pixels with 255 in the mask are left out. A
    slice whose mask is empty has no Dice of its own: what is predicted there is a false alarm, and lowers the
    Dice of the volume.
    """

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS) -> None:
        self.thresholds = np.sort(np.asarray(thresholds, np.float32))
        self.volumes: dict[str, np.ndarray] = {}  # of each patient (tp, fp, fn) at each threshold
        self.slices = {name: np.zeros(len(self.thresholds)) for name in ("dice", "iou", "alarms")}  # sums
        self.num_positive = self.num_negative = 0  # slices with and without tissue in their mask

    def add(self, score_map: np.ndarray, mask: np.ndarray, patient: str) -> None:
        """Count a slice: scores (H, W), mask (H, W) of 0 and 1."""
        if score_map.shape != mask.shape:
            raise ValueError(
                f"patient {patient}: scores {score_map.shape}, mask {mask.shape} differ in shape"
            )
        tp, fp = self._above(score_map[mask == 1]), self._above(score_map[mask == 0])
        fn = np.count_nonzero(mask == 1) - tp
        self.volumes[patient] = self.volumes.get(patient, 0) + np.stack([tp, fp, fn])
        if tp[0] + fn[0]:
            self.num_positive += 1
            self.slices["dice"] += 2 * tp / (2 * tp + fp + fn)
            self.slices["iou"] += tp / (tp + fp + fn)
        else:
            self.num_negative += 1
            self.slices["alarms"] += fp > 0

    def _above(self, scores: np.ndarray) -> np.ndarray:
        """How many scores are above each threshold."""
        exceeded = np.searchsorted(self.thresholds, scores.astype(np.float32, copy=False))
        counts = np.bincount(exceeded, minlength=len(self.thresholds) + 1)
        return counts[::-1].cumsum()[-2::-1]

    def merge(self, other: "Sweep") -> None:
        """Take over what another process has counted with the same thresholds."""
        for patient, counts in other.volumes.items():
            self.volumes[patient] = self.volumes.get(patient, 0) + counts
        for name, sums in other.slices.items():
            self.slices[name] = self.slices[name] + sums
        self.num_positive += other.num_positive
        self.num_negative += other.num_negative

    def rows(self) -> list[dict[str, float]]:
        """One row for each threshold, to choose one or to write to a table.

        dice_slices, iou_slices: means over the slices with tissue. dice_volumes, iou_volumes: means over the
        patients of whom anything is true or predicted. false_alarms: share of the slices without tissue in
        which a pixel is predicted. NaN where there is nothing to take the mean of.
        """
        rows = []
        for i, threshold in enumerate(self.thresholds):
            volumes = [counts[:, i].tolist() for counts in self.volumes.values()]
            row = {"threshold": round(float(threshold), 6)}
            for name, measure in (("dice", dice_from_counts), ("iou", iou_from_counts)):
                row[f"{name}_slices"] = _mean(self.slices[name][i], self.num_positive)
                known = [value for counts in volumes if not np.isnan(value := measure(*counts))]
                row[f"{name}_volumes"] = _mean(sum(known), len(known))
            row["false_alarms"] = _mean(self.slices["alarms"][i], self.num_negative)
            rows.append(row)
        return rows

    def best(self, metric: str = "dice_volumes") -> dict[str, float]:
        """The row in which `metric` is highest, at the lowest threshold of several.

        Raises:
            ValueError: `metric` is NaN in all of them, as no slice had a mask with tissue.
        """
        rows = [row for row in self.rows() if not np.isnan(row[metric])]
        if not rows:
            raise ValueError(f"{metric} has no value: none of the slices has tissue in its mask")
        return max(rows, key=lambda row: row[metric])


def _mean(total: float, number: int) -> float:
    return float(total) / number if number else float("nan")
