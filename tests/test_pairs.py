"""common/pairs.py: scan and label on one grid, thin scans, median spacing, equal content."""

import numpy as np
import pytest

from common.nifti import load_label, load_nifti, write_nifti
from common.pairs import (
    content_hash,
    load_labelled,
    load_pair,
    median_spacing,
    refuse_copies,
    why_not_a_pair,
    why_too_thin,
)


def write(path, shape=(10, 12, 14), spacing_mm=(2, 1, 1), dtype=np.int16, **where):
    array = (np.arange(np.prod(shape)).reshape(shape) % 5).astype(dtype)
    write_nifti(path, array, spacing_mm, **where)
    return path


def test_a_pair_in_other_axes_is_read_on_one_grid(tmp_path):
    image = write(tmp_path / "image.nii.gz", orientation="RAS")
    label = write(tmp_path / "label.nii.gz", dtype=np.uint8, orientation="PIL")
    scan, labels = load_pair(image, label)
    assert scan.array.shape == labels.array.shape == (10, 12, 14) and labels.array.dtype == np.uint8
    assert np.array_equal(scan.array, labels.array)
    assert why_not_a_pair(scan, labels) == why_too_thin(scan) == ""


@pytest.mark.parametrize(
    "other",
    [{"shape": (9, 12, 14)}, {"spacing_mm": (2, 1, 1.1)}, {"origin_mm": (0, 0, 1)}],
)
def test_another_grid_is_named_with_both_files(other, tmp_path):
    image = write(tmp_path / "image.nii.gz")
    label = write(tmp_path / "label.nii.gz", dtype=np.uint8, orientation="LPS", **other)
    with pytest.raises(ValueError) as info:
        load_pair(image, label)
    difference = {
        "shape": "9 x 12 x 14 and 10 x 12 x 14 voxels (z y x)",
        "spacing_mm": "corners up to 1.3 mm apart, spacing 2 x 1 x 1.1 and 2 x 1 x 1 mm (z y x)",
        "origin_mm": "corners up to 1 mm apart, spacing 2 x 1 x 1 and 2 x 1 x 1 mm (z y x)",
    }[next(iter(other))]
    for words in (
        f"{label}: lies on another grid than image.nii.gz ({difference}; ",
        "label LPS, scan RAS",
    ):
        assert words in str(info.value)
    assert "take the file that was drawn on this scan" in str(info.value)


def test_a_single_slice_is_refused_with_its_size(tmp_path):
    image = write(tmp_path / "image.nii.gz", (1, 30, 40), (5, 1, 1))
    with pytest.raises(ValueError, match=r"image.nii.gz: only 5 x 30 x 40 mm \(z y x\); a single slice\?"):
        load_pair(image, write(tmp_path / "label.nii.gz", (1, 30, 40), (5, 1, 1), np.uint8))
    assert not why_too_thin(load_nifti(write(tmp_path / "b.nii", (2, 30, 40), (5, 1, 1)))), "10 mm are enough"


def test_labels_are_checked_against_what_may_be_there(tmp_path):
    """The label map holds 0 to 4."""
    image, label = write(tmp_path / "image.nii.gz"), write(tmp_path / "label.nii.gz", dtype=np.uint8)
    names = {1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}
    scan, target = load_labelled(image, label, names, (1, 2, 3, 4))
    assert scan.path == image and target.array.max() == 4
    with pytest.raises(
        ValueError, match=f"{label}: holds 4 .d., which --labelled or dataset.json does not name"
    ):
        load_labelled(image, label, names, (1, 2, 3))
    with pytest.raises(ValueError, match=f"{label}: label value.s. 4; expected 1 to 3"):
        load_labelled(image, label, {1: "a", 2: "b", 3: "c"}, (1, 2, 3))
    with pytest.raises(ValueError, match=f"{label}: has no scan of the same name; add it, or move this file"):
        load_labelled(None, label, names, names)
    with pytest.raises(ValueError, match=f"{image}: has no label of the same name"):
        load_labelled(image, None, names, names, label_alone=True)
    scan, target = load_labelled(None, label, names, names, label_alone=True)
    assert scan is None and target.shape == (10, 12, 14)


def test_median_spacing_by_hand(tmp_path):
    """z 1, 2, 9 and y 3, 1, 2: each axis by itself, of the volume in RAS."""
    paths = [
        write(tmp_path / "a.nii", spacing_mm=(1, 3, 1)),
        write(tmp_path / "b.nii", spacing_mm=(2, 1, 1), orientation="PSR"),
        write(tmp_path / "c.nii", spacing_mm=(9, 2, 1)),
    ]
    (tmp_path / "broken.nii").write_bytes(b"nothing")
    assert median_spacing([*paths, tmp_path / "broken.nii", tmp_path / "none.nii"]) == (2.0, 2.0, 1.0)
    with pytest.raises(ValueError, match=r"none of 1 scan\(s\) can be read: .*broken.nii: not a readable"):
        median_spacing([tmp_path / "broken.nii"])


def test_hash_is_of_the_values_whatever_the_file(tmp_path):
    image = load_nifti(write(tmp_path / "a.nii.gz")).array
    first = content_hash(image)
    assert content_hash(load_nifti(write(tmp_path / "b.nii", orientation="LPS")).array) == first
    assert content_hash(load_label(write(tmp_path / "c.nii", dtype=np.uint8)).array) == first
    assert content_hash(image.astype(np.float32)) == first
    assert content_hash(image[::-1]) != first and content_hash(image.reshape(12, 10, 14)) != first
    changed = image.copy()
    changed[-1, -1, -1] += 1
    assert content_hash(changed) != first


def test_copies_under_the_name_of_another_subject():
    people = [("a", "anna", "x"), ("b", "ben", "y"), ("a2", "anna", "x"), ("c", "carl", "x")]
    entries = [dict(zip(("name", "subject", "content"), person, strict=True)) for person in people]
    copies = refuse_copies(entries)
    assert list(copies) == ["c"] and copies["c"].startswith("the same scan as a, but of subject carl instead")
