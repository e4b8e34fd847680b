"""A trained network applied to a whole scan: organ numbers on the scan's own grid."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from amos_lha.dataset import labelled_mask
from amos_lha.organs import NUM_CLASSES, SIDES
from common.checkpoints import TrainedModel
from common.inference import predict_labels, warn_of_memory
from common.intensity import Scaling, scale, stored_range
from common.losses import merge_unlabelled
from common.prediction import FLIPS, mirrored_classes
from common.volumes import Box

AIR_BELOW_HU = -500  # windows of a CT without a brighter voxel hold no body
NEVER = -1e4  # logit of an organ that no training case had labels for


def only_trained(network: Callable[[Tensor], Tensor], labelled: Sequence[int]) -> Callable:
    """The network with organs that no training case had labels for as parts of the background.

    Training asks only for their sum with the background (marginal softmax). What is left of each by itself
    says nothing, and could be the highest score.
    """
    mask = torch.from_numpy(labelled_mask(labelled))

    def predict(image: Tensor) -> Tensor:
        logits = network(image)
        return merge_unlabelled(logits, mask.expand(len(logits), -1)).clamp(min=NEVER)

    return network if mask.all() else predict


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
        tta: average with the prediction of the scan mirrored left to right; see `check_tta`.
        probabilities: as of `predict_labels`.
    """
    return predict_labels(
        only_trained(model.network, model.preprocessing["labelled"]),
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
        mirrored_classes=mirrored_classes(NUM_CLASSES, SIDES),
        value_range=stored_range(modality, scaling),
        air_below=AIR_BELOW_HU if modality == "ct" else None,
        precision=model.precision,
        progress=progress,
        on_message=warn_of_memory,
        box=box,
        probabilities=probabilities,
    )
