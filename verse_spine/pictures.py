"""Pictures of validation cases: slices through the spine, heat maps."""

from pathlib import Path

import numpy as np

from common.hdf5 import CaseFile
from common.planes import EDGES, PLANES, grey_picture, middle, plane, save_planes
from common.plots import PRED_COLOR, TRUTH_COLOR, costs_the_picture, outline, save_panels
from verse_spine.dataset import spine_box
from verse_spine.labels import map_labels
from verse_spine.networks import TrainedModel
from verse_spine.segment import segment

WINDOW_HU = (-500, 1300)
LABEL_COLORS = np.array(
    [[230, 30, 30], [30, 160, 230], [60, 190, 60], [240, 180, 20], [170, 80, 220], [240, 120, 170]], np.uint8
)


@costs_the_picture("the preview of a validation case")
def save_case_preview(folder: Path, epoch: int, model: TrainedModel, case: CaseFile) -> None:
    """Save previews/epoch_NNN.png of one validation case: the middle of its spine, at most two patches high,
    so that a preview takes only a few windows to predict."""
    folder.mkdir(exist_ok=True)
    box = spine_box(case, 20.0) or (np.zeros(3, int), np.array(case.shape))
    centre = (np.asarray(box[0]) + box[1]) // 2
    size = np.multiply(model.config["patch_size"], (2, 1.5, 1.5)).astype(int)
    size = np.minimum(size, case.shape)
    start = np.clip(centre - size // 2, 0, np.subtract(case.shape, size))
    image = case.read_image(start, size)
    target = map_labels(case.read_label(start, size), model.config["labels"])
    pred = segment(model, image, case.spacing_mm)
    save_planes(
        folder / f"epoch_{epoch:03d}.png",
        image,
        case.spacing_mm,
        pred,
        target,
        palette=LABEL_COLORS,
        value_range=WINDOW_HU,
        voxel_mm=min(case.spacing_mm),
        title=f"{case.path.stem}, epoch {epoch}",
    )


def save_heatmap_preview(
    path: Path, image: np.ndarray, target: np.ndarray, heat: np.ndarray, boxes: dict[str, tuple | None]
) -> None:
    """Save three planes of the small grid: the scan with boxes, the target, the heat map.

    Args:
        image: HU, (z, y, x) on the small grid.
        target, heat: values in [0, 1], of the same shape.
        boxes: {"truth": (start, stop) or None, "prediction": ...} in voxels of the small grid.
    """
    import matplotlib

    centre = middle(target > 0.5 * target.max()) if target.any() else middle(heat > 0.5 * heat.max())
    colors = {"truth": TRUTH_COLOR, "prediction": PRED_COLOR}
    heat_colors = matplotlib.colormaps["inferno"]
    rows, titles = [], []
    for axis, name in enumerate(PLANES):
        picture = np.repeat(grey_picture(plane(image, axis, centre[axis]), WINDOW_HU)[..., None], 3, -1)
        for kind, box in boxes.items():
            if box is not None:
                filled = np.zeros(image.shape, bool)
                filled[tuple(slice(int(a), int(b)) for a, b in zip(*box, strict=True))] = True
                picture = outline(picture, plane(filled, axis, centre[axis]), colors[kind])
        maps = [
            (heat_colors(plane(m, axis, centre[axis]))[..., :3] * 255).astype(np.uint8)
            for m in (target, heat)
        ]
        rows.append([picture, *maps])
        titles.append([f"{name}, box of truth (green), prediction (red)", "target", "heat map"])
    save_panels(path, rows, titles, edges=[[letters] * 3 for letters in EDGES])
