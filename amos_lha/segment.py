"""A trained network applied to a whole scan: organ numbers on the scan's own grid."""

from collections.abc import Sequence

import numpy as np

from amos_lha.organs import NUM_CLASSES, SIDES
from common.checkpoints import TrainedModel
from common.intensity import Scaling, scale, stored_range
from common.prediction import FLIPS, mirrored_classes, only_trained, predict_volume

AIR_BELOW_HU = -500  # windows of a CT without a brighter voxel hold no body


def segment(
    model: TrainedModel,
    volume,
    spacing_mm: Sequence[float],
    scaling: Scaling,
    modality: str,
    *,
    tta: bool = False,
    **options,
) -> np.ndarray:
    """Organ numbers (z, y, x) uint8 of a scan on its own grid; 0 outside of the box that is searched.

    Args:
        volume: (z, y, x) in HU of a CT, or grey values of an MR: an array or what can be sliced like one.
        scaling: of the model's CT, or that of this MR scan on its own grid.
        modality: "ct" or "mr".
        tta: average with the prediction of the scan mirrored left to right; see
            `check_tta` of common/prediction.py.
        options: box, overlap, batch_size, probabilities and progress, as of `predict_labels`.
    """
    return predict_volume(
        model,
        volume,
        spacing_mm,
        network=only_trained(model.network, NUM_CLASSES, model.preprocessing["labelled"]),
        num_classes=NUM_CLASSES,
        prepare=lambda image: scale(image, scaling),
        flips=FLIPS if tta else (),
        mirrored_classes=mirrored_classes(NUM_CLASSES, SIDES),
        value_range=stored_range(modality, scaling),
        air_below=AIR_BELOW_HU if modality == "ct" else None,
        **options,
    )
