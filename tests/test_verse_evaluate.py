"""verse_spine/evaluate.py: scores by hand, both modes end to end, tables for common/compare.py."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ERRORS

from common.compare import main as compare
from common.compare import read_results
from common.hardware import Precision
from common.hdf5 import CaseFile, write_case
from common.nifti import load_label, open_nifti, save_label, write_nifti
from verse_spine import evaluate
from verse_spine.cases import find_cases
from verse_spine.dataset import VerSe
from verse_spine.labels import (
    Centroids,
    centroids_to_mm,
    centroids_to_voxels,
    class_names,
    map_labels,
    mask_centres,
    read_centroids,
    unmap_labels,
    write_centroids,
)
from verse_spine.networks import TrainedModel
from verse_spine.scores import score_case

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")


def blocks(*levels, shape=(70, 20, 20), shift=0):
    """A mask of one 8 x 10 x 10 block for each level, from head to foot, with 4 voxels between."""
    labels = np.zeros(shape, np.uint8)
    for k, level in enumerate(levels):
        top = shape[0] - 3 - 12 * k
        labels[top - 8 : top, 5 + shift : 15 + shift, 5:15] = level
    return labels


def score(pred, target, labels="levels26", **kwargs):
    """`pred` in VerSe's numbers too."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    centres = mask_centres(target, affine)
    return score_case(map_labels(pred, labels), target, (2.0, 2.0, 2.0), affine, labels, centres, **kwargs)


# ---- one case ----


@pytest.mark.parametrize("labels", ["binary", "region3", "levels26"])
def test_perfect_masks(labels):
    target = blocks(18, 19, 28, 20, 21)
    rows, summary = score(target, target, labels)
    present = [r for r in rows if r["status"] == "ok"]
    assert len(rows) == len(class_names(labels)) - 1
    assert len(present) == {"binary": 1, "region3": 2, "levels26": 5}[labels]
    assert all(r["dice"] == 1 and r["hd95_mm"] == 0 and r["nsd_1mm"] == 1 for r in present)
    assert summary["dice_any"] == summary["dice_classes"] == 1
    if labels == "levels26":
        assert (summary["hits"], summary["targets"], summary["rate"]) == (5, 5, 1.0)
        assert summary["dice_instance"] == summary["dice_inner"] == 1
        assert {r["name"] for r in present} == {"T11", "T12", "T13", "L1", "L2"}


def test_scores_by_hand():
    """One vertebra half as wide, one a voxel to the front, one missed."""
    target = blocks(19, 20, 21)
    pred = target.copy()
    pred[(target == 19) & (np.arange(20) < 10)] = 0  # x: half of 10
    pred[target == 20] = 0
    pred[np.roll(target == 20, 1, axis=1)] = 20
    pred[target == 21] = 0
    rows, summary = score(pred, target)
    by_name = {r["name"]: r for r in rows if r["status"] != "absent"}
    half, moved = 2 * 400 / (400 + 800), 2 * 720 / 1600
    assert by_name["T12"]["dice"] == pytest.approx(half) and by_name["L1"]["dice"] == pytest.approx(moved)
    assert (by_name["L2"]["status"], by_name["L2"]["dice"]) == ("missed", 0)
    assert summary["dice_classes"] == pytest.approx((half + moved + 0) / 3)
    assert summary["dice_instance"] == pytest.approx((half + moved) / 3)
    assert summary["dice_any"] == pytest.approx(2 * (400 + 720) / (400 + 800 + 2400))
    assert (summary["hits"], summary["targets"], summary["predicted"]) == (2, 3, 2)
    assert by_name["T12"]["target_mm3"] == 800 * 8 and by_name["L1"]["hd95_mm"] == pytest.approx(2)


def test_one_level_off():
    """All names one too low: no name fits, each vertebra does."""
    target, pred = blocks(18, 19, 20, 21, 22), blocks(19, 20, 21, 22, 23)
    _, summary = score(pred, target)
    assert summary["dice_classes"] == 0 and summary["dice_instance"] == 1 and summary["dice_any"] == 1
    assert summary["hits"] == 0 and summary["rate"] == 0 and summary["dice_inner"] == 0


def test_vertebrae_cut_by_the_scan():
    target = blocks(18, 19, 20, 21)
    target[67:] = 17  # at the upper border
    pred = target.copy()
    pred[target == 17] = 0
    _, summary = score(pred, target)
    assert summary["dice_classes"] == pytest.approx(4 / 5) and summary["dice_inner"] == 1
    assert summary["rate"] == pytest.approx(4 / 5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", ["first", "last"])
def test_only_vertebrae_away_from_all_borders_are_inner(axis, end):
    """One vertebra in the middle, found; one that begins in the first or ends in the last voxel, missed."""
    target = np.zeros((30, 30, 30), np.uint8)
    target[12:18, 12:18, 12:18] = 20
    cut = [slice(2, 8)] * 3
    cut[axis] = slice(0, 6) if end == "first" else slice(24, 30)
    target[tuple(cut)] = 21
    pred = np.where(target == 20, 20, 0).astype(np.uint8)
    _, summary = score(pred, target)
    assert summary["dice_inner"] == 1 and summary["dice_classes"] == 0.5
    near = np.roll(target, 1 if end == "first" else -1, axis)  # one voxel away from the border
    _, summary = score(np.where(near == 20, 20, 0).astype(np.uint8), near)
    assert summary["dice_inner"] == 0.5


def test_volumes_are_those_of_the_affine():
    """A grid sheared by gantry tilt: 2 x 2 x 2 mm along its axes, but 4 mm^3 a voxel."""
    target = blocks(20)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[1, 2], affine[2, 2] = 2 * np.sin(np.pi / 3), 2 * np.cos(np.pi / 3)
    pred = map_labels(target, "levels26")
    rows, _ = score_case(pred, target, (2, 2, 2), affine, "levels26", {})
    (row,) = [r for r in rows if r["status"] == "ok"]
    assert row["target_mm3"] == row["pred_mm3"] == pytest.approx(800 * 4)


def test_sacrum_in_the_centroids_is_no_target():
    """Masks do not hold it, so no prediction could find it."""
    target = blocks(23, 24)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    centres = mask_centres(target, affine) | {26: (0.0, 0.0, 0.0), 27: (-20.0, 0.0, 0.0)}
    pred = map_labels(target, "levels26")
    _, summary = score_case(pred, target, (2, 2, 2), affine, "levels26", centres)
    assert summary["targets"] == 2 and summary["rate"] == 1


def test_empty_truth_and_prediction():
    nothing, target = blocks(), blocks(20, 21)
    rows, summary = score(nothing, nothing)
    assert {r["status"] for r in rows} == {"absent"}
    assert all(np.isnan(summary[k]) for k in ("dice_any", "dice_classes", "dice_instance", "dice_inner"))
    rows, summary = score(target, nothing)
    assert (
        summary["dice_any"] == 0 and np.isnan(summary["dice_classes"]) and np.isnan(summary["dice_instance"])
    )
    rows, summary = score(nothing, target)
    assert summary["dice_any"] == summary["dice_classes"] == summary["dice_instance"] == summary["rate"] == 0
    nan = float("nan")
    assert evaluate.mean_dice([{"dice_classes": 0.5}, {"dice_classes": nan}]) == 0.5
    assert np.isnan(evaluate.mean_dice([{"dice_classes": nan}]))


def test_without_surfaces_the_overlaps_are_the_same():
    target = blocks(20, 21)
    pred = blocks(20, 21, shift=1)
    (with_rows, with_summary), (rows, summary) = score(pred, target), score(pred, target, surfaces=False)
    assert "hd95_mm" not in rows[0] and "rate" not in summary
    assert [r["dice"] for r in rows if r["status"] == "ok"] == [
        r["dice"] for r in with_rows if r["status"] == "ok"
    ]
    assert all(with_summary[key] == value for key, value in summary.items())


# ---- masks in files ----


@pytest.fixture
def perfect(verse_source, tmp_path):
    """Folder of the true masks, named as predict.py names them."""
    folder = tmp_path / "pred"
    folder.mkdir()
    for case in find_cases(verse_source):
        shutil.copy(case.mask, folder / f"{case.name}_ct_mask.nii.gz")
    return folder


def run(*flags) -> int:
    return evaluate.main([str(f) for f in flags])


def table(path) -> list[dict]:
    with path.open(encoding="utf8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("grid", ["native", "1mm"])
def test_files(grid, perfect, verse_source, capsys):
    flags = ["--pred", perfect, "--source", verse_source, "--labels", "levels26", "--grid", grid]
    for name in [c.name for c in find_cases(verse_source)][2:]:
        (perfect / f"{name}_ct_mask.nii.gz").unlink()
    (perfect / "other_mask.nii.gz").write_bytes(b"")
    assert run(*flags) == 0
    text = capsys.readouterr().out
    assert "NOTE: no prediction for 4 case(s), left out of all means" in text and "class" in text
    cases = table(perfect / "cases.csv")
    assert len(cases) == 2 and all(float(row["dice_classes"]) == 1 for row in cases)
    rows = [r for r in table(perfect / "results.csv") if r["status"] == "ok"]
    assert rows and all(float(r["dice"]) == 1 and float(r["hd95_mm"]) == 0 for r in rows)
    hits, targets = (sum(int(row[key]) for row in cases) for key in ("hits", "targets"))
    # Vertebrae whose centre is in the scan, but of which the thickest part is not, may be off.
    assert targets - 2 <= hits <= targets and f"Identification rate {hits} of {targets}" in text
    summary = (perfect / "summary.md").read_text()
    assert "| T12 |" in summary or "| L1 |" in summary
    assert "a missed class counts Dice 0" in summary and "| T13 |" not in summary, "no row of nothing"


def test_the_1mm_grid_is_one_of_1_mm(verse_source, perfect):
    case = find_cases(verse_source)[0]
    for other in perfect.iterdir():
        if not other.name.startswith(case.name):
            other.unlink()
    rows: dict[str, dict] = {}
    for grid in ("native", "1mm"):
        found, failed = evaluate.evaluate_files(perfect, verse_source, "levels26", grid)
        assert not failed and len(found) == 1
        rows[grid] = {r["name"]: r["target_mm3"] for r in found[0]["classes"] if r["status"] == "ok"}
    voxel_mm3 = open_nifti(case.mask).voxel_mm3
    assert all(v / voxel_mm3 == pytest.approx(round(v / voxel_mm3)) for v in rows["native"].values())
    for name, volume in rows["native"].items():
        if volume > 5000:
            assert rows["1mm"][name] == pytest.approx(volume, rel=0.2) and rows["1mm"][name] != volume


def test_the_1mm_grid_has_the_spacing_that_whole_voxels_leave(tmp_path):
    """9 slices of 1.5 mm are 13.5 mm: 14 slices of 0.964 mm, and a shift by 3 of 9 slices is 4.5 mm."""
    source, pred = tmp_path / "verse" / "derivatives" / "sub-verse001", tmp_path / "pred"
    raw = tmp_path / "verse" / "rawdata" / "sub-verse001"
    for folder in (source, pred, raw):
        folder.mkdir(parents=True)
    truth, found = np.zeros((2, 9, 20, 20), np.uint8)
    truth[:3], found[3:6] = 20, 20
    write_nifti(raw / "sub-verse001_ct.nii.gz", truth, (1.5, 1, 1))
    write_nifti(source / "sub-verse001_seg-vert_msk.nii.gz", truth, (1.5, 1, 1))
    write_nifti(pred / "sub-verse001_mask.nii.gz", found, (1.5, 1, 1))
    rows, failed = evaluate.evaluate_files(pred, tmp_path / "verse", "levels26", "1mm")
    assert not failed
    (row,) = [r for r in rows[0]["classes"] if r["status"] == "ok"]
    slice_mm = 13.5 / 14
    shift, depth = round(row["hd95_mm"] / slice_mm), round(row["target_mm3"] / (400 * slice_mm))
    assert shift in (4, 5) and row["hd95_mm"] == pytest.approx(shift * slice_mm)
    assert depth in (4, 5) and row["target_mm3"] == pytest.approx(depth * 400 * slice_mm)


def test_bad_masks_are_listed(perfect, verse_source, capsys):
    cases = find_cases(verse_source)
    names = [f"{c.name}_ct_mask.nii.gz" for c in cases]
    shifted = load_label(perfect / names[0])
    write_nifti(perfect / names[0], shifted.array[1:], shifted.spacing_mm)
    (perfect / names[1]).write_bytes((perfect / names[1]).read_bytes()[:300])
    third = load_label(perfect / names[2])
    save_label(perfect / names[2], np.where(third.array > 0, 99, 0).astype(np.uint8), third)
    assert (
        run("--pred", perfect, "--source", verse_source, "--labels", "levels26", "--out", perfect / "o") == 1
    )
    text = capsys.readouterr().out
    assert f"failed: {cases[0].name}" in text and "lies on another grid than" in text and "truncated" in text
    assert "unknown label value(s) 99" in text and len(table(perfect / "o" / "cases.csv")) == 3
    assert text.count("failed: ") == (perfect / "o" / "summary.md").read_text().count("failed: ") == 3


def test_binary_and_region_masks(perfect, verse_source, capsys):
    """--labels says what the predictions hold; VerSe's numbers read as binary are refused."""
    for mode in ("binary", "region3"):
        folder = perfect.parent / mode
        folder.mkdir()
        for case in find_cases(verse_source):
            mask = load_label(case.mask)
            save_label(
                folder / f"{case.name}_mask.nii.gz", unmap_labels(map_labels(mask.array, mode), mode), mask
            )
        assert run("--pred", folder, "--source", verse_source, "--labels", mode) == 0
        assert all(float(r["dice_classes"]) == 1 for r in table(folder / "cases.csv"))
    capsys.readouterr()
    assert run("--pred", perfect, "--source", verse_source) == 1
    assert "are not among [1]" in capsys.readouterr().out


def test_two_runs_can_be_compared(perfect, verse_source, tmp_path, capsys):
    """results.csv has what common/compare.py needs; the worse run is told."""
    worse = tmp_path / "worse"
    shutil.copytree(perfect, worse)
    for path in worse.iterdir():
        mask = load_label(path)
        label = np.unique(mask.array)[-1]
        save_label(path, np.where(mask.array == label, 0, mask.array), mask)
    for folder in (perfect, worse):
        run("--pred", folder, "--source", verse_source, "--labels", "levels26")
    rows = read_results(worse)
    assert {"case", "patient", "class", "name", "status", "dice", "hd95_mm", "nsd_1mm"} <= set(rows[0])
    means = [np.mean([float(r["dice_classes"]) for r in table(f / "cases.csv")]) for f in (perfect, worse)]
    assert means[0] == 1 and means[1] < 0.97
    assert compare([str(perfect), str(worse), "--out", str(tmp_path / "cmp")]) in (0, None)
    rows = table(tmp_path / "cmp" / "comparison.csv")
    overall = next(r for r in rows if r["class"] == "all" and r["metric"] == "dice")
    assert float(overall["mean_a"]) == 1 > float(overall["mean_b"])


def test_centroid_files_are_the_truth(perfect, verse_source, tmp_path):
    """A case whose centroid file lies 40 mm off: its vertebrae are named right, but nowhere near."""
    source = tmp_path / "verse"
    shutil.copytree(verse_source, source)
    case = find_cases(source)[0]
    scan = open_nifti(case.mask)
    right = centroids_to_mm(read_centroids(case.centroids), scan)
    moved = {k: (z, y + 40, x) for k, (z, y, x) in right.items()}
    write_centroids(case.centroids, centroids_to_voxels(moved, scan))
    rows, _ = evaluate.evaluate_files(perfect, source, "levels26", "native")
    row = next(r for r in rows if r["case"] == case.name)
    assert row["hits"] == 0 and row["targets"] == len(right) and row["dice_classes"] == 1
    write_centroids(case.centroids, Centroids(tuple(scan.orientation), {}))
    rows, _ = evaluate.evaluate_files(perfect, source, "levels26", "native")
    assert np.isnan(next(r for r in rows if r["case"] == case.name)["rate"])
    case.centroids.unlink()
    rows, _ = evaluate.evaluate_files(perfect, source, "levels26", "native")
    assert next(r for r in rows if r["case"] == case.name)["rate"] == 1, "body centres of the true mask"


# ---- preprocessed cases ----


class Level(torch.nn.Module):
    """Vertebrae are as bright as 500 + 30 x class."""

    def forward(self, image):
        return -(image * 50 - torch.arange(27).view(1, -1, 1, 1, 1)).abs() * 10


class Hot(torch.nn.Module):
    def __init__(self, heat: float = 0.99) -> None:
        super().__init__()
        self.heat = heat

    def forward(self, image):
        return torch.logit((image > 0.005) * self.heat, eps=1e-4)


def model_of(network, labels="levels26", patch=(32, 32, 32), data_path="") -> TrainedModel:
    config = {"patch_size": list(patch), "labels": labels, "intensity": "hu"}
    notes = {"spacing_mm": [5.0, 5.0, 5.0], "data_path": str(data_path)}
    return TrainedModel(network.eval(), config, CPU, FP32, notes, {"train": [], "val": [], "test": []})


@pytest.fixture(scope="module")
def coded_h5(verse_h5, tmp_path_factory):
    """The preprocessed phantoms with their labels painted into the scans."""
    folder = tmp_path_factory.mktemp("coded") / "h5"
    (folder / "cases").mkdir(parents=True)
    shutil.copy(verse_h5 / "preprocessing.json", folder)
    verse = VerSe(verse_h5)
    for name, case in verse.cases.items():
        label = case.label[...]
        hu = (500 + 30 * map_labels(label, "levels26").astype(np.int16)).astype(np.int16)
        write_case(folder / "cases" / f"{name}.h5", hu, label, attributes=dict(case.attributes))
    return folder


@pytest.mark.parametrize("region", ["none", "oracle", "heatmap"])
def test_perfect_network_on_cases(region, coded_h5):
    verse = VerSe(coded_h5)
    names = sorted(verse.cases)
    heatmap = model_of(Hot(), patch=(32, 16, 16))
    rows, failed = evaluate.evaluate_cases(model_of(Level()), verse, names, region=region, heatmap=heatmap)
    assert not failed and [r["case"] for r in rows] == names
    for row in rows:
        # The clean-up takes stubs below 1 mL that touch no border.
        assert row["dice_any"] > 0.99 and row["dice_classes"] > 0.85 and row["dice_instance"] > 0.85
        assert row.get("region_recall") == (None if region == "none" else 1.0)
        assert row["patient"] == verse.subjects[row["case"]]
        assert row["rate"] > 0.8 and len(row["classes"]) == 26


def test_distances_are_in_the_spacing_of_the_case(tmp_path, monkeypatch):
    """Whole voxels leave 4.9 mm where 5 were asked for; the prediction lies one voxel to the right."""
    target = blocks(20, 21)
    hu = (500 + 30 * map_labels(np.roll(target, 1, axis=2), "levels26").astype(np.int16)).astype(np.int16)
    attributes = {
        "spacing_mm": (5.0, 5.0, 4.9),
        "affine": np.diag([4.9, 5.0, 5.0, 1.0]),
        "centroids": np.zeros((0, 4)),
    }
    write_case(tmp_path / "a.h5", hu, target, attributes=attributes)
    verse = SimpleNamespace(cases={"a": CaseFile(tmp_path / "a.h5")}, subjects={"a": "a"}, path=tmp_path)
    asked, segment = [], evaluate.segment

    def watched(model, volume, spacing_mm, **options):
        asked.append(spacing_mm)
        return segment(model, volume, spacing_mm, **options)

    monkeypatch.setattr(evaluate, "segment", watched)
    rows, failed = evaluate.evaluate_cases(model_of(Level()), verse, ["a"])
    assert not failed and asked == [(5.0, 5.0, 4.9)]
    found = {r["name"]: r["hd_mm"] for r in rows[0]["classes"] if r["status"] != "absent"}
    assert found == {"L1": pytest.approx(4.9), "L2": pytest.approx(4.9)}


def test_the_true_box_has_the_margin_of_the_heat_map(tmp_path):
    """Voxels of 3 x 0.5 x 2 mm, by hand: 30, 20, 20 mm are 10, 40 and 10 voxels."""
    attributes = {"spacing_mm": (3.0, 0.5, 2.0), "boxes": np.array([[20, 30, 90, 24, 40, 150, 36]])}
    write_case(tmp_path / "a.h5", np.zeros((80, 240, 60), np.int16), attributes=attributes)
    region = evaluate.case_region(CaseFile(tmp_path / "a.h5"), "oracle", None, tmp_path)
    assert region.source == "oracle"
    assert [list(corner) for corner in region.box] == [[20, 50, 14], [50, 190, 46]]


def test_what_makes_scores_flattering_is_said():
    """The second scan of a training patient is not the network's first sight of the patient."""
    model = SimpleNamespace(split={"train": ["a_1"], "val": [], "test": []})
    verse = SimpleNamespace(subjects={"a_1": "a", "a_2": "a", "b_1": "b"})
    (note,) = evaluate.part_notes("test", {"a"}, model, verse)
    assert "was trained on some of these scans" in note
    assert "was trained on" in evaluate.part_notes("train", {"b"}, model, verse)[0]
    assert "chose the epoch" in evaluate.part_notes("val", {"b"}, model, verse)[0]
    assert evaluate.part_notes("test", {"b"}, model, verse) == ()


def test_cases_are_cleaned_up(tmp_path):
    """A crumb of 0.25 mL that the network sees beside two vertebrae is in no score."""
    target = blocks(20, 21)
    hu = (500 + 30 * map_labels(target, "levels26").astype(np.int16)).astype(np.int16)
    hu[40, 2, 2:4] = 500 + 30 * 5
    attributes = {
        "spacing_mm": (5.0, 5.0, 5.0),
        "affine": np.diag([5.0, 5.0, 5.0, 1.0]),
        "centroids": np.zeros((0, 4)),
    }
    write_case(tmp_path / "a.h5", hu, target, attributes=attributes)
    verse = SimpleNamespace(cases={"a": CaseFile(tmp_path / "a.h5")}, subjects={"a": "a"}, path=tmp_path)
    rows, failed = evaluate.evaluate_cases(model_of(Level()), verse, ["a"], surfaces=False)
    assert not failed
    found = {r["name"]: r["status"] for r in rows[0]["classes"] if r["status"] != "absent"}
    assert found == {"L1": "ok", "L2": "ok"}
    assert rows[0]["dice_any"] == 1


def test_a_region_that_misses_is_seen(coded_h5, monkeypatch):
    verse = VerSe(coded_h5)
    name = sorted(verse.cases)[0]
    half = (np.array([0, 0, 0]), np.array(verse.cases[name].shape) // (2, 1, 1))
    monkeypatch.setattr(evaluate, "spine_region", lambda heat, grid: evaluate.Region(half, "heat map", 1.0))
    heatmap = model_of(Hot(), patch=(32, 16, 16))
    rows, _ = evaluate.evaluate_cases(model_of(Level()), verse, [name], region="heatmap", heatmap=heatmap)
    label = verse.cases[name].label[...]
    expected = (label[: half[1][0]] > 0).sum() / (label > 0).sum()
    assert rows[0]["region_recall"] == pytest.approx(expected) and rows[0]["dice_any"] < 0.9


def test_faint_heat_map_searches_the_whole_case(coded_h5):
    verse = VerSe(coded_h5)
    name = sorted(verse.cases)[0]
    faint = model_of(Hot(0.1), patch=(32, 16, 16))
    rows, _ = evaluate.evaluate_cases(model_of(Level()), verse, [name], region="heatmap", heatmap=faint)
    assert rows[0]["region_recall"] == 1.0 and rows[0]["dice_any"] > 0.99


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_one_damaged_case_costs_no_other(error, coded_h5, monkeypatch, tmp_path):
    verse = VerSe(coded_h5)
    names, original = sorted(verse.cases), evaluate.segment

    def failing(model, image, *args, **kwargs):
        if image.shape == verse.cases[names[1]].image.shape:
            assert [row["case"] for row in table(tmp_path / "cases.csv")] == names[:1]
            raise error.with_traceback(None)
        return original(model, image, *args, **kwargs)

    monkeypatch.setattr(evaluate, "segment", failing)
    (tmp_path / "summary.md").write_text("of an earlier evaluation")
    rows, failed = evaluate.evaluate_cases(
        model_of(Level()), verse, names[:3], surfaces=False, table=tmp_path / "cases.csv"
    )
    assert list(failed) == [names[1]] and [row["case"] for row in rows] == [names[0], names[2]]
    assert [row["case"] for row in table(tmp_path / "cases.csv")] == [names[0], names[2]]
    assert [path.name for path in tmp_path.iterdir()] == ["cases.csv"]


def test_cases_come_by_number_not_by_letter(tmp_path):
    target = blocks(20, 21)
    for name in ("sub-10", "sub-9"):
        for path in (
            f"verse/rawdata/{name}/{name}_ct.nii.gz",
            f"verse/derivatives/{name}/{name}_seg-vert_msk.nii.gz",
            f"pred/{name}_mask.nii.gz",
        ):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            write_nifti(tmp_path / path, target, (2, 2, 2))
    rows, failed = evaluate.evaluate_files(tmp_path / "pred", tmp_path / "verse", "levels26", "native")
    assert [row["case"] for row in rows] == ["sub-9", "sub-10"] and not failed


def test_two_masks_of_one_case_are_refused(perfect, verse_source):
    first = sorted(perfect.iterdir())[0]
    shutil.copy(first, perfect / first.name.replace("_ct_mask", "_mask"))
    with pytest.raises(ValueError, match="_mask.nii.gz and .*_ct_mask.nii.gz are the same case"):
        evaluate.evaluate_files(perfect, verse_source, "levels26", "native")


def test_a_bad_note_beside_a_mask_is_the_failure_of_its_case(perfect, verse_source):
    names = [case.name for case in find_cases(verse_source)]
    for name in names[2:]:
        (perfect / f"{name}_ct_mask.nii.gz").unlink()
    (perfect / f"{names[0]}_ct.json").write_text('{"labels": 3}')
    (perfect / f"{names[1]}_ct.json").write_text('{"labels": "binary"}')
    rows, failed = evaluate.evaluate_files(perfect, verse_source, "levels26", "native")
    assert not rows and '"labels" should be a text, found a number (3)' in failed[names[0]]
    assert "holds binary labels; score it with --labels binary" in failed[names[1]]


def test_a_mistake_in_the_flags_removes_no_report(verse_runs):
    seg = verse_runs["segmentation"]
    report = seg / "evaluation_test_heatmap" / "summary.md"
    report.parent.mkdir(exist_ok=True)
    report.write_text("kept")
    with pytest.raises(SystemExit, match="needs --heatmap_weights"):
        run(
            "--weights", seg / "weights" / "best.pt", "--region", "heatmap", "--device", "cpu", "--amp", "off"
        )
    assert report.read_text() == "kept"


def test_weights_end_to_end(verse_runs, capsys):
    """Trained for two epochs: all tables are there, in the run's folder, for each region."""
    seg, heat = (verse_runs[k] / "weights" / "best.pt" for k in ("segmentation", "heatmap"))
    flags = ["--weights", seg, "--device", "cpu", "--amp", "off"]
    for region, more in (("none", []), ("oracle", []), ("heatmap", ["--heatmap_weights", heat])):
        assert run(*flags, "--region", region, *more) == 0
        out = verse_runs["segmentation"] / f"evaluation_test_{region}"
        files = {p.name for p in out.iterdir()}
        assert files == {"results.csv", "cases.csv", "summary.csv", "summary.md"}
        assert read_results(out) and f"region: {region}" in (out / "summary.md").read_text()
        if region == "oracle":
            assert float(table(out / "cases.csv")[0]["region_recall"]) == 1
    assert run(*flags, "--part", "val", "--out", verse_runs["segmentation"] / "mine") == 0
    assert (verse_runs["segmentation"] / "mine" / "results.csv").is_file()


def test_wrong_flags(verse_runs, verse_source, verse_h5, tmp_path):
    seg, heat = (verse_runs[k] / "weights" / "best.pt" for k in ("segmentation", "heatmap"))
    (tmp_path / "empty").mkdir()
    shutil.copytree(verse_h5, tmp_path / "h5")
    split = {part: [] for part in ("train", "val", "test")} | {"train": sorted(VerSe(verse_h5).cases)}
    (tmp_path / "h5" / "splits.json").write_text(json.dumps(split))
    cpu = ["--device", "cpu", "--amp", "off"]
    for flags, message in (
        ([], "give either --weights"),
        (["--weights", seg, "--pred", tmp_path], "give either --weights"),
        (["--pred", tmp_path], "--pred needs --source"),
        (["--pred", tmp_path / "empty", "--source", verse_source], "empty: no .nii or .nii.gz file"),
        (["--pred", tmp_path / "none", "--source", verse_source], "none: no such folder"),
        (["--weights", seg, "--region", "heatmap", *cpu], "--region heatmap needs --heatmap_weights"),
        (["--weights", heat, *cpu], "not weights of verse_spine/train_segmentation.py but of heatmap"),
        (["--weights", seg, "--data_path", tmp_path, *cpu], "no preprocessed cases here"),
        (
            ["--weights", seg, "--data_path", tmp_path / "h5", "--part", "test", *cpu],
            "no case in its part test",
        ),
    ):
        with pytest.raises(SystemExit, match="error: .*" + message):
            run(*flags)
