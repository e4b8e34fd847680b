"""Folders of label maps that belong together: which file is which case, all of a case on one grid."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.foreign import foreign_hint
from common.nifti import Scan, case_name, is_nifti, load_label
from common.nifti_forms import grid_difference
from common.splits import natural_key

ENDINGS = ("_pred", "_prediction", "_seg", "_segmentation", "_mask", "_msk", "_label", "_labels", "_gt")
ENDINGS += ("_seg-vert",)  # of VerSe's masks, ..._seg-vert_msk
# What the scan has at the end of its name, and with it its prediction, but its true mask often has not: the
# channel of nnU-Net, the kind of scan.
SCAN_ENDINGS = ("_0000", "_ct", "_mr", "_t1", "_t1w")
PROBABILITIES = "probabilities"  # folder of the maps that predict.py writes, which are no masks
CONVERTED = "from_dicom"  # folder of the scans that it makes of DICOM files
NO_MASKS = {PROBABILITIES, CONVERTED}


def label_files(folder: str | Path, endings: Sequence[str] = ENDINGS) -> dict[str, Path]:
    """{case: file} of the NIfTI files of a folder in natural order; the case is the name without `endings`.

    If there is none in the folder itself, those of its subfolders are taken. If they are called alike, as
    case1/seg.nii.gz and case2/seg.nii.gz, with one in each, the case is the subfolder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no NIfTI file in it, or two of one case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of label maps")
    paths = sorted(filter(is_nifti, folder.iterdir()))
    if not paths:
        below = [path for path in sorted(folder.rglob("*")) if is_nifti(path) and path.is_file()]
        paths = [path for path in below if not NO_MASKS & {*path.relative_to(folder).parts}]
    cases = {path: _without(case_name(path), endings) for path in paths}
    parents = {path.parent for path in paths}
    if len(set(cases.values())) < len(paths) == len(parents):
        cases = {path: path.parent.relative_to(folder).as_posix() for path in paths}
    files: dict[str, Path] = {}
    for path, case in cases.items():
        if (other := files.setdefault(case, path)) != path:
            names = (other.relative_to(folder), path.relative_to(folder))
            raise ValueError(f"{folder}: {names[0]} and {names[1]} are the same case; move one away")
    if not files:
        raise ValueError(f"{folder}: no .nii or .nii.gz file{foreign_hint(folder)}")
    return {case: files[case] for case in sorted(files, key=natural_key)}


def _without(name: str, endings: Sequence[str]) -> str:
    while ending := next((e for e in endings if name.lower().endswith(e) and len(name) > len(e)), ""):
        name = name[: -len(ending)]
    return name


def called_as(files: Mapping[str, Path], cases: Collection[str]) -> dict[str, Path]:
    """`files` of `label_files` under the names of `cases`: one that is none of them, but is without an ending
    of SCAN_ENDINGS, gets that name.

    Raises:
        ValueError: two files would have one name.
    """
    renamed: dict[str, Path] = {}
    for name, path in files.items():
        short = _without(name, SCAN_ENDINGS)
        case = short if name not in cases and short in cases else name
        if (other := renamed.setdefault(case, path)) != path:
            raise ValueError(
                f"{path.parent}: {other.name} and {path.name} are the same case {case}; move one away"
            )
    return {case: renamed[case] for case in sorted(renamed, key=natural_key)}


def matching_files(
    folder: str | Path, cases: Collection[str], source: str | Path, endings: Sequence[str] = ENDINGS
) -> dict[str, Path]:
    """`label_files` of a folder of predictions for the `cases` of `source`, named as `called_as` does.

    Raises:
        FileNotFoundError, ValueError: as `label_files`; or no file belongs to any of the cases.
    """
    files = called_as(label_files(folder, endings), cases)
    if not files.keys() & set(cases):
        example = next(iter(cases), "case1")
        raise FileNotFoundError(
            f"{folder}: none of its {len(files)} masks has the name of one of the {len(cases)} cases of "
            f"{source} (e.g. {example}_mask.nii.gz)"
        )
    return files


def load_masks(
    target: Path, *preds: Path, renumber: Callable[[Scan, bool], np.ndarray] | None = None
) -> list[Scan]:
    """The true label map of a case and predicted ones, on one grid.

    Args:
        renumber: (mask, whether it is the true one) -> the labels that are scored, from the numbers in the
            file, such as `merged_labels`; None: they are the labels.

    Raises:
        FileNotFoundError, ValueError: as `load_label` and `renumber`; or a prediction lies on another grid
            than the target.
    """
    truth, *found = (load_label(path) for path in (target, *preds))
    for pred in found:
        if difference := grid_difference(pred, truth):
            raise ValueError(
                f"{pred.path}: lies on another grid than {truth.path} ({difference}); score masks that were "
                "predicted for this very scan"
            )
    if renumber is None:
        return [truth, *found]
    return [replace(scan, array=renumber(scan, scan is truth)) for scan in (truth, *found)]


def merged_labels(mask: Scan, is_truth: bool) -> np.ndarray:
    """All labels above 0 as the label 1: a `renumber` of `load_masks`."""
    return (mask.array > 0).astype(np.uint8)
