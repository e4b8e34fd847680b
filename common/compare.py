"""Two runs on the same cases: which is better, by how much, and could it be chance?

    python common/compare.py runs/a/evaluation runs/b/evaluation
    python common/compare.py predictions_a predictions_b --target labels --metric dice hd95_mm

Takes tables of evaluate.py (the file results.csv or its folder) with one row for each case and class; or,
with --target, folders of NIfTI label maps, which are scored first. Writes comparison.csv to --out.
Differences are B - A. A structure that was missed or invented counts with the worst score, and how many there
were stands beside it.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.class_metrics import case_means, case_metrics, metric_columns
from common.config import make_parser, parse_args, run_script
from common.conversion import failure_reason
from common.faults import ending_in_a_sentence
from common.files import make_folder
from common.mask_files import called_as, label_files, load_masks
from common.metrics import holm, paired_wilcoxon
from common.splits import natural_key, patients_of
from common.tables import read_table, write_table

RESULTS = "results.csv"
VOLUMES = ("target_mm3", "pred_mm3")  # columns that are not scores


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "run_a",
        help="the first run: its folder, the folder of an evaluation or its results.csv; with --target a "
        "folder of label maps",
    )
    parser.add_argument("run_b", help="the second run, given in the same way")
    parser.add_argument(
        "--metric",
        nargs="+",
        help="columns of the tables to compare, such as dice; default: all that both tables have",
    )
    parser.add_argument(
        "--target",
        help="folder of true label maps (NIfTI) with the names of the predictions; needed only if run_a and "
        "run_b are folders of label maps",
    )
    parser.add_argument(
        "--patient_pattern",
        help="regular expression whose group finds the patient in the name of a case, such as "
        "'sub-([0-9]+)'; needed where a patient has several scans, which then count as one in the "
        "test and in the interval",
    )
    parser.add_argument("--out", default="comparison", help="folder that the tables are written to")
    return parser


def read_results(path: str | Path) -> list[dict]:
    """Rows of a table of evaluate.py; metrics as float, an empty cell as NaN.

    Raises:
        FileNotFoundError: no such table.
        ValueError: an empty table, a missing column, a cell that is not a number, a case and class twice, or
            an empty metric of a structure that is not absent.
    """
    path = Path(path)
    if path.is_dir():  # of the table, or of a run, whose evaluation lies below it
        folder = path / "evaluation" if (path / "evaluation" / RESULTS).is_file() else path
        path = folder / RESULTS
    if not path.is_file():
        if folds := sorted(path.parent.glob(f"fold_*/evaluation/{RESULTS}")):
            raise FileNotFoundError(
                f"{path}: no such table, as not all folds are done; those done can be compared one by one, "
                f"such as {folds[0].parents[1]}"
            )
        raise FileNotFoundError(f"{path}: no such table; run evaluate.py, or name --target for label maps")
    _, rows = read_table(path)
    missing = {"case", "class", "status"} - set(rows[0] if rows else ())
    if missing:
        what = f"no column {', '.join(sorted(missing))}" if rows else "no rows"
        raise ValueError(f"{path}: {what}; a table of case, class, status and metrics is needed")
    seen = set()
    for row in rows:
        where = f"{path}: case {row['case']}, class {row['class']}"
        if (row["case"], row["class"]) in seen:
            raise ValueError(f"{where}: stands there twice")
        seen.add((row["case"], row["class"]))
        for metric in metric_columns(rows):
            try:
                row[metric] = float(row[metric] or "nan")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {metric} is {row[metric]!r}, not a number") from error
            if np.isnan(row[metric]) and row["status"] != "absent":
                raise ValueError(
                    f"{where}: {row['status']}, but its {metric} is empty. Left out it would flatter the "
                    "mean; score it again (0 for overlaps, the image's diagonal for distances)"
                )
    return rows


def score_folders(
    folders: list[str], target: str, pattern: str | None
) -> tuple[list[list[dict]], dict[str, str]]:
    """(rows of both runs, {failed case: reason}); a case that fails in one run is left out of both."""
    targets = label_files(target)
    files = [called_as(label_files(folder), targets) for folder in folders]
    cases = sorted(set(targets).intersection(*files), key=natural_key)
    by_folder = dict(zip(map(str, [*folders, target]), [*files, targets], strict=True))
    for case in sorted(set().union(*by_folder.values()) - set(cases), key=natural_key):
        has = [folder for folder, of_folder in by_folder.items() if case in of_folder]
        lacks = ", ".join(folder for folder in by_folder if folder not in has)
        print(f"left out: {case} of {', '.join(has)}: no such mask in {lacks}")
    patients, results, failed = patients_of(cases, pattern), [[], []], {}
    for case in tqdm(cases, "scoring", unit="case", disable=None, leave=False):
        try:
            truth, *preds = load_masks(targets[case], *(of_run[case] for of_run in files))
            labels = sorted(set().union(*(np.unique(s.array).tolist() for s in (truth, *preds))) - {0})
            if not labels:
                print(f"left out: {case}: nothing is in the true mask, nor in the predictions")
                continue
            for rows, pred in zip(results, preds, strict=True):
                scores = case_metrics(pred.array, truth.array, truth.spacing_mm, {c: str(c) for c in labels})
                rows += [{"case": case, "patient": patients[case], **row} for row in scores]
        except (ValueError, OSError) as error:  # one damaged file must not cost the others
            failed[case] = failure_reason(error)
    if not results[0]:
        reasons = "; ".join(failed.values()) or "no case is in all three folders, or all are empty"
        raise ValueError(f"nothing to compare: {reasons}")
    return results, failed


def compare(a: list[dict], b: list[dict], metrics: list[str] | None = None) -> list[dict]:
    """The table of differences between two runs, B - A.

    Args:
        a, b: rows as of `read_results`; cases that only one of them has are left out.
        metrics: columns to compare; by default all that both have.

    Returns:
        One row for each metric and class, and one with class "all" for the mean over the classes of a case:
        the columns of `paired_wilcoxon`; p_holm, the p value adjusted over the classes of a metric; and how
        many structures each run missed and hallucinated (missed_a, hallucinated_a, missed_b, hallucinated_b).

    Raises:
        ValueError: the runs have no case in common, or a case with other classes or another patient; an
            unknown metric.
    """
    cases = {r["case"] for r in a} & {r["case"] for r in b}
    if not cases:
        names = f"{a[0]['case']!r} and {b[0]['case']!r}" if a and b else "none"
        raise ValueError(f"the runs have no case in common (first: {names})")
    a, b = ([r for r in rows if r["case"] in cases] for rows in (a, b))
    keys_a, keys_b = ({(r["case"], str(r["class"])) for r in rows} for rows in (a, b))
    if keys_a != keys_b:
        case, label = min(keys_a ^ keys_b)
        raise ValueError(f"case {case}: class {label} is in one run only; score both with the same classes")
    both = [m for m in metric_columns(a) if m in b[0]]
    if unknown := [m for m in metrics or () if m not in both]:
        raise ValueError(f"no column {', '.join(unknown)} in both runs; there are {', '.join(both)}")
    patients = {r["case"]: r.get("patient") or r["case"] for r in a}
    for row in b:
        if (row.get("patient") or row["case"]) != patients[row["case"]]:
            raise ValueError(f"case {row['case']}: patient {patients[row['case']]} or {row.get('patient')}?")
    table = []
    labels = [*dict.fromkeys(str(r["class"]) for r in a), "all"]
    for metric in metrics or [m for m in both if m not in VOLUMES]:
        block = []
        for label in labels:
            of_a, of_b = ([r for r in rows if label in (str(r["class"]), "all")] for rows in (a, b))
            row = {"metric": metric, "class": label, "name": "mean of classes"}
            if label != "all":
                row["name"] = of_a[0].get("name") or label
            row |= paired_wilcoxon(case_means(of_a, metric), case_means(of_b, metric), patients)
            for status in ("missed", "hallucinated"):
                for run, rows in (("a", of_a), ("b", of_b)):
                    row[f"{status}_{run}"] = sum(r["status"] == status for r in rows)
            block.append(row)
        for row, p in zip(block, [*holm([r["p"] for r in block[:-1]]), block[-1]["p"]], strict=True):
            row["p_holm"] = p
        table += block
    return table


def dropped_lines(a: list[dict], b: list[dict]) -> list[str]:
    """What `compare` leaves out of two runs, and why, a line for each case, column or structure."""
    lines = []
    cases = [{row["case"] for row in rows} for rows in (a, b)]
    for run, other, only in (("A", "B", cases[0] - cases[1]), ("B", "A", cases[1] - cases[0])):
        if only:
            lines += [
                f"only in {run}, left out: {_names(only)}",
                f"  {other} has no row of them: not predicted, or failed",
            ]
    columns = [set(metric_columns(rows)) if rows else set() for rows in (a, b)]
    if only := columns[0] ^ columns[1]:
        lines.append(f"columns of one run only, left out: {', '.join(sorted(only))}")
    statuses = [{(str(row["class"]), row["case"]): row["status"] for row in rows} for rows in (a, b)]
    names = {str(row["class"]): row.get("name") or row["class"] for row in a}
    for label, name in names.items():
        both = [key for key in statuses[0] if key[0] == label and key in statuses[1]]
        pairs = {case: (statuses[0][label, case], statuses[1][label, case]) for _, case in both}
        if absent := [case for case, pair in pairs.items() if set(pair) == {"absent"}]:
            lines.append(f"{name}: absent in truth and predictions, left out: {_names(absent)}")
        for case, pair in pairs.items():
            if "absent" in pair and set(pair) != {"absent"}:
                lines.append(
                    f"{name}: left out: {case}: {pair[0]} in A, {pair[1]} in B, so that only one has a score"
                )
    return lines


def _names(cases: Iterable[str]) -> str:
    return ", ".join(sorted(cases, key=natural_key))


def print_comparison(table: list[dict]) -> None:
    """Print the table of `compare`; missed and invented structures are given as A/B."""
    widths = (-26, 9, 9, 9, 20, 7, 8, 5, 9, 10)

    def show(*cells: object) -> None:
        # A negative width aligns to the left.
        print("".join(f"{c:>{w}}" if w > 0 else f"{c:<{-w}}" for c, w in zip(cells, widths, strict=True)))

    show("", "A", "B", "B - A", "95 % interval", "p", "p Holm", "n", "missed", "invented")
    metric = None
    for row in table:
        if row["metric"] != metric:
            metric = row["metric"]
            print(f"{metric} ({'lower' if metric.endswith('_mm') else 'higher'} is better)")
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        text = {key: "-" if np.isnan(value) else f"{value:.3f}" for key, value in numbers.items()}
        text |= {key: "<0.001" for key in ("p", "p_holm") if row[key] < 0.001}
        show(
            f"  {row['name'][:23]}",
            *(text[k] for k in ("mean_a", "mean_b", "difference")),
            f"{text['low']} to {text['high']}",
            *(text["p"], text["p_holm"], row["n"]),
            *(f"{row[f'{s}_a']}/{row[f'{s}_b']}" for s in ("missed", "hallucinated")),
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    failed: dict[str, str] = {}
    with ending_in_a_sentence():
        out = Path(args.out)
        if args.target:
            (a, b), failed = score_folders([args.run_a, args.run_b], args.target, args.patient_pattern)
        else:
            a, b = read_results(args.run_a), read_results(args.run_b)
            if args.patient_pattern:
                patients = patients_of(list({r["case"] for r in a + b}), args.patient_pattern)
                a, b = ([{**r, "patient": patients[r["case"]]} for r in rows] for rows in (a, b))
        cases_a, cases_b = ({r["case"] for r in rows} for rows in (a, b))
        for line in dropped_lines(a, b):
            print(line)
        table = compare(a, b, args.metric)
        make_folder(out)
        for name, rows in (("a", a), ("b", b)) if args.target else ():
            write_table(out / f"results_{name}.csv", rows)
        write_table(out / "comparison.csv", table)
    print(f"A: {args.run_a}\nB: {args.run_b}\n{len(cases_a & cases_b)} cases")
    print_comparison(table)
    print(f"written: {out / 'comparison.csv'}")
    for case, reason in failed.items():
        print(f"failed: {case}: {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
