"""A trained network applied to a whole scan: organ numbers on the scan's own grid, and their clean-up."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from amos_lha.organs import NUM_CLASSES, SIDES
from common.checkpoints import TrainedModel
from common.inference import predict_labels
from common.intensity import Scaling, scale, stored_range
from common.volumes import Box

AIR_BELOW_HU = -500  # windows of a CT without a brighter voxel hold no body
FLIPS = ((), (0,), (1,), (2,))  # of --tta: as it is, upside down, back to front, left to right
COMPACT = (1, 2, 3, 4, 6, 11, 12, 14, 15)  # organs of which only the largest component stays
HOLLOW = (7, 13)  # stomach and duodenum: gas and food part them, so that small pieces are often right
MIN_CUT_SHARE = 0.01  # of the largest, from which on another piece that touches the scan's border stays
MIN_SHARE = 0.05  # of the largest component: smaller ones of the other organs, long and thin, are removed
LIVER, SPLEEN = 6, 1


def mirrored_classes() -> list[int]:
    """For each label the one that it is in a mirror: left and right of paired organs change places."""
    classes = list(range(NUM_CLASSES))
    for a, b in SIDES:
        classes[a], classes[b] = b, a
    return classes


def segment(
    model: TrainedModel,
    volume,
    spacing_mm: Sequence[float],
    scaling: Scaling,
    modality: str,
    *,
    box: Box | None = None,
    tta: bool = False,
    overlap: float = 0.5,
    batch_size: int = 1,
    probabilities: Mapping[int, np.ndarray] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Organ numbers (z, y, x) uint8 of a scan on its own grid; 0 outside of `box`.

    Args:
        volume: (z, y, x) in HU of a CT, or grey values of an MR: an array or what can be sliced like one.
        scaling: of the model's CT, or that of this MR scan on its own grid.
        modality: "ct" or "mr".
        box: (start, stop), z y x, in voxels of the volume.
        tta: average with the predictions of the scan mirrored along each of the three axes.
        probabilities: as of `predict_labels`.
    """
    return predict_labels(
        model.network,
        volume,
        spacing_mm=spacing_mm,
        working_spacing_mm=model.preprocessing["spacing_mm"],
        patch_shape=tuple(model.config["patch_size"]),
        num_classes=NUM_CLASSES,
        prepare=lambda image: scale(image, scaling),
        device=model.device,
        overlap=overlap,
        batch_size=batch_size,
        flips=FLIPS if tta else (),
        mirrored_classes=mirrored_classes(),
        value_range=stored_range(modality, scaling),
        air_below=AIR_BELOW_HU if modality == "ct" else None,
        precision=model.precision,
        progress=progress,
        on_message=_tell_trouble,
        box=box,
        probabilities=probabilities,
    )


def _tell_trouble(line: str) -> None:
    """Print only the messages about a lack of memory; what a prediction needs is printed by the caller."""
    if "out of memory" in line:
        tqdm.write(f"warning: {line}")


def clean_up(
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    hollow: bool = False,
    voxel_mm3: float | None = None,
) -> tuple[np.ndarray, dict[int, dict]]:
    """Remove stray pieces of each organ; returns a copy of the labels and what was removed.

    Of compact organs only the largest component stays, and what has at least 1 % of its volume and touches
    the border of the scan, which may have cut the organ in two; of oesophagus, aorta, vena cava and pancreas
    all that has at least 5 %. Each organ is looked at in its own box only.

    Args:
        labels: (z, y, x) uint8 organ numbers of a whole scan, since its borders count.
        hollow: treat stomach and duodenum like the pancreas; otherwise they stay as they are.
        voxel_mm3: volume of a voxel; None = the product of the spacings, wrong for a sheared grid.

    Returns:
        (labels, {organ number: {"removed_ml", "components"}}) with the organs of which something was removed.
    """
    from scipy import ndimage

    labels, report = labels.copy(), {}
    ml = (float(np.prod(spacing_mm)) if voxel_mm3 is None else voxel_mm3) / 1000
    for organ, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or (organ in HOLLOW and not hollow):
            continue
        view = labels[box]
        components, num = ndimage.label(view == organ, np.ones((3, 3, 3)))
        if num < 2:
            continue
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        largest = sizes.argmax()
        goes = sizes < sizes[largest] * MIN_SHARE
        if organ in COMPACT:
            is_cut = np.zeros(num + 1, bool)
            for k, part in enumerate(ndimage.find_objects(components), start=1):
                is_cut[k] = any(
                    whole.start + side.start == 0 or whole.start + side.stop == size
                    for whole, side, size in zip(box, part, labels.shape, strict=True)
                )
            goes = ~is_cut | (sizes < sizes[largest] * MIN_CUT_SHARE)
        goes[[0, largest]] = False
        if goes.any():
            view[goes[components]] = 0
            report[organ] = {"removed_ml": float(sizes[goes].sum() * ml), "components": int(goes.sum())}
    return labels, report


def looks_mirrored(labels: np.ndarray) -> bool:
    """Whether the liver lies left of the spleen: the scan's left and right are then probably exchanged.

    Args:
        labels: (z, y, x) uint8 organ numbers in RAS+, where x grows to the patient's right. Without liver or
            spleen nothing can be said: False.
    """
    from scipy import ndimage

    boxes = ndimage.find_objects(labels, max_label=max(LIVER, SPLEEN))
    if boxes[LIVER - 1] is None or boxes[SPLEEN - 1] is None:
        return False
    liver_x, spleen_x = (
        boxes[organ - 1][2].start + ndimage.center_of_mass(labels[boxes[organ - 1]] == organ)[2]
        for organ in (LIVER, SPLEEN)
    )
    return bool(liver_x < spleen_x)
