"""How well maps of scores overlap with true masks at many thresholds at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.metrics import dice_from_counts, iou_from_counts
from common.plots import save_curves
from common.tables import write_table

THRESHOLDS = np.arange(1, 50) / 50
SIZES = ("small", "medium", "large")


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
        self.positive: list[tuple[int, np.ndarray]] = []  # of each slice with tissue: its pixels, its Dice

    def add(self, score_map: np.ndarray, mask: np.ndarray, patient: str) -> None:
        """Count a slice: scores (H, W), mask (H, W) of 0 and 1."""
        if score_map.shape != mask.shape:
            raise ValueError(
                f"patient {patient}: scores {score_map.shape}, mask {mask.shape} differ in shape"
            )
        tp, fp, fn = counts = counts_at(self.thresholds, score_map, mask)
        self.volumes[patient] = self.volumes.get(patient, 0) + counts
        if tp[0] + fn[0]:
            self.num_positive += 1
            dice = 2 * tp / (2 * tp + fp + fn)
            self.positive.append((int(tp[0] + fn[0]), dice.astype(np.float32)))
            self.slices["dice"] += dice
            self.slices["iou"] += tp / (tp + fp + fn)
        else:
            self.num_negative += 1
            self.slices["alarms"] += fp > 0

    def merge(self, other: "Sweep") -> None:
        """Take over what another process has counted with the same thresholds."""
        for patient, counts in other.volumes.items():
            self.volumes[patient] = self.volumes.get(patient, 0) + counts
        for name, sums in other.slices.items():
            self.slices[name] = self.slices[name] + sums
        self.positive += other.positive
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

    def row_at(self, threshold: float) -> dict[str, float]:
        """The row of the nearest threshold, with the numbers of slices with and without tissue."""
        counts = {"positive_slices": self.num_positive, "negative_slices": self.num_negative}
        return self.rows()[self.index_of(threshold)] | counts

    def rows_by_size(self, threshold: float) -> list[dict]:
        """Dice of the slices with tissue in thirds, by how many pixels of it they have.

        Slices with the same number may come to lie in two thirds; fewer than three slices give fewer rows.

        Returns:
            rows of size (small, medium, large), pixels_from, pixels_to, slices (their number), dice_slices,
            and missed (share of the slices in which nothing of the tissue is found).
        """
        k = self.index_of(threshold)
        in_order = sorted(((pixels, dice[k]) for pixels, dice in self.positive), key=lambda pair: pair[0])
        rows = []
        for size, part in zip(SIZES, np.array_split(in_order, len(SIZES)), strict=True):
            if len(part):
                pixels, dice = part.T
                row = {"size": size, "pixels_from": int(pixels[0]), "pixels_to": int(pixels[-1])}
                row |= {"slices": len(part), "dice_slices": float(dice.mean())}
                rows.append(row | {"missed": float((dice == 0).mean())})
        return rows

    def index_of(self, threshold: float) -> int:
        """Of the nearest one of the thresholds."""
        return int(np.abs(self.thresholds - threshold).argmin())


def counts_at(thresholds: np.ndarray, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """int64 (3, number of thresholds): true positives, false positives and false negatives at each threshold.

    Args:
        thresholds: ascending; what is above one counts as predicted. Scores are compared in their precision.
        scores, mask: of one shape; other values of the mask than 0 and 1 are left out.
    """

    def above(chosen: np.ndarray) -> np.ndarray:
        exceeded = np.searchsorted(thresholds, scores[chosen].astype(thresholds.dtype, copy=False))
        return np.bincount(exceeded, minlength=len(thresholds) + 1)[::-1].cumsum()[-2::-1]

    tp, fp = above(mask == 1), above(mask == 0)
    return np.stack([tp, fp, np.count_nonzero(mask == 1) - tp])


def write_sweeps(out: Path, sweeps: Mapping[str, Sweep], thresholds: Mapping[str, float]) -> None:
    """sweep.csv and sweep.png: overlap at each threshold; volumes.csv and sizes.csv: Dice of each patient and
    of slices with little and much tissue, at one of them.

    Args:
        sweeps: {kind of map: overlap}, all with the same thresholds.
        thresholds: {kind of map: threshold of volumes.csv and sizes.csv}.
    """
    table: list[dict] = [{"threshold": row["threshold"]} for row in next(iter(sweeps.values())).rows()]
    volumes: dict[str, dict] = {}
    for kind, sweep in sweeps.items():
        for row, of_kind in zip(table, sweep.rows(), strict=True):
            row |= {f"{kind} {name}": value for name, value in of_kind.items() if name != "threshold"}
        i = sweep.index_of(thresholds[kind])
        for patient, counts in sweep.volumes.items():
            row = volumes.setdefault(patient, {"patient": patient})
            row[f"{kind} dice"] = dice_from_counts(*counts[:, i].tolist())
    write_table(out / "sweep.csv", table)
    write_table(out / "volumes.csv", list(volumes.values()))
    by_size = {kind: sweep.rows_by_size(thresholds[kind]) for kind, sweep in sweeps.items()}
    if rows := [{"output": kind} | row for kind, of_kind in by_size.items() for row in of_kind]:
        write_table(out / "sizes.csv", rows)
    panels = {f"Dice, {c}": [f"{kind} dice_{c}" for kind in sweeps] for c in ("slices", "volumes")}
    names = {f"{kind} dice_{c}": kind for kind in sweeps for c in ("slices", "volumes")}
    save_curves(out / "sweep.png", table, panels, names, x="threshold")


def overlap_lines(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table to print of {name: row of `Sweep.row_at`}."""
    lines = [f"{'Dice of':<28}{'threshold':>10}{'slices':>8}{'volumes':>9}{'false alarms':>14}"]
    for name, row in rows.items():
        lines.append(
            f"{name:<28}{row['threshold']:>10.2f}{row['dice_slices']:>8.3f}{row['dice_volumes']:>9.3f}"
            f"{row['false_alarms']:>14.3f}"
        )
    return lines


def size_line(kind: str, rows: Sequence[Mapping]) -> str:
    """A line to print of `Sweep.rows_by_size` of this kind of map."""
    parts = [
        f"{row['size']} ({row['pixels_from']} to {row['pixels_to']}) {row['dice_slices']:.3f}, "
        f"{row['missed']:.0%} missed"
        for row in rows
    ]
    return f"Dice of {kind} by pixels of tissue in the slice: {'; '.join(parts)}"


def _mean(total: float, number: int) -> float:
    return float(total) / number if number else float("nan")
