"""Picture of the worst and the median cases of an evaluation."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.class_metrics import Structures, case_means, only_labelled
from common.hu import why_not_hu
from common.intensity import mr_scaling
from common.mask_files import load_masks
from common.nifti import Scan, load_nifti
from common.nifti_forms import grid_difference
from common.planes import EDGES, ERROR_TITLE, PLANES, contour_pictures
from common.plots import save_panels

CONTOUR_TITLE = "solid: truth, dashed: prediction"


def worst_and_median(rows: Sequence[dict], number: int) -> dict[str, str]:
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
    rows: Sequence[dict],
    preds: Mapping[str, Path],
    targets: Mapping[str, Path],
    images: Mapping[str, Path],
    structures: Structures,
    *,
    labelled: Mapping[str, Collection[int]],
    number: int,
    window_hu: tuple[float, float] | None,
    renumber: Callable[[Scan, bool], np.ndarray] | None = None,
) -> None:
    """Three planes through the worst structure of each chosen case, and the errors in the axial one.

    Contours of the truth are solid, those of the prediction dashed. Writes nothing without any case.

    Args:
        rows: of `score_structures`, with "case".
        preds, targets, images: {case: file}; without its scan a case is drawn on black.
        labelled: {case: labels}; other structures are not drawn.
        number: of the worst cases, and of the median ones.
        window_hu: what is black and what is white in a CT; other scans are shown by their percentiles. None:
            no scan is a CT.
        renumber: as of `load_masks`.

    Raises:
        ValueError: a scan lies on another grid than its mask.
    """
    pictures, titles = [], []
    for case, kind in worst_and_median(rows, number).items():
        of_case = [row for row in rows if row["case"] == case and not np.isnan(row["dice"])]
        worst = min(of_case, key=lambda row: row["dice"])
        target, pred = load_masks(targets[case], preds[case], renumber=renumber)
        value_range = window_hu or (0, 1)
        image = np.full(target.shape, value_range[0])
        if case in images:
            scan = load_nifti(images[case])
            if difference := grid_difference(scan, target):
                raise ValueError(
                    f"{scan.path} lies on another grid than {target.path} ({difference}); --images needs the "
                    "scans themselves"
                )
            image = scan.array
            if window_hu is None or why_not_hu(image):
                value_range = mr_scaling(image)[:2]
        pictures.append(
            contour_pictures(
                image,
                target.spacing_mm,
                only_labelled(pred.array, structures, labelled[case]),
                only_labelled(target.array, structures, labelled[case]),
                worst["class"],
                palette=structures.colors[1:],
                value_range=value_range,
            )
        )
        # In two lines, as a long one would be cut off.
        name = f"{kind}: {case}\n{worst['name']} {worst['dice']:.2f}"
        titles.append([name, f"{PLANES[1]}\n{CONTOUR_TITLE}", PLANES[2], ERROR_TITLE])
    if pictures:
        shown = sorted(set().union(*labelled.values()))
        legend = {structures.names[n]: structures.colors[n] for n in shown}
        save_panels(path, pictures, titles, legend=legend, edges=[(*EDGES, EDGES[0])] * len(pictures))
