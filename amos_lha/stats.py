"""How large, how frequent and how bright each organ is in a data set, measured from its labels.

    python amos_lha/stats.py --data_path ../shared/data/abdomen_ct --out data/amos
    python amos_lha/stats.py --data_path ../shared/data/abdomen_ct/label_only --round_trip light

Of a data set in AMOS22's layout the training cases count; a folder of label maps alone will do, too. Writes
statistics.csv with a row for each organ: volume, sides of its box (z y x), percentiles of its HU.
"""

import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import Case, add_raw_data_flags, list_any, load_case
from amos_lha.conversion import PRESETS
from amos_lha.organs import ORGANS, group_of
from common import distributed
from common.config import make_parser, parse_args, positive_float, run_script
from common.conversion import each_case, print_failed
from common.files import make_folder
from common.label_measures import describe_labels, label_rows, label_text, round_trip
from common.tables import write_table
from common.working_case import Spacing, resolve_spacing


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_raw_data_flags(parser, ", or label maps alone")
    parser.add_argument(
        "--out", default="runs/amos_lha/statistics", help="folder that statistics.csv is written to"
    )
    parser.add_argument(
        "--sizes_ml",
        type=positive_float,
        nargs=2,
        default=(75.0, 190.0),
        metavar=("MEDIUM", "LARGE"),
        help="median volumes in mL from which on an organ is called medium, and large",
    )
    parser.add_argument(
        "--round_trip",
        nargs="+",
        metavar="SPACING",
        help="also tell the Dice that is left of each label after it is resampled to this voxel size, and "
        "back; no network trained there can be better. light, fine, native, or millimetres z y x",
    )
    return parser


def describe(case: Case, working_mm: Spacing | None) -> dict[int, dict[str, float]]:
    """{organ: its volume, extents, HU percentiles (of CT) and, on a grid of `working_mm`, Dice} of a case."""
    scan, label = load_case(case)
    image = scan.array if scan is not None and case.modality == "ct" else None
    organs = describe_labels(label, image)
    if working_mm:
        for n, dice in round_trip(label.array, label.spacing_mm, working_mm)[1].items():
            organs[n]["round_trip_dice"] = dice
    return organs


def size_group(median_ml: float, medium_ml: float, large_ml: float) -> str:
    """small, medium or large; "" without any volume."""
    if math.isnan(median_ml):
        return ""
    return "small" if median_ml < medium_ml else "large" if median_ml >= large_ml else "medium"


def statistics(args: Namespace) -> dict[str, str]:
    """Measure every labelled case and write the table; returns {failed case: reason}.

    Raises:
        FileNotFoundError, ValueError: nothing can be measured as asked.
    """
    listed, _ = list_any(args.data_path, args.labelled)
    cases = [case for case in listed if case.part in ("train", "labels") and case.label is not None]
    if not cases:
        raise ValueError(f"--data_path {args.data_path}: no training case with a label")
    working_mm = resolve_spacing(args.round_trip, PRESETS) if args.round_trip else None
    results, unread = each_case(describe, cases, working_mm, workers=args.workers, doing="measuring")
    failed = {case.name: reason for case, reason in unread.items()}
    print_failed(failed, "could not be measured")
    if not results:
        return failed
    rows = label_rows(list(results.values()), ORGANS, [case.labelled for case in results])
    for row in rows:
        group = size_group(row["ml"], *args.sizes_ml)
        row |= {"group": group_of(row["label"]), "group_by_size": group}
        round_trip_dice = row.get("round_trip_dice", math.nan)
        round_trip_text = "" if math.isnan(round_trip_dice) else f", round trip {round_trip_dice:.3f}"
        print(label_text(row, f" ({group})") + round_trip_text)
    path = make_folder(args.out) / "statistics.csv"
    write_table(path, rows)
    print(f"{len(results)} cases; see {path}")
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():  # an error that the user can mend is one line
        return 1 if statistics(args) else 0


if __name__ == "__main__":
    run_script(main)
