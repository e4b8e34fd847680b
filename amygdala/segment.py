"""Trained networks applied to a T1 scan: the structures' labels on the scan's own grid."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from amygdala.structures import DATASETS, NUM_CLASSES
from common.checkpoints import TrainedModel
from common.intensity import scale_by_own_values
from common.prediction import FLIPS, mirrored_classes, predict_volume


def check_ensemble(models: Sequence[TrainedModel], weights: Sequence[str | Path]) -> None:
    """ValueError if networks cannot be averaged; `weights` are their files, for the message."""

    def described(model: TrainedModel) -> dict:
        return {
            "data set": model.preprocessing["dataset"],
            "spacing in mm": tuple(model.preprocessing["spacing_mm"]),
            "classes": model.config.get("num_classes", NUM_CLASSES),
            "patch size": tuple(model.config["patch_size"]),
        }

    first = described(models[0])
    for model, path in zip(models[1:], weights[1:], strict=True):
        for what, value in described(model).items():
            if value != first[what]:
                raise ValueError(
                    f"--weights: {path} was trained with another {what} ({value}) than {weights[0]} "
                    f"({first[what]}), so their predictions cannot be averaged; name folds of one run"
                )


def mean_network(networks: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """(N, 1, d, h, w) -> (N, K, d, h, w) whose softmax is the mean of the networks' softmax.

    A single network is handed back as it is.
    """
    if len(networks) == 1:
        return networks[0]

    def predict(image: Tensor) -> Tensor:
        total = networks[0](image).float().log_softmax(1)
        for network in networks[1:]:
            total = torch.logaddexp(total, network(image).float().log_softmax(1))
        return total - math.log(len(networks))

    return predict


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
