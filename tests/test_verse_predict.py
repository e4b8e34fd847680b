"""verse_spine/predict.py: place of the mask in space, region, files written, and what goes wrong."""

import csv
import json
import os
import subprocess
import sys
import warnings

import nibabel
import numpy as np
import pytest
import torch
from conftest import ERRORS, REAL_DATA, ROOT

from common import distributed, nifti_checks
from common.checkpoints import save_checkpoint
from common.hardware import Precision
from common.hdf5 import CaseFile, write_case
from common.metrics import binary_counts, dice_from_counts
from common.nifti import NiftiFile, load_label, load_nifti, open_nifti, write_nifti
from common.overview import OVERVIEW_MM
from verse_spine import predict
from verse_spine import segment as segment_module
from verse_spine.labels import VERTEBRAE, body_centres, centroids_to_mm, num_outputs, read_centroids
from verse_spine.networks import TrainedModel, get_model
from verse_spine.phantoms import spine_phantom
from verse_spine.region import Region, find_region
from verse_spine.segment import segment

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")
BONE_HU = 200.0
QUICK = ("--save_preview", "False")


class Threshold(torch.nn.Module):
    """A network that needs no training: a class where HU, scaled by scale_hu, are above its threshold."""

    def __init__(self, thresholds=(BONE_HU,)) -> None:
        super().__init__()
        self.thresholds = [(hu - 500) / 1500 for hu in thresholds]

    def forward(self, image):
        if len(self.thresholds) == 1:
            return 50 * (image - self.thresholds[0])
        scores = [torch.zeros_like(image)]
        for k, at in enumerate(self.thresholds):
            scores.append(scores[-1] + 50 * (image - at) if k else 50 * (image - at))
        return torch.cat(scores, 1)


def threshold_model(patch=(24, 24, 24), spacing=(2.0, 2.0, 2.0), network=None, labels="binary"):
    config = {"patch_size": list(patch), "labels": labels, "intensity": "hu", "model": "UNet"}
    network = (network or Threshold()).eval()
    return TrainedModel(network, config, CPU, FP32, {"spacing_mm": list(spacing)}, {"train": []})


class Spot(torch.nn.Module):
    """A heat map: hot where the body is brighter than 800 HU; never above `heat`."""

    def __init__(self, heat=0.99) -> None:
        super().__init__()
        self.heat = heat

    def forward(self, image):
        return torch.logit((image > 0.2) * self.heat, eps=1e-4)


def stub(monkeypatch, model=None, heat=None):
    """predict.py takes these instead of checkpoints."""
    heatmap = heat and TrainedModel(heat.eval(), {"patch_size": [32, 16, 16]}, CPU, FP32, {}, {"train": []})
    models = {"segmentation": model or threshold_model(), "heatmap": heatmap}
    monkeypatch.setattr(predict, "load_trained", lambda *args: models[args[3]])
    return models


def run(source, out, *flags, weights="run/weights/best.pt") -> int:
    base = ["--weights", weights, "--source", source, "--out", out, "--device", "cpu", "--amp", "off"]
    return predict.main([str(f) for f in (*base, *flags)])


def ball(shape, spacing_mm, centre=0.5, radius_mm=16.0):
    """Body of 40 HU in air with a soft ball of up to 1000 HU that touches no border."""
    axes = [(np.arange(n) + 0.5) * s for n, s in zip(shape, spacing_mm, strict=True)]
    middle = np.multiply(shape, spacing_mm) * centre
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    r = np.sqrt(sum((g - m) ** 2 for g, m in zip(grid, middle, strict=True)))
    hu = np.clip(1000 - 800 * r / radius_mm, -900, 1000)
    return np.where(hu < -100, -100, hu).astype(np.int16)


def dice(a, b) -> float:
    return dice_from_counts(*binary_counts(a > 0, b > 0)[:3])


def results(out) -> list[dict]:
    with (out / "predictions.csv").open(encoding="utf8") as file:
        return list(csv.DictReader(file))


# ---- geometry ----

# Each order of the axes once, each axis in both directions; all 48 orientations: tests/test_nifti.py.
ORIENTATIONS = ["LPI", "RSP", "ALS", "PIR", "SLA", "IAL"]
SPACINGS = [(1.0, 1.7, 2.4), (3.0, 1.3, 0.9), (1.6, 0.8, 3.1), (2.0, 2.0, 2.0)]


@pytest.mark.parametrize("index", range(6), ids=ORIENTATIONS)
def test_mask_lies_on_the_scans_own_grid(index, tmp_path, monkeypatch):
    """Every axis order x flips, anisotropic, oblique: the mask of a threshold network is the threshold."""
    stub(monkeypatch, threshold_model(spacing=(1.4, 1.4, 1.4)))
    spacing = SPACINGS[index % 4]
    shape = tuple(int(np.ceil(mm / s)) for mm, s in zip((60, 52, 46), spacing, strict=True))
    hu = ball(shape, spacing, centre=(0.55, 0.5, 0.47))
    path = tmp_path / "scan.nii.gz"
    write_nifti(path, hu, spacing, origin_mm=(31, -77, 5), orientation=ORIENTATIONS[index])
    straight = nibabel.load(path)
    angle = np.deg2rad(20 * (index % 3))  # 0, 20 and 40 degrees: the orientation codes stay
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    scan = nibabel.Nifti1Image(np.asarray(straight.dataobj), turn @ straight.affine, straight.header)
    scan.set_qform(scan.affine, 2 if index % 2 else 0)
    scan.set_sform(scan.affine, 1)
    nibabel.save(scan, path)
    assert run(path, tmp_path / "out", *QUICK, "--no_roi", "--clean_up", "False") == 0
    scan, mask = nibabel.load(path), nibabel.load(tmp_path / "out" / "scan_mask.nii.gz")
    assert mask.shape == scan.shape and mask.affine.tobytes() == scan.affine.tobytes()
    for field in (
        "qform_code",
        "sform_code",
        "pixdim",
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
        "xyzt_units",
    ):
        assert np.array_equal(mask.header[field], scan.header[field]), field
    assert mask.get_data_dtype() == np.uint8
    assert (mask.dataobj.slope, mask.dataobj.inter) == (1.0, 0.0)
    assert dice(np.asarray(mask.dataobj), np.asarray(scan.dataobj) > BONE_HU) > 0.99


class Counting(Threshold):
    """Notes how many voxels above the threshold each window holds."""

    def forward(self, image):
        self.seen = [*getattr(self, "seen", []), int((image > self.thresholds[0]).sum())]
        return super().forward(image)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 1.0, 0.5)])
def test_the_network_sees_the_voxels_of_its_training(spacing, tmp_path, monkeypatch):
    """A block of 24 x 12 x 16 mm has 12 x 6 x 8 voxels of 2 mm, whatever those of the scan."""
    network = Counting()
    stub(monkeypatch, threshold_model(patch=(32, 32, 32), network=network))
    hu = np.zeros([round(64 / s) for s in spacing], np.int16)
    low, high = (np.divide(mm, spacing).astype(int) for mm in ((16, 24, 16), (40, 36, 32)))
    hu[tuple(map(slice, low, high))] = 400  # borders lie half-way to the threshold
    write_nifti(tmp_path / "s.nii", hu, spacing)
    assert run(tmp_path / "s.nii", tmp_path / "out", *QUICK, "--no_roi") == 0
    assert network.seen == [12 * 6 * 8]


@pytest.mark.parametrize("region", ["body", "whole"])
def test_region_makes_no_difference_inside(region, tmp_path, monkeypatch):
    """An off-centre ball in an off-centre body, odd sizes: pasted back at its place."""
    stub(monkeypatch, threshold_model(spacing=(1.2, 1.2, 1.2)))
    hu = np.full((61, 57, 83), -1000, np.int16)
    hu[11:58, 5:49, 20:77] = ball((47, 44, 57), (1.3, 1.1, 0.7), centre=(0.6, 0.5, 0.5), radius_mm=12)
    write_nifti(tmp_path / "s.nii", hu, (1.3, 1.1, 0.7), orientation="LPS")
    assert run(tmp_path / "s.nii", tmp_path, *QUICK, *(["--no_roi"] if region == "whole" else [])) == 0
    assert dice(load_label(tmp_path / "s_mask.nii.gz").array, hu > BONE_HU) > 0.985


def test_a_preprocessed_case_gives_the_same_labels(tmp_path):
    hu = ball((40, 36, 32), (2, 2, 2))
    write_case(tmp_path / "c.h5", hu, (hu > BONE_HU).astype(np.uint8), attributes={"spacing_mm": (2.0,) * 3})
    case = CaseFile(tmp_path / "c.h5")
    pred = segment(threshold_model(), case.image, case.spacing_mm)
    assert np.array_equal(pred, case.label[...]), "on the grid of training nothing is resampled"
    assert np.array_equal(pred, segment(threshold_model(), hu, (2, 2, 2)))
    boxed = segment(threshold_model(), case.image, case.spacing_mm, box=((5, 6, 7), (33, 30, 30)))
    outside = np.ones(hu.shape, bool)
    outside[5:33, 6:30, 7:30] = False
    assert not boxed[outside].any() and np.array_equal(boxed[~outside], pred[~outside])


# ---- region ----


def test_volume_of_a_tilted_gantry(tmp_path, monkeypatch):
    """Slices 2 mm apart along an axis that leans by 30 degrees: 1.73 mm^3 a voxel, not 2."""
    stub(monkeypatch)
    hu = np.zeros((24, 24, 24), np.int16)
    hu[8:16, 8:16, 8:16] = 1000
    affine = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 3**0.5, 0], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(hu, affine)
    image.set_sform(affine, 1)
    nibabel.save(image, tmp_path / "s.nii")
    assert run(tmp_path / "s.nii", tmp_path, *QUICK, "--clean_up", "False") == 0
    voxels = np.count_nonzero(load_label(tmp_path / "s_mask.nii.gz").array)
    volume_ml = json.loads((tmp_path / "s.json").read_text())["volume_ml"]
    assert voxels > 400 and volume_ml == {"1": pytest.approx(voxels * 3**0.5 / 1000)}
    assert float(results(tmp_path)[0]["volume_ml"]) == pytest.approx(voxels * 3**0.5 / 1000, rel=1e-4)


def written_box(out, name="s"):
    region = json.loads((out / f"{name}.json").read_text())["region"]
    return region["source"], tuple(region["start"]), tuple(region["stop"])


def inside_of(box, mask) -> bool:
    places = np.argwhere(mask)
    return bool((places.min(0) >= box[1]).all() and (places.max(0) < box[2]).all())


@pytest.mark.parametrize("spacing", [(1.0, 0.7, 0.7), (5.0, 0.45, 0.6), (0.8, 0.8, 3.0), (2.9, 1.4, 1.01)])
def test_body_box_holds_the_body(spacing, tmp_path, monkeypatch):
    """Odd sizes, where the last block of the coarse copy is not whole."""
    stub(monkeypatch)
    shape = tuple(int(100 / s) | 1 for s in spacing)
    hu = np.full(shape, -1000, np.int16)
    start, stop = (np.multiply(shape, share).astype(int) for share in (0.3, 0.93))
    hu[tuple(map(slice, start, stop))] = 40
    write_nifti(tmp_path / "s.nii", hu, spacing)
    run(tmp_path / "s.nii", tmp_path, *QUICK)
    box = written_box(tmp_path)
    assert box[0] == "body" and inside_of(box, hu > -500)
    slack_mm = np.multiply(np.subtract(start, box[1]), spacing)
    assert (slack_mm <= 20 + 4 * np.maximum(OVERVIEW_MM, spacing)).all(), "and not much more"


@pytest.mark.parametrize("spacing, factors", [((2.0, 2.0, 1.0), (1, 1, 3)), ((0.8, 0.7, 5.0), (3, 4, 1))])
def test_voxels_of_the_overview_are_not_above_3_mm(spacing, factors, tmp_path, monkeypatch):
    asked, read = [], NiftiFile.read_reduced

    def watched(file, factors, value_range):
        asked.append(factors)
        return read(file, factors, value_range)

    monkeypatch.setattr(NiftiFile, "read_reduced", watched)
    write_nifti(tmp_path / "s.nii", np.zeros((12, 12, 12), np.int16), spacing)
    region_of(tmp_path / "s.nii")
    assert asked == [factors]


def test_heat_map_gives_the_region(tmp_path, monkeypatch):
    stub(monkeypatch, heat=Spot())
    hu = np.full((60, 50, 50), 40, np.int16)
    hu[20:40, 15:25, 20:30] = 1200  # hot
    hu[2:5, 44:48, 44:48] = 600  # bone far from the spine, too faint to be hot
    write_nifti(tmp_path / "s.nii", hu, (4, 4, 4), orientation="PIR")
    run(tmp_path / "s.nii", tmp_path, *QUICK, "--heatmap_weights", "hm.pt", "--clean_up", "False")
    box = written_box(tmp_path)
    assert box[0] == "heat map" and inside_of(box, hu > 1000)
    assert np.prod(np.subtract(box[2], box[1])) < 0.5 * hu.size
    mask = load_label(tmp_path / "s_mask.nii.gz").array
    assert mask[22:38, 17:23, 22:28].all() and not mask[2:5, 44:48, 44:48].any()
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["region"]["max_heat"] == pytest.approx(0.99, abs=0.01)


def region_of(path, heat=None) -> Region:
    heatmap = heat and TrainedModel(heat.eval(), {"patch_size": [32, 16, 16]}, CPU, FP32, {}, {"train": []})
    return find_region(open_nifti(path), heatmap)


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PIR"])
def test_box_of_the_heat_map_where_the_body_begins_elsewhere(orientation, tmp_path):
    """Worked out by hand: 3 mm voxels, a body of 50 x 18 x 18 that begins at (25, 27, 31).

    With 20 mm (7 voxels) around it, it is 64 x 32 x 32 and exactly twice as fine as the heat map. The hot
    block begins on even voxels of it. Around it come 30, 20 and 20 mm: 10, 6.67 and 6.67 voxels.
    """
    hu = np.full((110, 70, 80), -1000, np.int16)
    hu[25:75, 27:45, 31:49] = 40
    hu[42:58, 32:40, 34:46] = 1200
    write_nifti(tmp_path / "s.nii", hu, (3, 3, 3), orientation=orientation)
    region = region_of(tmp_path / "s.nii", Spot())
    assert region.source == "heat map" and region.heat == pytest.approx(0.99, abs=0.01)
    assert region.box == ((32, 25, 27), (68, 47, 53))
    faint = region_of(tmp_path / "s.nii", Spot(heat=0.2))
    assert faint.source == "body" and faint.box == ((18, 20, 24), (82, 52, 56))


def test_margin_of_the_body_is_in_millimetres(tmp_path):
    """20 mm: 4 slices of 6 mm, 14 rows of 1.5 mm (7 pairs of them in the coarse copy), 7 columns of 3 mm."""
    hu = np.full((40, 120, 60), -1000, np.int16)
    hu[10:20, 40:80, 20:40] = 40
    write_nifti(tmp_path / "s.nii", hu, (6, 1.5, 3))
    assert region_of(tmp_path / "s.nii").box == ((6, 26, 13), (24, 94, 47))


def test_padding_and_metal_do_not_move_the_region(tmp_path):
    """Blocks of 3 x 3 voxels, at the border two thirds of them body: -3024 in the rest makes them no air.

    (-1024 + 40 + 40) / 3 is -315, which is body; (-3024 + 40 + 40) / 3 would be -981.
    """
    hu = np.full((30, 60, 60), -1000, np.int16)
    hu[5:25, 31:41, 34:39] = 40
    write_nifti(tmp_path / "plain.nii", hu, (3, 1, 1))
    box = region_of(tmp_path / "plain.nii").box
    assert box == ((0, 30 - 21, 33 - 21), (30, 60, 60))
    hu[hu == -1000] = -3024
    write_nifti(tmp_path / "padded.nii", hu, (3, 1, 1))
    hu[10, 35, 35] = 30_000
    write_nifti(tmp_path / "screw.nii", hu, (3, 1, 1))
    assert region_of(tmp_path / "padded.nii").box == region_of(tmp_path / "screw.nii").box == box


@pytest.mark.parametrize("mm", [1.0, 1.7])
def test_metal_and_padding_change_no_voxel_of_the_mask(mm, tmp_path, monkeypatch):
    """The scan as it is, and cut to 12 bits beforehand: one mask. A screw in bone, padding beside tissue."""
    stub(monkeypatch, threshold_model(spacing=(mm,) * 3))
    hu = ball((60, 50, 50), (1, 1, 1), radius_mm=20)
    hu[25:28, 20:24, 5:45] = 30_000
    hu[:, :, :6] = -3024
    write_nifti(tmp_path / "raw.nii", hu, (1, 1, 1))
    write_nifti(tmp_path / "cut.nii", hu.clip(-1024, 3071), (1, 1, 1))
    for name in ("raw", "cut"):
        assert run(tmp_path / f"{name}.nii", tmp_path, *QUICK) == 0
    raw, cut = (load_label(tmp_path / f"{name}_mask.nii.gz").array for name in ("raw", "cut"))
    assert cut.any() and np.array_equal(raw, cut)


class Context(torch.nn.Module):
    """The mean of the whole window decides: whatever is shown beyond a region matters."""

    def forward(self, image):
        return image.mean(dim=(2, 3, 4), keepdim=True).expand_as(image) * 50


@pytest.mark.parametrize("rows, bright", [((20, 24), True), ((0, 4), False)])
def test_around_a_region_the_scan_is_read(rows, bright, tmp_path, monkeypatch):
    """A region of 4 slices, a patch of 24: it depends on the slices of the scan beyond the region."""
    stub(monkeypatch, threshold_model(patch=(24, 30, 30), network=Context()))
    hu = np.full((48, 30, 30), 1500, np.int16)
    hu[:12], hu[20:24] = -900, -400
    write_nifti(tmp_path / "s.nii", hu, (2, 2, 2))
    (tmp_path / "roi.json").write_text(json.dumps({"start": [rows[0], 0, 0], "stop": [rows[1], 30, 30]}))
    flags = [*QUICK, "--clean_up", "False", "--roi", tmp_path / "roi.json"]
    assert run(tmp_path / "s.nii", tmp_path, *flags) == 0
    mask = load_label(tmp_path / "s_mask.nii.gz").array
    assert mask[rows[0] : rows[1]].all() if bright else not mask.any()
    assert not mask[: rows[0]].any() and not mask[rows[1] :].any()
    assert written_box(tmp_path) == ("given", (rows[0], 0, 0), (rows[1], 30, 30))


def test_faint_heat_map_falls_back_to_the_body(tmp_path, monkeypatch, capsys):
    stub(monkeypatch, heat=Spot(heat=0.2))
    hu = np.full((40, 40, 40), -1000, np.int16)
    hu[8:34, 8:34, 8:34] = 1200
    write_nifti(tmp_path / "s.nii", hu, (3, 3, 3))
    run(tmp_path / "s.nii", tmp_path, *QUICK, "--heatmap_weights", "hm.pt")
    assert "warning: s.nii: the heat map found no spine (highest value 0.20)" in capsys.readouterr().out
    box = written_box(tmp_path)
    assert box[0] == "body" and inside_of(box, hu > 0)
    assert json.loads((tmp_path / "s.json").read_text())["region"]["max_heat"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("where", [[], ["--no_roi"], ["--roi", "roi.json"]])
def test_a_scan_that_is_not_in_hu_is_named(where, tmp_path, monkeypatch, capsys):
    """Wherever it is segmented."""
    stub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roi.json").write_text(json.dumps({"start": [8, 8, 8], "stop": [34, 34, 34]}))
    hu = np.random.default_rng(0).normal(-1000, 20, (40, 40, 40))
    hu[8:34, 8:34, 8:34] += 1050
    hu[8:34, 8:14, 8:34] -= 150  # fat
    for name, image in (("ct", hu), ("raw", np.clip(hu + 1024, 0, 4095))):
        write_nifti(tmp_path / f"{name}.nii", image.astype(np.int16), (3, 3, 3))
        run(tmp_path / f"{name}.nii", tmp_path, *QUICK, *where)
    printed = capsys.readouterr().out
    assert "warning: raw.nii: values from" in printed and "1024 must be subtracted" in printed
    assert "warning: ct.nii: values" not in printed


def test_given_region(tmp_path, monkeypatch, capsys):
    """A plain box, this script's own JSON, and all that is none."""
    stub(monkeypatch)
    hu = np.full((30, 30, 30), 600, np.int16)
    write_nifti(tmp_path / "s.nii", hu, (2, 2, 2), orientation="LPS")
    roi = tmp_path / "roi.json"
    roi.write_text(json.dumps({"start": [3, 4, 5], "stop": [20, 25, 30]}))
    first, second = tmp_path / "a", tmp_path / "b"
    assert run(tmp_path / "s.nii", first, *QUICK, "--roi", roi) == 0
    mask = load_label(first / "s_mask.nii.gz").array
    assert mask[3:20, 4:25, 5:30].all() and mask.sum() == 17 * 21 * 25
    assert run(tmp_path / "s.nii", second, *QUICK, "--roi", first / "s.json") == 0
    assert written_box(second) == ("given", (3, 4, 5), (20, 25, 30))
    assert np.array_equal(load_label(second / "s_mask.nii.gz").array, mask)
    capsys.readouterr()
    for content, message in (
        ('{"start": [0, 0, 0], "stop": [10, 10, 31]}', "is not inside s.nii (30, 30, 30)"),
        ('{"start": [5, 5, 5], "stop": [5, 9, 9]}', "is not inside"),
        ('{"start": [-1, 0, 0], "stop": [5, 9, 9]}', "is not inside"),
        ('{"start": [0, 0], "stop": [5, 9]}', "is not inside"),
        ('{"start": [0, 0, "0"], "stop": [5, 9, 9]}', "is not inside"),
        ('{"start": [0, 0, 0]}', '"stop" is missing, expected a list'),
        ('{"region": "body"}', "expected an object, found a text"),
        ("[1, 2]", "expected an object, found a list"),
        ("no json", "not valid JSON"),
    ):
        roi.write_text(content)
        assert run(tmp_path / "s.nii", tmp_path / "c", *QUICK, "--roi", roi) == 1
        out = capsys.readouterr().out
        assert f"failed: {tmp_path / 's.nii'}: {roi}: " in out and message in out, content
    assert run(tmp_path / "s.nii", tmp_path / "c", *QUICK, "--roi", tmp_path / "none.json") == 1
    assert "none.json: no such file" in capsys.readouterr().out


@pytest.mark.parametrize("hu", [-1000, -3024])
def test_empty_scan_gives_an_empty_mask_and_says_so(hu, tmp_path, monkeypatch, capsys):
    stub(monkeypatch, heat=Spot())
    write_nifti(tmp_path / "s.nii", np.full((20, 30, 40), hu, np.int16), (2, 2, 2))
    assert run(tmp_path / "s.nii", tmp_path, "--heatmap_weights", "hm.pt") == 0
    out = capsys.readouterr().out
    assert "warning: s.nii: no vertebra found, its mask is empty" in out and "found no spine" in out
    assert not load_label(tmp_path / "s_mask.nii.gz").array.any()
    assert read_centroids(tmp_path / "s_bodies.json").voxels == {}
    assert json.loads((tmp_path / "s.json").read_text())["volume_ml"] == {}


@pytest.mark.parametrize(
    "shape, spacing",
    [((2, 40, 40), (5, 2, 2)), ((10, 9, 8), (2, 2, 2)), ((1, 30, 30), (3, 2, 2)), ((200, 20, 18), (3, 3, 3))],
    ids=["two slices", "smaller than a patch", "one slice", "600 mm"],
)
def test_unusual_sizes(shape, spacing, tmp_path, monkeypatch):
    stub(monkeypatch, heat=Spot())
    hu = np.full(shape, 40, np.int16)
    middle = tuple(slice(n // 4, max(n - n // 4, n // 4 + 1)) for n in shape)
    hu[middle] = 1200
    write_nifti(tmp_path / "s.nii.gz", hu, spacing)
    flags = ["--heatmap_weights", "hm.pt", "--clean_up", "False"]
    assert run(tmp_path / "s.nii.gz", tmp_path, *flags) == 0
    mask = load_label(tmp_path / "s_mask.nii.gz").array
    assert mask.shape == shape and dice(mask, hu > BONE_HU) > 0.8
    assert inside_of(written_box(tmp_path), hu > 1000)


def test_cervical_spine(tmp_path, monkeypatch):
    """Small vertebrae only; the threshold finds them and the clean-up leaves them."""
    stub(monkeypatch, threshold_model(spacing=(2.5, 2.5, 2.5)))
    _, label, _ = spine_phantom(6, spacing_mm=(2.5, 2.5, 2.5), levels=(1, 7))
    write_nifti(tmp_path / "s.nii.gz", np.where(label > 0, 600, 40).astype(np.int16), (2.5, 2.5, 2.5))
    assert run(tmp_path / "s.nii.gz", tmp_path, *QUICK) == 0
    assert dice(load_label(tmp_path / "s_mask.nii.gz").array, label) > 0.97


# ---- files written ----


@pytest.fixture(scope="module")
def phantom():
    return spine_phantom(0, spacing_mm=(2.5, 2.0, 2.0), levels=(14, 22), variant="T13", noise_hu=10)


class Fixed(torch.nn.Module):
    """Levels coded as HU: 500 + 30 x class; the nearest class wins."""

    def forward(self, image):
        classes = torch.arange(27).view(1, -1, 1, 1, 1)
        level = ((image * 1500 + 500) - 500) / 30
        return -(level - classes).abs() * 10


def coded_levels(label, index_of=VERTEBRAE):
    table = np.zeros(29, np.int16)
    table[list(index_of)] = range(1, len(index_of) + 1)
    return (500 + 30 * table[label]).astype(np.int16)


def test_levels_and_their_centres(phantom, tmp_path, monkeypatch):
    """VerSe's numbers in mask and centroid file; centres in mm where the bodies are."""
    _, label, centres = phantom
    stub(monkeypatch, threshold_model(spacing=(2.5, 2, 2), network=Fixed(), labels="levels26"))
    path = tmp_path / "s.nii.gz"
    write_nifti(path, coded_levels(label), (2.5, 2, 2), origin_mm=(-40, 12, 300), orientation="PIR")
    assert run(path, tmp_path / "out", "--no_roi", "--clean_up", "False") == 0
    mask = load_label(tmp_path / "out" / "s_mask.nii.gz")
    assert np.array_equal(mask.array, label) and 28 in mask.array, "T13 is the 26th class and VerSe's 28"
    found = read_centroids(tmp_path / "out" / "s_ctd.json")
    assert found.direction == ("P", "I", "R")
    in_mm = centroids_to_mm(found, open_nifti(path))
    truth = {k: np.add(c, (300, 12, -40)) for k, c in centres.items()}
    whole = [k for k in truth if 15 <= k <= 21]
    assert whole and all(np.linalg.norm(np.subtract(in_mm[k], truth[k])) < 4 for k in whole)
    content = json.loads((tmp_path / "out" / "s.json").read_text())
    voxel_ml = 2.5 * 2 * 2 / 1000
    assert content["volume_ml"] == {
        str(k): pytest.approx((label == k).sum() * voxel_ml) for k in np.unique(label).tolist() if k
    }
    assert results(tmp_path / "out")[0]["labels"] == " ".join(content["volume_ml"])
    assert content["classes"][1] == "C1" and content["labels"] == "levels26"
    assert content["seconds"] >= content["region"]["seconds"] >= 0
    assert content["predicted_mib"]["host"] > 0 and content["precision"] == "fp32"
    assert content["region"]["stop"] == list(label.shape) and content["clean_up"]["removed_ml"] == 0
    with (tmp_path / "out" / "s_preview.png").open("rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_binary_bodies_are_counted_from_head_to_foot(phantom, tmp_path, monkeypatch):
    _, label, _ = phantom
    stub(monkeypatch, threshold_model(spacing=(2.5, 2, 2)))
    path = tmp_path / "s.nii.gz"
    write_nifti(path, np.where(label > 0, 600, 40).astype(np.int16), (2.5, 2, 2), orientation="LPS")
    assert run(path, tmp_path, *QUICK, "--no_roi") == 0
    scan = open_nifti(path)
    found = centroids_to_mm(read_centroids(tmp_path / "s_bodies.json"), scan)
    assert list(found) == list(range(1, len(found) + 1)), "numbered without gaps"
    assert (np.diff([found[k][0] for k in found]) < 0).all(), "from head to foot"
    truth = body_centres(label, scan.affine)
    distance = np.linalg.norm(
        np.array(list(truth.values()))[:, None] - np.array(list(found.values())), axis=2
    )
    assert (distance.min(0) < 8).all() and abs(len(found) - len(truth)) <= 2


def test_more_bodies_than_numbers_stay_readable(tmp_path, monkeypatch):
    """VerSe's numbers end at 28; a file with a 29th could not be read again."""
    stub(monkeypatch)
    monkeypatch.setattr(
        segment_module, "count_bodies", lambda *_: np.array([[z, 5.0, 5.0] for z in range(60, 0, -2)])
    )
    write_nifti(tmp_path / "s.nii", ball((40, 30, 30), (2, 2, 2)), (2, 2, 2))
    assert run(tmp_path / "s.nii", tmp_path, *QUICK) == 0
    assert len(read_centroids(tmp_path / "s_bodies.json").voxels) == 28


class OneSided(torch.nn.Module):
    """Sees only what rises to the right: mirrored, another answer."""

    def forward(self, image):
        return torch.diff(image, dim=-1, append=image[..., -1:]) * 50 + 0.1 * image


def test_tta_is_the_average_of_both(tmp_path, monkeypatch):
    hu = ball((20, 24, 24), (2, 2, 2))
    network = OneSided()
    pred = segment(threshold_model(network=network), hu, (2, 2, 2), mirror=True)
    image = (torch.from_numpy(hu).float().clamp(-1000, 2000)[None, None] - 500) / 1500
    both = (network(image) + network(image.flip(-1)).flip(-1)) / 2
    assert np.array_equal(pred, (both[0, 0] > 0).numpy().astype(np.uint8))
    assert not np.array_equal(pred, segment(threshold_model(network=network), hu, (2, 2, 2)))
    stub(monkeypatch, threshold_model(network=network))
    write_nifti(tmp_path / "s.nii", hu, (2, 2, 2))
    run(tmp_path / "s.nii", tmp_path, *QUICK, "--tta", "--no_roi", "--clean_up", "False")
    assert np.array_equal(load_label(tmp_path / "s_mask.nii.gz").array, pred)


def test_clean_up_can_be_left_out_and_knows_the_scans_border(tmp_path, monkeypatch):
    """A crumb goes; one at the border of the region, but not of the scan, goes too."""
    stub(monkeypatch)
    hu = ball((60, 60, 60), (2, 2, 2), radius_mm=20)
    hu[50, 50, 50], hu[5, 30, 30] = 1000, 1000
    write_nifti(tmp_path / "s.nii", hu, (2, 2, 2))
    roi = tmp_path / "roi.json"
    roi.write_text(json.dumps({"start": [5, 0, 0], "stop": [60, 60, 60]}))
    run(tmp_path / "s.nii", tmp_path / "raw", *QUICK, "--clean_up", "False", "--roi", roi)
    run(tmp_path / "s.nii", tmp_path / "clean", *QUICK, "--roi", roi)
    raw, clean = (load_label(tmp_path / d / "s_mask.nii.gz").array for d in ("raw", "clean"))
    assert raw[50, 50, 50] and raw[5, 30, 30] and not clean[50, 50, 50] and not clean[5, 30, 30]
    assert raw.sum() - clean.sum() == 2
    removed = json.loads((tmp_path / "clean" / "s.json").read_text())["clean_up"]["removed_ml"]
    assert removed == pytest.approx(2 * 8 / 1000)


# ---- folders, and what goes wrong ----


def scans(folder, *names, shape=(16, 16, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_nifti(folder / name, ball(shape, (3, 3, 3)), (3, 3, 3))
    return folder


def test_folder_with_bad_files(tmp_path, monkeypatch, capsys):
    """Truncated, 4-D, text, own masks, two of one name: the good ones are written, the bad ones listed."""
    stub(monkeypatch)
    source = scans(tmp_path / "in", "b10.nii.gz", "b9.nii", "b9.nii.gz")
    scans(source / "sub", "c.nii.gz")
    whole = (source / "b10.nii.gz").read_bytes()
    (source / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.eye(4)), source / "four.nii")
    (source / "text.nii").write_text("no scan")
    (source / "notes.txt").write_text("x")
    (source / "._b.nii").write_text("x")
    out = source / "out"
    assert run(source, out, *QUICK, "--recursive") == 1
    text = capsys.readouterr().out
    assert [row["scan"].rsplit("/")[-1] for row in results(out)] == ["b9.nii", "b10.nii.gz", "c.nii.gz"]
    assert "3 of 7 scan(s) written" in text
    failures = [line for line in text.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 4
    for name, reason in (("cut.nii.gz", "truncated"), ("four.nii", "4-D"), ("text.nii", "not a readable"),
                         ("b9.nii.gz", "would have the name of that of")):  # fmt: skip
        assert any(name in line and reason in line for line in failures), name
    assert sorted(p.name for p in out.glob("*_mask.nii.gz")) == [
        "b10_mask.nii.gz", "b9_mask.nii.gz", "c_mask.nii.gz"]  # fmt: skip
    assert not list(out.glob(".partial*"))


def test_second_run_and_own_output(tmp_path, monkeypatch, capsys):
    """--out inside the source, or the source itself: masks are not taken for scans, results are replaced."""
    stub(monkeypatch)
    source = scans(tmp_path / "in", "a.nii.gz", "b.nii.gz")
    for out in (source / "out", source, tmp_path):
        assert run(source, out, *QUICK, "--recursive") == 0
        (out / "a_mask.nii.gz").write_bytes(b"old")
        assert run(source, out, *QUICK, "--recursive") == 0
        assert len(results(out)) == 2
        assert load_label(out / "a_mask.nii.gz").array.any(), "written anew"
    assert "2 of 2 scan(s)" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    stub(monkeypatch)
    source, calls = scans(tmp_path / "in", "a.nii", "b.nii", "c.nii"), []
    original = predict.segment

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(predict, "segment", interrupted)
    told = r"stopped by the user after 1 of 3 scan\(s\); their results are in"
    with pytest.raises(KeyboardInterrupt, match=told):  # which `run_script` turns into exit code 130
        run(source, tmp_path / "out", *QUICK)
    assert [row["scan"][-5:] for row in results(tmp_path / "out")] == ["a.nii"]
    assert (tmp_path / "out" / "a_mask.nii.gz").is_file() and not (
        tmp_path / "out" / "b_mask.nii.gz"
    ).exists()


def test_pictures_that_fail_cost_the_pictures_alone(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise IndexError("index 65 is out of bounds")

    stub(monkeypatch)
    monkeypatch.setattr(predict, "save_planes", fails)
    monkeypatch.setattr("verse_spine.views.surface_mesh", fails)
    source, out = scans(tmp_path / "in", "a.nii", "b.nii"), tmp_path / "out"
    assert run(source, out, "--no_roi", "--save_preview", "--save_3d") == 0
    told = capsys.readouterr().out
    assert "warning: a_preview.png is left out: IndexError: index 65 is out of bounds (test_verse" in told
    assert "warning: what is missing of the 3-D pictures of b is left out: IndexError" in told
    assert [row["scan"][-5:] for row in results(out)] == ["a.nii", "b.nii"]
    assert (out / "a.json").is_file() and (out / "b_mask.nii.gz").is_file()


def test_a_scan_beyond_the_free_memory_is_refused_with_flags_that_this_script_has(
    tmp_path, monkeypatch, capsys
):
    stub(monkeypatch)
    monkeypatch.setattr(nifti_checks, "ALWAYS_FREE", 0)
    monkeypatch.setattr("common.hardware.cores_and_ram_gib", lambda: (1, 1.0, 1e-4))
    source = scans(tmp_path / "in", "a.nii")
    assert run(source, tmp_path / "out", *QUICK, "--no_roi") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        f"failed: {source / 'a.nii'}: predicting it takes 0.0 GiB of memory, but 0.0 GiB are"
    )
    assert last.endswith(
        "needs a smaller --batch_size, --heatmap_weights (without --no_roi) or a smaller --roi"
    )


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_good_bad_good_gives_two_masks(error, tmp_path, monkeypatch, capsys):
    """Whatever the second scan raises; when it begins, the first one stands in the table."""
    stub(monkeypatch)
    original, out = predict.segment, tmp_path / "out"

    def failing(model, image, *args, **kwargs):
        if image.shape[0] == 20:
            assert [row["scan"][-5:] for row in results(out)] == ["a.nii"]
            raise error.with_traceback(None)
        return original(model, image, *args, **kwargs)

    monkeypatch.setattr(predict, "segment", failing)
    source = scans(tmp_path / "in", "a.nii", "c.nii")
    scans(source, "b.nii", shape=(20, 16, 16))
    assert run(source, out, *QUICK, "--no_roi") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"failed: {source / 'b.nii'}: ") and "2 of 3 scan(s) written" in lines[-2]
    assert sum("failed: " in line for line in lines) == 1
    assert [row["scan"][-5:] for row in results(out)] == ["a.nii", "c.nii"]
    assert sorted(p.name for p in out.glob("*_mask.nii.gz")) == ["a_mask.nii.gz", "c_mask.nii.gz"]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_scans_of_one_name_in_two_processes(rank, tmp_path, monkeypatch, capsys):
    """Each process knows of the other one's files: only the first of the two is predicted."""
    stub(monkeypatch)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    source = scans(tmp_path / "in", "a.nii", "a.nii.gz")
    assert run(source, tmp_path / "out", *QUICK) == (1 if rank == 0 else 0)
    assert (tmp_path / "out" / "a_mask.nii.gz").is_file() is (rank == 0)
    if rank == 0:
        reason = f"its result would have the name of that of {source / 'a.nii'}; rename one of the two"
        assert capsys.readouterr().out.splitlines()[-1] == f"failed: {source / 'a.nii.gz'}: {reason}"
        assert [row["scan"] for row in results(tmp_path / "out")] == [str(source / "a.nii")]


def checkpoint(path, stage, labels="binary"):
    config = {"model": "UNet", "checkpointing": False, "patch_size": [16, 16, 16], "labels": labels,
              "intensity": "hu"}  # fmt: skip
    outputs = 1 if stage == "heatmap" else num_outputs(labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_checkpoint(
        path,
        {"model": get_model(config, outputs).state_dict(), "config": config, "stage": stage,
         "num_outputs": outputs, "preprocessing": {"spacing_mm": [3.0, 3.0, 3.0]},
         "split": {"train": [], "val": [], "test": []}},
    )  # fmt: skip
    return path


def test_wrong_weights_and_sources(tmp_path):
    seg = checkpoint(tmp_path / "seg" / "weights" / "best.pt", "segmentation")
    heat = checkpoint(tmp_path / "hm" / "weights" / "best.pt", "heatmap")
    foreign = tmp_path / "foreign.pt"
    save_checkpoint(foreign, {"model": {}, "config": {"model": "UNet", "image_size": 256}})
    source = scans(tmp_path / "in", "a.nii")
    empty = tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    for flags, message in (
        ({"weights": heat}, "best.pt: not weights of verse_spine/train_segmentation.py but of heatmap"),
        ({"weights": seg, "heatmap_weights": seg}, "not weights of verse_spine/train_heatmap.py but of segm"),
        ({"weights": foreign}, "not weights of verse_spine/train_segmentation.py but of another task"),
        ({"weights": tmp_path / "none.pt"}, "none.pt: no such checkpoint"),
        ({"weights": seg, "heatmap_weights": tmp_path / "none.pt"}, "none.pt: no such checkpoint"),
        ({"weights": seg, "source": tmp_path / "none.nii"}, "none.nii: no such file or folder"),
        ({"weights": seg, "source": empty}, "no NIfTI scan in it; --recursive also"),
    ):
        flags = {"source": source, "out": tmp_path / "out", "device": "cpu", "amp": "off"} | flags
        with pytest.raises(SystemExit, match="error: .*" + message):
            predict.main([str(f) for pair in ((f"--{k}", v) for k, v in flags.items()) for f in pair])
    # Real, untrained networks end to end; by default the results lie with the run.
    flags = [
        "--weights",
        seg,
        "--heatmap_weights",
        heat,
        "--source",
        source,
        "--device",
        "cpu",
        "--amp",
        "off",
    ]
    assert predict.main([str(f) for f in (*flags, *QUICK)]) == 0
    assert (tmp_path / "seg" / "predictions" / "a_mask.nii.gz").is_file()


def test_real_scan(tmp_path, monkeypatch):
    """A real scan through the whole of it, with the true mask as network."""
    folder = REAL_DATA / "spine_ct"
    if not folder.is_dir():
        pytest.skip("the real scans are not on this machine")
    stub(monkeypatch, threshold_model(spacing=(3, 3, 3)))
    scan = folder / "rawdata" / "sub-verse901" / "sub-verse901_ct.nii.gz"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(scan, tmp_path) == 0
    mask, image = load_label(tmp_path / "sub-verse901_ct_mask.nii.gz"), load_nifti(scan)
    assert mask.array.shape == image.array.shape and np.array_equal(mask.affine, image.affine)
    assert dice(mask.array, image.array > BONE_HU) > 0.95
    assert (tmp_path / "sub-verse901_ct_preview.png").stat().st_size > 10000


# ---- memory ----

BIG = """
import resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np, torch
torch.set_num_threads(1)
import test_verse_predict as t
t.predict.load_trained = lambda *args: t.threshold_model((96, 96, 96), ({mm},) * 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = t.run({scan!r}, {out!r}, "--overlap", "0.1")
print("PEAK", code, before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_body_ct(path, shape=(1000, 512, 512), spacing=(0.8, 0.7, 0.7)) -> None:
    """A body of soft tissue with 24 bright blocks and ribs, written slab by slab."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape[::-1])
    header.set_data_dtype(np.int16)
    header.set_sform(np.diag([*spacing[::-1], 1]), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header.set_xyzt_units("mm")
    rng = np.random.default_rng(0)
    noise = rng.integers(-20, 20, shape[1:], dtype=np.int16)
    y, x = np.ogrid[: shape[1], : shape[2]]
    body = ((y / shape[1] - 0.5) / 0.4) ** 2 + ((x / shape[2] - 0.5) / 0.47) ** 2 < 1
    with path.open("wb") as file:
        file.write(header.binaryblock + b"\0" * 4)
        for z in range(shape[0]):
            plane = np.where(body, np.roll(noise, z, 1) + 40, -1000).astype(np.int16)
            if z % 40 < 30:
                plane[200:260, 220:290] = 600
            if z % 40 < 5:  # ribs: bone all over the body, so that the mask's box is nearly the scan
                plane[120:400, 60:70] = plane[120:400, 440:450] = 600
            file.write(plane.tobytes())


def peak_mib(tmp_path, mm: float) -> tuple[int, int]:
    """(before the prediction, peak) of a whole-body CT of 500 MiB, in MiB."""
    write_body_ct(tmp_path / "big.nii")
    code = BIG.format(root=str(ROOT), tests=str(ROOT / "tests"), mm=mm, scan=str(tmp_path / "big.nii"),
                      out=str(tmp_path / "out"))  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    line = next((s for s in done.stdout.splitlines() if s.startswith("PEAK")), None)
    assert line, done.stdout + done.stderr
    status, before, peak = map(int, line.split()[1:])
    assert status == 0, done.stdout
    return before, peak


@pytest.mark.slow
def test_memory_of_a_whole_body(tmp_path):
    """512 x 512 x 1000 without a heat map: below 2 GB above the file's 524 MB, libraries included."""
    _, peak = peak_mib(tmp_path, 2.5)
    assert peak < 500 + 1907
