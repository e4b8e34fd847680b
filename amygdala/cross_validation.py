"""cross_validation.txt: the scores of all folds in the layout of CBIM-Medical-Image-Segmentation, then ours.

The first part is three blocks, Dice, HD and ASD, with a line for each fold that holds the mean of each label
over the fold's cases. What follows them tells what the numbers mean, how many cases there were, sites and
volumes; none of its lines looks like one of a block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.agreement import mean_or_nan, spread_or_nan, volume_agreement, volume_lines
from common.class_metrics import metric_columns
from common.compare import RESULTS
from common.files import printable, replacing
from common.sites import site_lines, site_table
from common.tables import write_table

BLOCKS = {"Dice": "dice", "HD": "hd95_mm", "ASD": "asd_mm"}  # title: our metric
EXPLANATION = (
    "HD is the 95th percentile of surface distances (HD95) in mm, ASD the mean of the two directed mean "
    "distances in mm, both weighted by surface area.",
    "A fold's number is the mean over its test cases. A missed label counts with Dice 0 and the image's "
    "diagonal as distance, and so does one in a case that does not have it; a label in neither is left out.",
    "Std is the standard deviation of the folds' numbers, with their number n as divisor, not n - 1.",
)


def fold_means(folds: Sequence[Sequence[dict]], labels: Sequence[int], metric: str) -> np.ndarray:
    """(folds, labels) mean of a metric over the cases of each fold; NaN where there is no value.

    Args:
        folds: for each fold its rows of `score_structures`, each with "case".
    """
    means = [
        [mean_or_nan([row[metric] for row in rows if row["class"] == label]) for label in labels]
        for rows in folds
    ]
    return np.array(means, float)


def block_lines(title: str, values: np.ndarray) -> list[str]:
    """Lines of one block from (folds, labels) means; NaN are left out of averages."""
    by_class = [mean_or_nan(column) for column in values.T]
    spread = [spread_or_nan(column) for column in values.T]
    of_folds = [mean_or_nan(row) for row in values]
    return [
        title,
        *(f"Fold {fold}: {printed(row)}" for fold, row in enumerate(values)),
        f"Each Class {title} Avg: {printed(by_class)}",
        f"Each Class {title} Std: {printed(spread)}",
        f"All classes {title} Avg: {mean_or_nan(values.ravel()):.4f}",
        f"All classes {title} Std: {spread_or_nan(of_folds):.4f}",
    ]


def printed(values: Sequence[float]) -> str:
    """Numbers as numpy prints them with four decimals, in one line."""
    with np.printoptions(precision=4, suppress=True, linewidth=10_000):
        return str(np.asarray(values, float))


def write_cross_validation(
    path: str | Path,
    folds: Sequence[Sequence[dict]],
    labels: Mapping[int, str],
    sites: Mapping[str, str],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Write cross_validation.txt; beside it a .csv by fold and label, and results.csv for common/compare.py.

    Args:
        path: of the text file.
        folds: for each fold its rows of `evaluate_cases`; an empty fold has NaN.
        labels: {label: name}, in the order of the numbers in the file.
        sites: {case: site}.
        notes: what a reader of the scores must know, such as that the epochs were chosen on the test folds.

    Raises:
        ValueError: no row in any fold, or a case that is in two folds.
    """
    fold_of: dict[str, int] = {}
    for fold, rows in enumerate(folds):
        for row in rows:
            if fold_of.setdefault(row["case"], fold) != fold:
                earlier = fold_of[row["case"]]
                raise ValueError(f"case {row['case']} was tested in fold {earlier} and in fold {fold}")
    every = [row for rows in folds for row in rows]
    if not every:
        raise ValueError(f"{path}: no fold has a scored case, so there is nothing to write")
    lines: list[str] = []
    for title, metric in BLOCKS.items():
        lines += [*block_lines(title, fold_means(folds, list(labels), metric)), ""]
    lines += ["About these numbers", "", *(f"NOTE: {note}" for note in notes), *EXPLANATION, ""]
    lines += ["| structure | cases | missed | hallucinated | left out |", "|---" * 5 + "|"]
    for label, name in labels.items():
        status = [row["status"] for row in every if row["class"] == label]
        counts = [len(status), *(status.count(key) for key in ("missed", "hallucinated", "absent"))]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    lines += ["", *site_lines(site_table(every, sites)), "", *volume_lines(volume_agreement(every))]
    path = Path(path)
    with replacing(path) as partial:
        partial.write_text(printable("\n".join(lines) + "\n"), encoding="utf8")
    write_table(path.with_suffix(".csv"), fold_table(folds, labels, metric_columns(every)))
    write_table(path.with_name(RESULTS), every)


def fold_table(
    folds: Sequence[Sequence[dict]], labels: Mapping[int, str], metrics: Sequence[str]
) -> list[dict]:
    """One row for each fold and label: cases, missed, hallucinated, absent, and the means of the metrics."""
    table = []
    for fold, rows in enumerate(folds):
        for label, name in labels.items():
            of_class = [row for row in rows if row["class"] == label]
            status = [row["status"] for row in of_class]
            table.append(
                {"fold": fold, "class": label, "name": name, "cases": len(of_class)}
                | {key: status.count(key) for key in ("missed", "hallucinated", "absent")}
                | {metric: mean_or_nan([row[metric] for row in of_class]) for metric in metrics}
            )
    return table
