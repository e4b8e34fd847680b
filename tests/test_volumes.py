"""common/volumes.py: resampling against other code and by property, slabs, boxes, values."""

import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from scipy import ndimage

from common import volumes
from common.nifti import open_nifti, write_nifti
from common.stored_values import clip_values
from common.volumes import (
    body_box,
    box_of,
    crop,
    crop_affine,
    expand_box,
    needed_rows,
    resample,
    resample_labels,
    resample_slab,
    resampled_affine,
    resampled_shape,
)

# Mixed: every combination of an axis that grows, shrinks, stays, or has one voxel.
SIZES = [
    ((9, 11, 13), (15, 20, 17)),
    ((15, 20, 17), (9, 11, 13)),
    ((9, 20, 13), (15, 11, 13)),
    ((20, 9, 13), (7, 15, 40)),
    ((1, 8, 9), (4, 4, 9)),
    ((8, 9, 1), (1, 30, 5)),
    ((7, 8, 9), (7, 8, 9)),
]


SMALL = (1, 2, 3, 5)  # all shapes of these sides to all others: 4,096 pairs


def random_volume(shape, dtype=np.float32):
    return np.random.default_rng(0).uniform(-1000, 1000, shape).astype(dtype)


def dense_weights(n_in, n_out):
    """(n_out, n_in) triangle weights, written out over all pairs."""
    ratio = n_in / n_out
    centres = (np.arange(n_out) + 0.5) * ratio - 0.5
    weights = 1 - np.abs(np.arange(n_in)[None] - centres[:, None]) / max(ratio, 1)
    weights = np.maximum(weights, 0)
    return weights / weights.sum(1, keepdims=True)


def dense_resample(volume, shape):
    weights = [dense_weights(a, b) for a, b in zip(volume.shape, shape, strict=True)]
    return np.einsum("zyx,az,by,cx->abc", volume.astype(np.float64), *weights)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint16, np.float64])
def test_growing_equals_scipy_at_the_same_coordinates(dtype):
    volume, shape = random_volume((9, 11, 13), np.float32).clip(0).astype(dtype), (15, 20, 17)
    centres = [(np.arange(b) + 0.5) * a / b - 0.5 for a, b in zip(volume.shape, shape, strict=True)]
    grid = np.meshgrid(*centres, indexing="ij")
    expected = ndimage.map_coordinates(volume.astype(np.float64), grid, order=1, mode="nearest")
    got = resample(volume, shape)
    assert got.dtype == np.float32 and got.shape == shape
    np.testing.assert_allclose(got, expected, atol=2e-3)


@pytest.mark.parametrize("size, shape", SIZES)
def test_equals_the_dense_formula(size, shape):
    volume = random_volume(size)
    np.testing.assert_allclose(resample(volume, shape), dense_resample(volume, shape), atol=2e-3)


def test_one_voxel_wide_planes_by_hand():
    """Half as many voxels: weights 1/4 3/4 3/4 1/4 of a whole; at the borders 3/7 3/7 1/7."""
    ramp = np.arange(8.0)
    expected = [(0 * 3 + 1 * 3 + 2) / 7, 2.5, 4.5, (5 + 6 * 3 + 7 * 3) / 7]
    for axis in range(3):
        size, shape = [1, 1, 1], [1, 1, 1]
        size[axis], shape[axis] = 8, 4
        np.testing.assert_allclose(resample(ramp.reshape(size), shape).ravel(), expected, rtol=1e-6)


def test_all_small_shapes_equal_the_dense_formula():
    """Every pair of shapes with sides of 1, 2, 3 or 5 voxels, in numpy's order and in torch's slabs."""
    shapes = list(itertools.product(SMALL, repeat=3))
    for size in shapes:
        volume = random_volume(size)
        for shape in shapes:
            np.testing.assert_allclose(
                resample(volume, shape), dense_resample(volume, shape), atol=2e-3, err_msg=f"{size} {shape}"
            )


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_slabs_in_any_memory_order_equal_the_dense_formula(order):
    """A slab may be a view with its axes in another order, as when a prediction streams along y or x."""
    for size, shape in (
        ((1, 6, 4), (1, 3, 1)),
        ((6, 4, 1), (3, 1, 2)),
        ((5, 7, 6), (4, 1, 8)),
        ((4, 1, 7), (4, 1, 1)),
    ):
        scores = torch.from_numpy(random_volume((2, *size)))
        stored = scores.permute(order).contiguous().permute(np.argsort(order).tolist())
        got = resample_slab(stored, 0, size[0], shape[0], (0, shape[0]), shape[1:])
        for channel, one in zip(got, scores, strict=True):
            np.testing.assert_allclose(channel, dense_resample(one.numpy(), shape), atol=2e-3)


@pytest.mark.parametrize("size, shape", SIZES)
def test_constant_stays_and_ramp_stays_away_from_the_borders(size, shape):
    np.testing.assert_allclose(resample(np.full(size, 7, np.int16), shape), 7, rtol=1e-6)
    for axis in range(3):
        ratio = size[axis] / shape[axis]
        ramp = np.moveaxis(
            np.broadcast_to(
                np.arange(size[axis], dtype=np.float32), (*size[:axis], *size[axis + 1 :], size[axis])
            ),
            -1,
            axis,
        )
        centres = (np.arange(shape[axis]) + 0.5) * ratio - 0.5
        inside = (centres - max(ratio, 1) >= -1) & (centres + max(ratio, 1) <= size[axis])
        got = np.moveaxis(resample(ramp, shape), axis, -1)[..., inside]
        whole_number = ratio <= 1 or float(ratio).is_integer()  # else the sampled triangle has a small tilt
        np.testing.assert_allclose(
            got, np.broadcast_to(centres[inside], got.shape), atol=1e-4 if whole_number else 0.1
        )


@pytest.mark.parametrize("shape", [(10, 8, 6), (13, 9, 11)])
def test_shrinking_keeps_the_mass_and_does_not_alias(shape):
    volume = np.zeros((30, 24, 18), np.float32)
    volume[8:20, 7:16, 5:12] = random_volume((12, 9, 7)) + 2000
    got = resample(volume, shape)
    assert got.sum() * volume.size / got.size == pytest.approx(
        volume.sum(), rel=1e-5 if shape[0] == 10 else 0.02
    )
    stripes = np.zeros((4, 4, 64), np.float32)
    stripes[..., ::2] = 1  # finer than the new grid can show
    np.testing.assert_allclose(resample(stripes, (4, 4, 16))[..., 1:-1], 0.5, atol=1e-6)


@pytest.mark.parametrize("slab_bytes", [1, 10**9])
@pytest.mark.parametrize("size, shape", SIZES)
def test_rows_and_slabs_equal_the_whole_bit_for_bit(monkeypatch, size, shape, slab_bytes):
    volume = random_volume(size)
    whole = resample(volume, shape)
    monkeypatch.setattr(volumes, "SLAB_BYTES", slab_bytes)
    np.testing.assert_array_equal(resample(volume, shape), whole)
    for first in range(shape[0]):
        for last in range(first + 1, shape[0] + 1):
            np.testing.assert_array_equal(resample(volume, shape, rows=(first, last)), whole[first:last])


@pytest.mark.parametrize("size, shape", SIZES)
def test_slab_of_scores_equals_channel_by_channel(size, shape):
    scores = torch.from_numpy(random_volume((3, *size)))
    whole = np.stack([resample(channel, shape) for channel in scores.numpy()])
    for rows in ((0, shape[0]), (shape[0] // 2, shape[0]), (0, 1)):
        first, last = needed_rows(rows, size[0], shape[0])
        for a, b in ((first, last), (0, size[0])):  # just what is needed, or more
            got = resample_slab(scores[:, a:b], a, size[0], shape[0], rows, shape[1:])
            np.testing.assert_array_equal(got.numpy(), whole[:, slice(*rows)])
    half = resample_slab(scores.half(), 0, size[0], shape[0], (0, shape[0]), shape[1:])
    assert half.dtype == torch.float16
    np.testing.assert_allclose(half.float().numpy(), whole, atol=1.5)  # 1000 has a step of 0.5


@pytest.mark.parametrize("size_in, size_out", [(9, 15), (15, 9), (100, 7), (5, 5), (1, 3), (3, 1)])
def test_needed_rows_are_those_with_a_weight(size_in, size_out):
    weights = dense_weights(size_in, size_out)
    for first in range(size_out):
        for last in range(first + 1, size_out + 1):
            used = np.flatnonzero((weights[first:last] > 1e-12).any(0))
            assert needed_rows((first, last), size_in, size_out) == (used[0], used[-1] + 1)


def test_only_the_needed_rows_are_read():
    class Volume:
        shape, rows = (40, 6, 7), []

        def __getitem__(self, at):
            self.rows.append((at.start, at.stop))
            return np.zeros((at.stop - at.start, 6, 7), np.int16)

    resample(Volume(), (60, 6, 7), rows=(30, 36))
    assert Volume.rows == [(19, 25)]


def test_a_file_is_resampled_without_loading_it(tmp_path):
    volume = random_volume((9, 11, 13), np.int16)
    write_nifti(tmp_path / "scan.nii.gz", volume, (3, 1, 2), orientation="LPS")
    np.testing.assert_array_equal(
        resample(open_nifti(tmp_path / "scan.nii.gz"), (15, 20, 8)), resample(volume, (15, 20, 8))
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: resample(np.zeros((2, 3)), (2, 3, 4)), "cannot resample (2, 3) to (2, 3, 4)"),
        (lambda: resample(np.zeros((2, 3, 4)), (2, 0, 4)), "cannot resample (2, 3, 4) to (2, 0, 4)"),
        (lambda: resample(np.zeros((2, 3, 4)), (2, 3, 4), rows=(1, 3)), "rows (1, 3) of a result"),
        (lambda: resample_slab(torch.zeros(1, 2, 3, 3), 4, 10, 20, (0, 4), (3, 3)),
         "output rows (0, 4) need input rows (0, 3), but the slab holds (4, 6)"),
        (lambda: resample_labels(np.full((2, 2, 2), -1), (2, 2, 2)), "labels -1..-1, expected whole"),
        (lambda: resample_labels(np.full((2, 2, 2), 0.5), (2, 2, 2)), "labels 0.5..0.5, expected"),
        (lambda: crop(np.zeros((2, 3, 4)), (0, 0, 0), (2, 3, 5)), "box (0, 0, 0) to (2, 3, 5) is not"),
        (lambda: crop(np.zeros((2, 3, 4)), (-1, 0, 0), (1, 1, 1)), "box (-1, 0, 0) to (1, 1, 1) is"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# ---- labels ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
@pytest.mark.parametrize("size, shape", SIZES)
def test_labels_equal_brute_force_argmax(monkeypatch, size, shape, dtype):
    coarse = np.random.default_rng(3).integers(0, 4, [-(-n // 3) for n in size])
    labels = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)[: size[0], : size[1], : size[2]]
    labels = np.array([0, 2, 5, 9])[labels].astype(dtype)
    values = np.unique(labels)
    expected = values[np.argmax([resample(labels == v, shape) for v in values], axis=0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for slab_bytes in (1, 10**9):
            monkeypatch.setattr(volumes, "SLAB_BYTES", slab_bytes)
            got = resample_labels(labels, shape)
            np.testing.assert_array_equal(got, expected)
            assert got.dtype == (np.uint8 if dtype == np.uint8 else np.uint16)
            middle = (shape[0] // 3, shape[0] // 3 + 1)
            np.testing.assert_array_equal(
                resample_labels(labels, shape, rows=middle), expected[slice(*middle)]
            )
        kept = np.where(np.isin(labels, [2, 9]), labels, 0)
        np.testing.assert_array_equal(resample_labels(labels, shape, [2, 9]), resample_labels(kept, shape))


def test_equal_scores_give_the_lower_label():
    with pytest.warns(UserWarning, match=r"labels \[3\] are gone"):
        assert resample_labels(np.array([[[3, 1]]], np.uint8), (1, 1, 1)).tolist() == [[[1]]]


def test_a_label_that_vanishes_is_named():
    labels = np.ones((9, 9, 9), np.uint8)
    labels[4, 4, 4] = 7
    with pytest.warns(UserWarning, match=r"labels \[7\] are gone after resampling \(9, 9, 9\) to"):
        assert (resample_labels(labels, (3, 3, 3)) == 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (resample_labels(labels, (27, 27, 27)) == 7).any()


# ---- geometry ----


def test_shape_and_affine_of_a_resampled_grid():
    assert resampled_shape((200, 512, 512), (1.5, 0.8, 0.8), (1, 1, 1)) == (300, 410, 410)
    assert resampled_shape((1, 2, 100), (1, 1, 1), (5, 5, 5)) == (1, 1, 20)


@pytest.mark.parametrize("shape", [(30, 20, 50), (9, 13, 8)])
def test_a_blob_stays_where_it_is_in_mm(shape):
    affine = np.array([[0.0, -0.8, 0.1, 12], [0.7, 0, 0, -40], [0, 0.2, 2.5, 100], [0, 0, 0, 1]])
    z, y, x = np.indices((24, 26, 28))
    volume = np.exp(-((z - 11.3) ** 2 + (y - 12.8) ** 2 + (x - 15.1) ** 2) / 18)

    def centre_mm(array, to_mm):
        return to_mm @ [*ndimage.center_of_mass(array)[::-1], 1]

    got = centre_mm(resample(volume, shape), resampled_affine(affine, volume.shape, shape))
    np.testing.assert_allclose(got, centre_mm(volume, affine), atol=0.02)
    start = (3, 5, 7)
    cropped = crop(volume, start, (24, 26, 28))
    corner = crop_affine(affine, start) @ [0, 0, 0, 1]
    np.testing.assert_allclose(corner, affine @ [7, 5, 3, 1])
    assert cropped[0, 0, 0] == volume[3, 5, 7]
    # The outer corners of the field of view stay too.
    new = resampled_affine(affine, volume.shape, shape)
    np.testing.assert_allclose(new @ [-0.5, -0.5, -0.5, 1], affine @ [-0.5, -0.5, -0.5, 1])
    ends = [[*np.subtract(s, 0.5)[::-1], 1] for s in (shape, volume.shape)]
    np.testing.assert_allclose(new @ ends[0], affine @ ends[1])


# ---- boxes ----


def test_crop():
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert crop(array, (1, 0, 2), (3, 4, 5)).shape == (2, 2, 4, 3)
    assert np.shares_memory(crop(array, (0, 0, 0), (1, 1, 1)), array)


def test_box_of_and_expand():
    mask = np.zeros((5, 6, 7), np.uint8)
    assert box_of(mask) is None
    mask[1, 2, 3] = mask[3, 2, 6] = 2
    assert box_of(mask) == ((1, 2, 3), (4, 3, 7))
    assert expand_box((1, 2, 3), (4, 3, 7), (2, 1, 1), mask.shape) == ((0, 1, 2), (5, 4, 7))
    assert expand_box((1, 2, 3), (4, 3, 7), 0, mask.shape) == ((1, 2, 3), (4, 3, 7))


@pytest.mark.parametrize("shape", [(20, 60, 60), (40, 300, 290)])
def test_body_box(shape):
    image = np.full(shape, -1000, np.int16)
    assert body_box(image) == ((0, 0, 0), shape)
    start, stop = (3, 13, 11), (shape[0] - 4, shape[1] - 21, shape[2] - 17)
    crop(image, start, stop)[...] = 40
    image[:, -4:, 2:-2] = 0  # the table, a smaller part
    seen = body_box(image)
    slack = [-(-n // 128) - 1 for n in shape]
    for got, exact, loose in zip(seen[0], start, slack, strict=True):
        assert exact - 2 * loose <= got <= exact
    for got, exact, loose in zip(seen[1], stop, slack, strict=True):
        assert exact <= got <= exact + 2 * loose
    assert body_box(image, margin_voxels=2) == expand_box(*seen, 2, shape)


# ---- values ----


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.int32])
def test_clip_values(dtype):
    values = np.array([-3024, -1024, 7, 3071, 30000], dtype)
    got = clip_values(values, (-1024, 3071))
    assert got.dtype == dtype and got.tolist() == [-1024, -1024, 7, 3071, 3071]
    assert clip_values(values, None) is values


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8])
def test_clip_values_of_types_that_cannot_hold_the_limits(dtype):
    values = np.array([0, 100], dtype)
    got = clip_values(values, (-1024, 70_000))
    assert got.dtype == dtype and got.tolist() == [0, 100]


def test_values_are_cut_before_they_are_weighed():
    """By hand: 0 and 30,000 HU averaged are 15,000, cut 3,071; cut first, (0 + 3,071) / 2."""
    volume = np.array([0, 30_000, -3024, 0], np.int16).reshape(4, 1, 1)
    got = resample(volume, (2, 1, 1), value_range=(-1024, 3071)).ravel()
    plain = resample(volume.clip(-1024, 3071), (2, 1, 1)).ravel()
    np.testing.assert_array_equal(got, plain)
    assert abs(got[0] - resample(volume, (2, 1, 1)).ravel()[0].clip(-1024, 3071)) > 500


def test_resampling_holds_a_few_rows_at_a_time(monkeypatch):
    """SLAB_BYTES bounds the rows of a slab, so that a long scan takes no more memory than a short one."""

    class Volume:
        shape, longest = (400, 16, 16), 0

        def __getitem__(self, at):
            Volume.longest = max(Volume.longest, at.stop - at.start)
            return np.zeros((at.stop - at.start, 16, 16), np.int16)

    row_bytes = 4 * (16 * 16 + 2 * 16 * 16)  # a row of the result and the two that it comes from
    monkeypatch.setattr(volumes, "SLAB_BYTES", 10 * row_bytes)
    resample(Volume(), (200, 16, 16))
    assert 20 <= Volume.longest <= 22, "10 rows of the result, and the neighbours of the outermost"
