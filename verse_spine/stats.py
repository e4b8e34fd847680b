"""What is in a data set: geometry, orientations, vertebrae and densities, as tables and a picture.

    python verse_spine/stats.py --source data/verse --out runs/verse_spine/statistics
    python verse_spine/stats.py --source my_scans --recursive --out runs/my_scans

Takes VerSe's layout, or any folder of NIfTI files, then without masks. Writes scans.csv (a row a scan),
labels.csv (a row a vertebra number), statistics.md (a summary with what is unusual) and statistics.png. All
numbers are z y x of the scan turned to RAS+. Files that cannot be read are listed at the end, exit code 1.
"""

import math
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import Switch, make_parser, non_negative_int, parse_args, run_script
from common.conversion import convert_cases
from common.metrics import write_table
from common.nifti import NiftiFile, Scan, case_name, is_nifti, load_label, open_nifti, same_grid
from common.plots import new_figure, save_figure
from common.splits import natural_key
from verse_spine.cases import Case, find_cases
from verse_spine.labels import (
    LABEL_NAMES,
    MAX_DISTANCE_MM,
    VERTEBRAE,
    centroids_to_mm,
    check_centroids,
    map_labels,
    mask_centres,
    read_centroids,
)

BODY_HU = -500
AIR_HU = -200  # nearly every CT holds something darker
BLOCK_VOXELS = 2**25  # of a scan in memory at once: 64 MiB of int16
SAMPLE_VOXELS = 2**22  # of a scan for the percentiles of the body; all voxels of smaller scans
PERCENTILES = {"p0.5": 0.5, "median": 50, "p99.5": 99.5}
HU_EDGES = np.arange(-1025, 2026, 25)  # of the picture; -1000 lies inside a bin
THICK_MM = 3.0
SHEAR = 1e-3  # cosine between two axes; rounding of headers stays below
TOP_TO_BOTTOM = sorted(VERTEBRAE, key=lambda label: 19.5 if label == 28 else label)  # T13 below T12


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--source", default="data/verse", help="VerSe folder, or a folder of NIfTI files")
    parser.add_argument("--out", default="runs/verse_spine/statistics", help="folder of the tables")
    parser.add_argument("--recursive", action=Switch, default=False, help="sub-folders too (not for VerSe)")
    parser.add_argument("--workers", type=non_negative_int, default=0, help="processes; 0 = this one only")
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
        more = "" if recursive else "; --recursive looks into sub-folders too"
        raise FileNotFoundError(f"{source}: neither VerSe (rawdata, derivatives) nor *.nii, *.nii.gz{more}")
    names = [(path.relative_to(source).parent / case_name(path)).as_posix() for path in paths]
    return sorted(map(Case, names, names, paths), key=lambda case: natural_key(case.name))


def obliqueness(affine: np.ndarray) -> tuple[float, bool]:
    """(largest angle of a voxel axis to its axis of space in degrees, sheared or not); affine as RAS+."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # Not the arc cosine: near 1 it makes 0.03 degrees of the rounding of a float32 header.
    angles = np.arctan2(np.linalg.norm(axes * (1 - np.eye(3)), axis=0), np.diag(axes))
    return float(np.degrees(angles).max()), bool(np.abs(axes.T @ axes - np.eye(3)).max() > SHEAR)


def _percentiles(values: np.ndarray, prefix: str) -> dict[str, float]:
    found = np.percentile(values, list(PERCENTILES.values())) if values.size else [math.nan] * 3
    return {f"{prefix}_{name}": float(v) for name, v in zip(PERCENTILES, found, strict=True)}


def _blocks(file: NiftiFile, step: int) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """(place, voxels) of slabs across the file's slowest axis, each a multiple of `step` voxels thick."""
    axis = next(i for i, codes in enumerate(("SI", "AP", "RL")) if file.orientation[2] in codes)
    plane = math.prod(file.shape) // file.shape[axis]
    thick = -(-max(1, BLOCK_VOXELS // plane) // step) * step
    for first in range(0, file.shape[axis], thick):
        start, stop = [0, 0, 0], list(file.shape)
        start[axis], stop[axis] = first, min(first + thick, file.shape[axis])
        yield tuple(slice(a, b) for a, b in zip(start, stop, strict=True)), file.read_box(start, stop)


def densities(file: NiftiFile, mask: np.ndarray | None) -> tuple[dict, dict[str, np.ndarray]]:
    """Range and percentiles of a scan, read slab by slab, and where in HU_EDGES its voxels lie (shares).

    hu_p0.5, hu_median and hu_p99.5 are of the voxels above -500 HU (of every s-th voxel an axis where the
    scan has more than 4 million), hu_min and hu_max of all, bone_hu_... of all voxels of vertebrae; NaN where
    there are none. `mask` is (z, y, x) with VerSe's numbers on the grid of the file.
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
    shares = {k: np.histogram(v, HU_EDGES)[0] / max(v.size, 1) for k, v in samples.items()}
    return columns, shares


def describe(case: Case, source: Path) -> dict:
    """All numbers of one case: its `row` of scans.csv (cells about the mask are empty without one),
    `volumes_ml` of its vertebrae {VerSe's number: mL}, and `shares` as `densities`.

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
        centres_mm = centroids_to_mm(read_centroids(case.centroids), file)
        of_mask = mask_centres(mask.array, mask.affine)
        both = centres_mm.keys() & of_mask.keys()
        farthest_mm = max((math.dist(centres_mm[n], of_mask[n]) for n in both), default=math.nan)
        notes = check_centroids(centres_mm, mask.array, mask.affine)[0]
    row = {
        "vertebrae": len(levels),
        "first_level": levels[0] if levels else None,
        "last_level": levels[-1] if levels else None,
        "vertebra_ml": float(sum(volumes_ml.values())),
        "mask_on_grid": "yes" if same_grid(file, mask) else "no",
        "centroid_max_mm": farthest_mm,
    }
    return row, volumes_ml, notes


def label_rows(results: list[dict]) -> list[dict]:
    """Rows of labels.csv, C1 first: all of VerSe's vertebrae, sd (sample) and mean empty without a scan."""
    rows = []
    for label in TOP_TO_BOTTOM:
        ml = [r["volumes_ml"][label] for r in results if label in r["volumes_ml"]]
        mean, sd = (np.mean(ml) if ml else math.nan), (np.std(ml, ddof=1) if len(ml) > 1 else math.nan)
        names = {"label": label, "name": LABEL_NAMES[label], "scans": len(ml)}
        rows.append({**names, "mean_ml": float(mean), "sd_ml": float(sd)})
    return rows


def unusual(result: dict) -> dict[str, bool]:
    """{what: whether the case of `describe` is so}."""
    row, farthest_mm = result["row"], result["row"]["centroid_max_mm"] or 0
    thickest_mm = round(max(row[f"spacing_{a}_mm"] for a in "zyx"), 3)  # headers hold float32: 3.0000001
    return {
        "a thirteenth thoracic vertebra (T13)": 28 in result["volumes_ml"],
        "a sixth lumbar vertebra (L6)": 25 in result["volumes_ml"],
        "sheared affine (gantry tilt)": row["sheared"] == "yes",
        f"voxels longer than {THICK_MM:g} mm": thickest_mm > THICK_MM,
        "longer (z) than twice the width (x)": row["fov_z_mm"] > 2 * row["fov_x_mm"],
        f"nothing below {AIR_HU} HU: no CT?": row["hu_min"] >= AIR_HU,
        "mask on another grid": row["mask_on_grid"] == "no",
        "mask without a vertebra": row["vertebrae"] == 0,
        f"centroid > {MAX_DISTANCE_MM:g} mm from its mask": farthest_mm > MAX_DISTANCE_MM,
        "notes in scans.csv": bool(row["notes"]),
    }


def _table(header: list[str], rows: list[list]) -> list[str]:
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in [header, *rows]]
    lines.insert(1, " | ".join(["---"] * len(header)))
    return [*(f"| {line} |" for line in lines), ""]


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def report(source: str | Path, results: list[dict], failed: dict[str, str]) -> str:
    """The text of statistics.md."""
    rows = [r["row"] for r in results]
    lines = [f"# Statistics of {source}", "", "Axes are z y x of the scan turned to RAS+.", ""]
    groups, cells = [(r["part"] or "-", r["edition"] or "-") for r in rows], []
    for group in [*sorted(set(groups), key=str), ("all", "")]:
        of = [r for r, own in zip(rows, groups, strict=True) if group in (own, ("all", ""))]
        patients, vertebrae = len({r["subject"] for r in of}), sum(r["vertebrae"] or 0 for r in of)
        cells.append([*group, len(of), patients, vertebrae])
    lines += ["## Scans", "", *_table(["part", "edition", "scans", "patients", "vertebrae"], cells)]
    cells = []
    for column in [c for c in rows[0] if c != "edition"]:
        values = [v for r in rows if isinstance(v := r[column], int | float) and not math.isnan(v)]
        if values:
            spread = (np.median(values), min(values), max(values))
            cells.append([column, *map(_short, spread), len(values)])
    lines += ["## Geometry and density", ""]
    lines += ["fov: field of view; hu: of voxels above -500 HU; bone_hu: of voxels inside the mask.", ""]
    lines += _table(["column of scans.csv", "median", "lowest", "highest", "scans"], cells)

    cells = [[code, number] for code, number in Counter(r["orientation"] for r in rows).most_common()]
    lines += ["## Orientations of the files", "", *_table(["orientation", "scans"], cells)]
    seen = [r for r in label_rows(results) if r["scans"]]
    cells = [[r["name"], r["scans"], _short(r["mean_ml"]), _short(r["sd_ml"])] for r in seen]
    if cells:
        lines += ["## Vertebrae", "", "Volumes include vertebrae that the scan cuts.", ""]
        lines += _table(["level", "scans", "mean mL", "sd mL"], cells)
    cells = []
    for what in unusual(results[0]):
        names = [r["row"]["case"] for r in results if unusual(r)[what]]
        cells.append([what, len(names), ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")])
    lines += ["## Unusual", "", *_table(["what", "scans", "which"], cells)]
    lines += ["## Could not be read", ""] if failed else []
    lines += [f"- {name}: {reason}" for name, reason in failed.items()]
    return "\n".join([*lines, "", "![statistics](statistics.png)", ""])


def save_picture(path: Path, results: list[dict]) -> None:
    """statistics.png; without a vertebra the two panels about vertebrae are left out."""
    rows, labels = [r["row"] for r in results], label_rows(results)
    seen = any(r["scans"] for r in labels)
    figure, axes = new_figure(2, 3 if seen else 2, (15 if seen else 10, 7.5))
    places = iter(axes.flat)
    axis, x, z = next(places), *([r[f"spacing_{a}_mm"] for r in rows] for a in "xz")
    limits = (0, 1.1 * max(x + z))
    axis.axline((0, 0), slope=1, color="0.7")
    axis.scatter(x, z, alpha=0.5)
    axis.set(xlim=limits, ylim=limits, xlabel="x (left-right), mm", ylabel="z (head-feet), mm")
    axis.set_title("voxel size")
    axis = next(places)
    axis.hist([r["fov_z_mm"] for r in rows], bins=min(30, max(5, len(rows) // 3)), edgecolor="white")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set(title="field of view", xlabel="z (head-feet), mm", ylabel="scans")
    orientations = Counter(r["orientation"] for r in rows)
    _bars(next(places), dict(orientations.most_common()), "orientation of the files")
    axis = next(places)
    for key in ("body", "vertebrae"):
        shares = [r["shares"][key] for r in results if r["shares"][key].any()]
        if shares:  # every scan weighs the same, whatever its size
            axis.stairs(np.mean(shares, axis=0), HU_EDGES, label=key, fill=True, alpha=0.5)
            axis.legend()
    axis.set(title="density", xlabel="HU", ylabel="share of voxels")
    if seen:
        _bars(next(places), {r["name"]: r["scans"] for r in labels}, "vertebrae")
        axis, names = next(places), [r["name"] for r in labels]
        error = np.nan_to_num([r["sd_ml"] for r in labels])
        axis.errorbar(names, [r["mean_ml"] for r in labels], error, fmt="o", capsize=2)
        axis.tick_params(axis="x", rotation=90, labelsize=8)
        axis.set(title="volume, mean and sd", ylabel="mL", ylim=(0, None), xlim=(-0.6, len(names) - 0.4))
    save_figure(figure, path)


def _bars(axis, counts: dict[str, int], title: str) -> None:
    bars = axis.bar(list(counts), list(counts.values()))
    axis.bar_label(bars, [n or "" for n in counts.values()], fontsize=7)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.02, y=0.1)
    axis.set(title=title, ylabel="scans")
    if len(counts) > 10:
        axis.tick_params(axis="x", rotation=90, labelsize=8)


def statistics(args: Namespace) -> dict[str, str]:
    """Describe every scan, write the files; returns {unreadable file: reason}. Raises as `find_scans`."""
    source, out = Path(args.source), Path(args.out)
    cases = find_scans(source, args.recursive)
    results, failed = [], {}
    described = convert_cases(describe, cases, source, workers=args.workers)
    for case, result, reason in tqdm(described, "reading", len(cases), unit="scan", disable=None):
        if result is None:
            failed[case.image.relative_to(source).as_posix()] = reason.removeprefix(f"{case.image}: ")
        else:
            results.append(result)
    if results:
        results.sort(key=lambda r: natural_key(r["row"]["case"]))
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / "scans.csv", [r["row"] for r in results])
        write_table(out / "labels.csv", label_rows(results))
        save_picture(out / "statistics.png", results)
        (out / "statistics.md").write_text(report(args.source, results, failed), encoding="utf8")
        vertebrae = sum(len(r["volumes_ml"]) for r in results)
        print(f"{len(results)} scans, {vertebrae} vertebrae; see {out / 'statistics.md'}")
    if failed:
        print(f"{len(failed)} of {len(cases)} scans could not be read:")
        print("\n".join(f"  {name}: {reason}" for name, reason in failed.items()))
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    try:
        return 1 if statistics(args) else 0
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run_script(main)
