"""common/windows.py: tiling by hand, weights as MONAI's, what is read around a box, predicted memory."""

import itertools

import numpy as np
import pytest
import torch

from common.volumes import resampled_shape
from common.windows import gaussian_weights, prediction_peak_mib, reading_box, window_starts


def test_window_starts_by_hand():
    assert window_starts(96, 96, 0.5) == window_starts(20, 96, 0.5) == [0]
    assert window_starts(97, 96, 0.5) == [0, 1]
    assert window_starts(200, 96, 0.5) == [0, 34, 69, 104]
    assert window_starts(30, 10, 0.0) == [0, 10, 20]
    assert window_starts(12, 10, 0.99) == [0, 1, 2]
    # In floating point 10 * (1 - 0.8) is a little below 2, and 10 * (1 - 0.7) a little above 3.
    assert window_starts(100, 10, 0.8) == list(range(0, 91, 2))
    assert window_starts(100, 10, 0.7) == list(range(0, 91, 3))


def test_window_starts_are_flush_even_and_overlap_enough():
    for size, patch, overlap in itertools.product(range(1, 60), (1, 7, 16), (0.0, 0.25, 0.5, 0.8, 0.95)):
        starts = window_starts(size, patch, overlap)
        gaps = np.diff(starts)
        assert starts[0] == 0 and starts[-1] == max(size - patch, 0)
        assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
        assert all(patch - gap >= min(patch * overlap, patch - 1) - 1e-9 for gap in gaps)


@pytest.mark.parametrize("bad", [(0, 4, 0.5), (4, 0, 0.5), (4, 4, 1.0), (4, 4, -0.1)])
def test_window_starts_refuses(bad):
    with pytest.raises(ValueError, match=r"patch \d on \d voxels, overlap"):
        window_starts(*bad)


def test_gaussian_weights():
    weights = gaussian_weights((9, 16, 5))
    assert weights.shape == (9, 16, 5) and weights.dtype == torch.float32
    assert weights.min() == pytest.approx(1e-3) and weights.max() <= 1
    assert torch.equal(weights, weights.flip(0, 1, 2))
    assert gaussian_weights((9, 9, 9))[4, 4, 4] == 1
    assert gaussian_weights((9, 9, 9))[4, 4, 5] == pytest.approx(np.exp(-0.5 * (8 / 9) ** 2))


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 12, 9), (3, 2, 1)])
def test_gaussian_weights_are_monais(patch):
    utils = pytest.importorskip("monai.data.utils")
    expected = utils.compute_importance_map(patch, mode="gaussian", sigma_scale=0.125)
    torch.testing.assert_close(gaussian_weights(patch), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "box, expected",
    [
        ((20, 60), (20, 60)),  # as large as the patch of 32 or larger: as it is
        ((40, 50), (29, 61)),  # 22 more, 11 on either side
        ((40, 51), (30, 62)),  # 21 more: the odd one behind
        ((0, 10), (0, 32)),  # the scan begins there
        ((95, 100), (68, 100)),  # and ends there
        ((3, 9), (0, 32)),
    ],
)
def test_reading_box_by_hand(box, expected):
    for axis in range(3):
        shape, spacing, working, patch = [40, 40, 40], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [8, 8, 8]
        start, stop = [5, 5, 5], [20, 20, 20]
        shape[axis], start[axis], stop[axis], patch[axis] = 100, *box, 16
        spacing[axis], working[axis] = 1.5, 3.0  # 16 voxels of 3 mm are 32 of 1.5 mm
        read = reading_box((start, stop), shape, spacing, working, patch)
        assert (read[0][axis], read[1][axis]) == expected
        others = [a for a in range(3) if a != axis]
        assert all((read[0][a], read[1][a]) == (5, 20) for a in others)


def test_reading_box_of_a_scan_smaller_than_the_patch_is_the_scan():
    read = reading_box(((3, 3, 3), (5, 5, 5)), (9, 6, 7), (1, 1, 1), (1, 1, 1), (16, 16, 16))
    assert read == ((0, 0, 0), (9, 6, 7))


def test_reading_box_holds_a_patch_and_does_not_grow_twice():
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape, patch = rng.integers(5, 90, 3), rng.integers(1, 40, 3)
        spacing, working = rng.uniform(0.3, 4, 3), rng.uniform(0.5, 3, 3)
        start = rng.integers(0, shape)
        stop = rng.integers(start + 1, shape + 1)
        read = reading_box((start, stop), shape, spacing, working, patch)
        low, high = np.array(read)
        assert (0 <= low).all() and (low <= start).all() and (stop <= high).all() and (high <= shape).all()
        whole = high - low == shape
        assert (whole | (np.array(resampled_shape(high - low, spacing, working)) >= patch)).all()
        assert np.array_equal(reading_box(read, shape, spacing, working, patch), read)


def test_peak_does_not_grow_with_length_but_for_the_labels():
    options = dict(
        spacing_mm=(1, 1, 1), working_spacing_mm=(1, 1, 1), patch_shape=(96, 96, 96), num_classes=16
    )
    short, long = (prediction_peak_mib((n, 300, 300), **options).host_mib for n in (400, 1600))
    assert long - short == pytest.approx(1200 * 300 * 300 / 2**20)
    assert prediction_peak_mib((400, 300, 300), **options, network_mib=500).host_mib > short


def test_peak_knows_which_device_holds_the_sums():
    options = dict(
        spacing_mm=(1, 1, 1), working_spacing_mm=(1, 1, 1), patch_shape=(96, 96, 96), num_classes=16
    )
    sums_mib = 17 * 96 * 300 * 300 * 4 / 2**20
    on_cpu = prediction_peak_mib((400, 300, 300), **options, device="cuda", accumulate_on="cpu")
    on_gpu = prediction_peak_mib((400, 300, 300), **options, device="cuda", accumulate_on="cuda")
    assert on_cpu.host_mib > sums_mib > on_cpu.device_mib > 2 * 16 * 96**3 * 4 / 2**20
    assert on_gpu.device_mib > sums_mib > on_gpu.host_mib
