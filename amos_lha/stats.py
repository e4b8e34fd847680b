"""How large, how frequent and how bright each organ is in a data set, measured from its labels.

    python amos_lha/stats.py --data_path data/amos
    python amos_lha/stats.py --data_path ../shared/data/abdomen_ct/label_only --round_trip light

Takes a folder of preprocess.py or a data set in AMOS22's layout, of which the training cases count, or a
folder of label maps alone. Writes statistics.csv with a row for each organ, and statistics.json.
"""

import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import Case, add_flags, list_any, load_case, why_not_organs
from amos_lha.conversion import Spacing, resolve_spacing
from amos_lha.organs import ORGANS, group_of
from common.config import make_parser, parse_args, run_script
from common.conversion import each_case, print_failed
from common.files import make_folder, read_json, write_json
from common.hdf5 import CaseFile
from common.label_measures import measure_labels, round_trip
from common.metrics import write_table
from common.nifti import load_label, voxel_mm3

PERCENTILES = (0.5, 50, 99.5)


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data_path",
        default="data/amos",
        help="folder that preprocess.py wrote, or that holds the data set in AMOS22's layout, or label maps",
    )
    parser.add_argument(
        "--out",
        help="folder that statistics.csv and statistics.json are written to; default: that of preprocess.py, "
        "else runs/amos_lha/statistics",
    )
    parser.add_argument(
        "--small_ml",
        type=float,
        default=75.0,
        help="organs with a median volume below this many mL are called small",
    )
    parser.add_argument(
        "--large_ml",
        type=float,
        default=190.0,
        help="organs with a median volume of this many mL or more are called large",
    )
    parser.add_argument(
        "--round_trip",
        nargs="+",
        metavar="SPACING",
        help="also tell the Dice that is left of each label after it is resampled to this voxel size, and "
        "back; no network trained there can be better. light, fine, native, or millimetres z y x",
    )
    add_flags(parser)
    return parser


class Volume(NamedTuple):
    """What is read of a case: labels and, if there is one, the image, both (z, y, x)."""

    labels: np.ndarray
    image: np.ndarray | None
    affine: np.ndarray
    spacing_mm: Spacing
    modality: str | None
    labelled: tuple[int, ...]


def read_volume(source: Case | CaseFile) -> Volume:
    """Labels and image of a case of a data set, or of a file of preprocess.py."""
    if isinstance(source, CaseFile):
        about, affine = source.attributes, np.array(source.attributes["affine"])
        labelled = tuple(about["labelled"])
        return Volume(
            source.label[...], source.image[...], affine, source.spacing_mm, about["modality"], labelled
        )
    image = None
    if source.image is not None:
        scan, label = load_case(source)
        image = scan.array
    else:
        label = load_label(source.label)
        if reason := why_not_organs(label.array, source.labelled):
            raise ValueError(f"{source.label}: {reason}")
    return Volume(label.array, image, label.affine, label.spacing_mm, source.modality, source.labelled)


def describe(source: Case | CaseFile, working_mm: Spacing | None) -> dict:
    """{"labelled": [organs], "organs": {organ: {"ml", "extent_mm" z y x, "hu", "round_trip"}}} of a case.

    "hu" (of CT) are its PERCENTILES, "round_trip" the Dice that a grid of `working_mm` leaves.
    """
    volume = read_volume(source)
    labels, image = volume.labels, volume.image
    left = round_trip(labels, volume.spacing_mm, working_mm)[1] if working_mm else {}
    organs = {}
    for n, measure in measure_labels(labels).items():
        block = tuple(slice(a, b) for a, b in zip(*measure.box, strict=True))
        mask = labels[block] == n
        organ = {
            "ml": measure.voxels * voxel_mm3(volume.affine) / 1000,
            "extent_mm": list(measure.extent_mm(volume.spacing_mm)),
        }
        if image is not None and volume.modality == "ct":
            organ["hu"] = np.percentile(image[block][mask], PERCENTILES).tolist()
        if n in left:
            organ["round_trip"] = left[n]
        organs[n] = organ
    return {"labelled": list(volume.labelled), "organs": organs}


def size_group(median_ml: float, small_ml: float, large_ml: float) -> str:
    """small, medium or large; "" without any volume."""
    if math.isnan(median_ml):
        return ""
    return "small" if median_ml < small_ml else "large" if median_ml >= large_ml else "medium"


def organ_rows(results: list[dict], small_ml: float, large_ml: float) -> list[dict]:
    """A row for each organ: medians over the cases that have it, NaN where none has."""

    def medians(values: list, length: int) -> list[float]:
        return np.median(values, axis=0).tolist() if values else [math.nan] * length

    rows = []
    for n, name in ORGANS.items():
        found = [result["organs"][n] for result in results if n in result["organs"]]
        labelled = sum(n in result["labelled"] for result in results)
        (median_ml,) = medians([[organ["ml"]] for organ in found], 1)
        row = {
            "organ": n,
            "name": name,
            "present": len(found),
            "labelled": labelled,
            "presence": len(found) / labelled if labelled else math.nan,
            "median_ml": median_ml,
            "min_ml": min((organ["ml"] for organ in found), default=math.nan),
            "max_ml": max((organ["ml"] for organ in found), default=math.nan),
            "default_group": group_of(n),
            "group_by_size": size_group(median_ml, small_ml, large_ml),
        }
        extent_mm = medians([organ["extent_mm"] for organ in found], 3)
        hu = medians([organ["hu"] for organ in found if "hu" in organ], len(PERCENTILES))
        row |= {f"extent_{axis}_mm": mm for axis, mm in zip("zyx", extent_mm, strict=True)}
        row |= {f"hu_p{p:g}": value for p, value in zip(PERCENTILES, hu, strict=True)}
        dice = [organ["round_trip"] for organ in found if "round_trip" in organ]
        row["round_trip_dice"] = float(np.mean(dice)) if dice else math.nan
        rows.append(row)
    return rows


def statistics(args: Namespace) -> dict[str, str]:
    """Measure every labelled case and write the tables; returns {failed case: reason}.

    Raises:
        FileNotFoundError, ValueError: nothing can be measured as asked.
    """
    path, notes = Path(args.data_path), Path(args.data_path) / "preprocessing.json"
    if notes.is_file():
        entries = read_json(notes, {"cases": list})["cases"]
        names = [entry["name"] for entry in entries if entry["part"] == "train"]
        sources = [CaseFile(path / "cases" / f"{name}.h5") for name in names]
        out = Path(args.out or path)
    else:
        cases, _ = list_any(path, args.labelled)
        sources = [case for case in cases if case.part in ("train", "labels") and case.label is not None]
        names = [case.name for case in sources]
        out = Path(args.out or "runs/amos_lha/statistics")
    if not sources:
        raise ValueError(f"--data_path {path}: no training case with a label")
    working_mm = resolve_spacing(args.round_trip) if args.round_trip else None
    results, unread = each_case(describe, sources, working_mm, workers=args.workers, doing="measuring")
    failed = {names[sources.index(source)]: reason for source, reason in unread.items()}
    print_failed(failed, "could not be measured")
    if not results:
        return failed
    rows = organ_rows(list(results.values()), args.small_ml, args.large_ml)
    make_folder(out)
    write_table(out / "statistics.csv", rows)
    plain = [{k: None if v != v else v for k, v in row.items()} for row in rows]  # JSON has no NaN
    about = {"data_path": args.data_path, "cases": len(results), "small_ml": args.small_ml}
    write_json(out / "statistics.json", about | {"large_ml": args.large_ml, "organs": plain})
    for row in rows:
        text = f"{row['organ']:2} {row['name']}: {row['present']} of {row['labelled']}"
        if row["present"]:
            extent = " x ".join(f"{row[f'extent_{axis}_mm']:.0f}" for axis in "zyx")
            text += f", median {row['median_ml']:.3g} mL ({row['group_by_size']}), {extent} mm (z y x)"
        if not math.isnan(row["round_trip_dice"]):
            text += f", round trip {row['round_trip_dice']:.3f}"
        print(text)
    print(f"{len(results)} cases; see {out / 'statistics.csv'}")
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    try:
        return 1 if statistics(args) else 0
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run_script(main)
