"""Score organ masks against true ones: overlap, surfaces and volumes by organ, misses and false alarms.

    python amos_lha/evaluate.py --pred predictions --target AMOS/labelsVa --out evaluation
    python amos_lha/evaluate.py --pred a --target labelsVa --out a_scores --images imagesVa --compare b

Files belong together by the name of the case, with or without an ending such as _mask. Every file of --target
needs a prediction. Writes results.csv (one row for each case and organ), cases.csv, summary.csv (by organ),
groups.csv (small, medium, large, all), summary.md and worst_and_median.png; with --compare also
comparison.csv, in which B is the second folder.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import labelled_organs
from amos_lha.dataset import Amos, case_scaling
from amos_lha.organs import GROUPS, ORGANS
from amos_lha.pictures import save_worst_and_median
from amos_lha.scores import case_row, score
from amos_lha.segment import segment
from common import batch, distributed, report
from common.checkpoints import TrainedModel
from common.class_metrics import class_table, group_table, mean_of_classes
from common.compare import compare, label_files, print_comparison
from common.config import make_parser, non_negative_int, parse_args, run_script
from common.decathlon import read_dataset_json
from common.files import make_folder
from common.metrics import write_table
from common.nifti import load_label, same_grid
from common.splits import natural_key, patients_of

CASES = "cases.csv"  # grows case by case
PICTURE, COMPARISON = "worst_and_median.png", "comparison.csv"
FILES = ("results.csv", CASES, "summary.csv", "groups.csv", report.SUMMARY, PICTURE, COMPARISON)
SHOWN = ("dice", "nsd_1mm", "nsd_2mm", "nsd_organ", "hd95_mm", "volume_similarity")  # in summary.md


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--pred", required=True, help="folder with the masks to score, such as predict.py writes"
    )
    parser.add_argument("--target", required=True, help="folder with the true masks, such as labelsVa")
    parser.add_argument("--out", required=True, help="folder that tables and pictures are written to")
    parser.add_argument(
        "--images",
        help="folder with the scans, which the picture of the worst and median cases then shows in grey",
    )
    parser.add_argument(
        "--labelled",
        type=int,
        nargs="+",
        choices=list(ORGANS),
        metavar="ORGAN",
        help="numbers of the organs that the true masks have labels for, if not all 15; what is predicted of "
        "others is not scored. Default: what labelled or labels of dataset.json beside --target say",
    )
    parser.add_argument(
        "--patient_pattern",
        help="regular expression whose group finds the patient in the name of a case, such as 'p([0-9]+)'; "
        "needed where a patient has several scans, which then count as one in intervals and tests",
    )
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
    return parser


# ---- preprocessed cases ----


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


# ---- masks in files ----


def evaluate_files(
    preds: dict[str, Path],
    targets: dict[str, Path],
    labelled: dict[str, list[int]],
    patients: dict[str, str],
    *,
    table: Path | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Score masks in files on the scans' own grids, shared over the processes.

    Args:
        preds, targets: {case: file}; a case without a prediction has failed.
        labelled, patients: {case: organ numbers} and {case: patient}.

    Returns:
        as `evaluate_cases`.
    """

    def evaluate(name: str) -> dict:
        if name not in preds:
            raise FileNotFoundError(f"no prediction for {targets[name]}")
        pred, target = load_label(preds[name]), load_label(targets[name])
        if not same_grid(pred, target):
            raise ValueError(
                f"{pred.path}: lies on another grid than {target.path} (shapes {pred.shape} and "
                f"{target.shape}); score masks that were predicted for this very scan"
            )
        voxel_mm3 = target.voxel_mm3
        rows = score(pred.array, target.array, target.spacing_mm, labelled[name], voxel_mm3=voxel_mm3)
        return case_row(name, patients[name], rows)

    rows, failed = batch.each(evaluate, list(targets), unit="case", table=table)
    return [row for of_case in rows for row in of_case["organs"]], failed


def write_report(
    rows: list[dict], out: Path, title: str, failed: dict[str, str], notes: tuple[str, ...] = ()
) -> None:
    """Write results.csv, summary.csv, groups.csv and summary.md; print the summary, `notes` and what failed.

    Args:
        rows: of `evaluate_cases` or `evaluate_files`.
        failed: {case: reason}.
    """
    make_folder(out)
    lines = [title, *(f"NOTE: {note}" for note in notes), ""]
    if rows:
        organs = [row for row in class_table(rows) if row["class"] != "all"]
        groups = group_table(rows)
        write_table(out / "results.csv", rows)
        write_table(out / "summary.csv", organs)
        write_table(out / "groups.csv", groups)
        shown = [metric for metric in SHOWN if metric in rows[0]]
        lines += [*report.class_lines(organs, shown), "", f"| group | {' | '.join(shown)} |"]
        lines.append("|---" * (len(shown) + 1) + "|")
        for group in dict.fromkeys(row["group"] for row in groups):
            entries = {row["metric"]: row for row in groups if row["group"] == group}
            values = [report.mean_and_interval(entries[metric]) for metric in shown]
            lines.append(f"| {group} | {' | '.join(values)} |")
        lines += ["", report.EXPLANATION, "A group's mean is that of its organs' means over the cases."]
    report.write_summary(out, lines, failed)


def matching_files(pred: str, targets: dict[str, Path]) -> dict[str, Path]:
    """{case: file} of a folder of predictions.

    Raises:
        FileNotFoundError: no such folder, or no file in it belongs to a case of `targets`.
    """
    files = label_files(pred)
    if not files.keys() & targets.keys():
        case, target = next(iter(targets.items()))
        raise FileNotFoundError(
            f"{pred}: none of its {len(files)} masks has the name of one of the {len(targets)} cases of "
            f"{target.parent} (e.g. {case}_mask.nii.gz)"
        )
    return files


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        out, found = Path(args.out), label_files(args.target)
        targets = {name: found[name] for name in sorted(found, key=natural_key)}
        preds = matching_files(args.pred, targets)
        second = matching_files(args.compare, targets) if args.compare else None
        images = label_files(args.images) if args.images else {}
        patients = patients_of(list(targets), args.patient_pattern)
        noted = Path(args.target).resolve().parent
        notes = read_dataset_json(noted)
        labelled = {
            name: list(labelled_organs(name, notes, args.labelled, noted / "dataset.json"))
            for name in targets
        }
        report.clear_report(out, FILES)
        rows, failed = evaluate_files(preds, targets, labelled, patients, table=out / CASES)
        if distributed.is_main():
            title = f"{len(targets) - len(failed)} masks of {args.pred} against {args.target}"
            extra = sorted(preds.keys() - targets.keys(), key=natural_key)
            others = (f"without a true mask, not scored: {', '.join(extra)}",) if extra else ()
            write_report(rows, out, title, failed, others)
        if second is not None:
            rows_b, failed_b = evaluate_files(second, targets, labelled, patients)
            failed |= {f"{name} of {args.compare}": reason for name, reason in failed_b.items()}
            if distributed.is_main():
                for line in batch.failed_lines(failed_b):
                    print(line)
                if rows and rows_b:
                    table = compare(rows, rows_b)
                    write_table(out / COMPARISON, table)
                    print(f"\nA: {args.pred}\nB: {args.compare}")
                    print_comparison(table)
        if rows and args.num_pictures and distributed.is_main():
            save_worst_and_median(
                out / PICTURE, rows, preds, targets, images, labelled=labelled, number=args.num_pictures
            )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
