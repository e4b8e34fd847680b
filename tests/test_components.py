"""common/components.py: stray pieces of a structure, and which side it lies on."""

import numpy as np
import pytest

from common.components import lies_left_of, remove_stray_pieces, smooth_mask

A, B = 6, 1


def test_of_a_compact_structure_the_largest_piece_stays():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:8, 2:8, 2:8] = A
    labels[8, 8, 8] = A  # touches the block at a corner
    labels[12:16, 12:16, 12:16] = A  # 64 of 217 voxels, and still not the structure
    labels[18, 18, 18] = A
    labels[10, 2:9, 2] = B  # in the box of the other
    before = labels.copy()
    cleaned, report = remove_stray_pieces(labels, 10.0, compact=[A, B])
    assert report == {A: {"removed_ml": pytest.approx(65 * 10 / 1000), "components": 2}}
    assert (cleaned == A).sum() == 217 and cleaned[8, 8, 8] == A
    np.testing.assert_array_equal(cleaned == B, before == B)
    np.testing.assert_array_equal(labels, before)  # a copy is changed


@pytest.mark.parametrize(("parted", "goes"), [([3], True), ([], False)])
def test_of_a_parted_structure_pieces_below_5_percent_go(parted, goes):
    labels = np.zeros((10, 10, 40), np.uint8)
    labels[2, 2:7, 2:22] = 3  # 100 voxels
    labels[5, 5, 30:35] = 3  # 5: just enough
    labels[8, 8, 30:34] = 3  # 4
    cleaned, report = remove_stray_pieces(labels, 1.0, compact=[A], parted=parted)
    assert (cleaned == 3).sum() == (105 if goes else 109)
    assert report == ({3: {"removed_ml": pytest.approx(0.004), "components": 1}} if goes else {})


def test_a_piece_of_a_compact_structure_that_the_scan_cuts_stays():
    """1000 voxels in the middle; pieces of 10 and 9 voxels at the border, and one of 10 beside it."""
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:15, 5:15, 5:15] = A
    for start, number in (((19, 5, 2), 10), ((0, 5, 2), 9), ((18, 10, 2), 10)):
        labels[start[0], start[1], start[2] : start[2] + number] = A
    cleaned, report = remove_stray_pieces(labels, 1.0, compact=[A])
    assert report[A]["components"] == 2 and (cleaned == A).sum() == 1010
    assert cleaned[19, 5, 2] == A and not cleaned[0].any() and not cleaned[18].any()


def test_clean_up_of_nothing_and_of_every_label_whole():
    empty = np.zeros((4, 4, 4), np.uint8)
    assert remove_stray_pieces(empty, 1.0, compact=range(1, 16))[1] == {}
    whole = np.zeros((4, 4, 20), np.uint8)
    for label in range(1, 16):
        whole[:2, :2, label] = label
    cleaned, report = remove_stray_pieces(whole, 1.0, compact=range(1, 9), parted=range(9, 16))
    assert report == {} and np.array_equal(cleaned, whole)


def test_which_of_two_lies_on_the_left():
    """x grows to the patient's right."""
    labels = np.zeros((30, 40, 50), np.uint8)
    labels[8:18, 12:24, 28:40], labels[10:16, 10:16, 10:16] = A, B
    assert not lies_left_of(labels, A, B) and lies_left_of(labels, B, A)
    assert lies_left_of(labels[:, :, ::-1], A, B)
    assert not lies_left_of(np.where(labels == A, labels, 0), A, B), "without the other nothing can be said"
    assert not lies_left_of(np.where(labels[:, :, ::-1] == B, labels[:, :, ::-1], 0), A, B)
    assert not lies_left_of(np.zeros((3, 3, 3), np.uint8), A, B)


def test_smoothing_is_the_median_of_the_probabilities():
    """A median of 27 is above the threshold where 14 or more of them are."""
    from scipy import ndimage

    probs = np.random.default_rng(0).random((7, 9, 8), np.float32)
    for threshold in (0.4, 0.5, 0.6):
        expected = ndimage.median_filter(probs, 3, mode="nearest") > threshold
        np.testing.assert_array_equal(smooth_mask(probs > threshold), expected)


def test_smoothing_of_single_voxels_and_holes():
    mask = np.zeros((5, 8, 8), bool)
    mask[:, :4] = True
    before = mask.copy()
    mask[2, 1, 1], mask[2, 6, 6] = False, True
    smooth = smooth_mask(mask)
    assert smooth.dtype == bool and not smooth_mask(np.zeros((2, 3, 3), np.uint8)).any()
    np.testing.assert_array_equal(smooth, before)  # also at the border of the scan
