"""common/intensity.py: grey values by a fingerprint of the CT, or by the MR scan itself."""

import numpy as np
import pytest
import torch

from common.intensity import (
    CT_RANGE,
    Scaling,
    fingerprint,
    mr_scaling,
    scale,
    scale_by_own_values,
    stored_range,
    to_grey,
)


def test_fingerprint_by_hand():
    """0, 1, ..., 1000 in two cases: percentiles 5 and 995; cut there the mean is 500."""
    found = fingerprint([np.arange(400), np.arange(400, 1001)])
    assert found[:3] == pytest.approx((5, 995, 500))
    assert found.sd == pytest.approx(np.clip(np.arange(1001), 5, 995).std())
    with pytest.raises(ValueError, match="no training case has a labelled voxel"):
        fingerprint([])


def test_scaling_of_an_mr_leaves_out_the_air():
    """Seven parts of air with 0 to one part of body with 100 and 300."""
    volume = np.zeros((8, 10, 10))
    volume[0, :5], volume[0, 5:] = 100, 300
    assert mr_scaling(volume) == pytest.approx((0, 300, 200, 100))
    volume[1, 0, 0] = np.nan
    assert mr_scaling(volume) == pytest.approx((0, 300, 200, 100)), "a voxel that is no number does not count"
    assert mr_scaling(np.full((2, 2, 2), 7.0)).sd > 0
    with pytest.raises(ValueError, match="no finite value"):
        mr_scaling(np.full((2, 2, 2), np.inf))


def test_scale_of_each_item_by_itself():
    image = torch.tensor([-100.0, 0, 50, 1000]).view(1, 1, 1, 1, 4).repeat(2, 1, 1, 1, 1)
    scaled = scale(image, torch.tensor([[-50.0, 150, 50, 100], [0, 2000, 0, 1000]]))
    assert scaled[0].ravel().tolist() == [-1, -0.5, 0, 1]
    assert scaled[1].ravel().tolist() == pytest.approx([0, 0, 0.05, 1])
    assert torch.equal(scale(image.short(), Scaling(-50, 150, 50, 100))[0], scaled[0])
    assert stored_range("ct", None) == CT_RANGE and stored_range("mr", Scaling(3, 9, 5, 1)) == (3, 9)


def test_windows_are_scaled_by_their_own_values_whatever_lies_around_the_brain():
    brain = np.random.default_rng(0).normal(100, 10, (16, 16, 16)).astype(np.float32)
    bare = np.zeros((20, 16, 16), np.float32)  # four rows of blanked voxels
    bare[:16] = brain
    windows = torch.from_numpy(np.stack([bare, 7 * bare + 3]))[:, None]
    scaled = scale_by_own_values(windows)
    assert scaled.dtype == torch.float32 and scaled.shape == windows.shape
    torch.testing.assert_close(scaled[0], scaled[1], atol=2e-3, rtol=0)  # unit and offset of MR mean nothing
    inside = scaled[0, 0, :16]
    assert abs(inside.mean()) < 0.01 and 0.97 < inside.std() < 1.03
    low, high = np.percentile(brain, [1, 99])
    expected = (np.clip(brain, low, high) - np.clip(brain, low, high).mean()) / np.clip(
        brain, low, high
    ).std()
    np.testing.assert_allclose(inside.numpy(), expected, atol=0.02)


def test_a_window_without_contrast_becomes_zero():
    scaled = scale_by_own_values(torch.full((1, 1, 4, 4, 4), 5.0))
    assert torch.equal(scaled, torch.zeros(1, 1, 4, 4, 4))


# ---- grey values ----


def test_grey_values_by_hand():
    """201 values 1..201: percentiles 0.5 and 99.5 are 2 and 200, so 101 is half way, 127.5, an even 128."""
    values = np.concatenate([np.zeros(50), np.arange(1, 202)]).astype(np.float32)
    grey = to_grey(values)
    assert grey.dtype == np.uint8 and not grey[:50].any()
    assert grey[50:].tolist()[:3] == [1, 1, 1] and grey[-2:].tolist() == [255, 255] and grey[50 + 100] == 128
    assert (np.diff(grey[50:].astype(int)) >= 0).all() and grey[50:].min() == 1


def test_what_is_not_finite_is_background():
    values = np.array([[np.nan, np.inf, -np.inf, 5, 10, 15]])
    assert to_grey(values).tolist() == [[0, 0, 0, 1, 128, 255]]
    assert not to_grey(np.full((2, 2), np.nan)).any() and not to_grey(np.zeros((0, 3))).size


def test_one_value_is_not_background():
    assert (to_grey(np.full((3, 3), 7)) == 1).all()


def test_zero_is_a_value_where_values_are_negative_and_zeros_are_rare():
    """CT: -1000..1000 without a gap in grey values around water; z-scored brains: 0 is what was stripped."""
    ct = np.arange(-1000, 1001)
    assert 126 <= to_grey(ct)[1000] <= 129
    brain = np.concatenate([np.zeros(500), np.linspace(-2, 2, 500)])
    assert not to_grey(brain)[:500].any() and (to_grey(brain)[500:] > 0).all()
