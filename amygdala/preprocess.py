"""Convert T1 scans and their labels to HDF5 files from which training reads patches directly.

    python amygdala/preprocess.py --dataset Amygdala --source ../shared/data/brain_t1_manual
    python amygdala/preprocess.py --dataset Hippocampus --source ../shared/data/hippocampus_mr

Reads imagesTr, labelsTr and, for the test, imagesTs and labelsTs: NIfTI or FreeSurfer's .mgz, in any
orientation. Each scan is turned to RAS, resampled to 1 mm where it has other voxels, and stored whole, with
the labels 1 and 2. A case that cannot be used is named at the end with the reason and costs the others
nothing. Run it again to go on where it stopped.
"""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amygdala.cases import Case, list_data_set, load_case
from amygdala.labels import add_label_map_flag, parse_label_map
from amygdala.structures import DATASETS, NUM_CLASSES, add_dataset_flag
from common import distributed
from common.config import make_parser, parse_args, run_script
from common.conversion import convert_data_set, finish_notes, print_failed
from common.files import file_sha1, make_folder, replacing
from common.flags import add_workers_flag
from common.hdf5 import write_case
from common.label_measures import label_counts
from common.messages import warn
from common.pairs import content_hash, refuse_copies
from common.working_case import grid_attributes, to_working_grid

SPACING_MM = (1.0, 1.0, 1.0)


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_dataset_flag(parser)
    parser.add_argument(
        "--source",
        required=True,
        help="folder that holds imagesTr and labelsTr and, if there are any, imagesTs and labelsTs",
    )
    parser.add_argument(
        "--out",
        help="folder that the converted data set is written to; default: dataset/ and the name of --dataset",
    )
    add_label_map_flag(parser, "the label files")
    parser.add_argument(
        "--subjects",
        metavar="TABLE",
        help="CSV file with the columns name, subject and site: scans of one subject are kept together, and "
        "sites are spread over the folds; default: participants.tsv in --source, else each scan is a subject",
    )
    add_workers_flag(parser)
    return parser


def convert_case(case: Case, out: Path, dataset: str, label_map: str | dict[int, int]) -> dict:
    """Write <out>/cases/<name>.h5; returns its entry of preprocessing.json."""
    data_set = DATASETS[dataset]
    scan, labels, notes = load_case(case, data_set, label_map)
    whole = (0, 0, 0), scan.array.shape
    value_range = float(scan.array.min()), float(scan.array.max())
    if value_range[0] == value_range[1]:
        raise ValueError(f"{case.image}: shows nothing, all its voxels have the value {value_range[0]:g}")
    working = to_working_grid(scan, labels, whole, SPACING_MM, value_range)
    counts = label_counts(working.labels, NUM_CLASSES)
    if working.lost:
        lost = ", ".join(data_set.structures.names[n] for n in working.lost)
        notes.append(f"too small for voxels of 1 mm, therefore gone: {lost}")
    if not counts[1:].any():
        raise ValueError(f"{case.label}: too small for voxels of 1 mm, nothing is left of it")
    whose = {"name": case.name, "subject": case.subject, "site": case.site}
    attributes = whose | {
        **grid_attributes(scan, whole, working.affine),
        "voxels": {str(n): int(counts[n]) for n in data_set.structures.names},
        "centre": np.argwhere(working.labels).mean(0),
    }
    write_case(out / "cases" / f"{case.name}.h5", working.image, working.labels, attributes=attributes)
    native = label_counts(labels, NUM_CLASSES) * scan.voxel_mm3
    return whose | {
        "part": case.part,
        "shape": list(working.image.shape),
        "volume_mm3": {str(n): round(float(native[n]), 1) for n in data_set.structures.names},
        "content": content_hash(scan.array),
        "sha1": {"image": file_sha1(case.image), "label": file_sha1(case.label)},
        "notes": "; ".join(notes),
    }


def write_list(out: Path, dataset: str, entries: Sequence[Mapping]) -> None:
    """<out>/list/dataset.yaml: for the reader, whose scan each case is, and what it was made from."""
    keys = ("name", "part", "subject", "site", "volume_mm3", "sha1")
    cases = [{key: entry[key] for key in keys} | {"spacing_mm": list(SPACING_MM)} for entry in entries]
    with replacing(make_folder(out / "list") / "dataset.yaml") as partial:
        partial.write_text(yaml.safe_dump({"dataset": dataset, "cases": cases}, sort_keys=False), "utf8")


def convert(args: Namespace, out: Path) -> dict[str, str]:
    """The whole conversion that the flags ask for; returns {failed case: reason}.

    Raises:
        ValueError, OSError: nothing can be converted as asked.
    """
    label_map = parse_label_map(args.label_map, DATASETS[args.dataset])
    cases, warnings, refused = list_data_set(args.source, args.subjects)
    for_prediction = [case.name for case in cases if case.part == "test" and case.label is None]
    cases = [case for case in cases if case.name not in for_prediction]
    about_all = {"spacing_mm": list(SPACING_MM), "dataset": args.dataset}
    entries, failed = convert_data_set(
        convert_case,
        {case.name: case for case in cases},
        out,
        args.dataset,
        label_map,
        files={case.name: (case.image, case.label) for case in cases},
        settings={
            case.name: about_all
            | {"label_map": args.label_map, "subject": case.subject, "site": case.site, "part": case.part}
            for case in cases
        },
        about_all=about_all,
        workers=args.workers,
    )
    copies = refuse_copies(entries)
    failed = refused | failed | copies
    entries = [entry for entry in entries if entry["name"] not in copies]
    if for_prediction:
        warnings.append(f"{len(for_prediction)} test scan(s) have no labels; they are for predict.py only")
    warnings += [f"{entry['name']}: {entry['notes']}" for entry in entries if entry["notes"]]
    for warning in warnings:
        warn(warning)
    print_failed(failed)
    finish_notes(out, entries, about_all, ("name", "part", "subject", "site", "shape", "notes"), {})
    write_list(out, args.dataset, entries)
    print_summary(entries, out, DATASETS[args.dataset].structures.names)
    return failed


def print_summary(entries: Sequence[dict], out: Path, names: Mapping[int, str]) -> None:
    """How many cases there are, whose, and how large the structures are."""
    parts = ", ".join(f"{n} {part}" for part, n in Counter(entry["part"] for entry in entries).items())
    subjects, sites = ({entry[key] for entry in entries} for key in ("subject", "site"))
    print(f"{len(entries)} cases in {out}: {parts or 'none'}", end="; ")
    print(f"{len(subjects)} subject(s), {len(sites)} site(s)")
    for label, name in names.items():
        volumes = [entry["volume_mm3"][str(label)] for entry in entries]
        if volumes:
            mean, low, high = np.mean(volumes), min(volumes), max(volumes)
            print(f"  {name}: {mean:.0f} mm3 in the mean, {low:.0f} to {high:.0f}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    out = Path(args.out or Path("dataset") / args.dataset)
    with distributed.session():  # an error that the user can mend is one line
        if convert(args, out):
            return 1
    print(f"next: python amygdala/train.py --dataset {args.dataset} --data_path {shlex.quote(str(out))}")
    return 0


if __name__ == "__main__":
    run_script(main)
