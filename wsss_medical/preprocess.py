"""Cut volumes into slices, each with a label that says only whether it shows what is looked for.

    python wsss_medical/preprocess.py --dataset LASC --source ../shared/data/left_atrium_lge --out data/LASC
    python wsss_medical/preprocess.py --dataset BraTS --source Task01_BrainTumour --modality flair t1gd t2

Writes imageSlice/LASC_001_012_1.npy (patient, slice, label), masks of the same names in maskSlice/ (for
evaluation only, training never reads them), manifest.csv, and slices.json with a suggested split by patient.
Run it again to go on where it stopped.
"""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import distributed
from common.config import (
    Switch,
    make_parser,
    non_negative_int,
    parse_args,
    positive_float,
    positive_int,
    run_script,
)
from common.conversion import convert_data_set, print_failed
from common.files import replacing, write_json
from common.flags import add_workers_flag
from common.label_measures import structure_mask, tell_structure_labels
from common.messages import warn
from common.nifti import load_label
from common.pairs import why_not_a_pair
from common.raw_layouts import READERS, Record, find_layout, list_records
from common.slices import read_scan, to_display, to_pixel_mm
from common.tables import write_table
from wsss_medical.dataset import IMAGES, MASKS, split_lines, split_slices, suggested_split

SCAN_STEP = 1000  # the slices of a patient's second scan are numbered from here on
COLUMNS = ("stem", "patient", "z", "label", "area", "height", "width")  # of manifest.csv
NOTED = {"patient": str, "slice_mm": list, "label_values": list, "slices": list, "files": list}  # of a scan
SETTINGS = ("label_values", "pixel_mm", "step", "skip_empty", "min_pixels", "below_min")


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--dataset",
        required=True,
        help="name of the data set, such as LASC or BraTS; in capitals it begins the name of every slice",
    )
    parser.add_argument("--source", required=True, help="folder with the volumes and their label maps")
    parser.add_argument("--out", help="folder that the slices are written to; default: data/<dataset>")
    parser.add_argument(
        "--layout",
        choices=("auto", *READERS),
        default="auto",
        help="how --source is laid out: decathlon (imagesTr/, labelsTr/), lasc (<patient>/lgemri.nrrd) or "
        "brats (<case>_flair.nii.gz); auto finds out",
    )
    parser.add_argument(
        "--modality",
        nargs="+",
        default=[],
        help="one MR sequence, or three that become the colours of the slices: flair, t1, t1ce, t2, or the "
        "numbers of the channels; default: flair where there is one, else the first channel",
    )
    parser.add_argument(
        "--label_values",
        type=positive_int,
        nargs="+",
        help="numbers in the label maps that count as what is looked for; default: all above 0",
    )
    parser.add_argument(
        "--pixel_mm",
        type=positive_float,
        help="side in mm of the square pixels that slices are resampled to; default: as they are",
    )
    parser.add_argument(
        "--step",
        type=positive_int,
        default=1,
        help="take every n-th slice only; LASC's published split counts every second one",
    )
    empty = "leave out slices that are black all over; published splits count them"
    parser.add_argument("--skip_empty", action=Switch, default=False, help=empty)
    parser.add_argument(
        "--min_pixels",
        type=non_negative_int,
        default=0,
        help="fewest pixels of the structure with which a slice's label is trusted; see --below_min",
    )
    parser.add_argument(
        "--below_min",
        choices=("positive", "negative", "drop"),
        default="drop",
        help="what slices with fewer than --min_pixels are: positive, negative, or left out",
    )
    parser.add_argument(
        "--limit",
        type=positive_int,
        help="number of volumes to convert in a trial; slices of others, of earlier runs, go",
    )
    add_workers_flag(parser)
    return parser


def convert_record(record: Record, out: Path, prefix: str, settings: dict) -> dict:
    """Write the slices of one scan; returns what is noted of it. Runs in a worker process."""
    pixel_mm = settings["pixel_mm"]
    slices, scan = read_scan([place for _, *place in record.images], pixel_mm)
    label = load_label(record.label)
    if reason := why_not_a_pair(scan, label):
        raise ValueError(reason)
    mask, found = structure_mask(label.array, settings["label_values"], record.label)
    shown = mask.any(axis=(1, 2))  # before resampling, in which a few pixels may be lost
    masks = to_pixel_mm(to_display(mask).astype(np.uint8), scan.spacing_mm, pixel_mm, is_mask=True)
    patient, rows = f"{prefix}_{record.patient:03d}", []
    for z in range(0, len(slices), settings["step"]):
        area, positive = int(masks[z].sum()), shown[z]
        if positive and area < settings["min_pixels"]:
            if settings["below_min"] == "drop":
                continue
            positive = settings["below_min"] == "positive"
        if settings["skip_empty"] and not slices[z].any():
            continue
        number = SCAN_STEP * record.scan + z
        stem = f"{patient}_{number:03d}_{int(positive)}"
        for folder, array in ((IMAGES, slices[z]), (MASKS, masks[z])):
            with replacing(out / folder / f"{stem}.npy") as partial:
                np.save(partial, array)
        rows.append([stem, patient, number, int(positive), area, *masks.shape[1:]])
    side_mm = scan.spacing_mm[1:] if pixel_mm is None else (pixel_mm, pixel_mm)
    slice_mm = [round(side, 6) for side in (scan.spacing_mm[0] * settings["step"], *side_mm)]
    files = [f"{folder}/{stem}.npy" for stem, *_ in rows for folder in (IMAGES, MASKS)]
    about = {"name": record.name, "patient": patient, "slice_mm": slice_mm, "label_values": found}
    return about | {"slices": rows, "files": files}


def convert(args: Namespace) -> dict[str, str]:
    """The whole conversion that the flags ask for; returns {failed scan: reason}."""
    source, out = Path(args.source), Path(args.out or f"data/{args.dataset}")
    layout = find_layout(source) if args.layout == "auto" else args.layout
    if out.resolve() == source.resolve():
        raise ValueError(f"--out {out}: holds the scans, which stay as they are; name another folder")
    records = list_records(source, layout, args.modality)[: args.limit]
    channels, prefix = [name for name, *_ in records[0].images], args.dataset.upper()
    if len(channels) not in (1, 3):
        raise ValueError(f"--modality {' '.join(args.modality)}: choose one sequence, or three")
    if not prefix.isalnum():
        raise ValueError(f"--dataset {args.dataset}: letters and digits only, as file names begin with it")
    print(f"{len(records)} labelled scans in the layout {layout}; channels: {', '.join(channels)}")
    settings = {flag: getattr(args, flag) for flag in SETTINGS}
    entries, failed = convert_data_set(
        convert_record,
        {record.name: record for record in records},
        out,
        prefix,
        settings,
        files={r.name: [*dict.fromkeys(path for _, path, _ in r.images), r.label] for r in records},
        settings={r.name: settings | {"channels": channels, "number": [prefix, *r[:2]]} for r in records},
        about_all={},
        workers=args.workers,
        folders=(IMAGES, MASKS),
        noted=NOTED,
    )
    print_failed(failed)
    rows = sorted(row for entry in entries for row in entry["slices"])
    if others := len(list((out / IMAGES).glob("[!.]*.npy"))) - len(rows):
        warn(f"{out / IMAGES}: {others} more file(s), which shift splits by slice numbers")
    if rows:
        found = set().union(*(entry["label_values"] for entry in entries))
        tell_structure_labels(found, args.label_values)
        write_table(out / "manifest.csv", [dict(zip(COLUMNS, row, strict=True)) for row in rows])
        names, positives = [row[0] for row in rows], sum(row[3] for row in rows)
        split = suggested_split(names)
        notes = {"dataset": args.dataset, "channels": channels, "slices": len(rows), "positives": positives}
        notes |= {"channel_numbers": [k for *_, k in records[0].images], "suggested_split": split}
        notes |= {"pixel_mm": args.pixel_mm, "step": args.step, "settings": settings}
        notes["slice_mm"] = {entry["patient"]: entry["slice_mm"] for entry in entries}
        write_json(out / "slices.json", notes)
        print(f"{len(rows)} slices in {out}, {100 * positives / len(rows):.0f} % of them positive")
        print(f"suggested slice_split: {split or 'none, as there are too few patients'}")
        for line in split_lines(split_slices(names, split)) if split else []:
            print(line)
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():  # an error that the user can mend is one line
        if convert(args):
            return 1
    out = shlex.quote(args.out or f"data/{args.dataset}")
    print(f"next: python wsss_medical/dist_train.py --dataset {args.dataset} --data_path {out}")
    return 0


if __name__ == "__main__":
    run_script(main)
