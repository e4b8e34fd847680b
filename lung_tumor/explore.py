"""What is in a data set before it is converted: a table and a picture (preprocess.py --explore)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.conversion import failure_reason
from common.files import make_folder
from common.hu import why_not_hu
from common.messages import warn
from common.plots import new_figure, save_figure
from common.tables import write_table


def explore(cases: list, load_case: Callable, out: Path) -> int:
    """Print one line for each case and write explore.csv and explore.png to `out`.

    Args:
        load_case: case -> (scan, mask), as lung_tumor.cases.load_case.

    Returns:
        The exit code: 1 if a case cannot be read, else 0.
    """
    rows, num_failed = [], 0
    edges = np.arange(-1024, 1000, 25)
    histogram = np.zeros(len(edges) - 1, np.int64)  # of the densities inside the tumours
    print(f"{'case':<16}{'shape z y x':>16}{'spacing mm':>18}{'HU':>14}{'tumour mm3':>12}{'slices':>8}")
    for case in cases:
        try:
            scan, mask = load_case(case)
        except (ValueError, OSError) as error:
            print(f"{case.case_id:<16}  cannot be read: {failure_reason(error)}")
            num_failed += 1
            continue
        shape, spacing = scan.array.shape, scan.spacing_mm
        low, high = int(scan.array.min()), int(scan.array.max())
        row = {
            "case": case.case_id,
            **dict(zip(("z", "y", "x"), shape, strict=True)),
            **dict(zip(("z_mm", "y_mm", "x_mm"), (round(s, 3) for s in spacing), strict=True)),
            "orientation": scan.orientation,
            "hu_min": low,
            "hu_max": high,
            "tumour_mm3": round(float(mask.sum()) * scan.voxel_mm3, 1),
            "tumour_slices": int(mask.any(axis=(1, 2)).sum()),
            "tumour_pixel_share": float(mask.mean()),
        }
        rows.append(row)
        histogram += np.histogram(scan.array[mask > 0], edges)[0]
        sizes = " ".join(map(str, shape))
        steps = " ".join(f"{s:.2f}" for s in spacing)
        print(
            f"{case.case_id:<16}{sizes:>16}{steps:>18}{f'{low}..{high}':>14}"
            f"{row['tumour_mm3']:>12.0f}{row['tumour_slices']:>8}"
        )
        if suspicion := why_not_hu(scan.array):
            warn(f"{case.case_id}: {suspicion}")
    if not rows:
        print("no case could be read")
        return 1
    make_folder(out)
    write_table(out / "explore.csv", rows)
    figure, axes = new_figure(1, 3, (12, 3.4))
    axes[0, 0].hist([r["tumour_mm3"] / 1000 for r in rows], bins=20)
    axes[0, 0].set(title="tumour volume", xlabel="mL", ylabel="cases")
    axes[0, 1].plot([r["x_mm"] for r in rows], [r["z_mm"] for r in rows], "o", alpha=0.6)
    axes[0, 1].set(title="spacing", xlabel="in plane (x), mm", ylabel="between slices (z), mm")
    axes[0, 2].stairs(histogram / max(histogram.sum(), 1), edges, fill=True)
    axes[0, 2].set(title="density inside the tumours", xlabel="HU", ylabel="share of voxels")
    save_figure(figure, out / "explore.png")
    total, tumour = sum(r["z"] for r in rows), sum(r["tumour_slices"] for r in rows)
    print(f"{len(rows)} cases, {total} slices, {tumour} with tumour ({100 * tumour / total:.1f} %)")
    print(f"written: {out / 'explore.csv'}, {out / 'explore.png'}")
    return 1 if num_failed else 0
