"""One case of AMOS22's layout to an HDF5 file: what amos_lha/preprocess.py does for each."""

import warnings
from pathlib import Path

import numpy as np

from amos_lha.cases import Case, load_case
from amos_lha.organs import NUM_CLASSES, ORGANS
from common.conversion import file_stamp
from common.hdf5 import write_case
from common.hu import why_not_hu
from common.intensity import mr_scaling, stored_range
from common.label_measures import label_counts
from common.nifti import Scan
from common.patches import location_index
from common.volumes import (
    Box,
    body_box,
    box_of,
    crop,
    crop_affine,
    resample,
    resample_labels,
    resampled_affine,
    resampled_shape,
)

Spacing = tuple[float, float, float]  # mm, z y x
PRESETS = {"light": (2.0, 1.5, 1.5), "fine": (2.0, 1.0, 1.0), "native": (2.0, 0.69, 0.69)}
BODY_HU = -500
BODY_MARGIN_MM = 10.0
MR_LEVELS = 200  # an MR scan with fewer grey levels than this is not rounded to whole numbers
SAMPLE = 10_000  # grey values kept of each case for the fingerprint of the training set
SEED = 0


def resolve_spacing(words: list[str], usual_mm: Spacing | None = None) -> Spacing:
    """Millimetres z y x that the words of a flag ask for; `usual_mm` is the median of the data set.

    Raises:
        ValueError: neither a preset nor three numbers above zero.
    """
    if words[0] in PRESETS and len(words) == 1:
        return PRESETS[words[0]]
    if words == ["median"] and usual_mm:
        return usual_mm
    try:
        z, y, x = (float(word) for word in words)
        if all(0 < mm < 1000 for mm in (z, y, x)):
            return z, y, x
    except ValueError:
        pass
    raise ValueError(
        f"spacing {' '.join(words)}: expected {', '.join(PRESETS)}{', median' if usual_mm else ''}, or three "
        "millimetres above zero (z y x)"
    )


def working_box(scan: Scan, organs: np.ndarray, modality: str) -> Box:
    """What of a scan is kept: of CT the body with a margin and every labelled voxel, of MR all."""
    if modality == "mr":
        return (0, 0, 0), scan.array.shape
    margin = np.ceil(np.divide(BODY_MARGIN_MM, scan.spacing_mm)).astype(int)
    start, stop = body_box(scan.array, BODY_HU, margin)
    if labels := box_of(organs):
        start, stop = np.minimum(start, labels[0]), np.maximum(stop, labels[1])
    return tuple(map(int, start)), tuple(map(int, stop))


def stored_values(values: np.ndarray, modality: str, value_range: tuple[float, float]) -> np.ndarray:
    """Resampled grey values as they are stored: int16, but float32 for MR that this would make coarser."""
    low, high = value_range
    limits = np.iinfo(np.int16)
    if modality == "mr" and (high - low < MR_LEVELS or low < limits.min or high > limits.max):
        return values.astype(np.float32)
    return np.rint(values).astype(np.int16)


def convert_case(case: Case, out: Path, spacing_mm: Spacing) -> dict:
    """Write <out>/cases/<name>.h5, voxels of about `spacing_mm`; returns its entry of preprocessing.json."""
    scan, label = load_case(case)
    modality, labelled, scaling, notes = case.modality, list(case.labelled), None, []
    if modality == "mr":
        scaling = mr_scaling(scan.array)
    elif suspicion := why_not_hu(scan.array):
        notes.append(suspicion)

    # ---- body, spacing ----
    start, stop = working_box(scan, label.array, modality)
    image, organs = crop(scan.array, start, stop), crop(label.array, start, stop)
    shape = resampled_shape(image.shape, scan.spacing_mm, spacing_mm)
    affine = resampled_affine(crop_affine(scan.affine, start), image.shape, shape)
    value_range = stored_range(modality, scaling)
    voxels = stored_values(resample(image, shape, value_range=value_range), modality, value_range)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lost labels: told below, by name
        numbers = resample_labels(organs, shape).astype(np.uint8)

    # ---- what training needs to know without reading volumes ----
    native, working = label_counts(organs, NUM_CLASSES), label_counts(numbers, NUM_CLASSES)
    if lost := [ORGANS[n] for n in ORGANS if native[n] and not working[n]]:
        notes.append(f"too small for these voxels, therefore gone: {', '.join(lost)}")
    if not native[1:].any():
        notes.append("holds no organ")
    inside = np.flatnonzero(numbers)
    rng = np.random.default_rng(SEED)
    sample = voxels.ravel()[rng.choice(inside, min(SAMPLE, inside.size), replace=False)]
    attributes = {
        "name": case.name,
        "modality": modality,
        "labelled": labelled,
        "spacing_mm": np.linalg.norm(affine[:3, :3], axis=0)[::-1],  # as whole voxels leave it
        "affine": affine,
        "source_image": case.image.name,
        "source_shape": scan.array.shape,
        "source_spacing_mm": scan.spacing_mm,
        "source_affine": scan.affine,
        "source_orientation": scan.orientation,
        "crop_start": start,
        "crop_stop": stop,
        "scaling": None if scaling is None else list(scaling),
        "foreground_sample": sample,
        "voxels": {str(n): int(working[n]) for n in ORGANS if working[n]},
    }
    index = location_index(numbers, boundary_per_class=True, seed=SEED)
    used = write_case(out / "cases" / f"{case.name}.h5", voxels, numbers, attributes=attributes, index=index)
    return {
        "name": case.name,
        "part": case.part,
        "modality": modality,
        "labelled": labelled,
        "shape": list(shape),
        "organ_ml": {str(n): round(native[n] * scan.voxel_mm3 / 1000, 3) for n in ORGANS if native[n]},
        "stamp": stamp_of(case),
        "settings": settings_of(case, spacing_mm),
        "compression": used,
        "notes": "; ".join(notes),
    }


def stamp_of(case: Case) -> list:
    return file_stamp([path for path in (case.image, case.label) if path is not None])


def settings_of(case: Case, spacing_mm: Spacing) -> dict:
    """What decides how the case comes out; a case made with other settings is made again."""
    return {"spacing_mm": list(spacing_mm), "modality": case.modality, "labelled": list(case.labelled)}
