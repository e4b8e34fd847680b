"""common/label_measures.py: sizes, places and pieces counted by hand; the round trip over another grid."""

import numpy as np
import pytest

from common.label_measures import label_counts, measure_labels, round_trip


@pytest.fixture
def labels() -> np.ndarray:
    """Label 2: 2 x 3 x 4 voxels; label 5: two parts that touch at a corner, and a speck apart."""
    labels = np.zeros((10, 12, 14), np.uint8)
    labels[1:3, 2:5, 4:8] = 2
    labels[5:7, 5:7, 5:7], labels[7, 7, 7], labels[9, 11, 13] = 5, 5, 5
    return labels


def test_measures_by_hand(labels):
    measures = measure_labels(labels)
    assert list(measures) == [2, 5]
    two, five = measures[2], measures[5]
    assert (two.voxels, two.centre, two.pieces) == (24, (1.5, 3.0, 5.5), (24,))
    assert two.box == ((1, 2, 4), (3, 5, 8))
    assert two.extent_mm((5.0, 1.0, 0.5)) == (10.0, 3.0, 2.0)
    assert five.pieces == (9, 1) and five.voxels == 10
    assert five.box == ((5, 5, 5), (10, 12, 14))
    assert five.centre == pytest.approx((6.0, 6.2, 6.4)), "(8 * 5.5 + 7 + 9) / 10 along z"
    assert five.specks(10) == (1,) and five.specks(1) == () and two.specks(100) == ()
    assert measure_labels(np.zeros((3, 3, 3), np.uint8)) == {}


def test_measures_follow_a_flip(labels):
    for axis in range(3):
        before, after = measure_labels(labels)[5], measure_labels(np.flip(labels, axis))[5]
        assert after.centre[axis] == pytest.approx(labels.shape[axis] - 1 - before.centre[axis])
        assert after.pieces == before.pieces


def test_counts_equal_bincount(labels):
    assert label_counts(labels, 16).tolist() == np.bincount(labels.ravel(), minlength=16).tolist()


def test_round_trip_on_the_same_grid_loses_nothing(labels):
    returned, dice = round_trip(labels, (2, 1, 1), (2, 1, 1))
    assert np.array_equal(returned, labels) and dice == {2: 1.0, 5: 1.0}


def test_round_trip_by_hand():
    """Twelve voxels along x to six and back; what is one voxel wide and alone is lost."""
    labels = np.zeros((4, 4, 12), np.uint8)
    labels[..., :6], labels[1, 1, 10] = 1, 3
    returned, dice = round_trip(labels, (1, 1, 1), (1, 1, 2))
    assert returned.shape == labels.shape and returned.dtype == np.uint8
    assert dice == {1: 1.0, 3: 0.0}


def test_round_trip_does_not_move_labels():
    """A ball of 12 voxels across over a grid of 1.7 times the spacing: as good, and centred as before."""
    z, y, x = np.ogrid[:30, :33, :36]
    labels = (((z - 14) ** 2 + (y - 15) ** 2 + (x - 19) ** 2) <= 36).astype(np.uint8)
    returned, dice = round_trip(labels, (1, 1, 1), (1.7, 1.7, 1.7))
    assert dice[1] > 0.93
    np.testing.assert_allclose(measure_labels(returned)[1].centre, (14, 15, 19), atol=0.1)
