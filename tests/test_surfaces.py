"""common/surfaces.py: golden spheres, boxes computed by hand, symmetries, and the peers where installed."""

import math

import numpy as np
import pytest
from scipy import ndimage

from common.metrics import binary_counts, dice_from_counts
from common.surfaces import (
    diagonal_mm,
    distances_between,
    hd95_voxel_edges,
    surface_distances,
    surface_metrics,
    surfel_areas_mm2,
    surfels,
)

DISTANCES = ("hd_mm", "hd95_mm", "assd_mm", "asd_mm")


def sphere(centre, radius, side=48):
    grid = np.stack(np.mgrid[:side, :side, :side], axis=-1)
    return np.linalg.norm(grid - centre, axis=-1) <= radius


def box(shape, low, high):
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, low, high))] = True
    return mask


def blobs(seed, shape=(24, 30, 27), threshold=0.03, sigma=1.5):
    """Random smooth shapes, also with holes and touching the border; many codes, crosses included."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, sigma) > threshold


# ---- golden numbers ----


@pytest.mark.parametrize(
    "spacing, hd95, nsd, voxel_hd95",
    [
        ((2, 1, 1), 4.1231, (0.63986, 0.82581, 0.94049), 4.5826),
        ((1, 1, 1), 2.4495, (0.64366, 0.86284, 0.99943), 3.0),
    ],
)
def test_golden_spheres(spacing, hd95, nsd, voxel_hd95):
    target, pred = sphere((24, 24, 24), 10), sphere((26, 24, 24), 11)
    assert dice_from_counts(*binary_counts(pred, target)[:3]) == pytest.approx(0.82020, abs=1e-5)
    metrics = surface_metrics(pred, target, spacing, (1, 2, 3))
    assert metrics["hd95_mm"] == pytest.approx(hd95, abs=5e-5)
    assert [metrics[f"nsd_{t}mm"] for t in (1, 2, 3)] == pytest.approx(nsd, abs=5e-6)
    assert hd95_voxel_edges(pred, target, spacing) == pytest.approx(voxel_hd95, abs=5e-5)


# ---- areas, by hand ----


def test_areas_of_the_simple_codes():
    z, y, x = 3.0, 1.3, 0.7
    areas = surfel_areas_mm2((z, y, x))
    assert areas.shape == (256,) and areas[0] == areas[255] == 0 and (areas[1:255] > 0).all()
    corner = math.sqrt((y * x) ** 2 + (z * x) ** 2 + (z * y) ** 2) / 8
    assert [areas[1 << bit] for bit in range(8)] == pytest.approx([corner] * 8)
    assert areas[0b11110000] == pytest.approx(y * x)  # all of the lower half: a plane across z
    assert areas[0b11001100] == pytest.approx(z * x)
    assert areas[0b10101010] == pytest.approx(z * y)
    assert areas[0b11000000] == pytest.approx(x * math.hypot(z, y) / 2)  # an edge along x
    assert areas[0b10000001] == areas[0b10000010] == pytest.approx(2 * corner)  # corners apart, in a cross
    # Three corners of a face: half of a plane, and a flat trapezoid of 3/4 of the parallelogram of its sides
    legs = np.cross((0, -y, x), (-z / 2, y / 2, 0))
    assert areas[0b11100000] == pytest.approx(y * x / 2 + 0.75 * np.linalg.norm(legs))


def test_areas_do_not_tell_inside_from_outside_nor_mirrored_codes():
    areas = surfel_areas_mm2((2.0, 1.3, 0.7))
    assert areas == pytest.approx(areas[::-1])  # the complement of a code is 255 - code
    cubes = ((np.arange(256)[:, None] >> np.arange(7, -1, -1)) & 1).reshape(256, 2, 2, 2)
    weights = 1 << np.arange(7, -1, -1)
    for axis in (1, 2, 3):
        mirrored = np.flip(cubes, axis).reshape(256, 8) @ weights
        assert areas[mirrored] == pytest.approx(areas)
    turned = cubes.transpose(0, 3, 1, 2).reshape(256, 8) @ weights  # x y z -> the new z is the old x
    assert surfel_areas_mm2((0.7, 2.0, 1.3))[turned] == pytest.approx(areas)


def test_area_of_a_large_box_and_a_sphere():
    spacing = (3.0, 1.3, 0.7)
    mask = box((20, 40, 60), (0, 5, 10), (20, 35, 50))  # also against both borders
    (_, mm2) = surfels(mask, [True], spacing)[True]
    z, y, x = 20 * 3.0, 30 * 1.3, 40 * 0.7
    assert mm2.sum() == pytest.approx(2 * (z * y + y * x + z * x), rel=0.03)  # edges and corners are cut
    (_, mm2) = surfels(sphere((24, 24, 24), 20.3), [True], (1, 1, 1))[True]
    assert mm2.sum() == pytest.approx(4 * math.pi * 20.3**2, rel=0.1)  # steps: more than the smooth one
    assert mm2.sum() > 4 * math.pi * 20**2


def test_surfels_of_a_label_map_are_those_of_each_mask():
    labels = np.random.default_rng(0).integers(0, 4, (37, 9, 8)).astype(np.uint8)  # three slabs
    together = surfels(labels, [3, 1, 7], (2, 1, 1))
    assert list(together) == [3, 1, 7] and together[7][0].size == together[7][1].size == 0
    for label in (1, 3):
        nodes, mm2 = surfels(labels == label, [True], (2, 1, 1))[True]
        assert np.array_equal(together[label][0], nodes) and np.array_equal(together[label][1], mm2)
        assert (np.diff(nodes) > 0).all() and nodes.max() < 38 * 10 * 9


@pytest.mark.parametrize("depth", [1, 15, 16, 17, 31, 32, 33])
def test_slabs_leave_no_seam(depth):
    mask = np.ones((depth, 3, 3), bool)
    nodes, _ = surfels(mask, [True], (1, 1, 1))[True]
    assert nodes.size == (depth + 1) * 16 - (depth - 1) * 4  # all nodes but the inner ones


# ---- distances ----


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_box_moved_by_whole_voxels(axis):
    spacing, steps = (2.5, 1.5, 0.5), 2
    target = box((30, 30, 30), (10, 10, 10), (20, 20, 20))
    pred = np.roll(target, steps, axis)
    metrics = surface_metrics(pred, target, spacing, (0.4, steps * spacing[axis]))
    far = steps * spacing[axis]
    assert metrics["hd_mm"] == metrics["hd95_mm"] == pytest.approx(far)
    assert 0 < metrics["assd_mm"] < far
    assert metrics[f"nsd_{far:g}mm"] == 1 and 0 < metrics["nsd_0.4mm"] < 1
    assert hd95_voxel_edges(pred, target, spacing) == pytest.approx(far)


def test_two_single_voxels():
    target, pred = box((9, 9, 9), (4, 4, 1), (5, 5, 2)), box((9, 9, 9), (4, 4, 5), (5, 5, 6))
    metrics = surface_metrics(pred, target, (3, 2, 0.5), (1, 1.5, 2))
    # Nodes lie 0.5 mm apart along x: half of the area of each is 3 apart steps nearer than the other half.
    distances = {"hd_mm": 2.0, "hd95_mm": 2.0, "assd_mm": 1.75, "asd_mm": 1.75}
    assert metrics == pytest.approx(distances | {"nsd_1mm": 0, "nsd_1.5mm": 0.5, "nsd_2mm": 1})
    assert hd95_voxel_edges(pred, target, (3, 2, 0.5)) == 2


def test_percentile_is_by_area_not_by_count():
    """A far flat thing of one voxel has 8 nodes of little area."""
    target = box((20, 40, 40), (5, 10, 10), (15, 30, 30))
    pred = target.copy()
    pred[17, 20, 20] = True
    distances = surface_distances(pred, target, (1, 1, 1))
    share = distances.pred_mm2[distances.pred_to_target_mm > 0].sum() / distances.pred_mm2.sum()
    assert 0 < share < 0.05
    metrics = surface_metrics(pred, target, (1, 1, 1))
    assert metrics["hd95_mm"] == 0 and metrics["hd_mm"] == 3
    far = distances.pred_mm2 @ distances.pred_to_target_mm
    assert metrics["assd_mm"] == pytest.approx(far / (distances.pred_mm2.sum() + distances.target_mm2.sum()))
    assert metrics["asd_mm"] == pytest.approx(far / distances.pred_mm2.sum() / 2), "the way back is all 0"


def test_a_mask_against_itself():
    mask = blobs(0)
    assert surface_metrics(mask, mask, (1, 2, 3)) == {
        "hd_mm": 0, "hd95_mm": 0, "assd_mm": 0, "asd_mm": 0, "nsd_1mm": 1, "nsd_2mm": 1,
    }  # fmt: skip
    assert hd95_voxel_edges(mask, mask, (1, 2, 3)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_all_pairs(seed):
    spacing = (2.0, 0.9, 1.3)
    pred, target = blobs(seed, (7, 8, 9)), blobs(seed + 10, (7, 8, 9))
    nodes = [surfels(m, [True], spacing)[True][0] for m in (pred, target)]
    points = [np.stack(np.unravel_index(n, (8, 9, 10)), axis=1) * spacing for n in nodes]
    pairs = np.linalg.norm(points[0][:, None] - points[1], axis=-1)
    distances = surface_distances(pred, target, spacing)
    assert distances.pred_to_target_mm == pytest.approx(pairs.min(axis=1))
    assert distances.target_to_pred_mm == pytest.approx(pairs.min(axis=0))


@pytest.mark.parametrize("metric", [surface_metrics, lambda *a: {"voxel": hd95_voxel_edges(*a)}])
@pytest.mark.parametrize("seed", range(2))
def test_symmetries(metric, seed):
    spacing = (2.0, 0.9, 1.3)
    pred, target = blobs(seed), blobs(seed + 10)
    expected = metric(pred, target, spacing)
    assert metric(target, pred, spacing) == pytest.approx(expected)
    for axes in ((0, 2, 1), (2, 0, 1), (2, 1, 0)):
        turned = metric(pred.transpose(axes), target.transpose(axes), [spacing[a] for a in axes])
        assert turned == pytest.approx(expected)
    assert metric(np.flip(pred, 1), np.flip(target, 1), spacing) == pytest.approx(expected)
    padding = ((17, 3), (0, 20), (5, 0))
    assert metric(np.pad(pred, padding), np.pad(target, padding), spacing) == expected
    doubled = metric(pred, target, [2 * s for s in spacing])
    for name in (*DISTANCES, "voxel"):
        if name in expected:
            assert doubled[name] == pytest.approx(2 * expected[name])


def test_a_tolerance_survives_the_rounding_of_headers():
    target = box((40, 8, 8), (5, 2, 2), (20, 6, 6))
    spacing = (float(np.float32(0.1)), 1, 1)  # 0.10000000149
    assert surface_metrics(np.roll(target, 10, 0), target, spacing, [1])["nsd_1mm"] == 1
    assert surface_metrics(np.roll(target, 11, 0), target, spacing, [1])["nsd_1mm"] < 1


# ---- empty masks, wrong input ----


def test_empty_masks_of_all_kinds():
    shape, spacing = (4, 6, 12), (3.0, 2.0, 0.5)
    empty, one = np.zeros(shape, bool), box(shape, (0, 0, 0), (1, 1, 1))
    diagonal = math.sqrt(12**2 + 12**2 + 6**2)
    assert diagonal_mm(shape, spacing) == pytest.approx(diagonal)
    for pred, target in ((one, empty), (empty, one)):
        metrics = surface_metrics(pred, target, spacing)
        assert [metrics[k] for k in DISTANCES] == pytest.approx([diagonal] * len(DISTANCES))
        assert metrics["nsd_1mm"] == metrics["nsd_2mm"] == 0
        assert hd95_voxel_edges(pred, target, spacing) == pytest.approx(diagonal)
        distances = surface_distances(pred, target, spacing)
        assert sorted(a.size for a in vars(distances).values()) == [0, 0, 8, 8]
        assert all(np.isinf(getattr(distances, k)).all() for k in ("pred_to_target_mm", "target_to_pred_mm"))
    both = surface_metrics(empty, empty, spacing)
    assert len(both) == len(DISTANCES) + 2 and all(math.isnan(v) for v in both.values())
    assert math.isnan(hd95_voxel_edges(empty, empty, spacing))
    assert not math.isnan(surface_metrics(one, one, spacing)["hd_mm"])


def test_the_worst_prediction_is_no_worse_than_a_missed_one():
    shape, spacing = (4, 6, 12), (3.0, 2.0, 0.5)
    target, pred = box(shape, (0, 0, 0), (1, 1, 1)), box(shape, (3, 5, 11), (4, 6, 12))
    found = surface_metrics(pred, target, spacing)
    missed = surface_metrics(np.zeros(shape, bool), target, spacing)
    assert all(found[k] < missed[k] for k in DISTANCES) and found["nsd_1mm"] >= missed["nsd_1mm"]


def test_a_far_stray_voxel_costs_no_distance_map(monkeypatch):
    """Only the surfaces are searched: no array of the size of the box between them is made."""
    import tracemalloc

    shape = (200, 200, 200)
    parts = (
        (np.array([0, 1]), np.ones(2)),
        (np.array([1, 201**3 - 1]), np.ones(2)),
    )
    tracemalloc.start()
    distances = distances_between(*parts, shape, (1, 1, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    assert distances.pred_to_target_mm == pytest.approx([1, 0])
    assert distances.target_to_pred_mm == pytest.approx([0, math.sqrt(200**2 * 2 + 199**2)])


def test_wrong_input_is_refused():
    mask = np.zeros((3, 4, 5), bool)
    for function in (surface_distances, surface_metrics, hd95_voxel_edges):
        with pytest.raises(ValueError, match="boolean, got uint8 and bool"):
            function(mask.astype(np.uint8), mask, (1, 1, 1))
        with pytest.raises(ValueError, match=r"prediction \(3, 4, 5\) and target \(3, 5, 4\)"):
            function(mask, mask.transpose(0, 2, 1), (1, 1, 1))
        with pytest.raises(ValueError, match=r"prediction \(4, 5\)"):
            function(mask[0], mask[0], (1, 1))
        for spacing in ((1, 1), (1, 0, 1), (1, float("nan"), 1), (1, 1, -1)):
            with pytest.raises(ValueError, match="three numbers above 0"):
                function(mask, mask, spacing)


# ---- peers ----


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.0, 0.9, 1.3), (5, 0.7, 0.7)])
@pytest.mark.parametrize("seed", range(3))
def test_parity_with_surface_distance(spacing, seed):
    peer = pytest.importorskip("surface_distance")
    pred, target = blobs(seed), blobs(seed + 10, threshold=0.1)
    theirs = peer.compute_surface_distances(target, pred, spacing)
    ours = surface_distances(pred, target, spacing)
    assert np.sort(ours.pred_to_target_mm) == pytest.approx(theirs["distances_pred_to_gt"])
    assert ours.pred_mm2.sum() == pytest.approx(theirs["surfel_areas_pred"].sum())
    metrics = surface_metrics(pred, target, spacing)
    assert metrics["hd_mm"] == pytest.approx(peer.compute_robust_hausdorff(theirs, 100))
    assert metrics["hd95_mm"] == pytest.approx(peer.compute_robust_hausdorff(theirs, 95))
    for t in (1, 2):
        assert metrics[f"nsd_{t}mm"] == pytest.approx(peer.compute_surface_dice_at_tolerance(theirs, t))
    to_pred, to_target = peer.compute_average_surface_distance(theirs)
    areas = [theirs["surfel_areas_gt"].sum(), theirs["surfel_areas_pred"].sum()]
    assert metrics["assd_mm"] == pytest.approx(np.average([to_pred, to_target], weights=areas))


def test_areas_of_all_codes_are_those_of_surface_distance():
    tables = pytest.importorskip("surface_distance.lookup_tables")
    for spacing in ((1, 1, 1), (2.0, 0.9, 1.3)):
        theirs = tables.create_table_neighbour_code_to_surface_area(spacing)
        assert surfel_areas_mm2(spacing) == pytest.approx(np.array(theirs))


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.0, 0.9, 1.3)])
@pytest.mark.parametrize("seed", range(3))
def test_parity_of_voxel_edges_with_monai(spacing, seed):
    peer = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    pred, target = blobs(seed), blobs(seed + 10, threshold=0.1)
    tensors = [torch.from_numpy(m)[None, None] for m in (pred, target)]
    theirs = peer.compute_hausdorff_distance(
        *tensors, include_background=True, percentile=95, spacing=spacing
    )
    assert hd95_voxel_edges(pred, target, spacing) == pytest.approx(theirs.item(), rel=1e-5)
