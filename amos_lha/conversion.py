"""One case of AMOS22's layout to an HDF5 file: what amos_lha/preprocess.py does for each."""

from pathlib import Path

from amos_lha.cases import Case, load_case
from amos_lha.organs import NUM_CLASSES, ORGANS
from common.hdf5 import write_case
from common.hu import why_not_hu
from common.intensity import mr_scaling, stored_range
from common.label_measures import label_counts
from common.patches import location_index
from common.working_case import Spacing, body_and_labels, grid_attributes, sample_inside, to_working_grid

PRESETS = {"light": (2.0, 1.5, 1.5), "fine": (2.0, 1.0, 1.0), "native": (2.0, 0.69, 0.69)}  # mm, z y x
BODY_HU = -500
BODY_MARGIN_MM = 10.0
SAMPLE = 10_000  # grey values kept of each case for the fingerprint of the training set
SEED = 0


def convert_case(case: Case, out: Path, spacing_mm: Spacing) -> dict:
    """Write <out>/cases/<name>.h5, voxels of about `spacing_mm`; returns its entry of preprocessing.json."""
    scan, label = load_case(case)
    notes, scaling = [], None
    if case.modality == "mr":
        scaling = mr_scaling(scan.array)
        box = (0, 0, 0), scan.array.shape
    else:
        box = body_and_labels(scan, label.array, BODY_HU, BODY_MARGIN_MM)
        if suspicion := why_not_hu(scan.array):
            notes.append(suspicion)
    working = to_working_grid(scan, label.array, box, spacing_mm, stored_range(case.modality, scaling))

    # ---- what training needs to know without reading volumes ----
    native = label_counts(label.array, NUM_CLASSES)
    counts = label_counts(working.labels, NUM_CLASSES)
    if working.lost:
        lost = ", ".join(ORGANS[n] for n in working.lost)
        notes.append(f"too small for these voxels, therefore gone: {lost}")
    if not native[1:].any():
        notes.append("holds no organ")
    about = {"name": case.name, "modality": case.modality, "labelled": list(case.labelled)}
    attributes = about | {
        **grid_attributes(scan, box, working.affine),
        "scaling": None if scaling is None else list(scaling),
        "foreground_sample": sample_inside(working.image, working.labels, SAMPLE, SEED),
        "voxels": {str(n): int(counts[n]) for n in ORGANS if counts[n]},
    }
    index = location_index(working.labels, boundary_per_class=True, seed=SEED)
    file = out / "cases" / f"{case.name}.h5"
    used = write_case(file, working.image, working.labels, attributes=attributes, index=index)
    return about | {
        "part": case.part,
        "shape": list(working.image.shape),
        "organ_ml": {str(n): round(native[n] * scan.voxel_mm3 / 1000, 3) for n in ORGANS if native[n]},
        "compression": used,
        "notes": "; ".join(notes),
    }
