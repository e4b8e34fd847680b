"""common/label_measures.py: sizes, places and pieces counted by hand; the round trip over another grid."""

import numpy as np
import pytest

from common.label_measures import (
    describe_labels,
    label_counts,
    label_rows,
    measure_labels,
    round_trip,
    why_not_labels,
)
from common.nifti import load_label, write_nifti


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


def test_numbers_that_do_not_belong_there(labels):
    names = {2: "nose", 5: "ear", 6: "beard"}
    assert why_not_labels(labels, names, (2, 5)) == why_not_labels(np.zeros_like(labels), names, (2,)) == ""
    assert why_not_labels(labels, names, (5, 6)).startswith(
        "holds 2 (nose), which --labelled or dataset.json"
    )
    unknown = why_not_labels(labels, {2: "nose", 6: "beard"}, (2,))
    assert unknown == "label value(s) 5; expected 2 to 6. Is it a label of another data set?"


def test_description_by_hand(labels, tmp_path):
    """Voxels of 5 x 1 x 0.5 mm; the image counts along x."""
    write_nifti(tmp_path / "label.nii.gz", labels, (5, 1, 0.5), orientation="PIL")
    scan = load_label(tmp_path / "label.nii.gz")
    image = np.broadcast_to(np.arange(14), labels.shape)
    described = describe_labels(scan, image, (0, 50))
    assert list(described) == [2, 5]
    assert described[2] == pytest.approx(
        {"ml": 0.06, "extent_z_mm": 10, "extent_y_mm": 3, "extent_x_mm": 2, "p0": 4, "p50": 5.5}
    )
    assert described[5]["p50"] == 6 and "p50" not in describe_labels(scan)[5]


def test_rows_of_labels_by_hand():
    cases = [{19: {"ml": 10.0, "p50": 4.0}, 28: {"ml": 3.0}}, {19: {"ml": 17.0}}, {19: {"ml": 12.0}}, {}]
    rows = label_rows(cases, {28: "T13", 19: "T12", 1: "C1"}, [(19, 28), (19,), (19,), (1,)])
    assert [row["name"] for row in rows] == ["T13", "T12", "C1"]
    assert rows[1] == {
        "label": 19,
        "name": "T12",
        "scans": 3,
        "labelled": 3,
        "presence": 1.0,
        "mean_ml": 13.0,
        "sd_ml": 13**0.5,
        "ml": 12.0,
        "p50": 4.0,
    }
    assert rows[0]["scans"] == rows[0]["labelled"] == 1 and np.isnan(rows[0]["sd_ml"])
    assert rows[2]["presence"] == 0 and np.isnan([rows[2][key] for key in ("mean_ml", "ml", "p50")]).all()
    everywhere = label_rows(cases, {19: "T12"})[0]
    assert (everywhere["labelled"], everywhere["presence"]) == (4, 0.75)
    assert np.isnan(label_rows([], {1: "C1"})[0]["presence"])
