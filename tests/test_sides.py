"""common/sides.py: left and right by world coordinates. More, in files: tests/test_amygdala_data.py."""

from types import SimpleNamespace

import numpy as np
import pytest

from common.sides import head_middle, split_sides, why_exchanged, world_x

AFFINE = np.diag([2.0, 1, 1, 1])
AFFINE[0, 3] = -40


def head():
    """A scan of 41 columns of 2 mm, bright from 10 to 30, so that its middle lies at x = 0; a mask of both
    sides, 3 columns each, and a crumb on the right."""
    image, mask = np.zeros((5, 6, 41), np.float32), np.zeros((5, 6, 41), bool)
    image[..., 10:31] = 100
    mask[2, 2:4, 11:14] = mask[2, 2:4, 27:30] = mask[4, 5, 22] = True
    return SimpleNamespace(array=image, shape=image.shape, affine=AFFINE, path=None), mask


def test_world_coordinates_and_the_middle_of_a_head():
    assert world_x((0, 0, 20), AFFINE) == 0 and world_x((3, 4, 21), AFFINE) == 2
    assert head_middle(head()[0]) == pytest.approx(0)


def test_a_mask_of_both_sides_is_split():
    scan, mask = head()
    labels = split_sides(mask, scan.affine, scan)
    assert labels.dtype == np.uint8 and np.array_equal(labels > 0, mask)
    assert labels[2, 2, 12] == 1 and labels[2, 2, 28] == 2 and labels[4, 5, 22] == 2
    np.testing.assert_array_equal(split_sides(mask, AFFINE, None), labels)
    scan.affine = AFFINE * np.array([[-1], [1], [1], [1]])  # x falls along the array
    assert split_sides(mask, scan.affine, scan)[2, 2, 12] == 2
    mask[..., 20:] = False
    scan.affine = AFFINE
    with pytest.raises(ValueError, match="not two pieces at least 20 mm apart"):
        split_sides(mask, scan.affine, None)
    with pytest.raises(ValueError, match="lies left of the middle of the head"):
        split_sides(mask, scan.affine, scan)


def test_exchanged_sides_are_told():
    scan, mask = head()
    labels, names = split_sides(mask, scan.affine, scan), {1: "left ear", 2: "right ear"}
    assert why_exchanged(labels, AFFINE, [(1, 2)], names) == ""
    assert "left ear (2)" not in why_exchanged(labels, AFFINE, [(2, 1)], names)
    wrong = why_exchanged((3 - labels) * mask, AFFINE, [(1, 2)], names)
    assert wrong.startswith("left and right are exchanged: left ear (1) is centred at x = ")
    assert wrong.endswith("exchange the two labels, or correct the orientation")
    assert why_exchanged((labels == 1) * 2, AFFINE, [(1, 2)], names) == "", "one side alone"
