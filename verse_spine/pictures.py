"""Slices through the spine with truth, prediction and error, in true proportions."""

from pathlib import Path

import numpy as np

from common.hdf5 import CaseFile
from common.plots import PRED_COLOR, TRUTH_COLOR, outline, overlay, save_panels
from common.volumes import resample
from verse_spine.dataset import spine_box
from verse_spine.labels import map_labels
from verse_spine.networks import TrainedModel
from verse_spine.segment import segment

WINDOW_HU = (-500, 1300)
PLANES = ("axial", "coronal", "sagittal")  # across z, y, x
FALSE_POSITIVE, FALSE_NEGATIVE = (255, 160, 0), (60, 120, 255)  # RGB
LABEL_COLORS = np.array(
    [[230, 30, 30], [30, 160, 230], [60, 190, 60], [240, 180, 20], [170, 80, 220], [240, 120, 170]], np.uint8
)


def middle(mask: np.ndarray) -> tuple[int, int, int]:
    """The voxel through which the three planes go: the median of the mask, or the volume's middle if the mask
    is empty."""
    centre = []
    for axis in range(3):
        below = np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})).cumsum()
        centre.append(int(np.searchsorted(below, below[-1] / 2)) if below[-1] else mask.shape[axis] // 2)
    return tuple(centre)


def plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """The plane `index` across `axis` as it is shown: head up (in axial planes the front up), the patient's
    right on the left."""
    picture = np.take(volume, index, axis)
    # Indices grow upwards, to the front and to the right, but pictures from the upper left corner. In the
    # sagittal plane the front is on the left.
    return picture[::-1, ::-1]


def true_plane(
    volume: np.ndarray, axis: int, index: int, spacing_mm: tuple, voxel_mm: float, labels: bool = False
) -> np.ndarray:
    """As `plane`, but with square pixels of `voxel_mm`; images are interpolated, labels take the nearest.

    Only this plane is resampled: a resampled CT of the whole body would take half a GB.
    """
    picture = plane(volume, axis, index)
    sides_mm = [n * s for n, s in zip(picture.shape, np.delete(spacing_mm, axis), strict=True)]
    shape = [max(1, round(mm / voxel_mm)) for mm in sides_mm]
    if not labels:
        return resample(picture[None], (1, *shape))[0]
    rows, columns = ((np.arange(n) + 0.5) * m // n for n, m in zip(shape, picture.shape, strict=True))
    return picture[np.ix_(rows.astype(int), columns.astype(int))]


def window(image: np.ndarray) -> np.ndarray:
    """HU -> grey uint8."""
    low, high = WINDOW_HU
    return ((np.clip(image, low, high) - low) * (255 / (high - low))).round().astype(np.uint8)


def error_picture(grey: np.ndarray, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The picture `grey` (h, w) in RGB with the errors of `pred` against `target`: blue where a structure is
    missed, orange where one is found that is not there or is another one."""
    rgb = overlay(grey, (pred != target) & (pred > 0), FALSE_POSITIVE, 0.7)
    missed = (pred != target) & (target > 0) & (pred == 0)
    rgb[missed] = (0.3 * rgb[missed] + 0.7 * np.array(FALSE_NEGATIVE)).astype(np.uint8)
    return rgb


def color_overlay(grey: np.ndarray, labels: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """The picture `grey` (h, w) in RGB with each label in one of six colours; those of neighbours differ."""
    rgb = np.repeat(grey[..., None], 3, -1).astype(np.float32)
    inside = labels > 0
    rgb[inside] = (1 - alpha) * rgb[inside] + alpha * LABEL_COLORS[(labels[inside] - 1) % len(LABEL_COLORS)]
    return rgb.round().astype(np.uint8)


def save_planes(
    path: Path,
    image: np.ndarray,
    spacing_mm: tuple,
    pred: np.ndarray,
    target: np.ndarray | None = None,
    voxel_mm: float = 1.0,
    title: str = "",
) -> None:
    """Three planes through the spine: the scan, the prediction, with a target also that and the error.

    Args:
        image: HU, (z, y, x).
        pred, target: labels on the same grid.
        voxel_mm: side of the pictures' pixels.
        title: stands above the first picture, behind the name of the plane.
    """
    centre = middle(pred if target is None or not target.any() else target)
    rows, titles = [], []
    for axis, name in enumerate(PLANES):
        grey = window(true_plane(image, axis, centre[axis], spacing_mm, voxel_mm))
        pred_plane = true_plane(pred, axis, centre[axis], spacing_mm, voxel_mm, labels=True)
        row, names = [grey], [f"{name} {title}" if axis == 0 else name]
        if target is not None:
            target_plane = true_plane(target, axis, centre[axis], spacing_mm, voxel_mm, labels=True)
            row.append(color_overlay(grey, target_plane))
            names.append("truth")
        row.append(color_overlay(grey, pred_plane))
        names.append("prediction")
        if target is not None:
            row.append(error_picture(grey, pred_plane, target_plane))
            names.append("too much (orange), missed (blue)")
        rows.append(row)
        titles.append(names)
    save_panels(path, rows, titles)


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
        picture = np.repeat(window(plane(image, axis, centre[axis]))[..., None], 3, -1)
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
    save_panels(path, rows, titles)
