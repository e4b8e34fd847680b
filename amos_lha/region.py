"""What a scan is, CT or MR, how its grey values are scaled, and where in it to look for organs."""

import numpy as np

from amos_lha.cases import modality_of_name
from amos_lha.conversion import BODY_HU, BODY_MARGIN_MM
from common.checkpoints import TrainedModel
from common.hu import why_not_hu
from common.intensity import Scaling, mr_scaling
from common.messages import warn
from common.nifti import NiftiFile, case_name
from common.overview import find_body, read_overview
from common.volumes import Box


def scan_modality(name: str, wish: str, trained: str, image: np.ndarray) -> str:
    """Whether a scan is a "ct" or "mr": what --modality says, else its name, the model or its values.

    Args:
        wish: "ct", "mr" or "auto".
        trained: "ct", "mr" or "both", what the model was trained on.
        image: a coarse copy of the scan.

    Raises:
        ValueError: a modality that the model has never seen.
    """
    by_values = "mr" if why_not_hu(image) else "ct"
    modality = wish
    if wish == "auto":
        modality = modality_of_name(name) or (by_values if trained == "both" else trained)
    if trained not in (modality, "both"):
        raise ValueError(
            f"{name}: a scan of {modality.upper()}, but the model was trained on {trained.upper()} only. If "
            f"it is {trained.upper()}, say --modality {trained}"
        )
    return modality


def scaling_of(model: TrainedModel, modality: str, image: np.ndarray) -> Scaling:
    """How grey values of a scan are scaled: CT by the model's fingerprint, MR by the scan itself."""
    return Scaling(*model.preprocessing["scaling"]) if modality == "ct" else mr_scaling(image)


def find_region(
    file: NiftiFile, model: TrainedModel, *, wish: str = "auto", whole_scan: bool = False
) -> tuple[str, Box]:
    """(modality, box of the scan to search in its voxels): of a CT that of the body, of an MR all.

    Args:
        wish: "ct", "mr" or "auto".
        whole_scan: search all of a CT as well.

    Raises:
        ValueError: as `scan_modality`.
    """
    overview = read_overview(file, None)
    modality = scan_modality(case_name(file.path), wish, model.preprocessing["modality"], overview.image)
    if modality == "ct" and (suspicion := why_not_hu(overview.image)):
        warn(f"{file.path.name}: {suspicion}")
    if modality == "mr" or whole_scan:
        return modality, ((0, 0, 0), file.shape)
    return modality, find_body(overview, file, BODY_HU, BODY_MARGIN_MM)[1]
