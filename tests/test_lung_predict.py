"""Prediction on images and scans, evaluation of whole volumes, data set and augmentation of lung_tumor."""

import csv
import json
import os
import pickle
import shutil
import warnings

import cv2
import nibabel
import numpy as np
import pytest
import torch
from conftest import ERRORS, ROOT, TINY, run_script

from common import distributed
from common.checkpoints import load_checkpoint, save_checkpoint
from common.compare import read_results
from common.hardware import Precision
from common.metrics import binary_counts, dice_from_counts
from common.nifti import load_label, load_nifti, write_nifti
from common.slices import resize, to_display, write_png
from lung_tumor import evaluate, overfit_test, predict, preprocess, train
from lung_tumor.augmentations import Augmentation
from lung_tumor.dataset import PackedSlices, SliceDataset, open_data, pack_slices
from lung_tumor.model import TrainedModel, get_loss, load_trained, predict_slices
from lung_tumor.report import summarise, sweep_table
from lung_tumor.slice_files import list_slices, read_notes
from lung_tumor.slices import probs_from_square, read_image, read_mask, volume_to_slices

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")


class BrightIsTumour(torch.nn.Module):
    """A network that needs no training: tumour where the input, in [-1, 1], is above `level`."""

    def __init__(self, level: float = 0.0) -> None:
        super().__init__()
        self.level = level

    def forward(self, image):
        margin = 20 * (image - self.level)
        return torch.cat([-margin, margin], dim=1)


def bright_model(size: int, level: float = 0.0, split: dict | None = None) -> TrainedModel:
    config = {"image_size": size, "batch_size": 4, "model": "UNet"}
    split = split or {"train": [], "val": [], "test": []}
    return TrainedModel(BrightIsTumour(level), config, CPU, FP32, {"window_hu": [-1024, 325]}, split)


# ---- predict ----


def run_predict(weights, source, out, *flags: object) -> int:
    flags = [
        "--weights",
        weights,
        "--source",
        source,
        "--out",
        out,
        "--device",
        "cpu",
        "--amp",
        "off",
        *flags,
    ]
    return predict.main([str(f) for f in flags])


def results(out) -> list[dict]:
    with (out / "results.csv").open(encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_a_2d_scan_gets_a_2d_mask(tmp_path, monkeypatch):
    hu = np.full((30, 40), -900, np.int16)  # x y
    hu[5:9, 10:20] = 100
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([2, 1, 5, 1])), tmp_path / "scan.nii")
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(40))
    flags = (tmp_path / "scan.nii", tmp_path / "out", "--save_overlay")
    assert run_predict("run/weights/best.pt", *flags) == 0
    mask = nibabel.load(tmp_path / "out/scan_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), hu > 0)


def test_pictures_that_fail_cost_the_pictures_alone(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise IndexError("index 65 is out of bounds")

    (tmp_path / "in").mkdir()
    write_nifti(tmp_path / "in/scan.nii.gz", np.full((6, 40, 30), -900, np.int16), (5, 1, 2))
    cv2.imwrite(str(tmp_path / "in/slice.png"), np.zeros((40, 30), np.uint8))
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(40))
    for name in ("overlay", "save_montage"):
        monkeypatch.setattr(predict, name, fails)
    assert run_predict("run/weights/best.pt", tmp_path / "in", tmp_path / "out", "--save_overlay") == 0
    told = capsys.readouterr().out
    assert "scan_overlay.png is left out: IndexError" in told and "slice_overlay.png is left out" in told
    assert len(results(tmp_path / "out")) == 2 and (tmp_path / "out/slice_mask.png").is_file()


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL"])
def test_mask_lies_on_the_scans_own_grid(orientation, tmp_path, monkeypatch):
    """A bright box comes back at its place, in the file's own axes, with its affine and volume."""
    hu = np.full((6, 40, 30), -900, np.int16)
    hu[2:4, 10:20, 5:9] = 100
    write_nifti(tmp_path / "scan.nii.gz", hu, (5, 1, 2), origin_mm=(3, -7, 11), orientation=orientation)
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(40))
    assert (
        run_predict("run/weights/best.pt", tmp_path / "scan.nii.gz", tmp_path / "out", "--save-overlay") == 0
    )
    scan, mask = nibabel.load(tmp_path / "scan.nii.gz"), nibabel.load(tmp_path / "out" / "scan_mask.nii.gz")
    assert mask.shape == scan.shape and np.array_equal(mask.affine, scan.affine)
    assert mask.get_data_dtype() == np.uint8 and nibabel.aff2axcodes(mask.affine) == tuple(orientation)
    assert np.array_equal(np.asarray(mask.dataobj), (np.asarray(scan.dataobj) > 0).astype(np.uint8))
    row = results(tmp_path / "out")[0]
    assert int(row["tumour_pixels"]) == 80 and float(row["volume_mm3"]) == pytest.approx(80 * 10)
    assert (tmp_path / "out" / "overlays" / "scan_overlay.png").stat().st_size > 1000


def test_volume_of_a_tilted_gantry(tmp_path, monkeypatch):
    """Slices 2 mm apart along an axis that leans by 30 degrees: 1.73 mm^3 a voxel, not 2."""
    hu = np.full((32, 32, 4), -900, np.int16)
    hu[4:8, 4:8, 1] = 300
    affine = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 3**0.5, 0], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(hu, affine)
    image.set_sform(affine, 1)
    nibabel.save(image, tmp_path / "s.nii")
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(32))
    run_predict("r/w/best.pt", tmp_path / "s.nii", tmp_path / "out")
    (row,) = results(tmp_path / "out")
    assert int(row["tumour_pixels"]) == 16
    assert float(row["volume_mm3"]) == pytest.approx(16 * 3**0.5, rel=1e-4)
    assert float(row["max_probability"]) > 0.9, "of all slices, not of the last"


def test_training_slice_gives_the_validation_mask(trained_run, phantom_slices, tmp_path):
    """Train, validation and prediction see the same tensor for the same PNG, and predict as one."""
    name = sorted((phantom_slices / "images").iterdir())[3].stem
    model = load_trained(trained_run / "weights" / "best.pt", CPU, FP32)
    packed, _, notes = open_data(phantom_slices, 48, 42)
    stems = [f.image.stem for f in list_slices(phantom_slices)]
    tensor, _ = SliceDataset(packed, sorted(set(packed.volumes)))[stems.index(name)]
    assert tensor.min() >= -1 and tensor.max() <= 1 and tensor.max() - tensor.min() > 1.5, "the 1/255 bug"
    with torch.inference_mode():
        square = model.network(tensor[None])[0].softmax(0)[1].numpy()
    shape = read_image(phantom_slices / "images" / f"{name}.png").shape
    assert max(shape) <= 48, "a larger slice is cut in training and whole in prediction"
    expected = probs_from_square(square, shape, 48, notes["scale"]) > 0.5
    assert (
        run_predict(trained_run / "weights" / "best.pt", phantom_slices / "images" / f"{name}.png", tmp_path)
        == 0
    )
    mask, clean = read_mask(tmp_path / f"{name}_mask.png")
    assert clean and np.array_equal(mask.astype(bool), expected)
    scan_slices = read_image(phantom_slices / "images" / f"{name}.png")
    assert np.array_equal(next(predict_slices(model, scan_slices[None])) > 0.5, expected)


def test_scan_and_its_slices_give_the_same(trained_run, phantom_source, phantom_slices, tmp_path):
    weights = trained_run / "weights" / "best.pt"
    assert run_predict(weights, phantom_source / "imagesTr" / "lung_001.nii.gz", tmp_path / "scan") == 0
    model = load_trained(weights, CPU, FP32)
    volume = to_display(load_label(tmp_path / "scan" / "lung_001_mask.nii.gz").array)
    for z in read_notes(phantom_slices, "volumes.json")["lung_001"]["kept"]:
        image = read_image(phantom_slices / "images" / f"lung_001_slice_{z:04d}.png")
        probs = next(predict_slices(model, image[None]))
        assert np.array_equal(resize(probs, volume[z].shape) > 0.5, volume[z])


def test_folder_of_everything(tmp_path, monkeypatch, capsys):
    """16-bit, RGBA, upper case, equal names in subfolders, own output skipped, one bad file survived."""
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(32))
    grey = np.zeros((20, 26), np.uint8)
    grey[5:9, 5:9] = 255
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    cv2.imwrite(str(source / "a.PNG"), grey.astype(np.uint16) * 257)
    cv2.imwrite(str(source / "b.png"), np.dstack([grey, grey, grey, np.full_like(grey, 255)]))
    cv2.imwrite(str(source / "c.JPG"), grey)
    cv2.imwrite(str(source / "sub" / "b.png"), 255 - grey)
    cv2.imwrite(str(source / "old_mask.png"), grey)
    (source / "bad.png").write_text("no image")
    (source / ".hidden.png").write_text("no image")
    (source / "notes.txt").write_text("x")
    assert run_predict("r/w/best.pt", source, source / "out", "--recursive", "--save_overlay") == 1
    out = capsys.readouterr().out
    assert "bad.png: not a readable image" in out.splitlines()[-1], "failed ones are listed last"
    assert f"4 of 5 file(s) written to {source / 'out'} in " in out and ", 4 with tumour\n" in out
    assert [row["file"].rsplit("/in/")[-1] for row in results(source / "out")] == [
        "a.PNG",
        "b.png",
        "c.JPG",
        "sub/b.png",
    ]
    for name in ("a", "b"):
        mask, clean = read_mask(source / "out" / f"{name}_mask.png")
        assert clean and mask.shape == grey.shape and abs(int(mask.sum()) - 16) <= 9
    inverse, _ = read_mask(source / "out" / "sub" / "b_mask.png")
    assert inverse.sum() > 400
    red = cv2.imread(str(source / "out" / "overlays" / "b_overlay.png"))[6, 6]
    assert red[2] > red[0] + 30, "tumour is red"
    assert run_predict("r/w/best.pt", source, source / "out", "--recursive") == 1
    assert "4 of 5 file(s)" in capsys.readouterr().out, "its own masks are not taken for images"


class GreyIsProbability(torch.nn.Module):
    """A pixel of grey value g is tumour with probability g / 255."""

    def forward(self, image):
        probability = ((image + 1) / 2).clamp(1e-6, 1 - 1e-6)
        return torch.cat([torch.zeros_like(image), probability.logit()], dim=1)


@pytest.mark.parametrize("threshold, found", [(0.1, 4), (0.3, 3), (0.5, 2), (0.9, 1)])
def test_threshold_for_image_files(threshold, found, tmp_path, monkeypatch):
    """Four pixels of probability 0.2, 0.4, 0.8 and 1."""
    image = np.zeros((16, 16), np.uint8)
    image[8, 2:6] = 51, 102, 204, 255
    write_png(tmp_path / "a.png", image)
    model = bright_model(16)
    model.network = GreyIsProbability()
    monkeypatch.setattr(predict, "load_trained", lambda *_: model)
    run_predict("r/w/best.pt", tmp_path / "a.png", tmp_path / "out", "--threshold", threshold)
    mask, _ = read_mask(tmp_path / "out" / "a_mask.png")
    assert mask.sum() == found and mask[8, 6 - found : 6].all()
    assert float(results(tmp_path / "out")[0]["max_probability"]) == pytest.approx(1, abs=1e-4)


def test_threshold_and_largest_component(tmp_path, monkeypatch):
    hu = np.full((4, 32, 32), -900, np.int16)
    hu[1, 4:8, 4:8], hu[2:4, 20:28, 20:28] = 0, 300
    write_nifti(tmp_path / "s.nii", hu, (1, 1, 1))
    counts = {}
    for name, flags in {"all": [], "largest": ["--largest_only"], "none": ["--threshold", 1]}.items():
        monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(32))
        run_predict("r/w/best.pt", tmp_path / "s.nii", tmp_path / name, *flags)
        counts[name] = int(results(tmp_path / name)[0]["tumour_pixels"])
    assert counts == {"all": 16 + 128, "largest": 128, "none": 0}


def test_suspicious_values_and_empty_masks_are_told(tmp_path, monkeypatch, capsys):
    """Raw scanner values are named in prediction, conversion and evaluation; so is a scan without tumour."""
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(32, level=0.9))
    hu = np.random.default_rng(0).normal(-950, 20, (4, 32, 32))
    hu[:, 8:26, 8:26] += 1000
    label = np.zeros((4, 32, 32), np.uint8)
    label[1, 10:14, 10:14] = 1
    for name, image in (("ct", hu), ("raw", np.clip(hu + 1024, 0, 4095))):
        for kind, array in (("imagesTr", image.astype(np.int16)), ("labelsTr", label)):
            (tmp_path / "source" / kind).mkdir(parents=True, exist_ok=True)
            write_nifti(tmp_path / "source" / kind / f"{name}.nii.gz", array, (5, 2, 2))
    sentence = "look like raw scanner values: 1024 must be subtracted"
    run_predict("r/w/best.pt", tmp_path / "source" / "imagesTr", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "warning: raw.nii.gz: values from" in printed and printed.count(sentence) == 1
    assert "note: ct.nii.gz: no tumour found, the mask is empty (highest probability 0.0" in printed
    assert "note: raw" not in printed, "all of it is brighter than any tissue"
    converted = tmp_path / "converted"
    flags = ["--source", str(tmp_path / "source"), "--out", str(converted), "--workers", "0"]
    assert preprocess.main(flags) == 0
    printed = capsys.readouterr().out
    assert "warning: raw: values from" in printed and printed.count(sentence) == 1
    assert sentence in read_notes(converted, "volumes.json")["raw"]["why_not_hu"]
    assert preprocess.main(flags) == 0 and sentence in capsys.readouterr().out, (
        "told again when nothing is to do"
    )
    assert preprocess.main([*flags, "--explore"]) == 0 and sentence in capsys.readouterr().out
    evaluate.evaluate_volumes(bright_model(32), converted, ["ct", "raw"])
    assert capsys.readouterr().out.count(sentence) == 1


def test_bad_sources_and_weights(trained_run, tmp_path):
    weights = trained_run / "weights" / "best.pt"
    (tmp_path / "empty").mkdir()
    evil = tmp_path / "evil.pt"
    torch.save({"model": torch.nn.Linear(1, 1), "config": {}}, evil)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(weights.read_bytes()[:1000])
    foreign = tmp_path / "foreign.pt"
    of_spine = {"model": {}, "config": {"model": "UNet"}, "preprocessing": {}, "stage": "heatmap"}
    save_checkpoint(foreign, of_spine)
    with pytest.raises(ValueError, match="not a checkpoint of lung_tumor/train.py"):
        load_trained(foreign, CPU, FP32)
    save_checkpoint(foreign, {"model": {}, "config": {"model": "SwinUNETR"}})
    for w, source, message in (
        (weights, tmp_path / "none.png", "no such file or folder"),
        (weights, tmp_path / "empty", "no NIfTI scan and no image in it; --recursive"),
        (tmp_path / "none.pt", tmp_path / "empty", "no such checkpoint"),
        (evil, tmp_path / "empty", "refused, because it holds more than tensors"),
        (damaged, tmp_path / "empty", "truncated, damaged or not a checkpoint at all"),
        (foreign, tmp_path / "empty", "not a checkpoint of lung_tumor/train.py .model 'SwinUNETR'"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_predict(w, source, tmp_path / "out")
    with pytest.raises(SystemExit, match="error: "):
        (tmp_path / "file").write_text("")
        run_predict(weights, ROOT / "README.md", tmp_path / "file" / "out")


def test_images_only_model_refuses_scans(trained_run, tmp_path):
    state = load_checkpoint(trained_run / "weights" / "best.pt")
    state["preprocessing"]["window_hu"] = None
    (tmp_path / "weights").mkdir()
    save_checkpoint(tmp_path / "weights" / "best.pt", state)
    write_nifti(tmp_path / "s.nii", np.zeros((2, 8, 8), np.int16), (1, 1, 1))
    done = run_script(
        "lung_tumor/predict.py", "--weights", "weights/best.pt", "--source", "s.nii", cwd=tmp_path
    )
    assert done.returncode == 1 and "without a known HU window" in done.stdout


# ---- evaluate ----


def test_scores_by_hand(tmp_path):
    """Two lesions, one found with a rim too much, one missed, one false alarm on a tumour-free slice."""
    target, image = np.zeros((5, 16, 16), np.uint8), np.zeros((5, 16, 16), np.uint8)
    target[1:3, 2:6, 2:6], target[3, 10:12, 10:12] = 1, 1
    image[1:3, 2:6, 2:8], image[4, 0, 0] = 255, 255
    volume = evaluate.Volume("v", image, target, [1, 2, 3], 2.0, True)
    row = evaluate.score_volume(bright_model(16), volume, 0.5)
    tp, fp, fn = 32, 2 * 8 + 1, 4
    assert (row["tp"], row["fp"], row["fn"]) == (tp, fp, fn)
    assert row["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn)) and row["iou"] == pytest.approx(
        tp / (tp + fp + fn)
    )
    assert (row["kept_tp"], row["kept_fp"], row["kept_fn"]) == (32, 16, 4)
    assert row["slice_dice"] == pytest.approx((2 * (32 / (32 + 8)) + 0) / 3)
    assert (row["empty_slices"], row["empty_with_false_positive"]) == (2, 1)
    assert [row[k] for k in ("target_lesions", "found_lesions", "pred_lesions", "true_lesions")] == [
        2,
        1,
        2,
        1,
    ]
    assert (row["target_mm3"], row["pred_mm3"]) == (36 * 2, 49 * 2)
    assert row["sweep"] == [[tp, fp, fn]] * 9, "probabilities of this network are 0 or 1"
    table = {r["metric"]: r for r in summarise([{"patient": "v", **row}])}
    assert table["pooled_dice"]["mean"] == pytest.approx(64 / (64 + 16 + 4))
    assert table["lesion_recall"]["mean"] == 0.5 and table["false_alarm_slices"]["mean"] == 0.5
    assert sweep_table([row])[4]["volume_dice"] == pytest.approx(row["dice"])


def test_threshold_sweep_counts_probabilities_above(monkeypatch):
    """And the scores are those at the threshold that was asked for."""
    probs = np.array([[0.05, 0.1, 0.15, 0.5, 0.95]], np.float32)  # 0.5 itself is not above 0.5
    monkeypatch.setattr(evaluate, "predict_slices", lambda *_: iter([probs]))
    target = np.array([[[0, 0, 1, 1, 1]]], np.uint8)
    volume = evaluate.Volume("v", np.zeros((1, 1, 5), np.uint8), target, [0], float("nan"), True)
    row = evaluate.score_volume(bright_model(5), volume, 0.5)
    expected = []
    for t in np.arange(1, 10) / 10:
        pred = probs > t
        expected.append([int((pred & (target[0] > 0)).sum()), int((pred & (target[0] == 0)).sum()),
                         int((~pred & (target[0] > 0)).sum())])  # fmt: skip
    assert row["sweep"] == expected
    assert (row["tp"], row["fp"], row["fn"]) == (1, 0, 2)
    for threshold, counts in ((0.07, (3, 1, 0)), (0.6, (1, 0, 2))):
        monkeypatch.setattr(evaluate, "predict_slices", lambda *_: iter([probs]))
        row = evaluate.score_volume(bright_model(5), volume, threshold)
        assert (row["tp"], row["fp"], row["fn"]) == counts


def test_empty_volume_never_helps():
    empty = evaluate.Volume("e", np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8), np.uint8), [], 1.0, True)
    alarm = np.zeros((2, 8, 8), np.uint8)
    alarm[0, 0, 0] = 255
    false = evaluate.Volume("f", alarm, np.zeros((2, 8, 8), np.uint8), [], 1.0, True)
    rows = [evaluate.score_volume(bright_model(8), v, 0.5) for v in (empty, false)]
    assert np.isnan(rows[0]["dice"]) and rows[1]["dice"] == 0
    table = {r["metric"]: r for r in summarise([{"patient": r["volume"], **r} for r in rows])}
    assert table["volume_dice"]["mean"] == 0 and table["volume_dice"]["n"] == 1


def test_all_slices_come_from_the_scan_when_only_some_were_converted(
    trained_run, phantom_slices, phantom_source
):
    model = load_trained(trained_run / "weights" / "best.pt", CPU, FP32)
    name = model.split["test"][0]
    (row,), failed = evaluate.evaluate_volumes(model, phantom_slices, [name])
    assert not failed
    scan = load_nifti(phantom_source / "imagesTr" / f"{name}.nii.gz")
    truth = to_display(load_label(phantom_source / "labelsTr" / f"{name}.nii.gz").array) > 0
    slices = volume_to_slices(scan.array, (-1024, 325))
    probs = np.stack(list(predict_slices(model, slices, pixel_size_mm=scan.spacing_mm[1:])))
    pred = probs > 0.5
    assert row["all_slices"] and row["slices"] == len(truth) > len(
        read_notes(phantom_slices, "volumes.json")[name]["kept"]
    )
    counts = ((pred & truth).sum(), (pred & ~truth).sum(), (~pred & truth).sum())
    assert (row["tp"], row["fp"], row["fn"]) == tuple(int(c) for c in counts)
    assert row["dice"] == pytest.approx(dice_from_counts(*counts))


def test_evaluate_script(trained_run, phantom_slices, phantom_source, tmp_path, capsys):
    weights = trained_run / "weights" / "best.pt"
    flags = ["--weights", str(weights), "--device", "cpu", "--amp", "off", "--out", str(tmp_path / "out")]
    evaluate.main([*flags, "--part", "train"])
    out = capsys.readouterr().out
    assert "4 train volumes of" in out and "threshold 0.5, fp32" in out and "missed_volumes" in out
    with (tmp_path / "out" / "per_volume.csv").open() as file:
        volumes = list(csv.DictReader(file))
    # What common/compare.py reads of each task.
    compared = read_results(tmp_path / "out")
    assert [row["case"] for row in compared] == [row["volume"] for row in volumes] and len(volumes) == 4
    for row, volume in zip(compared, volumes, strict=True):
        assert row["dice"] == float(volume["dice"]) and (row["class"], row["name"]) == ("1", "tumour")
        assert row["status"] == ("missed" if volume["tp"] == volume["fp"] == "0" else "ok")
    with pytest.raises(SystemExit, match="no slices of volume lung_999"):
        evaluate.main([*flags, "--volumes", "lung_999"])
    moved = tmp_path / "data"
    shutil.copytree(phantom_slices, moved, ignore=shutil.ignore_patterns("cache"))
    volumes = json.loads((moved / "volumes.json").read_text())
    for entry in volumes.values():
        entry["source"] = {k: str(tmp_path / "gone" / "x.nii.gz") for k in entry["source"]}
    (moved / "volumes.json").write_text(json.dumps(volumes))
    evaluate.main([*flags, "--data_path", str(moved)])
    assert "converted slices only" in capsys.readouterr().out
    evaluate.main([*flags, "--data_path", str(moved), "--source", str(phantom_source)])
    assert "converted slices only" not in capsys.readouterr().out
    assert (
        evaluate.main([*flags, "--volumes", "lung_001", "lung_002", "lung_003", "lung_004", "lung_005"]) == 0
    )
    assert "warning: the model was trained on lung_00" in capsys.readouterr().out
    scans = tmp_path / "scans"
    shutil.copytree(phantom_source, scans)
    broken = scans / "imagesTr" / "lung_002.nii.gz"
    broken.write_bytes(broken.read_bytes()[:20_000])
    flags += ["--data_path", str(moved), "--source", str(scans)]
    assert evaluate.main([*flags, "--volumes", "lung_001", "lung_002"]) == 1
    printed = capsys.readouterr().out
    assert "1 named volumes" in printed and "failed: lung_002: " in printed and "truncated" in printed


def test_validation_shared_over_ranks_counts_every_slice_once(phantom_slices, monkeypatch):
    packed, split, _ = open_data(phantom_slices, 48, 42)
    dataset, model = SliceDataset(packed, split["train"]), bright_model(48, level=0.3)
    alone = evaluate.validate(model, dataset, get_loss("dice_bce"))
    parts = []
    for rank in range(3):
        monkeypatch.setattr(evaluate.distributed, "my_share", lambda items, rank=rank: items[rank::3])
        monkeypatch.setattr(evaluate.distributed, "all_sum", lambda sums: parts.append(sums.clone()) or sums)
        evaluate.validate(model, dataset, get_loss("dice_bce"))
    monkeypatch.setattr(evaluate.distributed, "my_share", lambda items: items[:1])
    monkeypatch.setattr(evaluate.distributed, "all_sum", lambda sums: sum(parts))
    together = evaluate.validate(model, dataset, get_loss("dice_bce"))
    assert together == pytest.approx(alone)
    assert alone["val_dice"] > 0


class SaysItsMean(torch.nn.Module):
    """Logits that are both below 0: -2 for background and -2 plus the input for tumour."""

    def forward(self, image):
        return torch.cat([torch.full_like(image, -2.0), image - 2], dim=1)


def test_validation_weighs_batches_by_their_slices_and_takes_the_larger_logit():
    """Five slices in batches of 2, 2 and 1. A threshold of 0 on the logits would predict no pixel."""
    images = np.zeros((5, 4, 4), np.uint8)  # -1 as input: background
    images[:, :, :2] = 255  # 1 as input: tumour
    labels = np.zeros((5, 4, 4), np.uint8)
    labels[:4, :, :2] = 1
    dataset = SliceDataset(PackedSlices(images, labels, list("abcde"), 0), list("abcde"))
    config = {"image_size": 4, "batch_size": 2, "model": "UNet"}
    model = TrainedModel(SaysItsMean(), config, CPU, FP32, {}, {})
    losses = iter([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(9.0)])
    scores = evaluate.validate(model, dataset, lambda logits, target: next(losses))
    assert scores["val_loss"] == pytest.approx((2 * 1 + 2 * 2 + 1 * 9) / 5)
    tp, fp = 4 * 8, 8
    assert scores["val_dice"] == pytest.approx(2 * tp / (2 * tp + fp))
    assert scores["val_false_alarms"] == 1 and scores["val_pred_to_true"] == pytest.approx((tp + fp) / tp)
    model.network.train()
    evaluate.validate(model, dataset, lambda logits, target: torch.tensor(0.0))
    assert not model.network.training, "validation is in evaluation mode"


# ---- data set, augmentation ----


def test_cache_is_made_once_and_anew_when_a_file_changes(phantom_slices, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_slices, data, ignore=shutil.ignore_patterns("cache"))
    slices = list_slices(data)
    first = pack_slices(data, slices, 32)
    assert isinstance(first.images, np.memmap) and first.images.shape == (len(slices), 32, 32)
    sent = pickle.dumps(first)
    assert len(sent) < 10_000, "a spawned worker maps the files, it is not sent the data"
    assert np.array_equal(pickle.loads(sent).images, first.images)
    folder = next((data / "cache").iterdir())
    pack_slices(data, slices, 32)
    assert list((data / "cache").iterdir()) == [folder]
    write_png(slices[0].image, np.full(read_mask(slices[0].label)[0].shape, 77, np.uint8))
    again = pack_slices(data, slices, 32)
    assert (again.images[0] == 77).all() and folder not in list((data / "cache").iterdir())


def test_a_change_of_time_or_of_size_alone_makes_the_cache_anew(tmp_path):
    """A mask that was corrected often keeps its size; a copied file may keep its time."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        write_png(tmp_path / kind / "a.png", np.full((32, 32), 10, np.uint8) * (kind == "images"))
    image, slices = tmp_path / "images" / "a.png", list_slices(tmp_path)
    before = image.stat()
    assert (pack_slices(tmp_path, slices, 32).images == 10).all()
    write_png(image, np.full((32, 32), 11, np.uint8))
    os.utime(image, ns=(1, before.st_mtime_ns + 1_000_000_000))
    assert image.stat().st_size == before.st_size
    assert (pack_slices(tmp_path, slices, 32).images == 11).all(), "another time"
    time, noise = image.stat().st_mtime_ns, np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    write_png(image, noise)
    os.utime(image, ns=(1, time))
    assert np.array_equal(pack_slices(tmp_path, slices, 32).images[0], noise), "another size"
    half = pack_slices(tmp_path, slices, 32, 0.5).images[0]
    assert not np.array_equal(half, noise) and len(np.unique(half[:8])) < 32, "at another scale"


def test_cache_that_does_not_fit_the_disk(phantom_slices, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(phantom_slices, data, ignore=shutil.ignore_patterns("cache"))
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr("lung_tumor.dataset.shutil.disk_usage", lambda path: usage(1 << 30, 1 << 30, 0))
    with pytest.raises(OSError, match="the cache of slices takes .* MiB there, 0 are free; make"):
        open_data(data, 512, 42)
    assert not any((data / "cache").iterdir())


def test_pair_of_different_shapes_and_missing_partners(phantom_slices, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_slices, data, ignore=shutil.ignore_patterns("cache"))
    name = list_slices(data)[0].image.name
    write_png(data / "labels" / name, np.zeros((10, 48), np.uint8))
    with pytest.raises(ValueError, match=rf"{name}: image \(46, 46\) and label \(10, 48\) differ in shape"):
        open_data(data, 48, 42)
    assert not any((data / "cache").iterdir()), "no half-made cache"
    for kind, other in (("labels", "label"), ("images", "image")):
        (data / kind / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match=f"1 slice.s. without {other}, first {name[:-4]}"):
            list_slices(data)
        (tmp_path / name).rename(data / kind / name)


def test_plain_folder_of_images_gets_a_split_by_volume(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for volume in range(5):
            for z in range(3):
                pixels = np.full((16, 16), 200 if kind == "images" else 255 * (z == 1), np.uint8)
                write_png(tmp_path / kind / f"{volume}_slice_{z:04d}.png", pixels)
    _, split, preprocessing = open_data(tmp_path, 16, 42)
    assert len(split["train"]) == 4 and len(split["val"]) == 1 and preprocessing["window_hu"] is None
    assert json.loads((tmp_path / "splits.json").read_text())["val"] == split["val"]


def test_plain_folder_of_images_is_trained_on_and_scored(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "plain" / kind).mkdir(parents=True)
    for i in range(6):
        image = rng.integers(0, 90, (32, 32), dtype=np.uint8)
        image[8:16, 8:16] = 250
        write_png(tmp_path / "plain" / "images" / f"p{i}.png", image)
        write_png(tmp_path / "plain" / "labels" / f"p{i}.png", (image > 200) * np.uint8(255))
    flags = ["--data_path", str(tmp_path / "plain"), "--out", str(tmp_path), "--model_name", "plain", *TINY]
    train.main([*flags, "--image_size", "32", "--batch_size", "2", "--epochs", "1"])
    printed = capsys.readouterr().out
    assert "every image counts as a patient of its own" in printed and "volume_dice" in printed


def test_unfinished_conversion_is_refused(phantom_slices, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_slices, data, ignore=shutil.ignore_patterns("cache"))
    (data / "dataset.json").unlink()
    message = "its conversion is unfinished; run lung_tumor/preprocess.py again"
    with pytest.raises(ValueError, match=message):
        open_data(data, 48, 42)
    (data / "volumes.json").write_text("{}")  # stopped before the first volume was finished
    next((data / "labels").iterdir()).unlink()
    with pytest.raises(ValueError, match=message):
        open_data(data, 48, 42)


def test_two_files_of_one_name_do_not_share_a_mask(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(16))
    for name in ("a.png", "a.bmp"):
        cv2.imwrite(str(tmp_path / name), np.full((16, 16), 200, np.uint8))
    assert run_predict("r/weights/best.pt", tmp_path, tmp_path / "out") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"failed: {tmp_path / 'a.png'}: its result would have the name of that of {tmp_path / 'a.bmp'}; "
        "rename one of the two"
    )
    assert [row["file"] for row in results(tmp_path / "out")] == [str(tmp_path / "a.bmp")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_good_bad_good_gives_two_masks(error, tmp_path, monkeypatch, capsys):
    """Whatever the second image raises; when it begins, the first one stands in the table."""
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(16))
    original, out = predict.read_image, tmp_path / "out"

    def failing(path):
        if path.name == "b.png":
            assert [row["file"][-5:] for row in results(out)] == ["a.png"]
            raise error.with_traceback(None)
        return original(path)

    monkeypatch.setattr(predict, "read_image", failing)
    for name in "abc":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((16, 16), 200, np.uint8))
    assert run_predict("r/weights/best.pt", tmp_path, out) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"failed: {tmp_path / 'b.png'}: ") and "2 of 3 file(s) written" in lines[-2]
    assert sum("failed: " in line for line in lines) == 1
    assert [row["file"][-5:] for row in results(out)] == ["a.png", "c.png"]
    assert sorted(p.name for p in out.glob("*_mask.png")) == ["a_mask.png", "c_mask.png"]


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(16))
    original = predict.read_image

    def interrupted(path):
        if path.name == "c.png":
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(predict, "read_image", interrupted)
    for name in "abcd":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((16, 16), 200, np.uint8))
    told = r"stopped by the user after 2 of 4 file\(s\); their results are in"
    with pytest.raises(KeyboardInterrupt, match=told):  # which `run_script` turns into exit code 130
        run_predict("r/weights/best.pt", tmp_path, tmp_path / "out")
    assert [row["file"][-5:] for row in results(tmp_path / "out")] == ["a.png", "b.png"]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_files_of_one_name_in_two_processes(rank, tmp_path, monkeypatch, capsys):
    """Each process knows of the other one's files: only the first of the two is predicted."""
    monkeypatch.setattr(predict, "load_trained", lambda *_: bright_model(16))
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for name in ("a.jpg", "a.png"):
        cv2.imwrite(str(tmp_path / name), np.full((16, 16), 200, np.uint8))
    assert run_predict("r/weights/best.pt", tmp_path, tmp_path / "out") == (1 if rank == 0 else 0)
    assert (tmp_path / "out" / "a_mask.png").is_file() is (rank == 0)
    if rank == 0:
        assert (
            capsys.readouterr().out.splitlines()[-1].startswith(f"failed: {tmp_path / 'a.png'}: its result")
        )
        assert [row["file"] for row in results(tmp_path / "out")] == [str(tmp_path / "a.jpg")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_bad_volume_costs_no_other(error, phantom_slices, monkeypatch, tmp_path):
    original, names = evaluate.load_volume, ["lung_001", "lung_002", "lung_003"]
    table = tmp_path / "out" / "per_volume.csv"
    table.parent.mkdir()
    (tmp_path / "out" / "summary.csv").write_text("of an earlier evaluation")

    def failing(name, *args):
        if name == "lung_002":
            with table.open() as file:
                assert [row["volume"] for row in csv.DictReader(file)] == ["lung_001"]
            raise error.with_traceback(None)
        return original(name, *args)

    monkeypatch.setattr(evaluate, "load_volume", failing)
    model = bright_model(48, level=0.3)
    rows, failed = evaluate.evaluate_volumes(model, phantom_slices, names, table=table)
    assert [row["volume"] for row in rows] == ["lung_001", "lung_003"] and list(failed) == ["lung_002"]
    assert len(rows[0]["sweep"]) == 9
    with table.open() as file:
        assert [row["volume"] for row in csv.DictReader(file)] == ["lung_001", "lung_003"]
    assert [path.name for path in table.parent.iterdir()] == ["per_volume.csv"]


def test_augmentation_repeats_by_seed_and_keeps_masks_binary():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 25:45] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # albumentations only warns of arguments that it does not know
        augment = Augmentation()
        results = [augment(image, mask, seed) for seed in range(60)]
        again = Augmentation()(image, mask, 7)
    assert np.array_equal(results[7][0], again[0]) and np.array_equal(results[7][1], again[1])
    unchanged = sum(np.array_equal(r[0], image) for r in results)
    assert unchanged < 15, (
        "each transform decides for itself; with one seed for all, half the slices stay as they are"
    )
    assert all(r[0].dtype == r[1].dtype == np.uint8 and set(np.unique(r[1])) <= {0, 1} for r in results)
    assert 0.7 < np.mean([r[1].sum() for r in results]) / mask.sum() < 1.3


def test_augmentation_moves_image_and_mask_together():
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 34:50] = 1
    augment = Augmentation(brightness_contrast=0)
    overlaps = []
    for seed in range(40):
        image, moved = augment(mask * 255, mask, seed)
        overlaps.append(dice_from_counts(*binary_counts(image > 127, moved)[:3]))
    assert np.mean(overlaps) > 0.93 and min(overlaps) > 0.6


def test_dataset_shapes_and_split_by_volume():
    images = np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3)
    packed = PackedSlices(images, (images > 20).astype(np.uint8), ["a", "b", "a", "c"], 0)
    dataset = SliceDataset(packed, ["a", "c"])
    image, target = dataset[1]
    assert len(dataset) == 3 and image.shape == (1, 3, 3) and image.dtype == torch.float32
    assert target.shape == (3, 3) and target.dtype == torch.int64 and target.sum() == (images[2] > 20).sum()


# ---- overfit test ----


@pytest.mark.slow
def test_four_slices_are_learnt_by_heart(phantom_slices, tmp_path):
    flags = [
        "--data_path",
        phantom_slices,
        "--image_size",
        48,
        "--base_features",
        16,
        "--lr",
        3e-3,
        "--target",
        0.95,
        "--out",
        tmp_path,
    ]
    assert overfit_test.main([*map(str, flags), "--min_pixels", "10", "--device", "cpu", "--amp", "off"]) == 0
    assert (tmp_path / "overfit.png").exists() and (tmp_path / "overfit_curves.png").exists()


def test_overfit_test_fails_when_nothing_is_learnt(phantom_slices, tmp_path, capsys):
    flags = [
        "--data_path",
        phantom_slices,
        "--image_size",
        48,
        "--base_features",
        4,
        "--epochs",
        2,
        "--out",
        tmp_path,
    ]
    assert overfit_test.main([*map(str, flags), "--min_pixels", "10", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no slice has more than 5000 tumour pixels"):
        overfit_test.main([*map(str, flags), "--min_pixels", "5000"])
