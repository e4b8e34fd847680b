"""verse_spine/segment.py: clean-up, counted bodies; boxes of a stubbed heat map."""

import time

import numpy as np
import pytest
import torch
from conftest import REAL_DATA

from common.hardware import Precision
from common.nifti import load_label
from common.scan_files import voxel_mm3
from verse_spine.heatmap import small_grid
from verse_spine.networks import TrainedModel, scale_patches
from verse_spine.phantoms import spine_phantom
from verse_spine.segment import clean_up, count_bodies, predict_heatmap, segment, spine_region

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")


def block(labels, start, size, value=1):
    labels[tuple(slice(a, a + n) for a, n in zip(start, np.broadcast_to(size, 3), strict=True))] = value


# ---- clean-up ----


def test_crumbs_go_unless_the_scan_cuts_them():
    """2 mm voxels: 5 x 5 x 5 are 1 mL."""
    labels = np.zeros((60, 40, 40), np.uint8)
    block(labels, (20, 10, 10), 10)  # 8 mL
    block(labels, (22, 30, 30), (5, 5, 4), 7)  # 0.8 mL
    block(labels, (36, 12, 12), (5, 5, 5), 3)  # 1 mL
    block(labels, (0, 12, 12), (2, 5, 5), 2)  # 0.4 mL at the lower end
    block(labels, (10, 12, 38), (3, 3, 2), 4)  # at the right border
    before = labels.copy()
    cleaned, report = clean_up(labels, (2, 2, 2))
    assert np.array_equal(labels, before), "a copy"
    expected = before.copy()
    expected[before == 7] = 0
    assert np.array_equal(cleaned, expected)
    assert report == {"removed_ml": pytest.approx(0.8), "filled_ml": 0.0}


def test_the_limit_is_in_ml_not_voxels():
    labels = np.zeros((40, 40, 40), np.uint8)
    block(labels, (5, 5, 5), 10)
    block(labels, (25, 25, 25), 5)
    assert clean_up(labels, (2, 2, 2))[0][26, 26, 26] and not clean_up(labels, (1.9, 2, 2))[0][26, 26, 26]


def test_volumes_of_a_tilted_gantry():
    """Voxels of 2 x 2 x 2 mm sheared by 60 degrees hold 4 mm^3: the determinant, not the product."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[1, 2], affine[2, 2] = 2 * np.sin(np.pi / 3), 2 * np.cos(np.pi / 3)
    assert voxel_mm3(affine) == pytest.approx(4)
    labels = np.zeros((40, 40, 40), np.uint8)
    block(labels, (5, 5, 5), 12)  # 6.9 mL
    block(labels, (25, 25, 25), (6, 6, 5))  # 180 voxels: 0.72 mL, and not 1.44
    block(labels, (8, 8, 8), (4, 4, 5), 0)  # 80 voxels: 0.32 mL, and not 0.64
    cleaned, report = clean_up(labels, (2, 2, 2), voxel_mm3(affine))
    assert report == {"removed_ml": pytest.approx(0.72), "filled_ml": pytest.approx(0.32)}
    assert not cleaned[25:31, 25:31, 25:30].any() and cleaned[8:12, 8:12, 8:13].all()
    _, straight = clean_up(labels, (2, 2, 2))
    assert straight == {"removed_ml": 0.0, "filled_ml": 0.0}


@pytest.mark.parametrize("gap_mm, kept", [(20, True), (55, True), (70, False), (200, False)])
def test_chain(gap_mm, kept):
    """Pieces up to 60 mm apart are one spine; beyond that the lighter part goes, whatever its own size."""
    labels = np.zeros((200, 20, 20), np.uint8)
    for k in range(3):
        block(labels, (10 + 12 * k, 5, 5), (10, 8, 8), 20 - k)
    top = 10 + 24 + 10 + gap_mm // 2
    block(labels, (top, 5, 5), (10, 8, 8), 12)
    block(labels, (top + 12, 5, 5), (10, 8, 8), 11)
    cleaned, report = clean_up(labels, (2, 2, 2))
    assert np.array_equal(np.unique(cleaned), [0, 11, 12, 18, 19, 20] if kept else [0, 18, 19, 20])
    assert report["removed_ml"] == pytest.approx(0 if kept else 2 * 640 * 8 / 1000)


def test_pieces_are_one_spine_in_whatever_order_they_are_found():
    """By height they come as 0, 1, 2, 3, but 2 is near 3 only, 55 mm beside it; 3 lies 45 mm above 1."""
    labels = np.zeros((30, 9, 25), np.uint8)
    for label, (z, x) in enumerate([(3, 3), (10, 3), (21, 17), (22, 3)], 20):
        block(labels, (z, 3, x), (3, 3, 3), label)
    cleaned, report = clean_up(labels, (5, 5, 5))
    assert np.array_equal(cleaned, labels) and report["removed_ml"] == 0


def test_not_only_the_largest():
    """A long fused piece and single vertebrae above it; a hip 90 mm beside it goes."""
    labels = np.zeros((150, 40, 100), np.uint8)
    block(labels, (5, 10, 5), (80, 10, 12))
    for k in range(3):
        block(labels, (95 + 15 * k, 10, 5), (9, 10, 12))
    block(labels, (5, 10, 62), (20, 20, 20))
    cleaned, _ = clean_up(labels, (2, 2, 2))
    assert cleaned[:, :, :40].sum() == labels[:, :, :40].sum() and not cleaned[:, :, 40:].any()


def test_small_holes_take_the_label_around_them():
    labels = np.zeros((40, 40, 40), np.uint8)
    block(labels, (5, 5, 5), (30, 30, 14), 19)
    block(labels, (5, 5, 19), (30, 30, 14), 20)
    block(labels, (10, 10, 10), 3, 0)  # 0.216 mL inside 19
    block(labels, (20, 10, 25), 3, 0)  # inside 20
    block(labels, (12, 22, 22), (4, 4, 4), 0)  # 0.512 mL: too large
    block(labels, (30, 30, 30), (5, 2, 2), 0)  # open to the outside
    cleaned, report = clean_up(labels, (2, 2, 2))
    expected = labels.copy()
    block(expected, (10, 10, 10), 3, 19)
    block(expected, (20, 10, 25), 3, 20)
    assert np.array_equal(cleaned, expected) and report["filled_ml"] == pytest.approx(2 * 27 * 8 / 1000)


def test_hole_between_two_labels_takes_the_nearest():
    labels = np.zeros((10, 10, 12), np.uint8)
    block(labels, (1, 1, 1), (8, 8, 5), 3)
    block(labels, (1, 1, 6), (8, 8, 5), 4)
    labels[4, 4, 5], labels[4, 4, 6] = 0, 0
    cleaned, _ = clean_up(labels, (3, 3, 3))
    assert cleaned[4, 4, 5] == 3 and cleaned[4, 4, 6] == 4


def test_nothing_is_left_of_crumbs_and_of_nothing():
    labels = np.zeros((20, 20, 20), np.uint8)
    cleaned, report = clean_up(labels, (1, 1, 1))
    assert not cleaned.any() and report == {"removed_ml": 0.0, "filled_ml": 0.0}
    labels[10, 10, 10] = 1
    cleaned, report = clean_up(labels, (1, 1, 1))
    assert not cleaned.any() and report["removed_ml"] == pytest.approx(0.001)
    full = np.ones((9, 9, 9), np.uint8)
    assert np.array_equal(clean_up(full, (1, 1, 1))[0], full)


def test_many_crumbs():
    """More parts than uint16 can number."""
    labels = np.zeros((90, 90, 90), np.uint8)
    labels[1:-1:2, 1:-1:2, 1:-1:2] = 1
    labels[0] = 0
    block(labels, (30, 30, 30), 20)
    cleaned, _ = clean_up(labels, (1, 1, 1))
    assert cleaned[40, 40, 40] and cleaned[1, 1, 1] == 0 and cleaned.sum() < 21**3


@pytest.mark.slow
def test_cost_of_a_large_mask():
    """300 x 300 x 500 with noise all over it. No limit on time: it is printed, for the record."""
    rng = np.random.default_rng(0)
    labels = np.zeros((500, 300, 300), np.uint8)
    for z in range(20, 460, 30):
        block(labels, (z, 130, 130), (24, 40, 40), 1)
    for place in rng.integers(5, (490, 290, 290), (3000, 3)):
        block(labels, place, 3)
    started = time.perf_counter()
    cleaned, _ = clean_up(labels, (1, 1, 1))
    print(f"clean_up took {time.perf_counter() - started:.1f} s")
    assert not cleaned[:15].any() and cleaned[30, 150, 150]


# ---- counted bodies ----

PHANTOMS = [((1, 24), (2, 2, 2)), ((8, 19), (2, 2, 2)), ((16, 24), (2, 2, 3)), ((19, 24), (3, 2, 2))]


@pytest.mark.parametrize("levels, spacing", PHANTOMS)
def test_bodies_of_phantoms(levels, spacing):
    _, label, centres = spine_phantom(levels[0], spacing_mm=spacing, levels=levels, field_mm=(120, 110))
    found = count_bodies((label > 0).astype(np.uint8), spacing) * spacing
    assert abs(len(found) - len(centres)) <= 1 and (np.diff(found[:, 0]) < 0).all()
    distance = np.linalg.norm(np.array(list(centres.values()))[:, None] - found, axis=2)
    assert (distance.min(0) < 9).sum() >= len(found) - 1, "each is the body of a vertebra, not its arch"


@pytest.mark.parametrize("case, least", [("sub-verse901", 6), ("sub-verse903", 2), ("sub-verse004", 8)])
def test_bodies_of_real_masks(case, least):
    if not (REAL_DATA / "spine_ct").is_dir():
        pytest.skip("the real scans are not on this machine")
    mask = load_label(next((REAL_DATA / "spine_ct").rglob(f"{case}_seg-vert_msk.nii.gz")))
    true = np.count_nonzero(np.unique(mask.array))
    found = len(count_bodies((mask.array > 0).astype(np.uint8), mask.spacing_mm))
    assert least <= found <= true + 1


def test_bodies_of_thick_slices_and_fine_pixels():
    """3 x 0.4 x 0.4 mm: depth is measured in mm, and only the fine axes are thinned out."""
    labels = np.zeros((40, 140, 140), np.uint8)
    for first in (4, 16):  # 24 x 24 x 24 mm, with 12 mm between
        labels[first : first + 8, 40:100, 40:100] = 1
    labels[2:38, 110:118, 66:72] = 1  # a process: 108 mm long, 3.2 x 2.4 mm thick
    found = count_bodies(labels, (3, 0.4, 0.4))
    assert found.shape == (2, 3)
    expected_mm = np.multiply([(19.5, 69.5, 69.5), (7.5, 69.5, 69.5)], (3, 0.4, 0.4))
    assert np.abs(found * (3, 0.4, 0.4) - expected_mm).max() < 1.1


def test_bodies_of_thick_sagittal_slices():
    """1 x 1 x 6 mm: a body is 4 slices wide, which is as deep in mm as its 24 rows."""
    labels = np.zeros((100, 40, 10), np.uint8)
    for first in (10, 60):
        labels[first : first + 24, 8:32, 3:7] = 1
    found = count_bodies(labels, (1, 1, 6))
    assert found.shape == (2, 3)
    expected = [(71.5, 19.5, 4.5), (21.5, 19.5, 4.5)]
    assert np.abs((found - expected) * (1, 1, 6)).max() < 1.1


def test_no_bodies():
    assert count_bodies(np.zeros((4, 5, 6), np.uint8), (1, 1, 1)).shape == (0, 3)
    assert count_bodies(np.pad(np.ones((1, 1, 1), np.uint8), 3), (1, 1, 1)).shape == (0, 3)


# ---- stage 1 and 2 ----


class Steady(torch.nn.Module):
    def __init__(self, heat: torch.Tensor) -> None:
        super().__init__()
        self.heat = heat

    def forward(self, image):
        assert image.min() >= -1 and image.max() <= 1, "HU are scaled before the network"
        return torch.logit(self.heat, eps=1e-6)[None, None]


def test_heat_map_to_region():
    grid = small_grid((100, 60, 60), (2.0, 2.0, 2.0), (50, 30, 30))
    heat = torch.zeros(50, 30, 30)
    heat[20:30, 10:15, 12:16] = 0.9
    model = TrainedModel(Steady(heat), {"patch_size": [50, 30, 30]}, CPU, FP32, {}, {})
    predicted = predict_heatmap(model, np.full((50, 30, 30), 5000.0, np.float32))
    assert predicted.dtype == np.float32 and np.allclose(predicted, heat.numpy(), atol=1e-5)
    region = spine_region(predicted, grid)
    margin = np.array([15, 10, 10])  # 30, 20, 20 mm
    assert region.source == "heat map" and region.heat == pytest.approx(0.9, abs=1e-4)
    assert np.array_equal(region.box[0], np.array([40, 20, 24]) - margin)
    assert np.array_equal(region.box[1], np.array([60, 30, 32]) + margin)
    assert spine_region(0.3 * predicted, grid) is None


def test_margins_around_the_heat_map_are_in_millimetres():
    """Voxels of 3 x 0.5 x 2 mm, by hand: 30, 20, 20 mm are 10, 40 and 10 voxels."""
    grid = small_grid((80, 240, 60), (3.0, 0.5, 2.0), (80, 40, 40))
    heat = np.zeros((80, 40, 40), np.float32)
    heat[30:40, 15:25, 16:24] = 0.9
    assert grid.start == (0, 0, 0) and grid.inner == (80, 40, 40)
    region = spine_region(heat, grid)
    assert region.box == ((20, 90 - 40, 24 - 10), (50, 150 + 40, 36 + 10))


def test_patches_are_scaled_each_by_its_own_range_or_all_alike():
    patches = torch.tensor([[0.0, 50, 100], [-1000, -500, 0]]).view(2, 1, 1, 1, 3)
    own = scale_patches(patches, "patch").view(2, 3)
    torch.testing.assert_close(own, torch.tensor([[-1.0, 0, 1], [-1, 0, 1]]), atol=1e-5, rtol=0)
    alike = scale_patches(torch.tensor([-1000.0, 500, 2000, 9000]).view(1, 1, 1, 1, 4), "hu")
    assert alike.flatten().tolist() == [-1, 0, 1, 1]


def test_intensity_by_range_uses_the_whole_scan():
    """--intensity patch: [lowest, highest] of the scan -> [-1, 1], also where a box leaves them out."""
    hu = np.full((12, 12, 12), 100, np.int16)
    hu[0, 0, 0], hu[11, 11, 11], hu[4:8, 4:8, 4:8] = -1000, 3000, 1200
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, image):
            seen.append((float(image.min()), float(image.max())))
            return image

    config = {"patch_size": [8, 8, 8], "labels": "binary", "intensity": "patch"}
    model = TrainedModel(Watch(), config, CPU, FP32, {"spacing_mm": [1, 1, 1]}, {})
    pred = segment(model, hu, (1, 1, 1))
    assert min(low for low, _ in seen) == pytest.approx(-1, abs=1e-4)
    assert max(high for _, high in seen) == pytest.approx(1, abs=1e-4)
    assert pred.sum() == 64 + 1, "above the middle, 1000 HU"
    segment(model, hu, (1, 1, 1), box=((2, 2, 2), (10, 10, 10)))
    assert seen[-1][1] == pytest.approx(0.1, abs=1e-3), "1200 HU is 0.1 of -1000..3000"


def test_out_of_memory_is_told_and_gone_on_with(capsys):
    """Half the windows at a time, the same mask; sizes and skipped air are not repeated for every scan."""

    class Small(torch.nn.Module):
        def forward(self, image):
            if len(image) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 50 * image

    config = {"patch_size": [8, 8, 8], "labels": "binary", "intensity": "hu"}
    precision = Precision("fp32", None, False, "test")
    model = TrainedModel(Small(), config, torch.device("cpu"), precision, {"spacing_mm": [1, 1, 1]}, {})
    hu = np.random.default_rng(0).integers(-1000, 2000, (24, 20, 20)).astype(np.int16)
    pred = segment(model, hu, (1, 1, 1), batch_size=4)
    told = capsys.readouterr().out.splitlines()
    assert told == ["warning: cpu is out of memory: going on with 2 windows at a time"]
    assert np.array_equal(pred, segment(model, hu, (1, 1, 1), batch_size=1))
    assert capsys.readouterr().out == ""
