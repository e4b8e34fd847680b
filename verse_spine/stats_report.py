"""The text and the picture of verse_spine/stats.py, from what it found out about each scan."""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from common.label_measures import label_rows
from common.plots import new_figure, save_figure
from verse_spine.labels import LABEL_NAMES, MAX_DISTANCE_MM, VERTEBRAE

AIR_HU = -200  # nearly every CT holds something darker
THICK_MM = 3.0
HU_EDGES = np.arange(-1025, 2026, 25)  # bins of the density picture; -1000 lies inside one
TOP_TO_BOTTOM = sorted(VERTEBRAE, key=lambda label: 19.5 if label == 28 else label)  # T13 below T12


def vertebra_rows(results: list[dict]) -> list[dict]:
    """Rows of labels.csv: all of VerSe's vertebrae from C1 down, how many scans hold each, and its volume."""
    described = [{n: {"ml": ml} for n, ml in result["volumes_ml"].items()} for result in results]
    return label_rows(described, {n: LABEL_NAMES[n] for n in TOP_TO_BOTTOM})


def unusual(result: dict) -> dict[str, bool]:
    """{what is unusual: whether it is so in this scan}; `result` is that of `stats.describe`."""
    row = result["row"]
    farthest_mm = row["centroid_max_mm"] or 0  # None without a mask
    thickest_mm = round(max(row[f"spacing_{a}_mm"] for a in "zyx"), 3)  # headers hold float32: 3.0000001
    return {
        "a thirteenth thoracic vertebra (T13)": 28 in result["volumes_ml"],
        "a sixth lumbar vertebra (L6)": 25 in result["volumes_ml"],
        "sheared affine (gantry tilt)": row["sheared"] == "yes",
        f"voxels longer than {THICK_MM:g} mm": thickest_mm > THICK_MM,
        "longer (z) than twice the width (x)": row["fov_z_mm"] > 2 * row["fov_x_mm"],
        f"nothing below {AIR_HU} HU: not a CT?": row["hu_min"] >= AIR_HU,
        "mask on another grid": row["mask_on_grid"] == "no",
        "mask without a vertebra": row["vertebrae"] == 0,
        f"centroid > {MAX_DISTANCE_MM:g} mm from its mask": farthest_mm > MAX_DISTANCE_MM,
        "notes in scans.csv": bool(row["notes"]),
    }


def _table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a Markdown table and an empty one."""
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in [header, *rows]]
    lines.insert(1, " | ".join(["---"] * len(header)))
    return [*(f"| {line} |" for line in lines), ""]


def _short(value: float) -> str:
    """Three digits, more where the number itself is longer; empty for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def report(source: str | Path, results: list[dict], failed: dict[str, str]) -> str:
    """The text of statistics.md.

    Args:
        results: of `stats.describe`, at least one.
        failed: {file that could not be read: reason}.
    """
    rows = [r["row"] for r in results]
    lines = [f"# Statistics of {source}", "", "Axes are z y x of the scan turned to RAS+.", ""]
    lines += _scans_table(rows)
    lines += _columns_table(rows)
    counts = Counter(r["orientation"] for r in rows).most_common()
    lines += [
        "## Orientations of the files",
        "",
        *_table(["orientation", "scans"], [list(c) for c in counts]),
    ]
    lines += _vertebrae_table(results)
    lines += _unusual_table(results)
    if failed:
        lines += ["## Could not be read", "", *(f"- {name}: {reason}" for name, reason in failed.items())]
    return "\n".join([*lines, "", "![statistics](statistics.png)", ""])


def _scans_table(rows: list[dict]) -> list[str]:
    """How many scans, patients and vertebrae each part of each edition has."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["part"] or "-", row["edition"] or "-"), []).append(row)
    cells = []
    for group, own in [*sorted(groups.items(), key=lambda item: str(item[0])), (("all", ""), rows)]:
        patients = len({row["subject"] for row in own})
        cells.append([*group, len(own), patients, sum(row["vertebrae"] or 0 for row in own)])
    return ["## Scans", "", *_table(["part", "edition", "scans", "patients", "vertebrae"], cells)]


def _columns_table(rows: list[dict]) -> list[str]:
    """Median and range of each column of scans.csv that holds numbers."""
    cells = []
    for column in [c for c in rows[0] if c != "edition"]:
        values = [row[column] for row in rows if isinstance(row[column], int | float)]
        values = [value for value in values if not math.isnan(value)]
        if values:
            spread = (np.median(values), min(values), max(values))
            cells.append([column, *map(_short, spread), len(values)])
    note = "fov: field of view; hu: of voxels above -500 HU; bone_hu: of voxels inside the mask."
    header = ["column of scans.csv", "median", "lowest", "highest", "scans"]
    return ["## Geometry and density", "", note, "", *_table(header, cells)]


def _vertebrae_table(results: list[dict]) -> list[str]:
    """Volume of each vertebra; nothing if no scan holds one."""
    cells = [
        [row["name"], row["scans"], _short(row["mean_ml"]), _short(row["sd_ml"])]
        for row in vertebra_rows(results)
        if row["scans"]
    ]
    if not cells:
        return []
    note = "Volumes include vertebrae that the scan cuts."
    return ["## Vertebrae", "", note, "", *_table(["level", "scans", "mean mL", "sd mL"], cells)]


def _unusual_table(results: list[dict]) -> list[str]:
    """In how many scans, and in which, each unusual thing was found."""
    cells = []
    for what in unusual(results[0]):
        names = [r["row"]["case"] for r in results if unusual(r)[what]]
        cells.append([what, len(names), ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")])
    return ["## Unusual", "", *_table(["what", "scans", "which"], cells)]


def save_picture(path: Path, results: list[dict]) -> None:
    """statistics.png; without a vertebra the two panels about vertebrae are left out."""
    rows, labels = [r["row"] for r in results], vertebra_rows(results)
    some_vertebra = any(row["scans"] for row in labels)
    columns = 3 if some_vertebra else 2
    figure, axes = new_figure(2, columns, (5 * columns, 7.5))
    panels = list(axes.flat)
    _spacing_panel(panels[0], rows)
    _field_of_view_panel(panels[1], rows)
    orientations = Counter(row["orientation"] for row in rows)
    _bars(panels[2], dict(orientations.most_common()), "orientation of the files")
    _density_panel(panels[3], results)
    if some_vertebra:
        _bars(panels[4], {row["name"]: row["scans"] for row in labels}, "vertebrae")
        _volume_panel(panels[5], labels)
    save_figure(figure, path)


def _spacing_panel(axis, rows: list[dict]) -> None:
    x, z = ([row[f"spacing_{name}_mm"] for row in rows] for name in "xz")
    limits = (0, 1.1 * max(x + z))
    axis.axline((0, 0), slope=1, color="0.7")
    axis.scatter(x, z, alpha=0.5)
    axis.set(xlim=limits, ylim=limits, xlabel="x (left-right), mm", ylabel="z (head-feet), mm")
    axis.set_title("voxel size")


def _field_of_view_panel(axis, rows: list[dict]) -> None:
    axis.hist([row["fov_z_mm"] for row in rows], bins=min(30, max(5, len(rows) // 3)), edgecolor="white")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set(title="field of view", xlabel="z (head-feet), mm", ylabel="scans")


def _density_panel(axis, results: list[dict]) -> None:
    for kind in ("body", "vertebrae"):
        shares = [r["shares"][kind] for r in results if r["shares"][kind].any()]
        if shares:  # every scan weighs the same, whatever its size
            axis.stairs(np.mean(shares, axis=0), HU_EDGES, label=kind, fill=True, alpha=0.5)
            axis.legend()
    axis.set(title="density", xlabel="HU", ylabel="share of voxels")


def _volume_panel(axis, labels: list[dict]) -> None:
    names = [row["name"] for row in labels]
    deviations = np.nan_to_num([row["sd_ml"] for row in labels])
    axis.errorbar(names, [row["mean_ml"] for row in labels], deviations, fmt="o", capsize=2)
    axis.tick_params(axis="x", rotation=90, labelsize=8)
    axis.set(title="volume, mean and sd", ylabel="mL", ylim=(0, None), xlim=(-0.6, len(names) - 0.4))


def _bars(axis, counts: dict[str, int], title: str) -> None:
    bars = axis.bar(list(counts), list(counts.values()))
    axis.bar_label(bars, [n or "" for n in counts.values()], fontsize=7)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.02, y=0.1)
    axis.set(title=title, ylabel="scans")
    if len(counts) > 10:
        axis.tick_params(axis="x", rotation=90, labelsize=8)
