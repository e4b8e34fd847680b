"""common/planes.py: slices of a scan as they are shown, in true proportions, with labels and errors."""

import numpy as np
import pytest

from common import planes
from common.planes import (
    color_overlay,
    contour_pictures,
    error_picture,
    grey_picture,
    middle,
    plane,
    save_planes,
    true_plane,
)

COLORS = np.array([[230, 30, 30], [30, 160, 230], [60, 190, 60], [240, 180, 20]], np.uint8)


def test_orientation_of_planes():
    """RAS+: z up, y to the front, x to the patient's right."""
    volume = np.zeros((10, 20, 30))
    volume[9], volume[:, 19], volume[:, :, 29] = 1, 2, 4  # head, front, right; later ones win
    coronal = plane(volume, 1, 5)
    assert coronal.shape == (10, 30) and (coronal[0, 1:] == 1).all(), "head up"
    assert (coronal[:, 0] == 4).all() and (coronal[:, -1] != 4).all(), "patient's right on the left"
    axial = plane(volume, 0, 5)
    assert (axial[0, 1:] == 2).all() and (axial[:, 0] == 4).all(), "front up, right on the left"
    sagittal = plane(volume, 2, 5)
    assert (sagittal[0, 1:] == 1).all() and (sagittal[:, 0] == 2).all(), "head up, front on the left"


@pytest.mark.parametrize("labels", [False, True])
def test_true_proportions(labels):
    volume = np.zeros((10, 40, 30), np.int16)
    volume[5:, 20:, 15:] = 7
    spacing = (4.0, 0.5, 1.0)
    shapes = [true_plane(volume, axis, 7, spacing, 1.0, labels).shape for axis in range(3)]
    assert shapes == [(20, 30), (40, 30), (40, 20)]
    picture = true_plane(volume, 2, 20, spacing, 1.0, labels)
    assert (picture[:18, :8] == 7).all() and not picture[22:].any() and not picture[:, 12:].any()
    if labels:
        assert picture.dtype == volume.dtype and set(np.unique(picture)) == {0, 7}


def test_middle_and_colours():
    mask = np.zeros((20, 30, 40), bool)
    assert middle(mask) == (10, 15, 20)
    mask[4:7, 10:13, 30:33] = True
    mask[19, 29, 0] = True
    assert middle(mask) == (5, 11, 31), "the median, which a speck does not move"
    assert grey_picture(np.array([-5000, -500, 400, 1300, 9999]), (-500, 1300)).tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]
    grey = np.full((1, 5), 100, np.uint8)
    error = error_picture(grey, np.array([[0, 1, 1, 0, 2]]), np.array([[0, 1, 0, 1, 1]]))
    assert (error[0, 0] == 100).all() and (error[0, 1] == 100).all()
    assert error[0, 2, 0] > 180 > error[0, 2, 2] and error[0, 3, 2] > 180 > error[0, 3, 0]
    assert error[0, 4, 0] > 180, "the wrong class counts as too much"
    colored = color_overlay(grey, np.array([[0, 1, 2, 4, 5]]), COLORS)[0].tolist()
    expected = [[100] * 3, [165, 65, 65], [65, 130, 165], [170, 140, 60], [165, 65, 65]]
    assert colored == expected, "half of each; the fifth label begins again with the first colour"


@pytest.mark.parametrize("with_target", [False, True])
def test_panels(with_target, tmp_path, monkeypatch):
    """Three rows; scan and prediction, or scan, truth, prediction and error; resampled once a plane."""
    seen = []
    monkeypatch.setattr(planes, "save_panels", lambda *args, **more: seen.append((*args[1:], more)))
    hu, pred = np.zeros((5, 20, 24), np.int16), np.zeros((5, 20, 24), np.uint8)
    pred[2:4, 5:9, 6:12] = 2
    target = pred if with_target else None
    look = {"palette": COLORS, "value_range": (-500, 1300)}
    save_planes(tmp_path / "p.png", hu, (4, 1, 1), pred, target, **look, title="case")
    rows, titles, more = seen[0]
    assert more["edges"] == [[letters] * len(rows[0]) for letters in ("RL", "RL", "AP")]
    assert [len(row) for row in rows] == [4 if with_target else 2] * 3
    assert [row[0].shape for row in rows] == [(20, 24), (20, 24), (20, 20)]
    assert titles[0][0] == "axial case" and titles[1][0] == "coronal" and "prediction" in titles[2]
    assert all(len(row) == len(names) for row, names in zip(rows, titles, strict=True))
    coloured = (rows[0][-2 if with_target else -1].std(axis=-1) > 0).sum()
    assert coloured == 24, "the prediction is drawn: 4 x 6 pixels"


def test_contours_around_one_label():
    """Cubes of 20 voxels of 1 mm and a margin of 10 mm: 40 mm on 40 pixels, so that a pixel is a voxel."""
    image, target, pred = np.full((60, 60, 60), 50), *np.zeros((2, 60, 60, 60), np.uint8)
    target[20:40, 20:40, 20:40], pred[20:40, 20:40, 20:40] = 2, 2
    target[0:5] = 1  # more than 10 mm away: not seen
    look = {"palette": COLORS, "value_range": (0, 255), "margin_mm": 10.0, "side": 40}
    pictures = contour_pictures(image, (1, 1, 1), pred * 0, target, 2, **look)
    assert [picture.shape for picture in pictures] == [(40, 40, 3)] * 4
    border = np.zeros((40, 40), bool)
    border[10:30, 10:30] = True
    border[11:29, 11:29] = False
    for picture in pictures[:3]:
        np.testing.assert_array_equal((picture == COLORS[1]).all(axis=-1), border)
        assert (picture[~border] == 50).all()
    only_pred = contour_pictures(image, (1, 1, 1), pred, target * 0, 2, **look)
    drawn = (only_pred[0] == COLORS[1]).all(axis=-1)
    assert (drawn & ~border).sum() == 0 and 0.4 < drawn.sum() / border.sum() < 0.6, "dashed"
    assert pictures[3][20, 20, 2] > 180 > pictures[3][20, 20, 0], "all of it is missed: blue"
    assert only_pred[3][20, 20, 0] > 180 > only_pred[3][20, 20, 2], "all of it is too much: orange"


def test_the_legend_names_what_is_there():
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[0], labels[1] = 15, 2
    colors = np.arange(48, dtype=np.uint8).reshape(16, 3)
    assert planes.legend_of(labels, {2: "kidney", 3: "liver", 15: "uterus"}, colors) == {
        "kidney": (6, 7, 8),
        "uterus": (45, 46, 47),
    }
    assert planes.legend_of(labels * 0, {}, colors) == {}


def test_a_close_up_cuts_through_structures_and_not_between_them():
    """Two structures of 6 x 4 x 4 voxels, left and right; the middle of both lies at the edge of one."""
    labels = np.zeros((40, 50, 60), np.uint8)
    labels[10:16, 20:24, 10:14], labels[10:16, 20:24, 40:44] = 1, 2
    labels[12, 21, 9] = 1
    assert planes.fullest(labels > 0) == (12, 21, 10)
    assert planes.fullest(labels < 0) == middle(labels < 0) == (20, 25, 30)
    assert planes.close_up_box(labels == 2, (2, 1, 1), 5) == ((7, 15, 35), (19, 29, 49))
    assert planes.close_up_box(labels == 2, (2, 1, 1), 500) == ((0, 0, 0), (40, 50, 60))
    assert planes.close_up_box(labels == 3, (2, 1, 1), 5) == ((0, 0, 0), (40, 50, 60))


@pytest.mark.parametrize("with_target", [False, True])
def test_panels_of_a_close_up(with_target, tmp_path, monkeypatch):
    """Two blocks of 6 x 4 x 3 voxels with a line of 8 towards the other one, where the middle lies."""
    seen = []
    monkeypatch.setattr(planes, "save_panels", lambda path, rows, titles, **_: seen.append(rows))
    grey, pred = np.zeros((40, 50, 60), np.int16), np.zeros((40, 50, 60), np.uint8)
    pred[10:16, 20:24, 10:13], pred[10:16, 20:24, 40:43] = 1, 2
    pred[12, 21, 13:21], pred[12, 21, 32:40] = 1, 2
    target = np.roll(pred, 2, axis=1) if with_target else None
    look = {"palette": COLORS, "value_range": (0, 1), "voxel_mm": 0.5, "margin_mm": 5.0}
    save_planes(tmp_path / "p.png", grey, (1, 1, 1), pred, target, **look)
    longer = 2 if with_target else 0
    assert [row[0].shape for row in seen[0]] == [(28 + 2 * longer, 86), (32, 86), (32, 28 + 2 * longer)]
    drawn = [(row[-2 if with_target else -1].std(axis=-1) > 0).sum() for row in seen[0]]
    if not with_target:
        assert drawn == [4 * (24 + 16), 4 * (36 + 16), 4 * 24], "the sagittal plane cuts one of the blocks"
