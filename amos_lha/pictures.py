"""Pictures of organs: preview of a prediction, worst and median cases of an evaluation, views in 3-D."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from amos_lha.organs import COLORS, ORGANS
from amos_lha.scores import only_labelled
from common.class_metrics import case_means
from common.hu import why_not_hu
from common.intensity import Scaling, mr_scaling
from common.nifti import load_label, load_nifti, same_grid
from common.planes import ERROR_TITLE, PLANES, contour_pictures, save_planes
from common.plots import save_panels
from common.views import save_sides, save_turntable

WINDOW_HU = (-160, 240)  # soft tissue: level 40, width 400
FRAMES = 24  # of the turntable
HEIGHT = 800  # of the views in 3-D, in pixels
TURNTABLE_SIZE = (280, 280)  # h, w; 24 frames of a whole abdomen take 30 s of CPU time and 0.3 MB


def shown_range(modality: str, scaling: Scaling) -> tuple[float, float]:
    """Grey values that are black and white in pictures."""
    return WINDOW_HU if modality == "ct" else (scaling.low, scaling.high)


def legend_of(labels: np.ndarray) -> dict[str, tuple]:
    """{name: RGB} of the organs that are in a label map."""
    present = np.flatnonzero(np.bincount(np.unique(labels), minlength=2))
    return {ORGANS[n]: tuple(COLORS[n].tolist()) for n in present.tolist() if n}


def save_preview(
    path: Path,
    image: np.ndarray,
    spacing_mm: Sequence[float],
    pred: np.ndarray,
    value_range: Sequence[float],
    title: str,
) -> None:
    """Three planes through the middle of the organs, without and with their colours, and a legend."""
    save_planes(
        path,
        image,
        spacing_mm,
        pred,
        palette=COLORS[1:],
        value_range=value_range,
        title=title,
        legend=legend_of(pred),
    )


def save_3d(stem: Path, labels: np.ndarray, spacing_mm: Sequence[float]) -> None:
    """Write <stem>_3d.png, the organs from three sides, and <stem>_turntable.gif; nothing without any."""
    if labels.any():
        save_sides(stem.with_name(f"{stem.name}_3d.png"), labels, spacing_mm, colors=COLORS, height=HEIGHT)
        path = stem.with_name(f"{stem.name}_turntable.gif")
        save_turntable(
            path, labels, spacing_mm, colors=COLORS, frames=FRAMES, size=(HEIGHT // 2, HEIGHT // 2)
        )


# ---- worst and median cases ----


def worst_and_median(rows: list[dict], number: int) -> dict[str, str]:
    """{case: "worst" or "median"}: the cases with the lowest mean Dice, then those around the median."""
    means = case_means(rows, "dice")
    ordered = sorted((case for case in means if not np.isnan(means[case])), key=means.get)
    first = max((len(ordered) - number) // 2, 0)
    median = ordered[first : first + number]
    return dict.fromkeys(ordered[:number], "worst") | {
        case: "median" for case in median if case not in ordered[:number]
    }


def save_worst_and_median(
    path: Path,
    rows: list[dict],
    preds: Mapping[str, Path],
    targets: Mapping[str, Path],
    images: Mapping[str, Path],
    *,
    labelled: Mapping[str, list[int]],
    number: int,
) -> None:
    """Three planes through the worst organ of each chosen case, and the errors in the axial one.

    Contours of the truth are solid, those of the prediction dashed.

    Args:
        rows: of `score`, with "case".
        preds, targets, images: {case: file}; without its scan a case is drawn on black.
        labelled: {case: organ numbers}; other organs are not drawn.
        number: of the worst cases, and of the median ones.

    Raises:
        ValueError: a scan lies on another grid than its mask.
    """
    pictures, titles = [], []
    for case, kind in worst_and_median(rows, number).items():
        worst = min(
            (row for row in rows if row["case"] == case and not np.isnan(row["dice"])),
            key=lambda row: row["dice"],
        )
        target = load_label(targets[case])
        truth = only_labelled(target.array, labelled[case])
        pred = only_labelled(load_label(preds[case]).array, labelled[case])
        image, value_range = np.full(truth.shape, WINDOW_HU[0]), WINDOW_HU
        if case in images:
            scan = load_nifti(images[case])
            if not same_grid(scan, target):
                raise ValueError(
                    f"{scan.path} {scan.shape} lies on another grid than {target.path} {target.shape}; "
                    "--images needs the scans themselves"
                )
            image = scan.array
            if why_not_hu(image):
                value_range = shown_range("mr", mr_scaling(image))
        pictures.append(
            contour_pictures(
                image,
                target.spacing_mm,
                pred,
                truth,
                worst["class"],
                palette=COLORS[1:],
                value_range=value_range,
            )
        )
        name = f"{kind}: {case}, {worst['name']} {worst['dice']:.2f}"
        titles.append([name, *PLANES[1:], ERROR_TITLE])
    if pictures:
        organs = {ORGANS[n]: COLORS[n] for n in sorted(set().union(*labelled.values()))}
        save_panels(path, pictures, titles, legend=organs)
