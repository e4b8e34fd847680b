"""Label maps in the numbers of other schemes: named, and not taken for the task's own."""

import numpy as np
import pytest

from common.label_measures import why_not_labels
from common.nifti import write_nifti
from lung_tumor.cases import tumour_mask
from verse_spine.cases import Case
from verse_spine.schemes import why_other_scheme
from verse_spine.scores import score_files


def column(numbers, step=20) -> np.ndarray:
    """Blocks of 6 mm one above the other, the first number on top, `step` mm from centre to centre."""
    labels = np.zeros((step * len(numbers) + 10, 10, 10), np.uint8)
    for k, number in enumerate(reversed(numbers)):
        labels[step * k + 2 : step * k + 8, 3:8, 3:8] = number
    return labels


@pytest.mark.parametrize(
    ("numbers", "step", "problem"),
    [
        ([1], 20, "holds 0 and 1 alone"),
        ([1, 1, 1], 36, "holds 0 and 1 alone"),
        ([5, 4, 3, 2, 1], 36, "C5 would lie above C1"),
        ([27, 28], 36, "neither T12 nor L1"),
        ([1, 2, 3, 4, 5], 36, "C2 to C5 would lie 36 mm apart"),
        ([1, 2, 3, 4, 5], 17, ""),
        ([19, 28, 20, 21], 30, ""),
        ([20, 21, 22, 23, 24, 25], 36, ""),
        ([7, 8, 9], 20, ""),
        ([20], 20, ""),
        ([], 20, ""),
    ],
)
def test_numbers_of_other_schemes(numbers, step, problem):
    reason = why_other_scheme(column(numbers, step), np.eye(4))
    assert problem in reason and bool(problem) == bool(reason)


def test_a_plain_mask_is_not_scored_as_levels(tmp_path):
    lumbar, plain = column([20, 21, 22], 36), column([1, 1, 1], 36)
    for name, labels in (("lumbar", lumbar), ("plain", plain)):
        write_nifti(tmp_path / f"{name}.nii.gz", labels, (1.0, 1.0, 1.0))
    cases = {name: Case(name, name, *[tmp_path / f"{name}.nii.gz"] * 2) for name in ("lumbar", "plain")}
    with pytest.raises(ValueError, match="plain.nii.gz: holds 0 and 1 alone.*--labels binary"):
        score_files(tmp_path / "lumbar.nii.gz", cases["plain"], "levels26", "native")
    with pytest.raises(ValueError, match="plain.nii.gz: holds 0 and 1 alone, no numbers of vertebrae"):
        score_files(tmp_path / "plain.nii.gz", cases["lumbar"], "levels26", "native")
    assert score_files(tmp_path / "plain.nii.gz", cases["lumbar"], "binary", "native")[1]["dice_any"] == 1


def test_a_plain_mask_is_not_taken_for_the_first_of_many_organs():
    names = {1: "spleen", 2: "liver", 3: "aorta"}
    plain = np.zeros((2, 2, 2), np.uint8)
    assert why_not_labels(plain, names, names) == ""
    plain[0] = 1
    assert "holds 0 and 1 alone, though it was made with 3 labels" in why_not_labels(plain, names, names)
    assert why_not_labels(plain, names, [1]) == "" and why_not_labels(plain, names, [1, 2]) == ""
    plain[1] = 3
    assert why_not_labels(plain, names, names) == ""


@pytest.mark.parametrize("values", [(1, 2), (1, 255)])
def test_several_classes_are_not_merged_to_one_tumour(tmp_path, values):
    labels = np.array([[[0, *values]]])
    with pytest.raises(ValueError, match=f"a.nii: label values {values[0]}, {values[1]} are several classes"):
        tumour_mask(labels, tmp_path / "a.nii")
    assert tumour_mask(labels * (labels == 1), tmp_path / "a.nii").tolist() == [[[0, 1, 0]]]
    assert tumour_mask(labels * 0, tmp_path / "a.nii").sum() == 0
