"""Masks in files scored against true ones: what evaluate.py of several tasks does with folders."""

import argparse
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import batch, distributed, report
from common.agreement import volume_agreement, volume_lines
from common.class_metrics import Structures, case_row, case_summary, score_structures
from common.compare import compare, print_comparison
from common.config import non_negative_int
from common.decathlon import labelled_numbers, read_dataset_json
from common.flags import add_patient_pattern_flag
from common.mask_files import called_as, label_files, load_masks, matching_files
from common.montage import save_worst_and_median
from common.nifti import Scan
from common.plots import costs_the_picture
from common.sites import read_sites, site_lines, site_table
from common.splits import natural_key, patients_of
from common.tables import read_table, write_table

CASES = "cases.csv"  # grows case by case
PICTURE, COMPARISON = "worst_and_median.png", "comparison.csv"
VOLUMES, SITES = "volume_agreement.csv", "sites.csv"
VOLUME_TABLE = "volumes.csv"  # of a predict.py


def add_evaluation_flags(
    parser: argparse.ArgumentParser,
    labels: Collection[int] | None = None,
    *,
    required: bool = True,
    sites: bool = False,
) -> None:
    """The flags of `evaluate_folder`; `labels` are those of the task's structures, of which cases may be
    labelled in part. None: all cases are labelled in full. `required`: the script does nothing else. `sites`:
    also --sites."""
    parser.add_argument(
        "--pred", required=required, help="folder with the masks to score, such as predict.py writes"
    )
    parser.add_argument("--target", required=required, help="folder with the true masks, such as labelsVa")
    parser.add_argument("--out", required=required, help="folder that tables and pictures are written to")
    parser.add_argument(
        "--images",
        help="folder with the scans, which the picture of the worst and median cases then shows in grey",
    )
    if labels:
        parser.add_argument(
            "--labelled",
            type=int,
            nargs="+",
            choices=list(labels),
            metavar="LABEL",
            help=f"numbers of the structures that the true masks have labels for, if not all {len(labels)}; "
            "what is predicted of others is not scored. Default: what dataset.json beside --target says",
        )
    add_patient_pattern_flag(parser, "which then count as one in intervals and tests")
    parser.add_argument(
        "--compare",
        help="folder with the masks of a second run, which are scored in the same way and compared with "
        "those of --pred by a paired test",
    )
    parser.add_argument(
        "--num_pictures",
        type=non_negative_int,
        default=5,
        help="number of the worst cases that are drawn, and of those around the median; 0 draws none",
    )
    if sites:
        parser.add_argument(
            "--sites",
            help="table (.csv, or .tsv) with the columns name (of the case) and site; scores are then also "
            "given for each site",
        )


def labelled_beside(
    target: str | Path, flag: list[int] | None, known: Collection[int]
) -> dict[str, tuple[int, ...]]:
    """{case: labels that it was annotated with} for every file of `target`; see `labelled_numbers`.

    Args:
        flag: numbers that --labelled gives; None: what dataset.json in the folder above `target` says.
        known: numbers of all labels that there may be.
    """
    folder = Path(target).resolve().parent
    notes, path = read_dataset_json(folder), folder / "dataset.json"
    return {name: labelled_numbers(name, notes, flag, known, path) for name in label_files(target)}


class Masks(NamedTuple):
    """Two label maps (z, y, x) of one case on one grid; see `score_structures`.

    Attributes:
        columns: what the table of the cases gets besides.
    """

    pred: np.ndarray
    target: np.ndarray
    spacing_mm: Sequence[float]
    labelled: Collection[int]
    voxel_mm3: float | None = None
    columns: Mapping[str, object] = {}


def score_cases(
    masks_of: Callable[[str], Masks],
    names: Sequence[str],
    structures: Structures,
    patients: Mapping[str, str],
    *,
    surfaces: bool = True,
    table: Path | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Score cases by their names, shared over the processes.

    Args:
        masks_of: predicts or reads a case.
        patients: {case: patient}.
        surfaces: also the distances between surfaces, which take longer.
        table: CSV file that gets a row for each case as soon as it is scored.

    Returns:
        (rows of `score_structures` with "case" and "patient" in front, in the order of `names`; {failed
        case: reason}), the same in every process.
    """

    def score(name: str) -> dict:
        pred, target, spacing_mm, labelled, voxel_mm3, columns = masks_of(name)
        rows = score_structures(
            pred, target, spacing_mm, structures, labelled, surfaces=surfaces, voxel_mm3=voxel_mm3
        )
        return case_row(name, patients[name], rows, case_summary(rows) | columns)

    rows, failed = batch.each(score, names, unit="case", table=table)
    return [row for of_case in rows for row in of_case["classes"]], failed


def validate_cases(
    evaluate: Callable[[Sequence[str]], tuple[list[dict], dict[str, str]]],
    names: Sequence[str],
    most: int,
    log: Callable[[str], None],
) -> list[dict]:
    """Rows of at most `most` validation cases, evenly spread over `names`; a case that fails is logged.

    Args:
        evaluate: names -> as `score_cases` returns it.
    """
    rows, failed = evaluate(names[:: math.ceil(len(names) / most)])
    for name, reason in failed.items():
        log(f"warning: {name} could not be validated: {reason}")
    return rows


def score_files(
    preds: Mapping[str, Path],
    targets: Mapping[str, Path],
    structures: Structures,
    labelled: Mapping[str, Collection[int]],
    patients: Mapping[str, str],
    *,
    table: Path | None = None,
    renumber: Callable[[Scan, bool], np.ndarray] | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Score masks in files on the scans' own grids, shared over the processes.

    Args:
        preds, targets: {case: file}; a case without a prediction has failed.
        labelled, patients: {case: labels} and {case: patient}.
        table: CSV file that gets a row for each case as soon as it is scored.
        renumber: as of `load_masks`.

    Returns: as `score_cases`, in the order of `targets`.
    """

    def masks_of(name: str) -> Masks:
        if name not in preds:
            raise FileNotFoundError(f"no prediction for {targets[name]}")
        target, pred = load_masks(targets[name], preds[name], renumber=renumber)
        return Masks(pred.array, target.array, target.spacing_mm, labelled[name], target.voxel_mm3)

    return score_cases(masks_of, list(targets), structures, patients, table=table)


def check_whose_masks(folder: str | Path, columns: Collection[str]) -> None:
    """Refuse masks that a predict.py wrote of other structures than those that are scored.

    Args:
        folder: of the masks; without the volumes.csv that a predict.py writes beside them nothing is known.
        columns: what that table calls the volumes of the structures; empty: nothing is checked.

    Raises:
        ValueError: the table has none of these columns, but volumes.
    """
    path = Path(folder) / VOLUME_TABLE
    if not columns or not path.is_file():
        return
    found = [name for name in read_table(path)[0] if name.endswith("_mm3") and name != "removed_mm3"]
    if found and not set(columns) & set(found):
        raise ValueError(
            f"{path}: has {found[0]} and not {next(iter(columns))}, so these masks are of other structures; "
            "give their --dataset"
        )


def evaluate_folder(
    pred: str,
    target: str,
    out: Path,
    structures: Structures,
    labelled: Mapping[str, Collection[int]],
    *,
    images: str | None = None,
    other: str | None = None,
    patient_pattern: str | None = None,
    num_pictures: int = 5,
    window_hu: tuple[float, float] | None,
    volumes: bool = False,
    sites: str | None = None,
    renumber: Callable[[Scan, bool], np.ndarray] | None = None,
    volume_columns: Collection[str] = (),
) -> dict[str, str]:
    """Score a folder of masks against a folder of true ones; every file of `target` needs a prediction.

    Writes cases.csv, what `write_report` writes and worst_and_median.png; with `other` also comparison.csv,
    in which B is that folder.

    Args:
        labelled: {case: labels} for every case of `target`.
        images: folder of the scans, for the picture.
        other: folder with the masks of a second run.
        patient_pattern: as of `patients_of`.
        num_pictures, window_hu: as of `save_worst_and_median`.
        volumes: also write volume_agreement.csv, see `volume_agreement`, and add it to the summary.
        sites: table as of `read_sites`: also write sites.csv, see `site_table`, and add it to the summary.
        renumber: as of `load_masks`.
        volume_columns: as of `check_whose_masks`.

    Returns:
        {case that failed: reason}, the same in every process.

    Raises:
        FileNotFoundError, ValueError: as the functions that are named here and `matching_files`.
    """
    for folder in filter(None, (pred, other)):
        check_whose_masks(folder, volume_columns)
    targets = label_files(target)
    preds = matching_files(pred, targets, target)
    second = matching_files(other, targets, target) if other else None
    scans = called_as(label_files(images), targets) if images else {}
    patients = patients_of(list(targets), patient_pattern)
    site_of = read_sites(sites, targets) if sites else None
    report.clear_report(out, (*report.FILES, CASES, PICTURE, COMPARISON, VOLUMES, SITES))
    rows, failed = score_files(
        preds, targets, structures, labelled, patients, table=out / CASES, renumber=renumber
    )
    if distributed.is_main():
        extra = sorted(preds.keys() - targets.keys(), key=natural_key)
        notes = [f"without a true mask, not scored: {', '.join(extra)}"] if extra else []
        title = f"{len(targets) - len(failed)} masks of {pred} against {target}"
        more: list[str] = []
        if rows and volumes:
            agreement = volume_agreement(rows)
            write_table(out / VOLUMES, agreement)
            more += ["", *volume_lines(agreement)]
        if rows and site_of is not None:
            by_site = site_table(rows, site_of)
            write_table(out / SITES, by_site)
            more += ["", *site_lines(by_site)]
        report.write_report(rows, out, title, failed, notes=notes, more=more)
    if second is not None:
        rows_b, failed_b = score_files(second, targets, structures, labelled, patients, renumber=renumber)
        failed |= {f"{name} of {other}": reason for name, reason in failed_b.items()}
        if distributed.is_main():
            for line in batch.failed_lines(failed_b):
                print(line)
            if rows and rows_b:
                table = compare(rows, rows_b)
                write_table(out / COMPARISON, table)
                print(f"\nA: {pred}\nB: {other}")
                print_comparison(table)
    if rows and num_pictures and distributed.is_main():
        with costs_the_picture(PICTURE):
            save_worst_and_median(
                out / PICTURE,
                rows,
                preds,
                targets,
                scans,
                structures,
                labelled=labelled,
                number=num_pictures,
                window_hu=window_hu,
                renumber=renumber,
            )
    return failed
