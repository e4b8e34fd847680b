"""Convert VerSe to HDF5 files, one for each case, from which training reads patches directly.

    python verse_spine/preprocess.py --source data/verse --out data/verse_h5
    python verse_spine/preprocess.py --source data/verse --out data/verse_h5 --spacing 1 1 1 --workers 4

Reads the official layout (rawdata/ and derivatives/, of one edition or of both). Each scan is turned to RAS,
cropped to the body, resampled to --spacing (z y x) and stored as int16 HU with its vertebra numbers,
geometry, centroids and an index of places for patches. A case whose mask and centroid file disagree is set
aside and listed in quarantine.csv. Run it again to go on where it stopped.
"""

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import make_parser, non_negative_int, parse_args, run_script
from common.conversion import (
    convert_cases,
    file_stamp,
    finish_notes,
    finished_entries,
    ordered_entries,
    print_failed,
    write_notes,
)
from common.files import make_folder, read_json
from common.hdf5 import write_case
from common.hu import why_not_hu
from common.metrics import write_table
from common.nifti import voxel_mm3
from common.pairs import load_pair
from common.patches import location_index
from common.volumes import (
    body_box,
    box_of,
    crop_affine,
    resample,
    resample_labels,
    resampled_affine,
    resampled_shape,
)
from verse_spine.cases import Case, find_cases
from verse_spine.heatmap import HU_RANGE
from verse_spine.labels import (
    body_centres,
    centroids_to_mm,
    check_centroids,
    class_names,
    map_labels,
    read_centroids,
)

BODY_HU = -500
BODY_MARGIN_MM = 20.0
HARD_NEGATIVE_HU = 150  # bright voxels outside the vertebrae: ribs, pelvis, metal
INDEX_SEED = 0
Spacing = tuple[float, float, float]  # mm, z y x


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
        type=float,
        nargs=3,
        default=[1.0, 1.0, 1.0],
        metavar=("Z", "Y", "X"),
        help="size of a voxel in mm, z y x; 1 is that of the thesis behind this task, 2 takes an eighth of "
        "the memory and time",
    )
    parser.add_argument(
        "--workers",
        type=non_negative_int,
        default=min(4, os.cpu_count() or 1),
        help="number of processes that convert scans; 0 = the main process does it itself; each may take 2 "
        "GB for a long scan",
    )
    return parser


class Quarantined(ValueError):
    """Mask and centroid file of a case do not belong together."""


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
    if suspicion := why_not_hu(scan.array):
        print(f"warning: {case.name}: {suspicion}")
        notes.append(suspicion)

    # ---- body, spacing ----
    margin = np.ceil(np.divide(BODY_MARGIN_MM, scan.spacing_mm)).astype(int)
    start, stop = body_box(scan.array, BODY_HU, tuple(int(m) for m in margin))
    low, high = box_of(vertebrae > 0)  # tissue around them may be blanked out
    start, stop = np.minimum(start, low), np.maximum(stop, high)
    block = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    image, label = scan.array[block], vertebrae[block]
    shape = resampled_shape(image.shape, scan.spacing_mm, spacing_mm)
    affine = resampled_affine(crop_affine(scan.affine, start), image.shape, shape)
    voxels = np.rint(resample(image, shape, value_range=HU_RANGE)).astype(np.int16)
    numbers = resample_labels(label, shape).astype(np.uint8)

    # ---- what training needs to know without reading volumes ----
    boxes = [
        [number, *(part.start for part in box), *(part.stop for part in box)]
        for number, box in enumerate(ndimage.find_objects(numbers), 1)
        if box is not None
    ]
    attributes = {
        "name": case.name,
        "subject": case.subject,
        "spacing_mm": np.linalg.norm(affine[:3, :3], axis=0)[::-1],  # as whole voxels leave it
        "affine": affine,
        "boxes": np.array(boxes, np.int64).reshape(-1, 7),
        "centroids": np.array([[n, *zyx] for n, zyx in sorted(centres_mm.items())], float).reshape(-1, 4),
        "source_image": case.image.name,
        "source_shape": scan.array.shape,
        "source_spacing_mm": scan.spacing_mm,
        "source_affine": scan.affine,
        "source_orientation": scan.orientation,
        "crop_start": start,
        "crop_stop": stop,
        "hu_range": HU_RANGE,
    }
    index = location_index(numbers, voxels, hard_negative_above=HARD_NEGATIVE_HU, seed=INDEX_SEED)
    used = write_case(out / "cases" / f"{case.name}.h5", voxels, numbers, attributes=attributes, index=index)
    return {
        "name": case.name,
        "subject": case.subject,
        "part": case.part,
        "edition": case.edition,
        "stamp": _stamp(case),
        "settings": {"spacing_mm": list(spacing_mm)},
        "shape": list(shape),
        "vertebrae": [b[0] for b in boxes],
        "vertebra_ml": round(np.count_nonzero(numbers) * voxel_mm3(affine) / 1000, 1),
        "compression": used,
        "notes": "; ".join(notes),
    }


def _centres(case: Case, scan, mask) -> tuple[dict, list[str]]:
    """Centres of the vertebral bodies in mm: from the centroid file if there is one, else from the mask."""
    if case.centroids is None:
        return body_centres(mask.array, mask.affine), ["no centroid file: centres from the mask"]
    centres_mm = centroids_to_mm(read_centroids(case.centroids), scan)
    problems, notes = check_centroids(centres_mm, mask.array, mask.affine)
    if problems:
        raise Quarantined(f"{case.centroids}: does not fit the mask: {'; '.join(problems)}")
    return centres_mm, notes


def _stamp(case: Case) -> list:
    return file_stamp([p for p in (case.image, case.mask, case.centroids) if p is not None])


def _convert_or_quarantine(case: Case, out: Path, spacing_mm: Spacing) -> dict:
    try:
        return convert_case(case, out, spacing_mm)
    except Quarantined as error:
        return {"name": case.name, "quarantined": str(error)}


def convert(args: Namespace) -> dict[str, str]:
    """The whole conversion that the flags ask for; returns {failed case: reason}, quarantined ones included.

    Raises:
        ValueError, OSError: nothing can be converted as asked.
    """
    if min(args.spacing) <= 0:
        raise ValueError(f"--spacing {' '.join(map(str, args.spacing))}: millimetres above zero")
    out, spacing_mm = Path(args.out), tuple(args.spacing)
    cases = find_cases(args.source)
    make_folder(out / "cases")
    about_all = {
        "spacing_mm": list(spacing_mm),
        "hu_range": HU_RANGE,
        "labels": class_names("levels26"),
    }
    stamps = {case.name: _stamp(case) for case in cases}
    settings = {case.name: {"spacing_mm": list(spacing_mm)} for case in cases}
    done = finished_entries(out, stamps, settings)
    todo = [case for case in cases if case.name not in done]
    failed: dict[str, str] = {}
    quarantined: dict[str, str] = {}
    results = convert_cases(_convert_or_quarantine, todo, out, spacing_mm, workers=args.workers)
    for case, entry, reason in tqdm(results, "converting", len(todo), unit="case", disable=None):
        if entry is None:
            failed[case.name] = reason
        elif "quarantined" in entry:
            quarantined[case.name] = entry["quarantined"]
        else:
            done[case.name] = entry
            write_notes(out, done, about_all)
    (out / "quarantine.csv").unlink(missing_ok=True)
    if quarantined:
        rows = [{"case": name, "reason": reason} for name, reason in sorted(quarantined.items())]
        write_table(out / "quarantine.csv", rows)
    print_failed(failed)
    print_failed(quarantined, "set aside, see quarantine.csv")
    columns = ("name", "subject", "part", "edition", "shape", "vertebra_ml", "compression", "notes")
    rows = [{k: e[k] for k in columns} | {"vertebrae": len(e["vertebrae"])} for e in ordered_entries(done)]
    finish_notes(out, done, about_all, rows)
    if done:
        parts = [e["part"] for e in done.values()]
        counts = ", ".join(f"{part or 'without a part'} {parts.count(part)}" for part in dict.fromkeys(parts))
        vertebrae = sum(len(e["vertebrae"]) for e in done.values())
        print(f"{len(done)} cases in {out}: {counts}; {vertebrae} vertebrae")
    return failed | quarantined


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    try:
        if convert(args):
            return 1
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    notes = read_json(Path(args.out) / "preprocessing.json", {"cases": list})
    more = " --dataset_edition 20" if any(e["edition"] == 20 for e in notes["cases"]) else ""
    data = shlex.quote(args.out)
    print(f"next: python verse_spine/train_heatmap.py --data_path {data} --model_name spine_heatmap{more}")
    return 0


if __name__ == "__main__":
    run_script(main)
