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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import AMOS22, Case, add_raw_data_flags, list_any
from amos_lha.organs import ORGANS, SIDES, group_of
from common import check_cases, distributed
from common.config import make_parser, non_negative_int, parse_args, run_script
from common.conversion import each_case

RIGHT_AND_LEFT = (*SIDES, (6, 1))  # the liver lies right of the spleen
NEEDS = {"train": ("scan", "label"), "val": ("scan", "label"), "test": ("scan",), "labels": ("label",)}


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_raw_data_flags(parser, ", or label maps alone")
    parser.add_argument("--out", help="folder that check.csv is written to, with a row for each case")
    parser.add_argument(
        "--speck_voxels",
        type=non_negative_int,
        default=10,
        help="parts of an organ that are apart from its largest part and smaller than this many voxels are "
        "remarked on; 0 = none are",
    )
    return parser


def check_case(case: Case, speck_voxels: int) -> check_cases.Checked:
    """What one case holds and what is wrong with it."""
    checked = check_cases.check_case(
        case.image,
        case.label,
        ORGANS,
        labelled=case.labelled,
        needs=NEEDS[case.part],
        right_and_left=RIGHT_AND_LEFT,
        speck_voxels=speck_voxels,
        is_ct=case.modality == "ct",
    )
    checked.row = {"case": case.name, "part": case.part, "modality": case.modality} | checked.row
    return checked


def check(args: Namespace) -> int:
    """Check every case, print what is found; returns the number of problems.

    Raises:
        FileNotFoundError, ValueError: there is nothing to check, or dataset.json is wrong.
    """
    cases, problems = list_any(args.data_path, args.labelled)
    results, failed = each_case(check_case, cases, args.speck_voxels, workers=args.workers, doing="checking")
    problems += [f"{case.name} ({case.part}): {reason}" for case, reason in failed.items()]
    counts = Counter(f"{case.part} {(case.modality or '').upper()}".strip() for case in results)
    print(f"{', '.join(f'{n} {what}' for what, n in counts.items())} ({AMOS22})")
    checked = {f"{case.name} ({case.part})": result for case, result in results.items()}
    names = {n: f"{name} ({group_of(n)})" for n, name in ORGANS.items()}
    return check_cases.report(checked, problems, names, args.out)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():  # an error that the user can mend is one line
        return 1 if check(args) else 0


if __name__ == "__main__":
    run_script(main)
