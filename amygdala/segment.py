"""Trained networks applied to a T1 scan: the structures' labels on the scan's own grid."""

from collections.abc import Sequence

import numpy as np

from amygdala.structures import DATASETS, NUM_CLASSES
from common.checkpoints import TrainedModel
from common.intensity import scale_by_own_values
from common.prediction import FLIPS, mean_network, mirrored_classes, predict_volume


def segment(
    models: Sequence[TrainedModel],
    volume: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    tta: bool = False,
    **options,
) -> np.ndarray:
    """Labels (z, y, x) uint8 of a scan on its own grid; 0 outside of the `box`, if there is one.

    Args:
        models: one, or several that `check_ensemble` lets pass, whose probabilities are averaged.
        volume: (z, y, x) grey values: an array or what can be sliced like one.
        spacing_mm: z y x.
        tta: average with the prediction of the scan mirrored left to right; see `check_tta`.
        options: the other arguments of `predict_labels`: box, overlap, batch_size, probabilities, progress.
    """
    return predict_volume(
        models[0],
        volume,
        spacing_mm,
        network=mean_network([model.network for model in models]),
        num_classes=NUM_CLASSES,
        prepare=scale_by_own_values,
        flips=FLIPS if tta else (),
        mirrored_classes=mirrored_classes(NUM_CLASSES, DATASETS[models[0].preprocessing["dataset"]].sides),
        **options,
    )
