"""What a whole volume says beyond its slices: labels of pixels to learn from, and better maps to predict by.

See common/escape.py for the idea. Of a training volume the labels of slices are known, of another one they
are predicted.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import uniform_filter1d

from common.checkpoints import TrainedModel
from common.escape import escape_map
from common.files import make_folder, replacing
from common.pixel_labels import IGNORE
from wsss_medical.dataset import MedicalSliceDataset, patient_of
from wsss_medical.segment import GATE, SliceResult, segment_slices

FIRST = (0.57, 0.69)  # values of the escape map up to which and above which a pixel is labelled
LATER = (0.53, 0.65)  # the same of its geometric mean with the network's map
LEAST_SHARE = 0.35  # of the longest time: slices below it, often the outer ones, have no labels at first
MAPS = ("seg", "cam", "affinity", "cam_raw")  # of a SliceResult
NEIGHBOURS = 5  # slices whose scores are averaged


def by_patient(names: Sequence[str]) -> list[list[str]]:
    """Names of slices in lists, one for each patient."""
    patients: dict[str, list[str]] = {}
    for name in names:
        patients.setdefault(patient_of(name), []).append(name)
    return list(patients.values())


def label_pixels(
    model: TrainedModel,
    root: Path,
    names: Sequence[str],
    folder: Path,
    *,
    by_model: bool,
    batch_size: int = 8,
) -> None:
    """Write labels of pixels of a patient's slices, uint8 with 0, 1 and 255 = unknown, to <name>.npy.

    By the escape map alone or, `by_model`, by its geometric mean with what the model has learned, which is
    right where single volumes are not.
    """
    make_folder(folder)
    data = MedicalSliceDataset(root, names)
    slices, is_positive = [data.read(i) for i in range(len(data))], data.labels > 0
    if not are_alike(slices):
        raise ValueError(
            f"--pixel_labels escape: {names[0]} and other slices of its patient differ in size, so they "
            "are no volume; use --pixel_labels cam"
        )
    found, shares = escape_map(np.stack(slices), is_positive, model.config["dark"])
    (low, high), is_unsure = FIRST, is_positive & (shares < LEAST_SHARE)
    if by_model:
        results = segment_slices(model, slices, batch_size=batch_size, cams=False)
        found = np.sqrt(found * np.stack([result.seg for result in results]))
        (low, high), is_unsure = LATER, np.zeros_like(is_positive)
    label = np.select([found > high, found < low], [np.uint8(1), np.uint8(0)], np.uint8(IGNORE))
    label[is_unsure] = IGNORE
    for name, of_slice in zip(names, label, strict=True):
        with replacing(folder / f"{name}.npy") as partial:
            np.save(partial, of_slice)


def are_alike(slices: Sequence[np.ndarray]) -> bool:
    """Whether all slices have one shape, as those of a volume have."""
    return len({image.shape for image in slices}) == 1


def is_volume(model: TrainedModel, slices: Sequence[np.ndarray]) -> bool:
    """Whether the model was trained on volumes (--pixel_labels escape) and these slices are one."""
    return model.config.get("pixel_labels") == "escape" and len(slices) > 1 and are_alike(slices)


def patient_scores(
    model: TrainedModel, slices: Sequence[np.ndarray], results: Sequence[SliceResult]
) -> list[float]:
    """Score of each slice of a patient, in a volume the mean over its neighbours too."""
    scores = [result.score for result in results]
    if is_volume(model, slices):
        return uniform_filter1d(scores, NEIGHBOURS, mode="nearest").tolist()
    return scores


def segment_patient(
    model: TrainedModel, slices: Sequence[np.ndarray], *, gate: float = 0.0, **options
) -> list[SliceResult]:
    """`segment_slices` of all slices of a patient, in their order.

    In a volume the scores are those of `patient_scores`, and `seg` is the geometric mean of what the network
    says and the escape map by these scores.

    Args:
        slices: uint8 (row, column) or (row, column, 3) each.
        gate, options: of `segment_slices`.
    """
    if not is_volume(model, slices):
        return list(segment_slices(model, slices, gate=gate, **options))
    results = list(segment_slices(model, slices, **options))
    scores = patient_scores(model, slices, results)
    found, _ = escape_map(np.stack(slices), np.array(scores) >= GATE, model.config["dark"])
    better = []
    for result, score, escape in zip(results, scores, found, strict=True):
        maps = result._asdict() | {"seg": np.sqrt(result.seg * escape)}
        shown = {name: maps[name] * (score >= gate) for name in MAPS if maps[name] is not None}
        better.append(result._replace(score=score, **shown))
    return better
