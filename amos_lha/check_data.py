"""Find what is wrong with a data set in AMOS22's layout before hours are spent on it.

    python amos_lha/check_data.py --data_path ../shared/data/abdomen_ct
    python amos_lha/check_data.py --data_path ../shared/data/abdomen_ct/label_only --out runs/amos_lha/check

Problems, for which the exit code is 1: a scan or label that is missing, unreadable or on another grid;
numbers that are no organs; the same scan or label twice; organs on the wrong side. Remarks: specks of a few
voxels, very thin scans, and CT whose values do not look like HU. A folder without imagesTr is taken as one of
labels alone. Also prints how many scans and organs there are, and the voxel sizes.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import AMOS22, Case, add_flags, list_any, why_not_organs
from amos_lha.organs import ORGANS, SIDES, group_of
from common.config import make_parser, non_negative_int, parse_args, run_script
from common.conversion import each_case, failure_reason
from common.files import make_folder
from common.hu import why_not_hu
from common.label_measures import LabelMeasure, measure_labels
from common.metrics import write_table
from common.nifti import load_label, load_nifti
from common.pairs import content_hash, why_not_a_pair, why_too_thin

RIGHT_AND_LEFT = (*SIDES, (6, 1))  # the liver lies right of the spleen


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data_path",
        default="data/amos22",
        help="folder that holds the data set in AMOS22's layout, or label maps alone",
    )
    parser.add_argument("--out", help="folder that check.csv is written to, with a row for each case")
    parser.add_argument(
        "--speck_voxels",
        type=non_negative_int,
        default=10,
        help="parts of an organ that are apart from its largest part and smaller than this many voxels are "
        "remarked on; 0 = none are",
    )
    add_flags(parser)
    return parser


def check_case(case: Case, speck_voxels: int) -> dict:
    """What one case holds and what is wrong with it; each of its files is read once.

    Returns:
        row: its row of check.csv; problems, remarks: sentences; organs: those present; hashes: of its
        "scan" and "label", as far as they can be read.
    """
    problems, remarks, hashes, organs = [], [], {}, []
    scan = label = None
    if case.image is None and case.part != "labels":
        problems.append(f"{case.label}: a label without a scan of that name")
    if case.label is None and case.part != "test":
        problems.append(f"{case.image}: a scan without a label of that name")
    try:
        scan = load_nifti(case.image) if case.image else None
    except (ValueError, OSError) as error:
        problems.append(failure_reason(error))
    try:
        label = load_label(case.label) if case.label else None
    except (ValueError, OSError) as error:
        problems.append(failure_reason(error))
    if scan is not None:
        hashes["scan"] = content_hash(scan.array)
        remarks += [text for text in (why_too_thin(scan),) if text]
        if case.modality == "ct" and (suspicion := why_not_hu(scan.array)):
            remarks.append(suspicion)
    if scan is not None and label is not None and (difference := why_not_a_pair(scan, label)):
        problems.append(difference)
    if label is not None:
        if unknown := why_not_organs(label.array, case.labelled):
            problems.append(f"{case.label}: {unknown}")
        measures = {n: m for n, m in measure_labels(label.array).items() if n in ORGANS}
        organs = sorted(measures)
        if organs:
            hashes["label"] = content_hash(label.array)
        problems += wrong_sides(measures, label.affine)
        remarks += specks(measures, speck_voxels)
    known = scan if scan is not None else label
    row = {
        "case": case.name,
        "part": case.part,
        "modality": case.modality,
        **{f"shape_{axis}": known.shape[i] if known else None for i, axis in enumerate("zyx")},
        **{f"spacing_{axis}_mm": known.spacing_mm[i] if known else None for i, axis in enumerate("zyx")},
        "orientation": known.orientation if known else None,
        "organs": " ".join(map(str, organs)),
    }
    return {"row": row, "problems": problems, "remarks": remarks, "organs": organs, "hashes": hashes}


def wrong_sides(measures: dict[int, LabelMeasure], affine: np.ndarray) -> list[str]:
    """Sentences about organs that lie left of what they should lie right of.

    Args:
        measures: of the organs of a label map (z, y, x) in RAS+.
        affine: (4, 4) of it, voxel (x, y, z) to mm.
    """
    right_mm = {n: float((affine @ [*m.centre[::-1], 1.0])[0]) for n, m in measures.items()}
    pairs = [(a, b) for a, b in RIGHT_AND_LEFT if a in right_mm and b in right_mm]
    wrong = [(a, b) for a, b in pairs if right_mm[a] < right_mm[b]]
    if not wrong:
        return []
    listed = ", ".join(f"{ORGANS[a]} left of {ORGANS[b]}" for a, b in wrong)
    cause = "two labels are exchanged"
    if len(wrong) == len(pairs):
        cause = "the file is mirrored, its labels are exchanged, or the patient has situs inversus"
    return [f"on the wrong side: {listed}: {cause}"]


def specks(measures: dict[int, LabelMeasure], speck_voxels: int) -> list[str]:
    """A sentence for each organ that has parts below `speck_voxels` beside its largest part."""
    sentences = []
    for n, measure in measures.items():
        small = measure.specks(speck_voxels)
        if measure.pieces[0] < speck_voxels:
            sentences.append(f"{ORGANS[n]}: {measure.voxels} voxel(s) in all")
        elif small:
            sentences.append(f"{ORGANS[n]}: {len(small)} speck(s) of up to {max(small)} voxel(s)")
    return sentences


def note_duplicates(results: dict[Case, dict]) -> None:
    """Add a problem to each case whose scan or label has the content of an earlier one."""
    first: dict[tuple[str, str], Case] = {}
    for case, result in results.items():
        for kind, digest in result["hashes"].items():
            if (other := first.setdefault((kind, digest), case)) != case:
                result["problems"].append(f"its {kind} is the same as that of {other.name} ({other.part})")


def print_summary(results: dict[Case, dict]) -> None:
    """Counts, voxel sizes and presence of organs."""
    counts = Counter(f"{case.part} {case.modality.upper() if case.modality else ''}" for case in results)
    print(f"{', '.join(f'{n} {what}' for what, n in counts.items())} ({AMOS22})")
    rows = [r["row"] for r in results.values() if r["row"]["shape_z"]]
    if rows:
        print("voxel size in mm: lowest, median, highest")
        sizes = np.array([[row[f"spacing_{axis}_mm"] for axis in "zyx"] for row in rows])
        names = ("z", "y", "x", "slice thickness (the largest of the three)")
        for name, values in zip(names, [*sizes.T, sizes.max(axis=1)], strict=True):
            print(f"  {name}: {values.min():.3g}, {np.median(values):.3g}, {values.max():.3g}")
    print("organ: cases in which it is present, of those in which it is labelled")
    for n, name in ORGANS.items():
        labelled = [r for case, r in results.items() if case.label is not None and n in case.labelled]
        present = sum(n in r["organs"] for r in labelled)
        print(f"  {n:2} {name} ({group_of(n)}): {present} of {len(labelled)}")


def check(args: Namespace) -> int:
    """Check every case, print what is found; returns the number of problems.

    Raises:
        FileNotFoundError, ValueError: there is nothing to check, or dataset.json is wrong.
    """
    cases, problems = list_any(args.data_path, args.labelled)
    results, failed = each_case(check_case, cases, args.speck_voxels, workers=args.workers, doing="checking")
    problems += [f"{case.name} ({case.part}): {reason}" for case, reason in failed.items()]
    note_duplicates(results)
    print_summary(results)
    remarks = []
    for case, result in results.items():
        problems += [f"{case.name} ({case.part}): {text}" for text in result["problems"]]
        remarks += [f"{case.name} ({case.part}): {text}" for text in result["remarks"]]
        result["row"] |= {key: "; ".join(result[key]) for key in ("problems", "remarks")}
    if args.out and results:
        write_table(make_folder(args.out) / "check.csv", [result["row"] for result in results.values()])
    for title, lines in (("remark(s)", remarks), ("problem(s)", problems)):
        print(f"{len(lines)} {title}{':' if lines else ''}")
        for line in lines:
            print(f"  {line}")
    return len(problems)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    try:
        return 1 if check(args) else 0
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run_script(main)
