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
from common.volumes import Box

AIR_BELOW_HU = -500  # windows of a CT without a brighter voxel hold no body
NEVER = -1e4  # logit of an organ that no training case had labels for
FLIPS = ((), (2,))  # of --tta: as it is, left to right


def mirrored_classes() -> list[int]:
    """For each label the one that it is in a mirror: left and right of paired organs change places."""
    classes = list(range(NUM_CLASSES))
    for a, b in SIDES:
        classes[a], classes[b] = b, a
    return classes


def check_tta(model: TrainedModel) -> None:
    """ValueError if the network has never seen mirrored scans, of which it then makes nonsense.

    A network that was trained on CHAOS without them had a Dice of 0.91 on three held-out scans, with --tta
    0.87; of the liver 0.91 and 0.78.
    """
    if not model.config.get("flip_sides"):
        raise ValueError(
            "--tta averages over the mirrored scan, but this network was trained without mirrored scans "
            "(train.py --flip_sides 0), where it does badly; predict without --tta"
        )


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
        mirrored_classes=mirrored_classes(),
        value_range=stored_range(modality, scaling),
        air_below=AIR_BELOW_HU if modality == "ct" else None,
        precision=model.precision,
        progress=progress,
        on_message=warn_of_memory,
        box=box,
        probabilities=probabilities,
    )
