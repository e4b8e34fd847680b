"""common/inference.py against sums over the whole volume, against MONAI, and by what it allocates."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from common import grids, inference
from common.hardware import Precision
from common.hdf5 import CaseFile, write_case
from common.inference import predict_labels, stream_scores, warn_of_memory
from common.memory import StorageCounter
from common.patches import patch_start
from common.windows import gaussian_weights, prediction_peak_mib, window_starts

CPU = torch.device("cpu")


def as_it_is(x):
    return x


def copy_network(x):
    """Scores that are the input: stitching must give the image back."""
    return x.clone()


def random_volume(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv_network(num_classes, channels=1):
    torch.manual_seed(0)
    return nn.Conv3d(channels, num_classes, 3, padding=1).eval()


def stitched(network, volume, patch, num_classes, axis=0, **options):
    """All slabs of stream_scores in one tensor; checks that they follow each other."""
    options = {"device": CPU, "prepare": as_it_is, "on_message": lambda line: None} | options
    slabs, end = [], 0
    for start, stop, slab in stream_scores(network, volume, patch, num_classes, axis=axis, **options):
        assert start == end < stop and slab.shape[axis + 1] == stop - start
        slabs.append(slab.clone())
        end = stop
    assert end == volume.shape[axis - 3]
    return torch.cat(slabs, dim=axis + 1)


def labels_of(network, volume, num_classes, **options):
    defaults = dict(spacing_mm=(1, 1, 1), working_spacing_mm=(1, 1, 1), patch_shape=(16, 16, 16))
    defaults |= dict(prepare=as_it_is, device=CPU, on_message=lambda line: None)
    return predict_labels(network, volume, num_classes=num_classes, **(defaults | options))


def whole_at_once(network, volume, patch, num_classes, overlap):
    """Scores (K, Z, Y, X) from sums that span the volume, its edges repeated around it."""
    image = torch.from_numpy(volume)[None, None]
    missing = [max(p - s, 0) for p, s in zip(patch, volume.shape, strict=True)]
    around = [part for m in reversed(missing) for part in (m // 2, m - m // 2)]
    image = F.pad(image, around, mode="replicate")
    weights = gaussian_weights(patch)
    total, weight_sum = torch.zeros(num_classes, *image.shape[2:]), torch.zeros(image.shape[2:])
    starts = [window_starts(s, p, overlap) for s, p in zip(volume.shape, patch, strict=True)]
    with torch.no_grad():
        for corner in itertools.product(*starts):
            where = tuple(slice(s, s + p) for s, p in zip(corner, patch, strict=True))
            total[(slice(None), *where)] += network(image[(..., *where)])[0] * weights
            weight_sum[where] += weights
    inner = tuple(slice(m // 2, m // 2 + s) for m, s in zip(missing, volume.shape, strict=True))
    return (total / weight_sum)[(slice(None), *inner)]


# ---- scores ----


@pytest.mark.parametrize("shape", [(37, 21, 19), (18, 41, 23), (17, 20, 39), (5, 31, 9), (7, 6, 5)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_copying_network_gives_the_image_back(shape, axis):
    volume = random_volume(shape)
    scores = stitched(copy_network, volume, (16, 12, 10), 1, axis, batch_size=3)
    np.testing.assert_allclose(scores[0].numpy(), volume, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
def test_streaming_equals_sums_over_the_whole_volume(axis, overlap):
    network, patch = conv_network(3), (12, 8, 10)
    for shape in ((29, 17, 23), (10, 30, 7)):
        volume = random_volume(shape)
        expected = whole_at_once(network, volume, patch, 3, overlap)
        scores = stitched(network, volume, patch, 3, axis, overlap=overlap, batch_size=2)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(32, 24, 48), (24, 40, 16), (10, 24, 24), (7, 24, 5)])
def test_same_as_monai_where_tilings_coincide(shape):
    inferers = pytest.importorskip("monai.inferers")
    network, volume = conv_network(3), random_volume(shape)
    with torch.no_grad():
        image = torch.from_numpy(volume)[None, None]
        expected = inferers.sliding_window_inference(
            image, (16, 16, 16), 2, network, overlap=0.5, mode="gaussian", sigma_scale=0.125,
            padding_mode="replicate",
        )[0]  # fmt: skip
    for axis in range(3):
        scores = stitched(network, volume, (16, 16, 16), 3, axis)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    labels = labels_of(network, volume, 3)
    assert np.array_equal(labels, expected.argmax(dim=0).numpy())


def test_channels_go_to_the_network_together():
    network, volume = conv_network(2, channels=3), random_volume((3, 9, 20, 11))
    scores = stitched(network, volume, (9, 20, 11), 2)
    torch.testing.assert_close(
        scores, network(torch.from_numpy(volume)[None])[0].detach(), atol=1e-5, rtol=1e-5
    )
    assert stitched(network, volume, (8, 8, 8), 2, 1).shape == (2, 9, 20, 11)


def test_rows_are_read_once_and_in_order():
    volume, seen = random_volume((40, 9, 11)), []

    class Lazy:
        shape = volume.shape

        def __getitem__(self, where):
            seen.extend(range(*where[0].indices(40)))
            return volume[where]

    scores = stitched(copy_network, Lazy(), (8, 8, 8), 1)
    np.testing.assert_allclose(scores[0].numpy(), volume, atol=1e-5)
    assert seen == list(range(40))


def test_flips_are_turned_back_and_averaged():
    """A network that adds its x coordinate: mirrored passes average to the middle, whatever the image."""

    def ramp(x):
        return x + torch.arange(x.shape[-1]) * 1.0

    volume = random_volume((8, 8, 8))
    scores = stitched(ramp, volume, (8, 8, 8), 1, flips=((), (2,)))
    np.testing.assert_allclose(scores[0].numpy(), volume + 3.5, atol=1e-5)
    scores = stitched(ramp, volume, (8, 8, 8), 1, flips=((2,),))
    np.testing.assert_allclose(scores[0].numpy(), volume + np.arange(7, -1, -1), atol=1e-5)
    eight = [c for n in range(4) for c in itertools.combinations(range(3), n)]
    scores = stitched(
        as_it_is, volume, (8, 8, 8), 1, flips=eight
    )  # gives its input back: must not be changed
    np.testing.assert_allclose(scores[0].numpy(), volume, atol=1e-5)


def test_classes_change_places_in_a_mirror():
    """A network that calls the right half of what it sees 1 and the left half 2."""

    def by_side(x):
        right = (torch.arange(x.shape[-1]) >= x.shape[-1] / 2).float().expand(x.shape)
        return torch.cat([torch.zeros_like(x), right, 1 - right], 1)

    volume = random_volume((8, 8, 8))
    plain = stitched(by_side, volume, (8, 8, 8), 3).numpy()
    every = ((), (0,), (1,), (2,), (0, 2))
    swapped = stitched(by_side, volume, (8, 8, 8), 3, flips=every, mirrored_classes=(0, 2, 1)).numpy()
    np.testing.assert_allclose(swapped, plain, atol=1e-6)
    kept = stitched(by_side, volume, (8, 8, 8), 3, flips=every).numpy()
    np.testing.assert_allclose(kept[1], np.where(np.arange(8) >= 4, 0.6, 0.4) + 0 * volume, atol=1e-6)


@pytest.mark.parametrize("working_mm", [1.0, 2.0])
def test_probability_maps_are_the_softmax_inside_the_box(working_mm):
    """Scores 0, ln 3 and 0 where the image is 1: by hand 0.2, 0.6, 0.2, that is 51, 153, 51 of 255."""

    def network(x):
        return torch.cat([torch.zeros_like(x), np.log(3) * x, torch.zeros_like(x)], 1)

    volume, box = np.ones((40, 20, 22), np.float32), ((5, 4, 3), (30, 15, 12))
    maps = {k: np.zeros(volume.shape, np.uint8) for k in (1, 2)}
    spacing = {"working_spacing_mm": (working_mm,) * 3, "patch_shape": (8, 8, 8)}
    labels = labels_of(network, volume, 3, **spacing, box=box, probabilities=maps)
    inside = np.zeros(volume.shape, bool)
    inside[5:30, 4:15, 3:12] = True
    np.testing.assert_array_equal(maps[1], np.where(inside, 153, 0))
    np.testing.assert_array_equal(maps[2], np.where(inside, 51, 0))
    np.testing.assert_array_equal(labels, inside)


def test_bf16_network_and_float32_sums():
    network, volume = conv_network(2), random_volume((20, 12, 12))
    exact = stitched(network, volume, (8, 8, 8), 2)
    rough = stitched(network, volume, (8, 8, 8), 2, precision=Precision("bf16", torch.bfloat16, False, ""))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.03


def test_network_runs_without_gradients_and_its_caller_keeps_them():
    for _, _, slab in stream_scores(
        conv_network(2), random_volume((20, 8, 8)), (8, 8, 8), 2, device=CPU, prepare=as_it_is
    ):
        assert not slab.requires_grad and not slab.is_inference()
        assert torch.ones(1, requires_grad=True).exp().requires_grad


# ---- beyond the border ----


class Sum(nn.Module):
    """Sees far: each score is the sum of a window, so that any voxel that is filled otherwise shows."""

    def forward(self, x):
        return x.sum(dim=(2, 3, 4), keepdim=True).expand_as(x)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5, 20, 20), (20, 5, 20), (20, 20, 5), (5, 6, 7), (1, 9, 30), (1, 1, 1)])
def test_windows_see_the_edge_repeated(shape, axis):
    """By numpy's own padding: the volume in the middle of what windows see, whatever is streamed along."""
    volume, patch = random_volume(shape), (16, 12, 10)
    scores = stitched(Sum(), volume, patch, 1, axis)
    missing = [max(p - s, 0) for p, s in zip(patch, shape, strict=True)]
    padded = np.pad(volume, [(m // 2, m - m // 2) for m in missing], mode="edge")
    large = torch.from_numpy(padded)
    expected = stitched(Sum(), large.numpy(), patch, 1, axis)
    inner = tuple(slice(m // 2, m // 2 + s) for m, s in zip(missing, shape, strict=True))
    torch.testing.assert_close(scores, expected[(slice(None), *inner)], atol=1e-3, rtol=1e-4)
    if all(s <= p for s, p in zip(shape, patch, strict=True)):
        assert scores.flatten()[0].item() == pytest.approx(float(padded.sum(dtype=np.float64)), abs=1e-2)


def test_training_patches_and_prediction_see_the_same(tmp_path):
    """A scan shorter than the patch, read as a patch of training and by prediction."""
    volume = np.random.default_rng(0).integers(-1000, 1000, (9, 20, 7)).astype(np.int16)
    write_case(tmp_path / "a.h5", volume, attributes={"spacing_mm": (1, 1, 1)})
    case, patch, seen = CaseFile(tmp_path / "a.h5"), (16, 20, 12), []

    def network(x):
        seen.append(x.clone())
        return x.clone()

    labels_of(network, case.image, 1, patch_shape=patch)
    start = patch_start((4, 10, 3), patch, volume.shape)
    assert len(seen) == 1 and start == (-3, 0, -2)
    np.testing.assert_array_equal(seen[0][0, 0].numpy(), case.read_image(start, patch))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_around_a_small_box_the_scan_itself_is_seen(axis):
    """A box of 4 rows, a patch of 16: the window holds the scan's own rows, and edges beyond its end only."""
    shape, seen = (30, 30, 30), []
    volume = random_volume(shape)

    def network(x):
        seen.append(x.clone())
        return x.clone()

    start, stop = [0, 0, 0], [30, 30, 30]
    start[axis], stop[axis] = 13, 17
    labels = labels_of(network, volume, 1, box=(tuple(start), tuple(stop)), patch_shape=(16, 30, 30))
    if axis == 0:
        assert len(seen) == 1
        np.testing.assert_array_equal(seen[0][0, 0].numpy(), volume[7:23])
    expected = np.zeros(shape, np.uint8)
    inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    expected[inside] = volume[inside] > 0
    np.testing.assert_array_equal(labels, expected)


def test_nothing_is_read_that_no_window_needs():
    shape, read = (200, 20, 20), []

    class Lazy:
        def __getitem__(self, where):
            read.append(where[0])
            return np.zeros(shape, np.int16)[where]

    Lazy.shape = shape
    labels_of(copy_network, Lazy(), 1, box=((100, 0, 0), (104, 20, 20)), patch_shape=(16, 20, 20))
    rows = sorted(row for part in read for row in range(part.start, part.stop))
    assert rows == list(range(94, 110)), "a patch around the box, each row once"


# ---- values ----


@pytest.mark.parametrize("working_mm", [1.0, 2.3, 0.6])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_metal_and_padding_change_nothing_beside_them(working_mm, dtype):
    """30,000 HU beside tissue: the labels are those of the scan that is cut to the range beforehand."""
    volume = (300 * random_volume((40, 30, 30))).astype(dtype)
    volume[10:13, 12:15, 5:20], volume[:, :, :3], volume[38:] = 30_000, -3024, -3024
    options = dict(working_spacing_mm=(working_mm,) * 3, spacing_mm=(1, 1, 1))
    expected = labels_of(lambda x: x - 100, volume.clip(-1024, 3071), 1, **options)
    labels = labels_of(lambda x: x - 100, volume, 1, value_range=(-1024, 3071), **options)
    assert np.array_equal(labels, expected)
    if working_mm != 1.0:
        spoilt = labels_of(lambda x: x.clamp(-1024, 3071) - 100, volume, 1, **options)
        assert (spoilt != expected).any(), "cut after resampling, the voxels beside change"


def test_the_highest_score_wins_and_not_a_threshold():
    """Scores that are all negative, and scores that are all positive, name a class as well."""
    volume = random_volume((20, 16, 16))
    for shift in (-50.0, 0.0, 50.0):

        def network(x, shift=shift):
            return torch.cat([x, -x, 0.5 - x], dim=1) + shift

        expected = np.argmax([volume, -volume, 0.5 - volume], axis=0)
        assert np.array_equal(labels_of(network, volume, 3), expected)
        assert set(np.unique(expected)) == {0, 2}


# ---- air, memory shortage, bad input ----


def test_air_is_skipped_and_counted():
    volume = np.full((16, 16, 64), -1000, np.int16)
    volume[:, :, :16] = 40
    seen, lines = [], []

    def network(x):
        seen.append(len(x))
        return torch.cat([torch.zeros_like(x), x], dim=1)

    labels = labels_of(network, volume, 2, air_below=-500, on_message=lines.append)
    assert sum(seen) == 2, "windows at x = 0 and 8; those at 16, 24, ... 48 hold only air"
    assert lines[-1] == "5 of 7 windows held only air and were skipped"
    assert labels[:, :, :16].all() and not labels[:, :, 16:].any()
    binary = stitched(as_it_is, volume.astype(np.float32), (16, 16, 16), 1, 2, skip=lambda w: w.max() < -500)
    assert torch.allclose(binary[..., 32:], torch.tensor(-10.0))


def test_batch_is_halved_when_memory_runs_out():
    tried, lines, volume = [], [], random_volume((30, 20, 20))

    def network(x):
        tried.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return x.clone()

    options = dict(batch_size=8, on_message=lines.append)
    scores = stitched(network, volume, (8, 8, 8), 1, **options)
    np.testing.assert_allclose(scores[0].numpy(), volume, atol=1e-5)
    assert tried[:4] == [8, 4, 2, 2] and max(tried[3:]) == 2
    assert lines == [f"cpu is out of memory: going on with {n} windows at a time" for n in (4, 2)]


@pytest.mark.parametrize(
    "words", ["CUDA out of memory.", "DefaultCPUAllocator: not enough memory: you tried"]
)
def test_no_memory_for_one_window_says_what_to_do(words):
    def network(x):
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=r"one window of \(8, 8, 8\): use a smaller --patch_size$"):
        stitched(network, random_volume((9, 9, 9)), (8, 8, 8), 1, batch_size=2)


def test_other_errors_of_the_network_pass():
    def network(x):
        raise RuntimeError("weight has 3 channels")

    with pytest.raises(RuntimeError, match="3 channels"):
        stitched(network, random_volume((9, 9, 9)), (8, 8, 8), 1)


def test_bad_input_is_refused():
    volume = random_volume((9, 9, 9))
    with pytest.raises(ValueError, match=r"the network gives \(1, 1, 8, 8, 8\) .* expected 2 classes"):
        stitched(copy_network, volume, (8, 8, 8), 2)
    with pytest.raises(ValueError, match="NaN or infinite scores in rows 0 to 1 of axis 0"):
        stitched(lambda x: x / 0, volume, (8, 8, 8), 1)
    with pytest.raises(ValueError, match=r"volume \(9, 9\), patch"):
        next(stream_scores(copy_network, volume[0], (8, 8, 8), 1, device=CPU, prepare=as_it_is))
    with pytest.raises(ValueError, match="threshold 0.5: labels hold"):
        labels_of(copy_network, volume, 2, threshold=0.5)
    with pytest.raises(ValueError, match="box .* not inside"):
        labels_of(copy_network, volume, 1, box=((0, 0, 0), (9, 9, 10)))


# ---- labels on the scan's grid ----


def ball(shape, spacing_mm):
    """Smooth int16 bump in the middle of the field of view; above 0 within 60 % of its shortest side."""
    axes = [(np.arange(n) + 0.5) * s - n * s / 2 for n, s in zip(shape, spacing_mm, strict=True)]
    radius_mm = 0.3 * min(n * s for n, s in zip(shape, spacing_mm, strict=True))
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    return (1000 * (1 - np.sqrt(z**2 + y**2 + x**2) / radius_mm)).astype(np.int16)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize(
    "shape,spacing_mm",
    [
        ((40, 56, 50), (1.5, 0.9, 1.0)),
        ((22, 60, 50), (3.0, 1.0, 1.0)),  # thick slices: the working grid has more rows
        ((52, 22, 50), (1.0, 3.0, 1.0)),
        ((120, 50, 51), (0.6, 0.9, 0.9)),
        ((50, 40, 131), (1.0, 1.0, 0.6)),
        ((24, 90, 90), (5.0, 0.8, 0.8)),
    ],
)
def test_labels_lie_on_the_scans_grid(shape, spacing_mm):
    volume = ball(shape, spacing_mm)
    labels = labels_of(copy_network, volume, 1, spacing_mm=spacing_mm, working_spacing_mm=(1.2, 1.2, 1.2))
    assert labels.shape == shape and labels.dtype == np.uint8
    assert dice(labels > 0, volume > 0) > 0.99


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_thick_rows_need_rows_of_several_slabs(order):
    """6 mm rows from a 1 mm working grid in slabs of 4 rows: equal to the interpolation of all scores."""
    from common.volumes import resample, resampled_shape

    shape, spacing_mm = (tuple(np.array(v)[list(order)]) for v in ((15, 24, 24), (6.0, 1.0, 1.0)))
    volume, network = random_volume(shape), conv_network(3)
    patch = (8, 8, 8)
    labels = labels_of(
        network, volume, 3, spacing_mm=spacing_mm, working_spacing_mm=(1, 1, 1), patch_shape=patch
    )
    working = resample(volume, resampled_shape(shape, spacing_mm, (1, 1, 1)))
    scores = whole_at_once(network, working, patch, 3, 0.5)
    native = np.stack([resample(part.numpy(), shape) for part in scores])
    top = np.sort(native, axis=0)
    decided = top[-1] - top[-2] > 1e-4
    assert decided.mean() > 0.99
    assert np.array_equal(labels[decided], native.argmax(axis=0)[decided])


def test_threshold_is_of_the_sigmoid():
    volume = random_volume((20, 16, 16))
    for threshold in (0.2, 0.5, 0.9):
        labels = labels_of(copy_network, volume, 1, threshold=threshold)
        assert np.array_equal(labels, 1 / (1 + np.exp(-volume)) > threshold)
    assert np.array_equal(labels_of(copy_network, volume, 1), volume > 0)


def test_only_the_box_is_predicted():
    volume, box = ball((40, 40, 60), (1, 1, 1)), ((5, 10, 20), (30, 40, 50))
    inside = tuple(slice(a, b) for a, b in zip(*box, strict=True))
    labels = labels_of(copy_network, volume, 1, box=box)
    assert np.array_equal(labels[inside], volume[inside] > 0) and labels.any()
    labels[inside] = 0
    assert not labels.any() and labels.shape == volume.shape


def test_hdf5_and_channels_are_read_where_they_lie(tmp_path):
    h5py = pytest.importorskip("h5py")
    volume = random_volume((2, 12, 14, 33))
    network, options = conv_network(3, channels=2), dict(spacing_mm=(2, 1, 1), working_spacing_mm=(1, 1, 1))
    expected = labels_of(network, volume, 3, **options)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["image"] = volume
        assert np.array_equal(labels_of(network, file["image"], 3, **options), expected)
        options["box"] = (2, 0, 1), (12, 13, 30)
        assert np.array_equal(
            labels_of(network, file["image"], 3, **options), labels_of(network, volume, 3, **options)
        )


def test_progress_and_peak_are_told():
    lines, steps = [], []
    labels_of(
        copy_network,
        random_volume((40, 16, 16)),
        1,
        progress=lambda done, total: steps.append((done, total)),
        on_message=lines.append,
    )
    assert steps == [(i, 4) for i in range(1, 5)]
    assert lines[0].startswith("predicting 40 x 16 x 16 voxels takes up to ")


# ---- memory ----


@pytest.mark.parametrize("working_mm", [1.0, 1.6, 0.7])
@pytest.mark.parametrize(
    "num_classes,flips,options",
    [(1, (), {}), (12, (), {}), (12, ((), (2,)), {}), (12, ((), (2,)), {"mirrored_classes": range(12)})],
)
def test_peak_is_an_upper_bound_and_close(working_mm, num_classes, flips, options):
    volume = np.zeros((100, 60, 70), np.int16)

    def network(x):
        return x.new_zeros(len(x), num_classes, *x.shape[2:])

    spacing = dict(spacing_mm=(1, 1, 1), working_spacing_mm=(working_mm,) * 3, patch_shape=(24, 24, 24))
    with StorageCounter(hollow=False) as counter:
        if options:  # besides, maps of three classes, which the caller holds
            options = options | {"probabilities": {k: np.zeros(volume.shape, np.uint8) for k in (1, 2, 3)}}
        labels_of(network, volume, num_classes, **spacing, flips=flips, batch_size=2, **options)
    peak = prediction_peak_mib(volume.shape, *spacing.values(), num_classes, batch_size=2)
    measured_mib = counter.peak / 2**20 + volume.size / 2**20  # the labels are not a tensor
    assert measured_mib < peak.host_mib < 2 * measured_mib
    assert peak.device_mib == 0


@pytest.mark.parametrize("shape,patch,axis", [((30, 40, 50), (8, 8, 8), 2), ((40, 50, 60), (8, 16, 24), 0)])
def test_it_streams_along_the_axis_longest_in_patches(shape, patch, axis):
    seen = []

    class Lazy:
        def __getitem__(self, where):
            whole = [part == slice(0, n) for part, n in zip(where, shape, strict=True)]
            seen.append(whole.index(False))
            return np.zeros(shape, np.int16)[where]

    Lazy.shape = shape
    labels_of(copy_network, Lazy(), 1, patch_shape=patch)
    assert set(seen) == {axis}


def test_a_longer_scan_needs_no_more_memory():
    """Peak of the process above its imports, for 100 and for 800 slices of 12 classes."""
    code = """
import sys
import numpy as np, torch
from common.hardware import peak_memory_mib
from common.inference import predict_labels
torch.set_num_threads(1)
before = peak_memory_mib(torch.device("cpu"))
volume = np.zeros((int(sys.argv[1]), 100, 100), np.int16)
network = lambda x: x.new_zeros(len(x), 12, *x.shape[2:])
predict_labels(network, volume, spacing_mm=(1, 1, 1), working_spacing_mm=(1, 1, 1), patch_shape=(32, 96, 96),
               num_classes=12, prepare=lambda x: x, device="cpu", overlap=0.25)
print(peak_memory_mib(torch.device("cpu")) - before)
"""
    peaks = []
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else it varies what free() keeps
    for slices in (100, 800):
        done = subprocess.run(
            [sys.executable, "-c", code, str(slices)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(float(done.stdout.splitlines()[-1]))
    labels_and_scan_mib = 700 * 100 * 100 * 3 / 2**20
    whole_sums_mib = 12 * 700 * 100 * 100 * 4 / 2**20
    assert peaks[1] - peaks[0] - labels_and_scan_mib < 0.1 * whole_sums_mib


def test_few_rows_are_read_at_a_time(monkeypatch):
    shape, read = (40, 16, 16), []

    class Lazy:
        def __getitem__(self, where):
            read.append(where[0].stop - where[0].start)
            return np.zeros(shape, np.int16)[where]

    Lazy.shape = shape
    monkeypatch.setattr(inference, "READ_ROWS", 5)
    labels_of(copy_network, Lazy(), 1)
    assert sum(read) == 40 and max(read) == 5


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_become_those_of_the_scan_a_few_rows_at_a_time(rows, monkeypatch):
    """60 rows from 20: CHUNK_BYTES bounds what is interpolated at once, here 2 classes of 8 x 8 float32."""
    monkeypatch.setattr(grids, "CHUNK_BYTES", rows * 4 * 2 * 8 * 8)
    slabs = ((start, start + 10, torch.zeros(2, 10, 8, 8)) for start in (0, 10))
    firsts, sizes = [], []
    for first, scores in grids.native_rows(slabs, (60, 8, 8), 20, 0):
        firsts.append(first)
        sizes.append(scores.shape[1])
    assert max(sizes) == rows and sum(sizes) == 60
    assert firsts == np.cumsum([0, *sizes[:-1]]).tolist()


@pytest.mark.slow
def test_benchmark_script(tmp_path, monkeypatch, capsys):
    from benchmarks import sliding_window

    monkeypatch.setattr(sliding_window, "find_spec", lambda name: None)
    flags = ["--slices", 20, "--plane", 24, "--patch", 16, "--classes", 3, "--repeats", 2, "--threads", 1]
    content = sliding_window.main([*map(str, flags), "--out", str(tmp_path)])
    assert "not measured" in capsys.readouterr().out
    scan = content["scans"][0]
    assert list(scan["runs"]) == ["ours"] and len(scan["runs"]["ours"]) == 2 and scan["equal_labels"] == 1
    assert all(run[key] > 0 for run in scan["runs"]["ours"] for key in ("seconds", "cpu_s", "peak_mib"))
    assert "| 20 x 24 x 24 | ours | 2 |" in (tmp_path / "sliding_window.md").read_text()
    with pytest.raises(ValueError, match=r"--repeats \[2\] does not fit"):
        sliding_window.main(["--slices", "1", "2", "--repeats", "2"])


def test_only_a_lack_of_memory_is_told(capsys):
    warn_of_memory("3 of 8 windows held only air and were skipped")
    warn_of_memory("cuda is out of memory: going on with 2 windows at a time")
    assert capsys.readouterr().out == "warning: cuda is out of memory: going on with 2 windows at a time\n"
