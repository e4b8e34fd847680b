"""Scores of one case against the truth, and their means over organs and groups of organs."""

import numpy as np

from amos_lha.organs import ORGANS, TOLERANCES_MM, group_of
from common.class_metrics import case_metrics


def score(
    pred: np.ndarray,
    target: np.ndarray,
    spacing_mm: tuple,
    labelled: list[int],
    *,
    surfaces: bool = True,
    voxel_mm3: float | None = None,
) -> list[dict]:
    """Rows of `case_metrics` for the organs that the case has labels for, each with its size group.

    Args:
        pred, target: organ numbers, (z, y, x). What they hold of organs that are not labelled counts as
            background: it is neither right nor wrong.
        labelled: organ numbers.

    Raises:
        ValueError: as `case_metrics`; a label that is no organ's number.
    """
    for what, labels in (("prediction", pred), ("target", target)):
        if labels.size and labels.max() > max(ORGANS):
            found = sorted(set(np.unique(labels).tolist()) - {0, *ORGANS})
            raise ValueError(f"the {what} holds label(s) {str(found)[1:-1]}; organs are 1 to {max(ORGANS)}")
    pred, target = (only_labelled(labels, labelled) for labels in (pred, target))
    rows = case_metrics(
        pred,
        target,
        spacing_mm,
        {organ: ORGANS[organ] for organ in sorted(labelled)},
        organ_tolerances_mm=TOLERANCES_MM,
        surfaces=surfaces,
        voxel_mm3=voxel_mm3,
    )
    return [{"group": group_of(row["class"]), **row} for row in rows]


def only_labelled(labels: np.ndarray, labelled: list[int]) -> np.ndarray:
    """The label map with the organs that are not among `labelled` as background."""
    if others := sorted(set(ORGANS) - set(labelled)):
        labels = labels.copy()
        for organ in others:
            labels[labels == organ] = 0
    return labels


def case_row(name: str, patient: str, rows: list[dict]) -> dict:
    """Row of a case for the table that grows case by case, with its rows by organ as "organs"."""
    first = {"case": name, "patient": patient}
    dice = [row["dice"] for row in rows if not np.isnan(row["dice"])]
    statuses = [row["status"] for row in rows]
    return {
        **first,
        "dice": float(np.mean(dice)) if dice else float("nan"),
        "missed": statuses.count("missed"),
        "hallucinated": statuses.count("hallucinated"),
        "organs": [{**first, **row} for row in rows],
    }
