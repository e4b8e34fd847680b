"""Score organ masks."""

from pathlib import Path

import numpy as np

from amos_lha.dataset import Amos, case_scaling
from amos_lha.organs import GROUPS, ORGANS, TOLERANCES_MM, group_of
from amos_lha.segment import segment
from common import batch
from common.checkpoints import TrainedModel
from common.class_metrics import case_metrics, mean_of_classes


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


def evaluate_cases(
    model: TrainedModel,
    data: Amos,
    names: list[str],
    *,
    surfaces: bool = True,
    table: Path | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Predict and score preprocessed cases on their own grid, shared over the processes.

    Args:
        surfaces: also the distances between surfaces, which take longer.
        table: CSV file that gets a row for each case as soon as it is scored.

    Returns:
        (rows of `score` with "case" and "patient" in front, in the order of `names`; {failed case: reason}),
        the same in every process.
    """

    def evaluate(name: str) -> dict:
        case = data.cases[name]
        notes = case.attributes
        scaling = case_scaling(case, model.preprocessing)
        pred = segment(model, case.image, case.spacing_mm, scaling, notes["modality"])
        labelled = [int(organ) for organ in notes["labelled"]]
        return case_row(
            name, name, score(pred, case.label[...], case.spacing_mm, labelled, surfaces=surfaces)
        )

    rows, failed = batch.each(evaluate, names, unit="case", table=table)
    return [row for of_case in rows for row in of_case["organs"]], failed


def mean_dice(rows: list[dict]) -> float:
    """Mean over the organs of the mean over the cases that have the organ or a false alarm of it."""
    return mean_of_classes(rows, "dice")["mean"] if rows else float("nan")


def group_dice(rows: list[dict]) -> dict[str, float]:
    """{"small", "medium", "large": `mean_dice` of the organs of the group}; NaN for a group without any."""
    return {group: mean_dice([row for row in rows if row["group"] == group]) for group in GROUPS}
