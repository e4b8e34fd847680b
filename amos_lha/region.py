"""What a scan is, CT or MR, how its grey values are scaled, and where in it to look for organs."""

import numpy as np
from tqdm import tqdm

from amos_lha.cases import modality_of_case
from amos_lha.conversion import BODY_HU, BODY_MARGIN_MM
from common.checkpoints import TrainedModel
from common.hu import why_not_hu
from common.intensity import Scaling, mr_scaling
from common.nifti import NiftiFile, case_name
from common.overview import find_body, read_overview
from common.volumes import Box


def scan_modality(name: str, wish: str, model: TrainedModel, image: np.ndarray) -> str:
    """Whether a scan is a "ct" or "mr", from --modality, its name, the model or its values.

    Args:
        wish: "ct", "mr" or "auto".
        image: a coarse copy of the scan.
    """
    if wish != "auto":
        return wish
    trained = model.preprocessing["modality"]
    by_values = "mr" if why_not_hu(image) else "ct"
    return modality_of_case(name, {}) or (by_values if trained == "both" else trained)


def check_modality(name: str, modality: str, model: TrainedModel) -> None:
    """Refuse a scan of a modality that the model has never seen.

    Raises:
        ValueError: names the flag that allows it.
    """
    trained = model.preprocessing["modality"]
    if trained not in (modality, "both"):
        raise ValueError(
            f"{name}: a scan of {modality.upper()}, but the model was trained on {trained.upper()} only. If "
            f"it is {trained.upper()}, say --modality {trained}; --any_modality predicts it all the same"
        )


def scaling_of(model: TrainedModel, modality: str, image: np.ndarray) -> Scaling:
    """How grey values of a scan are scaled: CT by the model's fingerprint, MR by the scan itself, and so is a
    CT for a model that has never seen one."""
    fingerprint = model.preprocessing["scaling"]
    if modality == "ct" and fingerprint is not None:
        return Scaling(*fingerprint)
    return mr_scaling(image)


def find_region(
    file: NiftiFile,
    model: TrainedModel,
    *,
    wish: str = "auto",
    any_modality: bool = False,
    whole_scan: bool = False,
) -> tuple[str, Box]:
    """(modality, box of the scan to search in its voxels): of a CT that of the body, of an MR all.

    Args:
        wish: "ct", "mr" or "auto".
        any_modality: predict scans of a modality that the model has never seen.
        whole_scan: search all of a CT as well.

    Raises:
        ValueError: as `check_modality`.
    """
    name, whole = case_name(file.path), ((0, 0, 0), file.shape)
    overview = read_overview(file, None)
    modality = scan_modality(name, wish, model, overview.image)
    if not any_modality:
        check_modality(name, modality, model)
    if modality == "mr":
        return modality, whole
    if suspicion := why_not_hu(overview.image):
        tqdm.write(f"warning: {file.path.name}: {suspicion}")
    if whole_scan:
        return modality, whole
    return modality, find_body(overview, file, BODY_HU, BODY_MARGIN_MM)[1]
