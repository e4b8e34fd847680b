"""A trained network applied to a whole scan: organ numbers on the scan's own grid."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from amos_lha.dataset import labelled_mask
from amos_lha.organs import NUM_CLASSES, SIDES
from common.checkpoints import TrainedModel
from common.inference import predict_labels, warn_of_memory
from common.intensity import Scaling, scale, stored_range
from common.losses import merge_unlabelled
from common.volumes import Box

AIR_BELOW_HU = -500  # windows of a CT without a brighter voxel hold no body
NEVER = -1e4  # logit of an organ that cannot be
FLIPS = ((), (0,), (1,), (2,))  # of --tta: as it is, upside down, back to front, left to right


def mirrored_classes() -> list[int]:
    """For each label the one that it is in a mirror: left and right of paired organs change places."""
    classes = list(range(NUM_CLASSES))
    for a, b in SIDES:
        classes[a], classes[b] = b, a
    return classes


def known_organs(model: TrainedModel, image: Tensor) -> Tensor:
    """The network's logits; organs that no training case had labels for are background, as in the loss."""
    labelled = torch.from_numpy(labelled_mask(model.preprocessing["labelled"]))
    logits = merge_unlabelled(model.network(image), labelled.expand(len(image), -1))
    return logits.clamp(min=NEVER)  # scores of neighbouring voxels are mixed, which -inf would spoil


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
        partial(known_organs, model),
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
        on_message=warn_of_memory,
        box=box,
        probabilities=probabilities,
    )
