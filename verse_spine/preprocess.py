"""Convert VerSe to HDF5 files, one for each case, from which training reads patches directly.

    python verse_spine/preprocess.py --source data/verse --out data/verse_h5
    python verse_spine/preprocess.py --source data/verse --out data/verse_h5 --spacing 1 1 1 --workers 4

Reads the official layout (rawdata/ and derivatives/, of one edition or of both). Each scan is turned to RAS,
cropped to the body, resampled to --spacing (z y x) and stored as int16 HU with its vertebra numbers,
geometry, centroids and an index of places for patches. A case whose mask and centroid file disagree is set
aside and listed in quarantine.csv. Run it again to go on where it stopped.
"""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import make_parser, parse_args, positive_float, run_script
from common.conversion import convert_data_set, finish_notes, print_failed
from common.faults import ending_in_a_sentence
from common.files import read_json
from common.flags import add_workers_flag
from common.hdf5 import write_case
from common.hu import why_not_hu
from common.messages import warn
from common.pairs import load_pair
from common.patches import location_index
from common.scan_files import voxel_mm3
from common.tables import write_table
from common.working_case import Spacing, body_and_labels, grid_attributes, to_working_grid
from verse_spine.cases import Case, find_cases
from verse_spine.heatmap import HU_RANGE
from verse_spine.labels import (
    LABEL_NAMES,
    body_centres,
    check_centroids,
    class_names,
    map_labels,
    optional_centroids,
)
from verse_spine.schemes import why_other_scheme

BODY_HU = -500
BODY_MARGIN_MM = 20.0
HARD_NEGATIVE_HU = 150  # bright voxels outside the vertebrae: ribs, pelvis, metal
INDEX_SEED = 0
MISFIT = "does not fit the mask"  # a case of which this is said of its centroid file is set aside


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--source",
        default="data/verse",
        help="folder with the scans and masks in VerSe's layout: of one edition, or the folder above both",
    )
    parser.add_argument(
        "--out", default="data/verse_h5", help="folder that the converted data set is written to"
    )
    parser.add_argument(
        "--spacing",
        type=positive_float,
        nargs=3,
        default=[1.0, 1.0, 1.0],
        metavar=("Z", "Y", "X"),
        help="size of a voxel in mm, z y x; 1 is that of the thesis behind this task, 2 takes an eighth of "
        "the memory and time",
    )
    add_workers_flag(parser)
    return parser


def convert_case(case: Case, out: Path, spacing_mm: Spacing) -> dict:
    """Write <out>/cases/<name>.h5, voxels of about `spacing_mm`; returns its entry of preprocessing.json."""
    if case.mask is None:
        raise ValueError(f"{case.image}: has no mask (*_seg-vert_msk.nii.gz under derivatives)")
    scan, mask = load_pair(case.image, case.mask)
    try:
        map_labels(mask.array, "binary")
    except ValueError as error:
        raise ValueError(f"{case.mask}: {error}") from error
    vertebrae = np.where(np.isin(mask.array, [26, 27]), 0, mask.array)  # sacrum, coccyx: not annotated
    if not vertebrae.any():
        raise ValueError(f"{case.mask}: holds no vertebra; remove the case or its mask")
    centres_mm, notes = _centres(case, scan, mask)
    scheme = why_other_scheme(vertebrae, mask.affine)
    if scheme:
        scheme = f"{case.mask.name} {scheme}; only --labels binary can be trained and scored with it"
    for suspicion in filter(None, (why_not_hu(scan.array), scheme)):
        warn(f"{case.name}: {suspicion}")
        notes.append(suspicion)

    box = body_and_labels(scan, vertebrae, BODY_HU, BODY_MARGIN_MM)
    working = to_working_grid(scan, vertebrae, box, spacing_mm, HU_RANGE)
    voxels, numbers = working.image, working.labels
    if working.lost:
        lost = ", ".join(LABEL_NAMES[n] for n in working.lost)
        notes.append(f"too small for these voxels, therefore gone: {lost}")

    # ---- what training needs to know without reading volumes ----
    boxes = [
        [number, *(part.start for part in place), *(part.stop for part in place)]
        for number, place in enumerate(ndimage.find_objects(numbers), 1)
        if place is not None
    ]
    attributes = {
        "name": case.name,
        "subject": case.subject,
        **grid_attributes(scan, box, working.affine),
        "boxes": np.array(boxes, np.int64).reshape(-1, 7),
        "centroids": np.array([[n, *zyx] for n, zyx in sorted(centres_mm.items())], float).reshape(-1, 4),
        "hu_range": HU_RANGE,
    }
    index = location_index(numbers, voxels, hard_negative_above=HARD_NEGATIVE_HU, seed=INDEX_SEED)
    used = write_case(out / "cases" / f"{case.name}.h5", voxels, numbers, attributes=attributes, index=index)
    return {
        "name": case.name,
        "subject": case.subject,
        "part": case.part,
        "edition": case.edition,
        "shape": list(numbers.shape),
        "vertebrae": [b[0] for b in boxes],
        "vertebra_ml": round(np.count_nonzero(numbers) * voxel_mm3(working.affine) / 1000, 1),
        "compression": used,
        "other_scheme": scheme,
        "notes": "; ".join(notes),
    }


def _centres(case: Case, scan, mask) -> tuple[dict, list[str]]:
    """Centres of the vertebral bodies in mm: from the centroid file if there is one, else from the mask."""
    why_not = "no centroid file"
    if case.centroids is not None:
        centres_mm, why_not = optional_centroids(case.centroids, scan)
        if why_not:
            warn(f"{case.name}: {why_not}")
    if why_not:
        return body_centres(mask.array, mask.affine), [f"{why_not}: centres from the mask"]
    problems, notes = check_centroids(centres_mm, mask.array, mask.affine)
    if problems:
        raise ValueError(f"{case.centroids}: {MISFIT}: {'; '.join(problems)}")
    return centres_mm, notes


def convert(args: Namespace) -> dict[str, str]:
    """The whole conversion that the flags ask for; returns {failed case: reason}, quarantined ones included.

    Raises:
        ValueError, OSError: nothing can be converted as asked.
    """
    if not all(0 < mm < 1000 for mm in args.spacing):
        raise ValueError(f"--spacing {' '.join(map(str, args.spacing))}: millimetres between 0 and 1000")
    out, spacing_mm = Path(args.out), tuple(args.spacing)
    cases = find_cases(args.source)
    about_all = {"spacing_mm": list(spacing_mm), "hu_range": HU_RANGE, "labels": class_names("levels26")}
    entries, failed = convert_data_set(
        convert_case,
        {case.name: case for case in cases},
        out,
        spacing_mm,
        files={case.name: (case.image, case.mask, case.centroids) for case in cases},
        settings={case.name: {"spacing_mm": list(spacing_mm)} for case in cases},
        about_all=about_all,
        workers=args.workers,
    )
    set_aside = {name: reason for name, reason in failed.items() if MISFIT in reason}
    (out / "quarantine.csv").unlink(missing_ok=True)
    if set_aside:
        rows = [{"case": name, "reason": reason} for name, reason in sorted(set_aside.items())]
        write_table(out / "quarantine.csv", rows)
    print_failed({name: reason for name, reason in failed.items() if name not in set_aside})
    print_failed(set_aside, "set aside, see quarantine.csv")
    columns = ("name", "subject", "part", "edition", "shape", "vertebra_ml", "compression", "notes")
    finish_notes(out, entries, about_all, columns, {"vertebrae": "vertebrae"})
    if entries:
        parts = Counter(entry["part"] or "without a part" for entry in entries)
        counts = ", ".join(f"{part} {n}" for part, n in parts.items())
        vertebrae = sum(len(entry["vertebrae"]) for entry in entries)
        print(f"{len(entries)} cases in {out}: {counts}; {vertebrae} vertebrae")
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with ending_in_a_sentence():
        if convert(args):
            return 1
    notes = read_json(Path(args.out) / "preprocessing.json", {"cases": list})
    more = " --dataset_edition 20" if any(e["edition"] == 20 for e in notes["cases"]) else ""
    data = shlex.quote(args.out)
    print(f"next: python verse_spine/train_heatmap.py --data_path {data} --model_name spine_heatmap{more}")
    return 0


if __name__ == "__main__":
    run_script(main)
