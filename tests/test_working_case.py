"""common/working_case.py: boxes, grids and stored values by hand."""

import numpy as np
import pytest

from common.nifti import load_nifti, write_nifti
from common.working_case import (
    body_and_labels,
    grid_attributes,
    resolve_spacing,
    sample_inside,
    stored_values,
    to_working_grid,
)

PRESETS = {"light": (2.0, 1.5, 1.5), "fine": (1.0, 1.0, 1.0)}


@pytest.fixture
def scan(tmp_path):
    """A body of 0 HU in air: z 2..7, y 4..9, x 6..15 of 10 x 16 x 20 voxels of 4 x 2 x 1 mm."""
    image = np.full((10, 16, 20), -1000, np.int16)
    image[2:8, 4:10, 6:16] = 0
    write_nifti(tmp_path / "scan.nii.gz", image, (4, 2, 1), origin_mm=(5, 6, 7), orientation="LPS")
    return load_nifti(tmp_path / "scan.nii.gz")


def test_spacing_by_name_or_number():
    assert resolve_spacing(["fine"], PRESETS) == (1.0, 1.0, 1.0)
    assert resolve_spacing(["4", "3", "2.5"], PRESETS) == (4.0, 3.0, 2.5)
    assert resolve_spacing(["median"], PRESETS, (5.0, 0.7, 0.7)) == (5.0, 0.7, 0.7)
    for words in (["median"], ["fine", "fine"], ["1", "1"], ["1", "0", "1"], ["nan", "1", "1"]):
        with pytest.raises(
            ValueError, match=f"spacing {' '.join(words)}: expected light, fine, or three mill"
        ):
            resolve_spacing(words, PRESETS)
    with pytest.raises(ValueError, match="expected light, fine, median, or three"):
        resolve_spacing(["coarse"], PRESETS, (5.0, 0.7, 0.7))


def test_box_of_the_body_never_cuts_a_label(scan):
    """A margin of 4 mm is 1, 2 and 4 voxels."""
    labels = np.zeros(scan.shape, np.uint8)
    assert body_and_labels(scan, labels, -500, 4.0) == ((1, 2, 2), (9, 12, 20))
    labels[0, 15, 0] = 3
    assert body_and_labels(scan, labels, -500, 4.0) == ((0, 2, 0), (9, 16, 20))


def test_the_grid_of_the_scan_changes_nothing(scan):
    labels = np.zeros(scan.shape, np.uint8)
    labels[3, 5:7, 8:12] = 5
    box = (2, 4, 6), (8, 10, 16)
    working = to_working_grid(scan, labels, box, (4.0, 2.0, 1.0), (-1024, 1500))
    assert np.array_equal(working.image, scan.array[2:8, 4:10, 6:16]) and working.image.dtype == np.int16
    assert np.array_equal(working.labels, labels[2:8, 4:10, 6:16]) and working.labels.dtype == np.uint8
    assert working.lost == []
    np.testing.assert_allclose(working.affine @ [0, 0, 0, 1], scan.affine @ [6, 4, 2, 1])
    noted = grid_attributes(scan, box, working.affine)
    np.testing.assert_allclose(noted["spacing_mm"], (4, 2, 1))
    assert (noted["crop_start"], noted["crop_stop"]) == box
    assert (noted["source_image"], noted["source_orientation"]) == ("scan.nii.gz", "LPS")
    assert noted["source_shape"] == (10, 16, 20)


def test_coarser_voxels_cover_the_same_field_and_lose_specks(scan):
    labels = np.zeros(scan.shape, np.uint8)
    labels[:, :, 10:], labels[5, 8, 2] = 1, 7
    working = to_working_grid(scan, labels, ((0, 0, 0), scan.shape), (4.0, 4.0, 4.0), (-500, 100))
    assert working.labels.shape == (10, 8, 5) and working.lost == [7]
    assert (working.image >= -500).all(), "cut before it is resampled"
    field = scan.affine @ [9.5, 7.5, 4.5, 1]
    np.testing.assert_allclose(working.affine @ [2, 3.5, 4.5, 1], field, atol=1e-5)


@pytest.mark.parametrize(
    "value_range, dtype",
    [
        ((-1024, 1500), np.int16),
        ((0, 200), np.int16),
        ((0, 199), np.float32),
        ((0, 32768), np.float32),
        ((-32769, 0), np.float32),
    ],
)
def test_values_are_rounded_unless_that_would_coarsen_or_cut_them(value_range, dtype):
    stored = stored_values(np.array([0.6, -0.6, 1.4], np.float32), value_range)
    assert stored.dtype == dtype
    expected = [1, -1, 1] if dtype == np.int16 else [0.6, -0.6, 1.4]
    np.testing.assert_allclose(stored, expected, rtol=1e-6)


def test_a_sample_is_of_what_is_labelled_and_the_same_each_time():
    image = np.arange(1000, dtype=np.int16).reshape(10, 10, 10)
    labels = (image >= 900).astype(np.uint8)
    sample = sample_inside(image, labels, 50, seed=0)
    assert sample.size == np.unique(sample).size == 50 and sample.min() >= 900
    assert np.array_equal(sample, sample_inside(image, labels, 50, seed=0))
    assert sorted(sample_inside(image, labels, 5000, seed=0)) == list(range(900, 1000))
    assert sample_inside(image, np.zeros_like(labels), 50, seed=0).size == 0
