"""Pixels of any shape and size: the network sees one pixel size, masks come back on the scan's own grid."""

import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import REAL_DATA

from common.hardware import Precision
from common.nifti import load_label, write_nifti
from common.slices import resize, to_pixel_size
from lung_tumor import evaluate, predict, preprocess
from lung_tumor.augmentations import Augmentation
from lung_tumor.cases import pixel_size_mm
from lung_tumor.conversion import median_pixel_mm
from lung_tumor.dataset import common_scale, open_data, pack_slices
from lung_tumor.kaggle import KaggleCase
from lung_tumor.model import TrainedModel, predict_slices, predict_squares
from lung_tumor.overfit_test import slices_with_most_tumour
from lung_tumor.slice_files import list_slices, read_notes
from lung_tumor.slices import fit_to_square, probs_from_square

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")
WIDE = 9  # pixels: what `FindsWideSpots` takes for tumour is about as wide or wider


class FindsWideSpots(torch.nn.Module):
    """A network whose answer depends on the size of things in pixels: bright spots that are less than about
    9 pixels wide disappear in an erosion, the others come back by a dilation."""

    def forward(self, image):
        reach = dict(kernel_size=WIDE, stride=1, padding=WIDE // 2)
        eroded = -torch.nn.functional.max_pool2d(-image, **reach)
        opened = torch.nn.functional.max_pool2d(eroded, **reach)
        return torch.cat([-opened, opened], dim=1)


def spot_model(size: int, **preprocessing) -> TrainedModel:
    config = {"image_size": size, "batch_size": 4, "model": "UNet"}
    notes = {"window_hu": [-1024, 325], **preprocessing}
    return TrainedModel(FindsWideSpots(), config, CPU, FP32, notes, {"train": [], "val": [], "test": []})


def chest(pixel_size_mm: tuple[float, float], field_mm: tuple[float, float] = (96.0, 96.0)) -> np.ndarray:
    """HU (3, y, x) of a large and a small bright disc, 28 and 8 mm wide, by their position in mm."""
    fine = 8  # samples in a pixel along each side
    y, x = (
        (np.arange(round(fine * field / mm)) + 0.5) * mm / fine
        for field, mm in zip(field_mm, pixel_size_mm, strict=True)
    )
    large = (y[:, None] - 36) ** 2 + (x - 60) ** 2 < 14**2
    small = (y[:, None] - 70) ** 2 + (x - 20) ** 2 < 4**2
    plane = np.where(large | small, 60.0, -900.0)
    plane = plane.reshape(len(y) // fine, fine, len(x) // fine, fine).mean((1, 3))
    return np.repeat(np.rint(plane).astype(np.int16)[None], 3, 0)


def predicted(model: TrainedModel, pixel_size_mm: tuple[float, float], tmp_path, monkeypatch) -> np.ndarray:
    """The mask that predict.py writes for `chest`, on the scan's own grid."""
    write_nifti(tmp_path / "scan.nii.gz", chest(pixel_size_mm), (5.0, *pixel_size_mm))
    monkeypatch.setattr(predict, "load_trained", lambda *_: model)
    flags = ["--weights", "run/weights/best.pt", "--source", str(tmp_path / "scan.nii.gz")]
    assert predict.main([*flags, "--out", str(tmp_path / "out"), "--device", "cpu", "--amp", "off"]) == 0
    return load_label(tmp_path / "out" / "scan_mask.nii.gz").array[1] > 0


# ---- the formulas ----


def test_resize_takes_means_where_a_side_shrinks_and_is_linear_where_it_grows():
    image = np.array([[0, 40, 100, 200]], np.uint8)
    assert resize(image, (1, 2)).tolist() == [[20, 150]]
    assert resize(image, (1, 1)).tolist() == [[85]]
    assert resize(np.array([[0], [100]], np.uint8), (4, 1)).ravel().tolist() == [0, 25, 75, 100]
    both = resize(np.array([[0, 40], [100, 200]], np.uint8), (4, 1))  # columns shrink while rows grow
    assert both.ravel().tolist() == [20, 53, 118, 150]  # between 20 and 150
    assert resize(np.array([[0, 1, 1, 0]], np.uint8), (2, 8), is_mask=True).tolist() == 2 * [
        [0, 0, 1, 1, 1, 1, 0, 0]
    ]


def test_to_pixel_size_keeps_the_field_of_view():
    assert to_pixel_size(np.zeros((60, 100), np.uint8), (2.0, 0.5), 1.0).shape == (120, 50)
    assert to_pixel_size(np.zeros((100, 100), np.uint8), (0.98, 0.98), 1.95).shape == (50, 50)
    image = np.zeros((7, 9), np.uint8)
    assert to_pixel_size(image, (0.8, 0.8), 0.8) is image


@pytest.mark.parametrize(
    ("sides", "size", "scale"),
    [
        ([512, 512, 634], 512, 1.0),  # the largest is cut, not all shrunk
        ([512, 512, 634], 256, 0.5),
        ([100, 101, 300], 128, 1.0),  # no invented pixels
        ([128, 130, 132], 128, 1.0),  # 2 pixels are cut
        ([200], 128, 0.64),
        ([100, 200], 100, 0.5),
    ],
)
def test_one_scale_for_all_slices(sides, size, scale):
    volumes = {str(i): {"slice_shape": [side // 2, side]} for i, side in enumerate(sides)}
    assert common_scale(volumes, size) == pytest.approx(scale)
    volumes["older"] = {"shape_zyx": [10, 512, 512]}
    assert common_scale(volumes, size) is None and common_scale({}, size) is None


def test_squares_are_filled_cut_or_grow():
    image = np.arange(1, 25, dtype=np.uint8).reshape(4, 6)
    assert np.array_equal(fit_to_square(image, 8, 1.0)[2:6, 1:7], image)
    assert np.array_equal(fit_to_square(image, 4, 1.0, cut=True), image[:, 1:5])
    grown = fit_to_square(image, 4, 1.0)
    assert grown.shape == (4, 16) and np.array_equal(grown[:, 5:11], image)
    assert fit_to_square(image.T, 4, 1.0).shape == (16, 4), "only along the axis that needs it"
    assert fit_to_square(image, 12, 2.0).shape == (12, 12)
    square = fit_to_square(image, 8, 1.0)  # beyond the slice its edge is repeated, in the mask as well
    assert square[0].tolist() == [1, 1, 2, 3, 4, 5, 6, 6] and square[:, 7].tolist() == [
        6,
        6,
        6,
        12,
        18,
        24,
        24,
        24,
    ]
    mask = (image > 22).astype(np.uint8)
    assert np.array_equal(fit_to_square(mask, 8, 1.0, is_mask=True), (square > 22).astype(np.uint8))
    for size, scale in ((8, 1.0), (4, 1.0), (12, 2.0), (12, None), (3, None)):
        square = fit_to_square(np.full((4, 6), 200, np.uint8), size, scale)
        assert np.array_equal(probs_from_square(square.astype(np.float32), (4, 6), size, scale) > 100,
                              np.ones((4, 6), bool))  # fmt: skip


def test_augmentation_repeats_the_edge_as_the_squares_do():
    """A slice that is bright all over stays so, whatever is moved in from outside; likewise its mask."""
    image, mask = np.full((48, 48), 200, np.uint8), np.ones((48, 48), np.uint8)
    augment = Augmentation(elastic=1.0, brightness_contrast=0.0)
    names = ("Affine", "ElasticTransform", "GridDistortion")
    transforms = augment.transform.transforms
    augment.transform.transforms = [t for t in transforms if type(t).__name__ in names]
    assert len(augment.transform.transforms) == 3
    for seed in range(20):
        changed, changed_mask = augment(image, mask, seed)
        assert changed.min() >= 199 and changed_mask.min() == 1


# ---- prediction ----


@pytest.mark.parametrize("pixel_size_mm", [(1, 1), (2, 1), (1, 2), (0.5, 1), (1, 3), (2, 2), (0.5, 0.5)])
def test_any_pixels_give_the_mask_of_square_ones(pixel_size_mm, tmp_path, monkeypatch):
    """The disc of 28 mm is found and that of 8 mm is not, whatever the scan's pixels."""
    model = spot_model(96, pixel_mm=1.0, scale=1.0)
    mask = predicted(model, pixel_size_mm, tmp_path, monkeypatch)
    truth = chest(pixel_size_mm)[1] > -420
    truth[round(56 / pixel_size_mm[0]) :] = False  # the small disc
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.93
    size_mm2 = mask.sum() * pixel_size_mm[0] * pixel_size_mm[1]
    assert size_mm2 == pytest.approx(np.pi * 14**2, rel=0.1)


def test_weights_of_slices_of_unknown_pixel_size_see_pixel_counts_as_before(tmp_path, monkeypatch):
    """An earlier checkpoint: the longer side fills the square, whatever it is in mm."""
    older = spot_model(96)
    for side_mm in (1, 2):
        mask = predicted(older, (side_mm, side_mm), tmp_path, monkeypatch)
        assert abs(mask.sum() * side_mm**2 / (np.pi * 14**2) - 1) < 0.1
    write_nifti(tmp_path / "wide.nii.gz", np.full((2, 32, 96), -900, np.int16), (5, 1, 1))
    assert next(predict_slices(older, np.zeros((2, 32, 96), np.uint8), 4, (1.0, 1.0))).shape == (32, 96)


def test_slices_are_made_smaller_but_never_larger():
    """By the median slice, 96 pixels in the square: 48 stay, 100 are cut by 4 %, 128 shrink to 0.75."""
    for sides, scale in (([48], 1.0), ([100], 1.0), ([60, 128, 400], 0.75)):
        volumes = {str(side): {"slice_shape": [side, side - 8]} for side in sides}
        assert common_scale(volumes, 96) == scale


def test_a_wider_field_of_view_is_seen_whole_at_the_same_pixel_size(monkeypatch):
    """240 pixels in squares of 64: the disc near the border is found; and fewer slices go at a time."""
    model = spot_model(64, pixel_mm=1.0, scale=1.0)
    image = np.zeros((9, 240, 200), np.uint8)
    y, x = np.ogrid[:240, :200]
    disc = (y - 20) ** 2 + (x - 180) ** 2 < 14**2
    image[:, disc] = 255
    shapes = []
    monkeypatch.setattr(
        "lung_tumor.model.predict_squares",
        lambda model, squares: shapes.append(squares.shape) or predict_squares(model, squares),
    )
    probs = np.stack(list(predict_slices(model, image, 32, (1.0, 1.0))))
    assert probs.shape == image.shape and shapes == [(2, 240, 208)] * 4 + [(1, 240, 208)]
    found = probs[4] > 0.5
    assert 2 * (found & disc).sum() / (found.sum() + disc.sum()) > 0.95


def test_image_files_have_the_training_pixels_or_those_of_the_flag(tmp_path, monkeypatch):
    from common.slices import write_png
    from lung_tumor.slices import read_mask, volume_to_slices

    model = spot_model(96, pixel_mm=1.0, scale=1.0)
    monkeypatch.setattr(predict, "load_trained", lambda *_: model)
    write_png(tmp_path / "slice.png", volume_to_slices(chest((2, 2)), (-1024, 325))[0])
    flags = ["--weights", "run/weights/best.pt", "--source", str(tmp_path / "slice.png"), "--device", "cpu"]
    areas = {}
    for name, more in {"as training": [], "2 mm": ["--pixel_mm", "2"]}.items():
        predict.main([*flags, "--out", str(tmp_path / name), *more])
        areas[name] = int(read_mask(tmp_path / name / "slice_mask.png")[0].sum())
    assert areas["2 mm"] * 4 == pytest.approx(np.pi * 14**2, rel=0.1)
    # Without the flag the disc is half as wide for the network, and loses more of its rim.
    assert 0 < areas["as training"] < 0.9 * areas["2 mm"]
    with pytest.raises(SystemExit):
        predict.main([*flags, "--pixel_mm", "-1"])


# ---- conversion and training ----


@pytest.fixture
def two_patients(tmp_path):
    """One anatomy: a of 1 mm pixels, b of 2 mm, c of oblong ones, d of 1 mm; the large disc is tumour."""
    source = tmp_path / "source"
    for name, size in {"a": (1, 1), "b": (2, 2), "c": (1, 3), "d": (1, 1)}.items():
        hu = chest(size)
        label = (hu > -420).astype(np.uint8)
        label[:, round(56 / size[0]) :] = 0
        for kind, array in (("imagesTr", hu), ("labelsTr", label)):
            (source / kind).mkdir(parents=True, exist_ok=True)
            write_nifti(source / kind / f"{name}.nii.gz", array, (5.0, *size))
    return source


def convert(source, out, *flags: object) -> int:
    return preprocess.main(["--source", str(source), "--out", str(out), "--workers", "0", *map(str, flags)])


def test_all_patients_are_converted_to_one_pixel_size(two_patients, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(two_patients, out, "--val_ratio", 0.5) == 0
    assert "pixels 1 mm" in capsys.readouterr().out, "median of 1, 2, 1 (the finer side of 1 x 3) and 1"
    assert read_notes(out, "dataset.json")["pixel_mm"] == 1
    assert [e["slice_shape"] for e in read_notes(out, "volumes.json").values()] == [[96, 96]] * 4
    packed, _, notes = open_data(out, 96, 42)
    assert (notes["pixel_mm"], notes["scale"]) == (1, 1)
    first = {v: packed.volumes.index(v) for v in "abcd"}
    areas = [int(packed.labels[i].sum()) for i in first.values()]
    assert areas == pytest.approx([np.pi * 14**2] * 4, rel=0.05), "in pixels of 1 mm"
    for name in "bcd":
        difference = packed.images[first[name]].astype(int) - packed.images[first["a"]].astype(int)
        assert np.abs(difference).mean() < 3, f"{name} looks as a does"
    assert convert(two_patients, tmp_path / "two", "--pixel_mm", 2) == 0
    assert read_notes(tmp_path / "two", "volumes.json")["c"]["slice_shape"] == [48, 48]


def test_tumour_outside_of_the_squares_is_told(two_patients, tmp_path, capsys):
    """Three of four scans are as wide as the square, one is twice as wide and loses half of its tumour."""
    hu = np.full((2, 200, 200), -900, np.int16)
    hu[:, 100:110, 140:156] = 60  # the square of 96 ends at 148
    for kind, array in (("imagesTr", hu), ("labelsTr", (hu > 0).astype(np.uint8))):
        write_nifti(two_patients / kind / "e.nii.gz", array, (5.0, 1.0, 1.0))
    convert(two_patients, tmp_path / "out")
    packed, _, notes = open_data(tmp_path / "out", 96, 42)
    others = sum(int(packed.labels[packed.volumes.index(v)].sum()) * 3 for v in "abcd")
    assert notes["scale"] == 1 and packed.tumour_cut_off == pytest.approx(160 / (320 + others), rel=1e-6)
    share = 100 * packed.tumour_cut_off
    printed = capsys.readouterr().out
    assert (
        f"warning: {share:.2f} % of the tumour in the training slices lie outside of the squares" in printed
    )


def test_scan_and_training_show_the_network_the_same(two_patients, tmp_path, monkeypatch):
    """The squares of prediction are those of training to the bit, for each of the pixel sizes."""
    out = tmp_path / "out"
    convert(two_patients, out, "--all_slices", "--empty_ratio", 1)
    for size in (96, 64):
        packed, _, notes = open_data(out, size, 42)
        model, seen = spot_model(size, **notes), []
        monkeypatch.setattr(
            "lung_tumor.model.predict_squares",
            lambda model, squares, seen=seen: seen.extend(squares) or predict_squares(model, squares),
        )
        for name in "abcd":
            predicted_size = {"b": (2, 2), "c": (1, 3)}.get(name, (1, 1))
            volume = chest(predicted_size)[:, ::-1, ::-1]
            slices = np.rint(np.clip((volume + 1024) / 1349, 0, 1) * 255).astype(np.uint8)
            list(predict_slices(model, slices, 4, predicted_size))
        assert np.array_equal(np.stack(seen), packed.images)


def test_overfit_test_shows_the_slices_of_training(two_patients, tmp_path):
    convert(two_patients, tmp_path / "out")
    packed, _, _ = open_data(tmp_path / "out", 64, 42)
    images, masks = slices_with_most_tumour(tmp_path / "out", 100, 0, 64)
    assert sorted(map(bytes, images)) == sorted(map(bytes, packed.images))
    assert sorted(map(bytes, masks)) == sorted(map(bytes, packed.labels))


def test_plain_folders_and_older_conversions_keep_their_pixel_counts(two_patients, tmp_path):
    out = tmp_path / "out"
    convert(two_patients, out)
    volumes = read_notes(out, "volumes.json")
    for entry in volumes.values():
        del entry["slice_shape"], entry["settings"]["pixel_mm"]
    (out / "volumes.json").write_text(json.dumps(volumes))
    dataset = read_notes(out, "dataset.json")
    del dataset["pixel_mm"]
    (out / "dataset.json").write_text(json.dumps(dataset))
    packed, _, notes = open_data(out, 64, 42)
    assert notes["pixel_mm"] is None and notes["scale"] is None and packed.images.shape[1:] == (64, 64)
    slices = list_slices(out)
    assert np.array_equal(packed.images, pack_slices(out, slices, 64).images)


def test_volumes_are_scored_on_the_scan_or_on_its_slices(two_patients, tmp_path):
    """mL are the same either way; the scan's own grid is taken where the scan is there."""
    out = tmp_path / "out"
    convert(two_patients, out, "--all_slices", "--empty_ratio", 1)
    model = spot_model(96, pixel_mm=1.0, scale=1.0)
    rows, failed = evaluate.evaluate_volumes(model, out, ["a", "b", "c"])
    assert not failed and [r["slices"] for r in rows] == [3, 3, 3] and min(r["dice"] for r in rows) > 0.93
    assert [r["tp"] + r["fn"] for r in rows] == [
        int((load_label(two_patients / "labelsTr" / f"{n}.nii.gz").array > 0).sum()) for n in "abc"
    ]
    for path in two_patients.rglob("*.nii.gz"):
        path.unlink()
    from_slices, failed = evaluate.evaluate_volumes(model, out, ["a", "b", "c"])
    assert not failed and min(r["dice"] for r in from_slices) > 0.93 and all(r["all_slices"] for r in rows)
    for name in ("target_mm3", "pred_mm3"):
        assert [r[name] for r in from_slices] == pytest.approx([r[name] for r in rows], rel=0.06)
        assert rows[0][name] == pytest.approx(np.pi * 14**2 * 15, rel=0.1)
    model.preprocessing["window_hu"] = [-160, 240]
    rows, failed = evaluate.evaluate_volumes(model, out, ["a"])
    assert not rows and "its slices show [-1024.0, 325.0] HU" in failed["a"]


def test_a_tumour_lost_between_larger_pixels_makes_no_empty_slice(tmp_path):
    source, label = tmp_path / "source", np.zeros((8, 12, 12), np.uint8)
    label[2, 4:8, 4:8], label[5, 2, 2] = 1, 1
    for name in "ab":
        for kind, array in (("imagesTr", np.where(label, 40, -800).astype(np.int16)), ("labelsTr", label)):
            (source / kind).mkdir(parents=True, exist_ok=True)
            write_nifti(source / kind / f"{name}.nii.gz", array, (5, 1, 1))
    convert(source, tmp_path / "out", "--pixel_mm", 4, "--empty_ratio", 1)
    entry = read_notes(tmp_path / "out", "volumes.json")["a"]
    assert entry["kept"] == [0, 1, 2, 3, 4, 6, 7] and entry["tumour_slices"] == [2, 5]


def test_pixel_size_of_a_packed_scan_is_read_from_its_header(two_patients, tmp_path):
    (tmp_path / "Task006_Lung" / "GroundTruth").mkdir(parents=True)
    archive = tmp_path / "Task006_Lung" / "CT.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        noise = np.random.default_rng(0).integers(-1000, 1000, (40, 64, 48)).astype(np.int16)
        write_nifti(tmp_path / "n.nii.gz", noise, (5, 0.7, 0.9))
        packed.write(tmp_path / "n.nii.gz", "1.nii.gz")
        packed.writestr("2.nii.gz", b"no scan")
    cases = [
        KaggleCase(str(k), f"{k}.nii.gz", archive.parent / "GroundTruth" / f"{k}.pkl") for k in (1, 2, 3)
    ]
    assert pixel_size_mm(cases[0]) == pytest.approx((0.7, 0.9))
    for case in cases[1:]:
        with pytest.raises(ValueError):
            pixel_size_mm(case)
    assert median_pixel_mm(cases) == pytest.approx(0.7)
    assert median_pixel_mm(cases[1:]) == 1


def test_real_patients_of_different_pixel_size(real_lung_ct, tmp_path):
    """1.95 and 0.98 mm: vertebrae and airways have the same size in pixels after the conversion."""
    assert REAL_DATA in real_lung_ct.parents
    convert(real_lung_ct, tmp_path / "out", "--val_cases", "lung_002")
    dataset, volumes = (
        read_notes(tmp_path / "out", "dataset.json"),
        read_notes(tmp_path / "out", "volumes.json"),
    )
    assert dataset["pixel_mm"] == pytest.approx((1.953 + 0.977) / 2, abs=0.002)
    shapes = {name: entry["slice_shape"] for name, entry in volumes.items()}
    for name, entry in volumes.items():
        field_mm = [n * mm for n, mm in zip(entry["shape_zyx"][1:], entry["spacing_mm"][1:], strict=True)]
        assert np.multiply(shapes[name], dataset["pixel_mm"]) == pytest.approx(
            field_mm, abs=dataset["pixel_mm"] / 2
        )
