"""Convert AMOS22, or a data set in its layout, to HDF5 files from which training reads patches directly.

    python amos_lha/preprocess.py --data_path ../shared/data/abdomen_ct --out data/amos
    python amos_lha/preprocess.py --data_path data/chaos --out data/chaos_h5 --modality mr --spacing median \\
        --labelled 1 2 3 6

Each scan is turned to RAS, cropped to the body (CT), resampled to --spacing and stored with its labels, its
geometry, and an index of places for patches. A case that cannot be used is named at the end with the reason
and costs the others nothing. Run it again to go on where it stopped.
"""

import os
import shlex
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import AMOS22, Case, list_data_set, load_pair
from amos_lha.intensity import mr_scaling, stored_range
from amos_lha.organs import ORGANS
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
from common.files import make_folder
from common.hdf5 import write_case
from common.hu import why_not_hu
from common.nifti import Scan, open_nifti
from common.patches import location_index
from common.volumes import (
    Box,
    body_box,
    box_of,
    crop,
    crop_affine,
    resample,
    resample_labels,
    resampled_affine,
    resampled_shape,
)

PRESETS = {"light": (2.0, 1.5, 1.5), "fine": (2.0, 1.0, 1.0), "native": (2.0, 0.69, 0.69)}  # mm, z y x
BODY_HU = -500
BODY_MARGIN_MM = 10.0
MIN_SIDE_MM = 10.0
MR_LEVELS = 200  # an MR scan with fewer grey levels than this is not rounded to whole numbers
SAMPLE = 10_000  # grey values kept of each case for the fingerprint of the training set
SEED = 0
Spacing = tuple[float, float, float]
THICK = 2.5  # slices so many times as thick as wanted are pointed out


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data_path",
        default="data/amos22",
        help="folder that holds the data set in AMOS22's layout (imagesTr, labelsTr, imagesVa, labelsVa)",
    )
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
    parser.add_argument(
        "--labelled",
        type=int,
        nargs="+",
        metavar="ORGAN",
        help="numbers of the organs that are labelled in this data set, e.g. 1 2 3 6; the others count "
        "neither as background nor as errors. Default: 'labelled' of dataset.json, else all organs",
    )
    parser.add_argument(
        "--workers",
        type=non_negative_int,
        default=min(4, os.cpu_count() or 1),
        help="number of processes that convert scans; 0 = the main process does it itself; each may take 2 "
        "GB for a long scan",
    )
    return parser


# ---- one case ----


def working_box(scan: Scan, organs: np.ndarray, modality: str) -> Box:
    """What of a scan is kept: of CT the body with a margin and every labelled voxel, of MR all."""
    if modality == "mr":
        return (0, 0, 0), scan.array.shape
    margin = np.ceil(np.divide(BODY_MARGIN_MM, scan.spacing_mm)).astype(int)
    start, stop = body_box(scan.array, BODY_HU, margin)
    if labels := box_of(organs):
        start, stop = np.minimum(start, labels[0]), np.maximum(stop, labels[1])
    return tuple(map(int, start)), tuple(map(int, stop))


def stored_values(values: np.ndarray, modality: str, value_range: tuple[float, float]) -> np.ndarray:
    """Resampled grey values as they are stored: int16, but float32 for MR that this would make coarser."""
    low, high = value_range
    limits = np.iinfo(np.int16)
    if modality == "mr" and (high - low < MR_LEVELS or low < limits.min or high > limits.max):
        return values.astype(np.float32)
    return np.rint(values).astype(np.int16)


def convert_case(case: Case, out: Path, spacing_mm: Spacing) -> dict:
    """Write <out>/cases/<name>.h5, voxels of about `spacing_mm`; returns its entry of preprocessing.json."""
    scan, label = load_pair(case)
    extent_mm = np.multiply(scan.array.shape, scan.spacing_mm)
    if min(extent_mm) < MIN_SIDE_MM:
        raise ValueError(
            f"{case.image}: only {' x '.join(f'{mm:.0f}' for mm in extent_mm)} mm (z y x); a single slice?"
        )
    modality, labelled, scaling, notes = case.modality, list(case.labelled), None, []
    if modality == "mr":
        scaling = mr_scaling(scan.array)
    elif suspicion := why_not_hu(scan.array):
        notes.append(suspicion)

    # ---- body, spacing ----
    start, stop = working_box(scan, label.array, modality)
    image, organs = crop(scan.array, start, stop), crop(label.array, start, stop)
    shape = resampled_shape(image.shape, scan.spacing_mm, spacing_mm)
    affine = resampled_affine(crop_affine(scan.affine, start), image.shape, shape)
    value_range = stored_range(modality, scaling)
    voxels = stored_values(resample(image, shape, value_range=value_range), modality, value_range)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lost labels: told below, by name
        numbers = resample_labels(organs, shape).astype(np.uint8)

    # ---- what training needs to know without reading volumes ----
    native, working = (np.bincount(a.ravel(), minlength=len(ORGANS) + 1) for a in (organs, numbers))
    if lost := [ORGANS[n] for n in ORGANS if native[n] and not working[n]]:
        notes.append(f"too small for these voxels, therefore gone: {', '.join(lost)}")
    if not native[1:].any():
        notes.append("holds no organ")
    inside = np.flatnonzero(numbers)
    rng = np.random.default_rng(SEED)
    sample = voxels.ravel()[rng.choice(inside, min(SAMPLE, inside.size), replace=False)]
    attributes = {
        "name": case.name,
        "modality": modality,
        "labelled": labelled,
        "spacing_mm": np.linalg.norm(affine[:3, :3], axis=0)[::-1],  # as whole voxels leave it
        "affine": affine,
        "source_image": case.image.name,
        "source_shape": scan.array.shape,
        "source_spacing_mm": scan.spacing_mm,
        "source_affine": scan.affine,
        "source_orientation": scan.orientation,
        "crop_start": start,
        "crop_stop": stop,
        "scaling": None if scaling is None else list(scaling),
        "foreground_sample": sample,
        "voxels": {str(n): int(working[n]) for n in ORGANS if working[n]},
    }
    index = location_index(numbers, boundary_per_class=True, seed=SEED)
    used = write_case(out / "cases" / f"{case.name}.h5", voxels, numbers, attributes=attributes, index=index)
    return {
        "name": case.name,
        "part": case.part,
        "modality": modality,
        "labelled": labelled,
        "shape": list(shape),
        "organ_ml": {str(n): round(native[n] * scan.voxel_mm3 / 1000, 3) for n in ORGANS if native[n]},
        "stamp": _stamp(case),
        "settings": _settings(case, spacing_mm),
        "compression": used,
        "notes": "; ".join(notes),
    }


def _stamp(case: Case) -> list:
    return file_stamp([path for path in (case.image, case.label) if path is not None])


def _settings(case: Case, spacing_mm: Spacing) -> dict:
    """What decides how the case comes out; a case made with other settings is made again."""
    return {"spacing_mm": list(spacing_mm), "modality": case.modality, "labelled": list(case.labelled)}


# ---- the data set ----


def choose_cases(cases: list[Case], modality: str | None) -> list[Case]:
    """The cases to convert, as --modality asks; prints how many there are and what is left out.

    Raises:
        ValueError: no case is left, or it is not known of a case whether it is CT or MR.
    """
    if unknown := [case.name for case in cases if case.modality is None]:
        if modality not in ("ct", "mr"):
            raise ValueError(
                f"neither name nor dataset.json tell whether {_listed(unknown)} are CT or MR; give "
                "--modality ct or --modality mr"
            )
        cases = [replace(case, modality=case.modality or modality) for case in cases]
    wanted = ("ct", "mr") if modality == "both" else (modality or "ct",)
    chosen, left_out = [], []
    counts: Counter[str] = Counter()
    for case in cases:
        if case.part == "test" and case.label is None:
            counts["test without labels, for predict.py"] += 1
        elif case.modality in wanted:
            counts[f"{case.part} {case.modality.upper()}"] += 1
            chosen.append(case)
        else:
            left_out.append(case.name)
    print(f"found: {', '.join(f'{n} {what}' for what, n in counts.items())} ({AMOS22})")
    if left_out:
        other = "MR" if "ct" in wanted else "CT"
        print(f"left out: {len(left_out)} {other} ({_listed(left_out)}); --modality both converts them too")
    if not chosen:
        raise ValueError("no case is left to convert" + ("; give another --modality" if left_out else ""))
    return chosen


def resolve_spacing(words: list[str], cases: list[Case]) -> Spacing:
    """Millimetres z y x that --spacing asks for.

    Raises:
        ValueError: neither a preset nor three numbers above zero.
    """
    if words[0] in PRESETS and len(words) == 1:
        return PRESETS[words[0]]
    if words == ["median"]:
        return median_spacing(cases)
    try:
        z, y, x = (float(word) for word in words)
        if min(z, y, x) > 0:
            return z, y, x
    except ValueError:
        pass
    raise ValueError(
        f"--spacing {' '.join(words)}: expected {', '.join(PRESETS)}, median, or three millimetres above "
        "zero (z y x)"
    )


def median_spacing(cases: list[Case]) -> Spacing:
    """Median over the scans along each axis, in mm, z y x; scans that cannot be read are passed over."""
    spacings = []
    for case in cases:
        try:
            if case.image is not None:
                spacings.append(open_nifti(case.image).spacing_mm)
        except (ValueError, OSError):
            continue  # its conversion fails with the reason
    if not spacings:
        raise ValueError("no scan can be read")
    z, y, x = np.median(spacings, axis=0).round(3).tolist()
    return z, y, x


def convert(args: Namespace) -> dict[str, str]:
    """The whole conversion that the flags ask for; returns {failed case: reason}.

    Raises:
        ValueError, OSError: nothing can be converted as asked.
    """
    cases, problems = list_data_set(args.data_path, args.labelled)
    if problems:
        raise ValueError("; ".join(problems))
    cases = choose_cases(cases, args.modality)
    spacing_mm = resolve_spacing(args.spacing, cases)
    usual_mm = median_spacing(cases)
    print("voxels of {:g} x {:g} x {:g} mm (z y x)".format(*spacing_mm), end="; ")
    print("the scans have {:g} x {:g} x {:g} mm in the median".format(*usual_mm))
    if usual_mm[0] > THICK * spacing_mm[0]:
        print(f"the slices are {usual_mm[0]:g} mm thick: --spacing median would save time and memory")
    out = Path(args.out)
    make_folder(out / "cases")
    about_all = {"spacing_mm": list(spacing_mm), "organs": {str(n): name for n, name in ORGANS.items()}}
    stamps = {case.name: _stamp(case) for case in cases}
    settings = {case.name: _settings(case, spacing_mm) for case in cases}
    done = finished_entries(out, stamps, settings)
    todo = [case for case in cases if case.name not in done]
    failed: dict[str, str] = {}
    results = convert_cases(convert_case, todo, out, spacing_mm, workers=args.workers)
    for case, entry, reason in tqdm(results, "converting", len(todo), unit="case", disable=None):
        if entry is None:
            failed[case.name] = reason
        else:
            done[case.name] = entry
            write_notes(out, done, about_all)
    for entry in ordered_entries(done):
        if entry["notes"]:
            print(f"warning: {entry['name']}: {entry['notes']}")
    print_failed(failed)
    columns = ("name", "part", "modality", "shape", "compression", "notes")
    rows = [
        {k: entry[k] for k in columns} | {"organs": len(entry["organ_ml"])} for entry in ordered_entries(done)
    ]
    finish_notes(out, done, about_all, rows)
    parts = Counter(f"{entry['part']} {entry['modality'].upper()}" for entry in ordered_entries(done))
    print(f"{len(done)} cases in {out}: {', '.join(f'{n} {part}' for part, n in parts.items()) or 'none'}")
    return failed


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    try:
        if convert(args):
            return 1
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    config = "--config amos_lha/lha_net.yaml"
    print(f"next: python amos_lha/train.py {config} --data_path {shlex.quote(args.out)}")
    return 0


if __name__ == "__main__":
    run_script(main)
