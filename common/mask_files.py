"""Folders of label maps that belong together: which file is which case, all of a case on one grid."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.nifti import Scan, case_name, is_nifti, load_label
from common.nifti_forms import grid_difference
from common.splits import natural_key

ENDINGS = ("_pred", "_prediction", "_seg", "_segmentation", "_mask", "_label", "_labels", "_gt")


def label_files(folder: str | Path, endings: Sequence[str] = ENDINGS) -> dict[str, Path]:
    """{case: file} of the NIfTI files of a folder in natural order; the case is the name without `endings`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no NIfTI file in it, or two of one case.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of label maps")
    files: dict[str, Path] = {}
    for path in sorted(filter(is_nifti, Path(folder).iterdir())):
        case = case_name(path)
        while ending := next((e for e in endings if case.lower().endswith(e) and len(case) > len(e)), ""):
            case = case[: -len(ending)]
        if (other := files.setdefault(case, path)) != path:
            raise ValueError(f"{folder}: {other.name} and {path.name} are the same case; move one away")
    if not files:
        raise ValueError(f"{folder}: no .nii or .nii.gz file")
    return {case: files[case] for case in sorted(files, key=natural_key)}


def matching_files(
    folder: str | Path, cases: Collection[str], source: str | Path, endings: Sequence[str] = ENDINGS
) -> dict[str, Path]:
    """`label_files` of a folder of predictions for the `cases` of `source`.

    Raises:
        FileNotFoundError, ValueError: as `label_files`; or no file belongs to any of the cases.
    """
    files = label_files(folder, endings)
    if not files.keys() & set(cases):
        example = next(iter(cases), "case1")
        raise FileNotFoundError(
            f"{folder}: none of its {len(files)} masks has the name of one of the {len(cases)} cases of "
            f"{source} (e.g. {example}_mask.nii.gz)"
        )
    return files


def load_masks(target: Path, *preds: Path, merged: bool = False) -> list[Scan]:
    """The true label map of a case and predicted ones, on one grid.

    Args:
        merged: all labels above 0 become 1.

    Raises:
        FileNotFoundError, ValueError: as `load_label`; or a prediction lies on another grid than the target.
    """
    truth, *found = (load_label(path) for path in (target, *preds))
    for pred in found:
        if difference := grid_difference(pred, truth):
            raise ValueError(
                f"{pred.path}: lies on another grid than {truth.path} ({difference}); score masks that were "
                "predicted for this very scan"
            )
    scans = [truth, *found]
    return [replace(scan, array=(scan.array > 0).astype(np.uint8)) for scan in scans] if merged else scans
