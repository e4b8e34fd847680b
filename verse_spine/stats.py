"""What is in a data set: geometry, orientations, vertebrae and densities, as tables and a picture.

    python verse_spine/stats.py --source data/verse --out runs/verse_spine/statistics
    python verse_spine/stats.py --source my_scans --recursive --out runs/my_scans

Takes a folder in VerSe's layout, or any folder of NIfTI files (then without masks). Writes scans.csv with one
row for each scan, labels.csv with one row for each vertebra number, statistics.md with a summary of what is
usual and unusual, and statistics.png. All numbers are z y x of the scan turned to RAS+. Files that cannot be
read are listed at the end; the exit code is then 1.
"""

import math
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import Switch, make_parser, parse_args, run_script
from common.conversion import each_case
from common.faults import ending_in_a_sentence
from common.files import make_folder, printable
from common.flags import add_workers_flag
from common.nifti import NiftiFile, Scan, case_name, is_nifti, load_label, open_nifti, same_grid
from common.splits import natural_key
from common.tables import write_table
from verse_spine.cases import Case, find_cases
from verse_spine.labels import (
    LABEL_NAMES,
    VERTEBRAE,
    check_centroids,
    map_labels,
    mask_centres,
    optional_centroids,
)
from verse_spine.stats_report import HU_EDGES, TOP_TO_BOTTOM, report, save_picture, vertebra_rows

BODY_HU = -500  # what is denser counts as body
BLOCK_VOXELS = 2**25  # that are in memory at once: 64 MiB of int16
SAMPLE_VOXELS = 2**22  # at most so many of a scan's voxels are used for the percentiles of the body
PERCENTILES = {"p0.5": 0.5, "median": 50, "p99.5": 99.5}
SHEAR = 1e-3  # cosine between two axes above which an affine counts as sheared; rounding stays below


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--source",
        default="data/verse",
        help="folder with scans and masks in VerSe's layout, or any folder with NIfTI scans",
    )
    parser.add_argument(
        "--out",
        default="runs/verse_spine/statistics",
        help="folder that the tables and the picture are written to",
    )
    parser.add_argument(
        "--recursive",
        action=Switch,
        default=False,
        help="also look into the subfolders of --source; needed only for folders that are not in VerSe's "
        "layout",
    )
    add_workers_flag(parser)
    return parser


def find_scans(source: str | Path, recursive: bool = False) -> list[Case]:
    """The cases of a VerSe folder, else every NIfTI file of a folder as a case of its own, without a mask.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        ValueError: a VerSe folder that contradicts itself; see `find_cases`.
    """
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; verse_spine/download.py fetches VerSe")
    try:
        return find_cases(source)
    except FileNotFoundError:  # not VerSe's layout
        paths = sorted(p for p in (source.rglob("*") if recursive else source.iterdir()) if is_nifti(p))
    if not paths:
        more = "" if recursive else "; --recursive also looks into subfolders"
        raise FileNotFoundError(f"{source}: neither VerSe (rawdata, derivatives) nor *.nii, *.nii.gz{more}")
    names = [(path.relative_to(source).parent / case_name(path)).as_posix() for path in paths]
    return sorted(map(Case, names, names, paths), key=lambda case: natural_key(case.name))


def obliqueness(affine: np.ndarray) -> tuple[float, bool]:
    """How far a grid is turned against the axes of space.

    Args:
        affine: (4, 4), voxel (x, y, z) of the RAS+ volume to mm.

    Returns:
        The largest angle between an axis of the grid and its axis of space, in degrees; and whether the axes
        of the grid are not at right angles to each other (sheared, as by a tilted gantry).
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # The arc cosine would be shorter, but near 1 it makes 0.03 degrees of the rounding of a float32 header.
    angles = np.arctan2(np.linalg.norm(axes * (1 - np.eye(3)), axis=0), np.diag(axes))
    return float(np.degrees(angles).max()), bool(np.abs(axes.T @ axes - np.eye(3)).max() > SHEAR)


def _percentiles(values: np.ndarray, prefix: str) -> dict[str, float]:
    """{column: percentile}; NaN without any value."""
    if not values.size:
        return {f"{prefix}_{name}": math.nan for name in PERCENTILES}
    return {f"{prefix}_{name}": float(np.percentile(values, p)) for name, p in PERCENTILES.items()}


def _blocks(file: NiftiFile, step: int) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Slabs of the scan as (their slices, voxels); each is a multiple of `step` voxels thick.

    They are cut across the axis that the file stores outermost, so that no byte is read twice.
    """
    axis = next(i for i, codes in enumerate(("SI", "AP", "RL")) if file.orientation[2] in codes)
    plane = math.prod(file.shape) // file.shape[axis]
    thick = -(-max(1, BLOCK_VOXELS // plane) // step) * step
    for first in range(0, file.shape[axis], thick):
        start, stop = [0, 0, 0], list(file.shape)
        start[axis], stop[axis] = first, min(first + thick, file.shape[axis])
        yield tuple(slice(a, b) for a, b in zip(start, stop, strict=True)), file.read_box(start, stop)


def densities(file: NiftiFile, mask: np.ndarray | None) -> tuple[dict, dict[str, np.ndarray]]:
    """Range, percentiles and histograms of a scan, which is read slab by slab.

    Args:
        mask: (z, y, x) with VerSe's numbers on the grid of the file, or None.

    Returns:
        columns: hu_p0.5, hu_median, hu_p99.5 of the voxels above -500 HU (of scans with more than 4 million
            voxels only every second, third, ... voxel along each axis is looked at); hu_min and hu_max of all
            voxels; bone_hu_p0.5 and so on of all voxels of vertebrae. NaN where there is no such voxel.
        shares: {"body", "vertebrae"}: the share of its voxels in each bin of HU_EDGES.
    """
    step = math.ceil((math.prod(file.shape) / SAMPLE_VOXELS) ** (1 / 3))
    body, bone, limits = [], [], []
    for place, block in _blocks(file, step):
        limits += [block.min().item(), block.max().item()]
        sample = block[::step, ::step, ::step]
        body.append(sample[sample > BODY_HU])
        if mask is not None:
            bone.append(block[np.isin(mask[place], VERTEBRAE)])
    samples = {"body": np.concatenate(body), "vertebrae": np.concatenate([*bone, np.empty(0, np.int16)])}
    columns = _percentiles(samples["body"], "hu") | {"hu_min": min(limits), "hu_max": max(limits)}
    columns |= _percentiles(samples["vertebrae"], "bone_hu")
    shares = {
        name: np.histogram(values, HU_EDGES)[0] / max(values.size, 1) for name, values in samples.items()
    }
    return columns, shares


def describe(case: Case, source: Path) -> dict:
    """All numbers of one case.

    Returns:
        row: its row of scans.csv; cells about the mask are empty if it has none.
        volumes_ml: {VerSe's number: volume of the vertebra in mL}.
        shares: as in `densities`.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, or the mask holds other numbers than VerSe's.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        file = open_nifti(case.image)
        mask = None if case.mask is None else load_label(case.mask)
        about_mask, volumes_ml, notes = _describe_mask(case, file, mask)
        on_grid = mask is not None and same_grid(file, mask)
        columns, shares = densities(file, mask.array if on_grid else None)
    notes += [str(w.message).removeprefix(f"{case.image}: ") for w in caught if w.category is UserWarning]
    degrees, sheared = obliqueness(file.affine)
    row = {
        "case": case.name,
        "subject": case.subject,
        "part": case.part,
        "edition": case.edition,
        "file": case.image.relative_to(source).as_posix(),
        "orientation": file.orientation,
        **{f"shape_{axis}": n for axis, n in zip("zyx", file.shape, strict=True)},
        **{f"spacing_{axis}_mm": mm for axis, mm in zip("zyx", file.spacing_mm, strict=True)},
        **{f"fov_{axis}_mm": n * mm for axis, n, mm in zip("zyx", file.shape, file.spacing_mm, strict=True)},
        "oblique_degrees": round(degrees, 2),
        "sheared": "yes" if sheared else "no",
        "dtype": str(file.header.get_data_dtype()),
        **columns,
        **about_mask,
        "notes": "; ".join(dict.fromkeys(notes)),
    }
    return {"row": row, "volumes_ml": volumes_ml, "shares": shares}


def _describe_mask(case: Case, file: NiftiFile, mask: Scan | None) -> tuple[dict, dict, list[str]]:
    """(columns of scans.csv, volumes_ml as in `describe`, notes)."""
    if mask is None:
        names = "vertebrae first_level last_level vertebra_ml mask_on_grid centroid_max_mm"
        return dict.fromkeys(names.split()), {}, []
    try:
        map_labels(mask.array, "binary")
    except ValueError as error:
        raise ValueError(f"{case.mask}: {error}") from error
    counts = np.bincount(mask.array.ravel(), minlength=max(LABEL_NAMES) + 1).tolist()
    volumes_ml = {n: counts[n] * mask.voxel_mm3 / 1000 for n in TOP_TO_BOTTOM if counts[n]}
    levels, notes, farthest_mm = [LABEL_NAMES[n] for n in volumes_ml], [], math.nan
    if case.centroids is not None:
        centres_mm, why_not = optional_centroids(case.centroids, file)
        of_mask = mask_centres(mask.array, mask.affine)
        both = (centres_mm or {}).keys() & of_mask.keys()
        farthest_mm = max((math.dist(centres_mm[n], of_mask[n]) for n in both), default=math.nan)
        notes = [why_not] if why_not else check_centroids(centres_mm, mask.array, mask.affine)[0]
    row = {
        "vertebrae": len(levels),
        "first_level": levels[0] if levels else None,
        "last_level": levels[-1] if levels else None,
        "vertebra_ml": float(sum(volumes_ml.values())),
        "mask_on_grid": "yes" if same_grid(file, mask) else "no",
        "centroid_max_mm": farthest_mm,
    }
    return row, volumes_ml, notes


def statistics(args: Namespace) -> dict[str, str]:
    """Describe every scan and write the files; returns {unreadable file: reason}.

    Raises:
        FileNotFoundError, ValueError: see `find_scans`.
    """
    source, out = Path(args.source), Path(args.out)
    cases = find_scans(source, args.recursive)
    described, unread = each_case(describe, cases, source, workers=args.workers, doing="reading")
    results = list(described.values())
    failed = {
        case.image.relative_to(source).as_posix(): reason.removeprefix(f"{case.image}: ")
        for case, reason in unread.items()
    }
    if results:
        results.sort(key=lambda r: natural_key(r["row"]["case"]))
        make_folder(out)
        write_table(out / "scans.csv", [r["row"] for r in results])
        write_table(out / "labels.csv", vertebra_rows(results))
        save_picture(out / "statistics.png", results)
        (out / "statistics.md").write_text(printable(report(args.source, results, failed)), encoding="utf8")
        vertebrae = sum(len(r["volumes_ml"]) for r in results)
        print(f"{len(results)} scans, {vertebrae} vertebrae; see {out / 'statistics.md'}")
    if failed:
        print(f"{len(failed)} of {len(cases)} scans could not be read:")
        print("\n".join(f"  {name}: {reason}" for name, reason in failed.items()))
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with ending_in_a_sentence():
        return 1 if statistics(args) else 0


if __name__ == "__main__":
    run_script(main)
