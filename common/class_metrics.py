"""Scores of label maps with several classes: a row for each class of a case, and tables over cases.

Empty masks are defined as in common/metrics.py for overlap, and as in common/surfaces.py for distances.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from common.metrics import dice_from_counts, iou_from_counts, presence, summary, volume_similarity
from common.surfaces import check_grid, diagonal_mm, distances_between, share_within, summarise, surfels

NOT_METRICS = ("case", "patient", "group", "class", "name", "status")  # columns without a metric


class Structures(NamedTuple):
    """What a task segments.

    Attributes:
        names: {label: name}, without the background.
        colors: (1 + highest label, 3) uint8 RGB, that of the background first.
        groups: {name of a group: its labels}, such as by size, each label in one; None for none.
        tolerances_mm: {label: distance between surfaces that counts as agreement} of all; None for none.
        nsd_mm: distances that count as agreement for every label, each with an NSD of its own.
    """

    names: Mapping[int, str]
    colors: np.ndarray
    groups: Mapping[str, Collection[int]] | None = None
    tolerances_mm: Mapping[int, float] | None = None
    nsd_mm: Sequence[float] = (1.0, 2.0)


def case_metrics(
    pred: np.ndarray,
    target: np.ndarray,
    spacing_mm: Sequence[float],
    classes: Mapping[int, str],
    tolerances_mm: Sequence[float] = (1.0, 2.0),
    *,
    organ_tolerances_mm: Mapping[int, float] | None = None,
    surfaces: bool = True,
    voxel_mm3: float | None = None,
) -> list[dict]:
    """One row for each class: class, name, status, dice, iou, volume_similarity, hd_mm, hd95_mm, assd_mm,
    asd_mm, nsd_<t>mm, target_mm3, pred_mm3.

    Args:
        pred, target: (z, y, x) label maps of integers or booleans, 0 = background.
        spacing_mm: z y x.
        classes: {label: name}, without the background.
        organ_tolerances_mm: {label: mm} of all classes; adds nsd_organ, the NSD with each class's own.
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
        distances = {}
        if surfaces:
            between = distances_between(*(e[label] for e in elements), pred.shape, spacing_mm)
            distances = summarise(between, worst_mm, tolerances_mm)
            if organ_tolerances_mm is not None:
                distances["nsd_organ"] = share_within(between, organ_tolerances_mm[label])
        rows.append(
            {
                "class": label,
                "name": name,
                "status": presence(num_target, num_pred),
                "dice": dice_from_counts(tp, fp, fn),
                "iou": iou_from_counts(tp, fp, fn),
                "volume_similarity": volume_similarity(tp, fp, fn),
                **distances,
                "target_mm3": num_target * voxel_mm3,
                "pred_mm3": num_pred * voxel_mm3,
            }
        )
    return rows


def score_structures(
    pred: np.ndarray,
    target: np.ndarray,
    spacing_mm: Sequence[float],
    structures: Structures,
    labelled: Collection[int],
    *,
    surfaces: bool = True,
    voxel_mm3: float | None = None,
) -> list[dict]:
    """Rows of `case_metrics` for the structures that the case has labels for; with groups also "group".

    Args:
        pred, target: (z, y, x) label maps. What they hold of structures that are not labelled counts as
            background: it is neither right nor wrong.
        labelled: their labels, present in the case or not.

    Raises:
        ValueError: as `case_metrics`; a label that is none of the structures' counts as one without a name.
    """
    pred, target = (only_labelled(labels, structures, labelled) for labels in (pred, target))
    rows = case_metrics(
        pred,
        target,
        spacing_mm,
        {label: structures.names[label] for label in sorted(labelled)},
        structures.nsd_mm,
        organ_tolerances_mm=structures.tolerances_mm,
        surfaces=surfaces,
        voxel_mm3=voxel_mm3,
    )
    if not structures.groups:
        return rows
    group_of = {label: group for group, labels in structures.groups.items() for label in labels}
    return [{"group": group_of[row["class"]], **row} for row in rows]


def only_labelled(labels: np.ndarray, structures: Structures, labelled: Collection[int]) -> np.ndarray:
    """The label map with the structures that are not among `labelled` as background."""
    others = sorted(structures.names.keys() - set(labelled))
    if not others:
        return labels
    labels = labels.copy()
    labels[np.isin(labels, others)] = 0
    return labels


def case_row(name: str, patient: str, rows: Sequence[dict], summary: Mapping[str, object]) -> dict:
    """Row of a case for a table that grows case by case.

    Args:
        rows: its rows by class, which come under "classes", each with the case and the patient in front.
        summary: further columns.
    """
    first = {"case": name, "patient": patient}
    return {**first, **summary, "classes": [{**first, **row} for row in rows]}


def case_summary(rows: Sequence[dict]) -> dict[str, float]:
    """Mean Dice of a case over its classes that are not absent, and how many were missed and hallucinated."""
    dice = [row["dice"] for row in rows if not np.isnan(row["dice"])]
    status = [row["status"] for row in rows]
    return {
        "dice": float(np.mean(dice)) if dice else float("nan"),
        "missed": status.count("missed"),
        "hallucinated": status.count("hallucinated"),
    }


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


def metric_columns(rows: Sequence[dict]) -> list[str]:
    """Names of the metrics in rows of `case_metrics`."""
    return [key for key in rows[0] if key not in NOT_METRICS]


def class_table(rows: Sequence[dict]) -> list[dict]:
    """One row for each class and metric; "all" is the mean over the classes of each case, then over cases.

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


def mean_of_classes(rows: Sequence[dict], metric: str) -> dict[str, float]:
    """Mean over the classes of their means over the cases, in which NaN are left out.

    Unlike "all" of `class_table`, a class that few cases have weighs as much as any other, which is how
    challenges rank.

    Args:
        rows: as of `class_table`.

    Returns:
        mean, low, high: with the 95 % bootstrap interval by patient, which is NaN with fewer than two
        patients. All NaN without a value.
    """
    cases, classes = (list(dict.fromkeys(r[key] for r in rows)) for key in ("case", "class"))
    values = np.full((len(cases), len(classes)), np.nan)
    patients = dict.fromkeys(cases, "")
    for row in rows:
        values[cases.index(row["case"]), classes.index(row["class"])] = row[metric]
        patients[row["case"]] = row.get("patient", row["case"])
    filled = np.nan_to_num(values)
    is_value = ~np.isnan(values)
    names, patient_of = np.unique(list(patients.values()), return_inverse=True)

    def mean(weights: np.ndarray) -> float:  # of each case
        counts = weights @ is_value
        has_value = counts > 0
        return float(np.mean((weights @ filled)[has_value] / counts[has_value]))

    result = {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    if is_value.any():
        result["mean"] = mean(np.ones(len(cases)))
    if len(names) > 1 and is_value.any():
        drawn = np.random.default_rng(0).integers(len(names), size=(2000, len(names)))
        times = [np.bincount(draw, minlength=len(names))[patient_of] for draw in drawn]
        means = [mean(t) for t in times if (t @ is_value).any()]
        edges = np.quantile(means, [0.025, 0.975])
        result["low"], result["high"] = edges.tolist()
    return result


def mean_dice(rows: Sequence[dict]) -> float:
    """Mean over the classes of the mean over the cases that have the class or a false alarm of it; rows as of
    `class_table`. NaN without any."""
    return mean_of_classes(rows, "dice")["mean"]


def group_table(rows: Sequence[dict]) -> list[dict]:
    """One row for each group of classes and metric, at last of all classes as group "all".

    Args:
        rows: as of `class_table`, each with "group", the name of the group of its class.

    Returns:
        rows of group, metric, mean, low, high (as of `mean_of_classes`), missed, hallucinated, absent
        (structures).
    """
    table = []
    for group in [*dict.fromkeys(r["group"] for r in rows), "all"]:
        of_group = [r for r in rows if group in (r["group"], "all")]
        status = [r["status"] for r in of_group]
        number = {key: status.count(key) for key in ("missed", "hallucinated", "absent")}
        table += [
            {"group": group, "metric": metric} | mean_of_classes(of_group, metric) | number
            for metric in metric_columns(rows)
        ]
    return table


def case_means(rows: Sequence[dict], metric: str) -> dict[str, float]:
    """{case: mean of the metric over its rows that are not NaN, NaN if there is none}."""
    values: dict[str, list[float]] = {}
    for row in rows:
        of_case = values.setdefault(row["case"], [])
        if not np.isnan(row[metric]):
            of_case.append(row[metric])
    return {case: float(np.mean(numbers)) if numbers else float("nan") for case, numbers in values.items()}
