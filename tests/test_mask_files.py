"""common/mask_files.py: which file is which case, and whether masks of a case lie on one grid."""

import numpy as np
import pytest

from common.mask_files import ENDINGS, label_files, load_masks, matching_files, merged_labels
from common.nifti import write_nifti

MASK = np.ones((4, 5, 6), np.uint8)
SPACING_MM = (2.0, 1.0, 0.5)


@pytest.fixture
def folder(tmp_path):
    for name in ("case_10_pred.nii.gz", "case_9_Label_mask.nii", "seg.nii"):
        write_nifti(tmp_path / name, MASK, SPACING_MM)
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_cases_without_endings_in_natural_order(folder):
    files = label_files(folder)
    assert list(files) == ["case_9", "case_10", "seg"]
    assert files["case_10"] == folder / "case_10_pred.nii.gz"
    write_nifti(folder / "a_ct_mask.nii", MASK, SPACING_MM)
    assert "a_ct" in label_files(folder) and "a" in label_files(folder, (*ENDINGS, "_ct"))


def test_folders_that_are_refused(folder):
    write_nifti(folder / "case_9.nii", MASK, SPACING_MM)
    with pytest.raises(ValueError, match="case_9.nii and case_9_Label_mask.nii are the same case"):
        label_files(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        label_files(folder / "c")
    (folder / "c").mkdir()
    with pytest.raises(ValueError, match=r"no .nii or .nii.gz file"):
        label_files(folder / "c")


def test_predictions_of_other_cases_are_refused(folder):
    assert list(matching_files(folder, ["case_9", "x"], "labels")) == ["case_9", "case_10", "seg"]
    message = r"none of its 3 masks has the name of one of the 2 cases of labels \(e.g. x_mask.nii.gz\)"
    with pytest.raises(FileNotFoundError, match=message):
        matching_files(folder, ["x", "y"], "labels")
    with pytest.raises(FileNotFoundError, match=r"the 0 cases of labels \(e.g. case1_mask"):
        matching_files(folder, [], "labels")


def test_masks_of_a_case_lie_on_one_grid(folder):
    target, pred = (folder / name for name in ("case_10_pred.nii.gz", "seg.nii"))
    truth, *found = load_masks(target, pred, pred)
    assert truth.path == target and [scan.path for scan in found] == [pred, pred]
    write_nifti(folder / "shifted.nii", MASK, SPACING_MM, origin_mm=(0, 0, 5))
    message = r"shifted.nii: lies on another grid than .*case_10_pred.nii.gz \(corners up to 5 mm apart"
    with pytest.raises(ValueError, match=message):
        load_masks(target, pred, folder / "shifted.nii")
    write_nifti(folder / "cut.nii", MASK[1:], SPACING_MM)
    with pytest.raises(ValueError, match=r"3 x 5 x 6 and 4 x 5 x 6 voxels"):
        load_masks(target, folder / "cut.nii")


def test_merged_labels_are_1(folder):
    parts = MASK * np.arange(0, 256, 51, dtype=np.uint8)  # 0, 51 ... 255 along x
    write_nifti(folder / "parts.nii", parts, SPACING_MM)
    truth, pred = load_masks(folder / "case_10_pred.nii.gz", folder / "parts.nii", renumber=merged_labels)
    assert np.array_equal(truth.array, MASK) and pred.array.dtype == np.uint8
    assert np.array_equal(pred.array, parts > 0)
