"""verse_spine/heatmap.py: the small grid, targets, losses and boxes."""

import numpy as np
import pytest
import torch

from verse_spine.heatmap import (
    LOSSES,
    TARGETS,
    box_iou,
    box_recall,
    heatmap_box,
    heatmap_loss,
    make_target,
    scan_box,
    small_grid,
    to_small_grid,
)

SHAPE = (64, 32, 32)
FIELDS = [
    ((300, 180, 160), (1.0, 1.0, 1.0)),
    ((40, 512, 512), (3.0, 0.4, 0.4)),
    ((600, 90, 70), (1.0, 1.5, 1.5)),
]


@pytest.mark.parametrize("scan_shape, spacing", FIELDS)
def test_grid_holds_the_scan_and_keeps_proportions(scan_shape, spacing):
    grid = small_grid(scan_shape, spacing, SHAPE)
    assert all(i <= n for i, n in zip(grid.inner, SHAPE, strict=True))
    assert any(i == n for i, n in zip(grid.inner, SHAPE, strict=True))
    assert grid.voxel_mm.max() / grid.voxel_mm.min() < 1.3
    start, stop = grid.to_scan(grid.start), grid.to_scan(np.add(grid.start, grid.inner))
    assert np.allclose(start, 0) and np.allclose(stop, scan_shape)
    positions = np.random.default_rng(0).uniform(0, scan_shape, (20, 3))
    assert np.allclose(grid.to_scan(grid.from_scan(positions)), positions)


def test_voxels_of_the_grid_by_hand():
    """120 x 204.8 x 204.8 mm in 64 x 32 x 32: voxels of 6.4 mm, and 18.75 of them along z become 19."""
    grid = small_grid((40, 512, 512), (3.0, 0.4, 0.4), SHAPE)
    assert grid.inner == (19, 32, 32) and grid.start == (22, 0, 0)
    assert grid.voxel_mm == pytest.approx([120 / 19, 6.4, 6.4])
    # A vertebra in the middle of the scan, the 10th of the 19 voxels: heat falls by its distance in mm.
    boxes = np.array([[18, 248, 248, 22, 264, 264]])
    heat = make_target("gaussian", grid, boxes, np.zeros(SHAPE))[:, 16, 16]
    to_the_centre = 2 * 3.2**2  # half a voxel along y and x
    for k in (0, 3, 8):
        expected = np.exp(-((k * 120 / 19) ** 2 + to_the_centre) / (2 * 24**2))
        assert heat[31 + k] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scan_shape, spacing", FIELDS)
def test_a_box_comes_back_within_one_small_voxel(scan_shape, spacing):
    """A mask resized to the grid and read back as a box lies where it was."""
    grid = small_grid(scan_shape, spacing, SHAPE)
    start, stop = (np.multiply(scan_shape, share).astype(int) for share in (0.3, 0.7))
    volume = np.zeros(scan_shape, np.float32)
    volume[tuple(map(slice, start, stop))] = 1
    small = to_small_grid(volume, grid, fill=0)
    found = heatmap_box(small)
    step = np.divide(grid.scan_shape, grid.inner)
    assert (np.abs(grid.to_scan(found[0]) - start) <= step).all()
    assert (np.abs(grid.to_scan(found[1]) - stop) <= step).all()


def test_beyond_the_scan_its_edges_are_repeated():
    """64 x 16 x 16 voxels in the middle of 64 x 32 x 32: eight more on either side of y and x."""
    grid = small_grid((64, 16, 16), (1, 1, 1), SHAPE)
    volume = np.random.default_rng(0).integers(-1000, 1000, (64, 16, 16)).astype(np.int16)
    small = to_small_grid(volume, grid)
    assert small.shape == SHAPE and small.dtype == np.float32
    assert np.array_equal(small, np.pad(volume, [(0, 0), (8, 8), (8, 8)], mode="edge"))
    filled = to_small_grid(volume, grid, fill=0)
    assert np.array_equal(filled, np.pad(volume, [(0, 0), (8, 8), (8, 8)]))


def example(count=5):
    """Boxes of a column of vertebrae in a scan of 300 x 160 x 160, and their occupancy on the grid."""
    grid = small_grid((300, 160, 160), (1, 1, 1), SHAPE)
    boxes = np.array([[20 + 40 * i, 60, 50, 50 + 40 * i, 110, 110] for i in range(count)]).reshape(-1, 6)
    mask = np.zeros((300, 160, 160), np.float32)
    for b in boxes:
        mask[b[0] : b[3], b[1] : b[4], b[2] : b[5]] = 1
    return grid, boxes, to_small_grid(mask, grid, fill=0)


@pytest.mark.parametrize("kind", TARGETS)
def test_targets(kind):
    grid, boxes, occupancy = example()
    target = make_target(kind, grid, boxes, occupancy)
    assert target.dtype == np.float32 and target.shape == SHAPE
    assert target.min() >= 0 and 0.95 <= target.max() <= 1 + 1e-6 and np.isfinite(target).all()
    for box in boxes:  # the middle of every vertebra is hot, the corner of the grid is not
        middle = np.floor(grid.from_scan((box[:3] + box[3:]) / 2)).astype(int)
        assert target[tuple(middle)] > 0.5
    assert target[0, 0, 0] < 0.4
    box = scan_box(grid, heatmap_box(target))
    assert (np.array(box[0]) <= boxes[:, :3].min(0)).all() and (np.array(box[1]) >= boxes[:, 3:].max(0)).all()


@pytest.mark.parametrize("kind", TARGETS)
def test_a_scan_without_vertebrae_has_a_target_of_zeros(kind):
    grid = small_grid((300, 160, 160), (1, 1, 1), SHAPE)
    target = make_target(kind, grid, np.zeros((0, 6), int), np.zeros(SHAPE))
    assert not target.any() and target.shape == SHAPE
    assert heatmap_box(target) is None


def test_a_vertebra_thinner_than_the_grid_does_not_vanish():
    grid = small_grid((900, 400, 400), (1, 1, 1), SHAPE)
    target = make_target("distance", grid, np.array([[500, 200, 200, 503, 203, 203]]), np.zeros(SHAPE))
    hottest = grid.to_scan(np.array(np.unravel_index(target.argmax(), SHAPE)) + 0.5)
    assert np.abs(hottest - 201.5 - [300, 0, 0]).max() <= 15 and target.max() == 1


def test_gaussian_falls_to_the_right_value_at_sigma():
    grid = small_grid((256, 128, 128), (2.0, 2.0, 2.0), SHAPE)  # voxels of 8 mm
    target = make_target("gaussian", grid, np.array([[120, 60, 60, 124, 64, 64]]), np.zeros(SHAPE))
    z, y, x = np.unravel_index(target.argmax(), SHAPE)
    # Centre at 122, 62, 62 = 30.5 - 0.5 = 30 voxels, sigma = 3 voxels.
    assert (z, y, x) == (30, 15, 15) and target[z, y, x] == pytest.approx(1)
    assert target[z + 3, y, x] == pytest.approx(np.exp(-0.5), abs=1e-5)


def test_unknown_target():
    with pytest.raises(ValueError, match="unknown heat-map target 'x'; choose from distance"):
        make_target("x", *example())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_least_at_the_target_and_have_gradients(name):
    torch.manual_seed(0)
    target = torch.rand(2, 1, 4, 4, 4).clamp(0.05, 0.95)
    at_target = heatmap_loss(name, torch.logit(target), target)
    for shift in (0.5, -0.5):
        logits = (torch.logit(target) + shift).requires_grad_()
        loss = heatmap_loss(name, logits, target)
        assert loss > at_target
        loss.backward()
        assert logits.grad.isfinite().all() and (logits.grad * shift > 0).all()


@pytest.mark.parametrize("name", ["weighted_mse", "bce", "adaptive_wing", "sum_mse"])
def test_loss_of_a_batch_is_the_mean_of_its_items(name):
    torch.manual_seed(1)
    logits, target = torch.randn(4, 1, 3, 4, 5), torch.rand(4, 1, 3, 4, 5)
    single = torch.stack([heatmap_loss(name, logits[i : i + 1], target[i : i + 1]) for i in range(4)])
    assert heatmap_loss(name, logits, target).item() == pytest.approx(single.mean().item(), rel=1e-5)


def test_weighted_mse_by_hand():
    probs, target = torch.tensor([0.2, 0.9]).view(1, 1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2)
    expected = (1 * 0.04 + 11 * 0.01) / 2
    assert heatmap_loss("weighted_mse", torch.logit(probs), target).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_adaptive_wing_is_continuous_at_theta():
    target = torch.zeros(1, 1, 1, 1, 1)
    below, above = (
        heatmap_loss("adaptive_wing", torch.logit(torch.full_like(target, p)), target).item()
        for p in (0.4999, 0.5001)
    )
    assert below == pytest.approx(above, rel=2e-3)


def test_box_joins_a_broken_spine_but_not_a_spot_beside_it():
    heat = np.zeros((40, 20, 20), np.float32)
    heat[5:15, 8:12, 8:12] = 1
    heat[20:30, 9:13, 8:12] = 0.8  # the spine goes on above
    heat[6:16, 15:19, 15:19] = 0.9  # beside it at the same height
    start, stop = heatmap_box(heat)
    assert tuple(start) == (5, 8, 8) and tuple(stop) == (30, 13, 12)


def test_a_faint_heat_map_gives_no_box():
    assert heatmap_box(np.full((8, 8, 8), 0.29, np.float32)) is None
    assert heatmap_box(np.full((8, 8, 8), 0.31, np.float32)) is not None


def test_margin_is_in_mm_and_stays_inside():
    grid = small_grid((100, 200, 200), (2.0, 1.0, 1.0), (50, 50, 50))
    start, stop = scan_box(grid, (np.array([10, 20, 20]), np.array([20, 30, 30])), margin_mm=(10, 20, 30))
    step = np.divide(grid.scan_shape, grid.inner)
    low = grid.to_scan([10, 20, 20]) - [5, 20, 30]
    assert np.abs(np.array(start) - np.clip(low, 0, None)).max() <= 1 and step.min() >= 1
    start, stop = scan_box(grid, (np.zeros(3), np.array(grid.shape)), margin_mm=(99, 99, 99))
    assert start == (0, 0, 0) and stop == (100, 200, 200)


def test_iou_and_recall():
    a, b = ((0, 0, 0), (4, 4, 4)), ((2, 0, 0), (6, 4, 4))
    assert box_iou(a, b) == pytest.approx(32 / 96) and box_iou(a, a) == 1
    assert box_iou(a, ((5, 5, 5), (6, 6, 6))) == 0 and box_iou(a, None) == 0 and np.isnan(box_iou(None, None))
    mask = np.zeros((6, 6, 6))
    mask[0:4, 0, 0] = 1
    assert box_recall(mask, b) == 0.5 and box_recall(mask, None) == 0 and np.isnan(box_recall(mask * 0, b))
