"""Convert AMOS22, or a data set in its layout, to HDF5 files from which training reads patches directly.

    python amos_lha/preprocess.py --data_path ../shared/data/abdomen_ct --out data/amos
    python amos_lha/preprocess.py --data_path data/chaos --out data/chaos_h5 --modality mr --spacing median \\
        --labelled 1 2 3 6

Each scan is turned to RAS, cropped to the body (CT), resampled to --spacing and stored with its labels, its
geometry, and an index of places for patches. A case that cannot be used is named at the end with the reason
and costs the others nothing. Run it again to go on where it stopped.
"""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import AMOS22, Case, add_raw_data_flags, list_data_set
from amos_lha.conversion import PRESETS, convert_case
from common import distributed
from common.config import make_parser, parse_args, run_script
from common.conversion import convert_data_set, finish_notes, print_failed
from common.files import listed
from common.foreign import foreign_hint
from common.messages import warn
from common.pairs import median_spacing
from common.working_case import resolve_spacing

THICK = 2.5  # slices so many times as thick as the voxels wanted are pointed out


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_raw_data_flags(parser)
    parser.add_argument("--out", default="data/amos", help="folder that the converted data set is written to")
    parser.add_argument(
        "--spacing",
        nargs="+",
        default=["light"],
        metavar="SPACING",
        help="size of a voxel: light (2 x 1.5 x 1.5 mm, z y x; for cards up to 6 GB), fine (2 x 1 x 1 mm), "
        "native (2 x 0.69 x 0.69 mm), median (that of the data set along each axis; for MR with thick "
        "slices), or three numbers in mm, z y x",
    )
    parser.add_argument(
        "--modality",
        choices=("ct", "mr", "both"),
        help="which scans to convert: ct (task 1 of AMOS22), mr, or both (task 2); default: ct. Also tells "
        "what the scans are where neither their names nor dataset.json do",
    )
    return parser


def choose_cases(cases: list[Case], modality: str | None) -> list[Case]:
    """The cases to convert, as --modality asks; prints how many there are and what is left out.

    Raises:
        ValueError: no case is left, or it is not known of a case whether it is CT or MR.
    """
    if unknown := [case.name for case in cases if case.modality is None]:
        if modality not in ("ct", "mr"):
            raise ValueError(
                f"neither name nor dataset.json tell whether {listed(unknown)} are CT or MR; give "
                "--modality ct or --modality mr"
            )
        cases = [replace(case, modality=case.modality or modality) for case in cases]
    wanted = ("ct", "mr") if modality == "both" else (modality or "ct",)
    usable = [case for case in cases if case.part != "test" or case.label is not None]
    chosen = [case for case in usable if case.modality in wanted]
    left_out = [case.name for case in usable if case.modality not in wanted]
    counts = Counter(f"{case.part} {case.modality.upper()}" for case in chosen)
    if len(usable) < len(cases):
        counts["test without labels, for predict.py"] = len(cases) - len(usable)
    print(f"found: {', '.join(f'{n} {what}' for what, n in counts.items()) or 'nothing'} ({AMOS22})")
    other = "mr" if "ct" in wanted else "ct"
    if left_out:
        print(f"left out: {len(left_out)} {other.upper()} ({listed(left_out)})", end="; ")
        print("--modality both converts them too")
    if not chosen:
        hint = f"; --modality {other} converts those left out" if left_out else ""
        raise ValueError(f"no labelled {' or '.join(wanted).upper()} case to convert{hint}")
    return chosen


def convert(args: Namespace) -> dict[str, str]:
    """The whole conversion that the flags ask for; returns {failed case: reason}.

    Raises:
        ValueError, OSError: nothing can be converted as asked.
    """
    cases, problems = list_data_set(args.data_path, args.labelled)
    if problems:
        raise ValueError("; ".join(problems))
    if not cases:
        where = f"{args.data_path}: no scan in imagesTr, imagesVa or imagesTs"
        raise ValueError(where + foreign_hint(args.data_path))
    cases = choose_cases(cases, args.modality)
    median_mm = median_spacing([case.image for case in cases if case.image is not None])
    spacing_mm = resolve_spacing(args.spacing, PRESETS, median_mm)
    print("voxels of {:g} x {:g} x {:g} mm (z y x)".format(*spacing_mm), end="; ")
    print("the scans have {:g} x {:g} x {:g} mm in the median".format(*median_mm))
    if median_mm[0] > THICK * spacing_mm[0]:
        print(f"the slices are {median_mm[0]:g} mm thick: --spacing median would save time and memory")
    out, spacing = Path(args.out), {"spacing_mm": list(spacing_mm)}
    settings = {
        case.name: spacing | {"modality": case.modality, "labelled": list(case.labelled)} for case in cases
    }
    entries, failed = convert_data_set(
        convert_case,
        {case.name: case for case in cases},
        out,
        spacing_mm,
        files={case.name: (case.image, case.label) for case in cases},
        settings=settings,
        about_all=spacing,
        workers=args.workers,
    )
    for entry in entries:
        if entry["notes"]:
            warn(f"{entry['name']}: {entry['notes']}")
    print_failed(failed)
    columns = ("name", "part", "modality", "shape", "compression", "notes")
    finish_notes(out, entries, spacing, columns, {"organs": "organ_ml"})
    parts = Counter(f"{entry['part']} {entry['modality'].upper()}" for entry in entries)
    print(f"{len(entries)} cases in {out}: {', '.join(f'{n} {part}' for part, n in parts.items()) or 'none'}")
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():  # an error that the user can mend is one line
        if convert(args):
            return 1
    config = "--config amos_lha/lha_net.yaml"
    print(f"next: python amos_lha/train.py {config} --data_path {shlex.quote(args.out)}")
    return 0


if __name__ == "__main__":
    run_script(main)
