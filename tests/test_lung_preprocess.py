"""Conversion of scans to slices and back, and reading of image and mask files."""

import csv
import json
import pickle
import shutil
import zipfile

import cv2
import numpy as np
import pytest
from conftest import REAL_DATA

from common import distributed
from common.decathlon import Case
from common.nifti import load_label, load_nifti, save_label, write_nifti
from common.slices import resize, to_display, write_png
from lung_tumor import conversion, preprocess
from lung_tumor.dataset import load_splits
from lung_tumor.slice_files import SliceFile, list_slices, parse_slice_name, read_notes, training_slices
from lung_tumor.slices import (
    fit_to_square,
    normalise,
    probs_from_square,
    read_image,
    read_mask,
    volume_to_slices,
)


def convert(source, out, *flags: object) -> int:
    return preprocess.main(["--source", str(source), "--out", str(out), "--workers", "0", *map(str, flags)])


def make_case(
    folder,
    name: str,
    mask: np.ndarray,
    orientation: str = "RAS",
    image: np.ndarray | None = None,
    spacing_mm: tuple[float, float, float] = (3, 0.8, 0.8),
) -> None:
    for kind, array in (("imagesTr", image), ("labelsTr", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        array = np.where(mask > 0, 40, -800).astype(np.int16) if array is None else array
        path = folder / kind / f"{name}.nii.gz"
        write_nifti(path, array, spacing_mm, origin_mm=(10, -20, 30), orientation=orientation)


@pytest.fixture
def three_cases(tmp_path):
    """Three volumes of 10 slices; volume k has tumour in k + 1 of them."""
    source = tmp_path / "source"
    for k, orientation in enumerate(("RAS", "LPS", "PIR")):
        mask = np.zeros((10, 12, 14), np.uint8)
        mask[3 : 4 + k, 2:5, 6:10] = 1
        make_case(source, f"lung_{k + 1:03d}", mask, orientation)
    return source


def test_counts_values_split_and_way_back(three_cases, tmp_path):
    out = tmp_path / "out"
    assert convert(three_cases, out, "--all_slices", "--empty_ratio", 0.5, "--test_ratio", 0.34) == 0
    files = list_slices(out)
    assert len(files) == 30 and all(set(np.unique(cv2.imread(str(f.label), -1))) <= {0, 255} for f in files)
    volumes = read_notes(out, "volumes.json")
    assert {v: e["tumour_slices"] for v, e in volumes.items()} == {
        "lung_001": [3],
        "lung_002": [3, 4],
        "lung_003": [3, 4, 5],
    }
    assert {v: len(e["kept"]) for v, e in volumes.items()} == {
        "lung_001": 1 + 4,
        "lung_002": 2 + 4,
        "lung_003": 3 + 4,
    }
    split = json.loads((out / "splits.json").read_text())
    assert sorted(split["train"] + split["val"] + split["test"]) == sorted(volumes)
    for name in volumes:  # PNG -> NIfTI is exact on the scan's own grid, whatever the file's orientation
        scan = load_nifti(three_cases / "imagesTr" / f"{name}.nii.gz")
        stack = np.stack([read_mask(f.label)[0] for f in files if f.volume == name])
        save_label(tmp_path / "back.nii.gz", to_display(stack), scan)
        truth = load_label(three_cases / "labelsTr" / f"{name}.nii.gz")
        back = load_label(tmp_path / "back.nii.gz")
        assert np.array_equal(back.array, truth.array) and np.array_equal(back.file_affine, truth.file_affine)


def test_displayed_orientation(tmp_path):
    """Front is up, the patient's right is on the left of the picture."""
    mask = np.zeros((2, 10, 10), np.uint8)
    mask[1, 8, 7] = 1  # RAS+: far to the front, to the right
    make_case(tmp_path / "source", "a", mask, "LPS")
    make_case(tmp_path / "source", "b", mask, "RAS")
    convert(tmp_path / "source", tmp_path / "out")
    for name in "ab":
        assert np.argwhere(read_mask(tmp_path / "out" / "labels" / f"{name}_slice_0001.png")[0]).tolist() == [
            [1, 2]
        ]


def test_one_window_for_all_slices():
    """A grey level is 1349 / 255 = 5.29 HU; 0.57 of a level is rounded to 1, 127.4 levels to 127."""
    volume = np.array([[[-2000, -1024, -1021, -350, 325, 3000]]], np.int16)
    assert volume_to_slices(volume, (-1024, 325))[0, 0, ::-1].tolist() == [0, 0, 1, 127, 255, 255]


def test_choice_of_empty_slices_does_not_depend_on_the_other_volumes(three_cases, tmp_path):
    convert(three_cases, tmp_path / "all", "--empty_ratio", 0.5)
    for kind in ("imagesTr", "labelsTr"):
        (three_cases / kind / "lung_001.nii.gz").unlink()
    convert(three_cases, tmp_path / "two", "--empty_ratio", 0.5)
    kept = [read_notes(tmp_path / n, "volumes.json")["lung_003"]["kept"] for n in ("all", "two")]
    assert kept[0] == kept[1] and len(kept[0]) == 7


def test_each_volume_has_empty_slices_of_its_own(tmp_path):
    mask = np.zeros((60, 8, 8), np.uint8)
    mask[30] = 1
    for name in "abcd":
        make_case(tmp_path / "source", name, mask)
    convert(tmp_path / "source", tmp_path / "out", "--empty_ratio", 0.2)
    volumes = read_notes(tmp_path / "out", "volumes.json")
    chosen = {tuple(entry["kept"]) for entry in volumes.values()}
    assert len(chosen) == 4 and all(len(slices) == 1 + 12 for slices in chosen)
    assert list(volumes) == list("abcd")
    convert(tmp_path / "source", tmp_path / "other", "--empty_ratio", 0.2, "--seed", 7)
    for name, entry in read_notes(tmp_path / "other", "volumes.json").items():
        assert entry["kept"] != volumes[name]["kept"], "by the seed, too"


def test_volumes_are_noted_by_number_not_by_letter(tmp_path):
    mask = np.zeros((4, 8, 8), np.uint8)
    mask[1] = 1
    for name in ("a10", "a9", "a100"):
        make_case(tmp_path / "source", name, mask)
    out = tmp_path / "out"
    convert(tmp_path / "source", out, "--val_cases", "a9")
    assert list(read_notes(out, "volumes.json")) == ["a9", "a10", "a100"]
    splits = read_notes(out, "splits.json")
    assert splits["train"] == ["a10", "a100"] and list(splits["patients"]) == ["a9", "a10", "a100"]
    (out / "splits.json").unlink()
    load_splits(out, list_slices(out), seed=0)
    assert list(read_notes(out, "splits.json")["patients"]) == ["a9", "a10", "a100"]


def test_slices_are_listed_by_number_not_by_letter(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for stem in ("a10_slice_2", "a2_slice_10", "a2_slice_9", "a10_slice_11"):
            write_png(tmp_path / kind / f"{stem}.png", np.zeros((4, 4), np.uint8))
    listed = [(f.volume, f.number) for f in list_slices(tmp_path)]
    assert listed == [("a2", 9), ("a2", 10), ("a10", 2), ("a10", 11)]


def test_min_pixels_drops_small_tumour_slices_instead_of_calling_them_empty(tmp_path):
    mask = np.zeros((10, 12, 12), np.uint8)
    mask[2, :2, :2] = 1
    mask[3, :6, :6] = 1
    make_case(tmp_path / "source", "a", mask)
    make_case(tmp_path / "source", "b", mask)
    convert(tmp_path / "source", tmp_path / "out", "--min_pixels", 5, "--empty_ratio", 1)
    assert read_notes(tmp_path / "out", "volumes.json")["a"]["kept"] == [0, 1, 3, 4, 5, 6, 7, 8, 9]


def test_goes_on_where_it_stopped_and_starts_anew_with_other_settings(
    three_cases, tmp_path, capsys, monkeypatch
):
    out, converted, original = tmp_path / "out", [], conversion.convert_case

    def count(case, *rest):
        if len(converted) == 2:
            raise KeyboardInterrupt
        converted.append(case.case_id)
        return original(case, *rest)

    monkeypatch.setattr(conversion, "convert_case", count)
    with pytest.raises(KeyboardInterrupt):
        convert(three_cases, out)
    assert len(read_notes(out, "volumes.json")) == 2
    converted.clear()
    assert convert(three_cases, out) == 0 and len(converted) == 1
    assert "2 of 3 volumes are converted already" in capsys.readouterr().out
    converted.clear()
    monkeypatch.setattr(conversion, "convert_case", original)
    before = len(list((out / "images").iterdir()))
    assert convert(three_cases, out, "--window", -160, 240, "--empty_ratio", 0) == 0
    assert len(list((out / "images").iterdir())) == 6 < before, "slices of the earlier settings are gone"
    assert read_notes(out, "dataset.json")["window_hu"] == [-160, 240]


def test_other_scans_of_the_same_names_are_converted_anew(three_cases, tmp_path):
    convert(three_cases, tmp_path / "out")
    make_case(three_cases, "lung_002", np.ones((10, 12, 14), np.uint8))
    assert convert(three_cases, tmp_path / "out") == 0
    assert len(read_notes(tmp_path / "out", "volumes.json")["lung_002"]["tumour_slices"]) == 10


def test_processes_give_the_same_as_one(three_cases, tmp_path):
    convert(three_cases, tmp_path / "one")
    preprocess.main(["--source", str(three_cases), "--out", str(tmp_path / "two"), "--workers", "2"])
    for path in sorted((tmp_path / "one" / "images").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "images" / path.name).read_bytes()
    assert read_notes(tmp_path / "one", "volumes.json") == read_notes(tmp_path / "two", "volumes.json")


def test_of_several_processes_one_writes_the_split_and_all_have_it(three_cases, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(three_cases, out)
    (out / "splits.json").unlink()
    slices = list_slices(out)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    drawn = load_splits(out, slices, seed=0)
    assert not (out / "splits.json").exists()
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    assert load_splits(out, slices, seed=0) == drawn
    assert (out / "splits.json").is_file() and load_splits(out, slices, seed=1) == drawn, "as it was written"


def test_a_mask_lies_on_the_scan_to_a_hundredth_of_a_mm_as_in_every_task(three_cases, tmp_path, capsys):
    label = three_cases / "labelsTr" / "lung_001.nii.gz"
    mask = load_label(label)
    where = {"origin_mm": np.add((10, -20, 30), (0, 0, 0.05))}
    write_nifti(label, mask.array, (3, 0.8, 0.8), **where)
    assert convert(three_cases, tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "corners up to 0.05 mm apart, spacing 3 x 0.8 x 0.8 and 3 x 0.8 x 0.8 mm" in printed


def test_bad_cases_are_listed_and_the_others_converted(three_cases, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(-1000, 1000, (10, 12, 14)).astype(np.int16)
    make_case(three_cases, "lung_002", np.ones((10, 12, 14), np.uint8), image=noise)
    path = three_cases / "imagesTr" / "lung_002.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    write_nifti(three_cases / "labelsTr" / "lung_003.nii.gz", np.zeros((10, 12, 13), np.uint8), (3, 0.8, 0.8))
    make_case(three_cases, "lung_004", np.ones((3, 12, 14), np.uint8))
    assert convert(three_cases, tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "2 volume(s) could not be converted" in printed
    assert "lung_002" in printed and "truncated or damaged" in printed
    assert "lung_003" in printed and "10 x 12 x 13 and 10 x 12 x 14 voxels" in printed
    assert sorted(read_notes(tmp_path / "out", "volumes.json")) == ["lung_001", "lung_004"]


def test_wrong_folders_and_flags(three_cases, tmp_path):
    for flags, message in (
        ((tmp_path / "none", tmp_path / "o"), "no such folder"),
        ((three_cases / "imagesTr", tmp_path / "o"), "neither imagesTr/"),
        ((three_cases, tmp_path / "o", "--window", 5, 5), "lower one"),
        ((three_cases, tmp_path / "o", "--val_cases", "lung_009"), "lung_009, which is not in the data set"),
        ((three_cases, tmp_path / "o", "--patient_pattern", "x(y)"), "finds no group in its name"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert(*flags)
    (three_cases / "labelsTr" / "lung_001.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"without a file of that name in labelsTr: lung_001"):
        convert(three_cases, tmp_path / "o")


def test_patients_with_several_scans_stay_together(tmp_path):
    mask = np.zeros((4, 8, 8), np.uint8)
    mask[1] = 1
    for name in ("p1_a", "p1_b", "p2_a", "p3_a", "p3_b", "p4_a"):
        make_case(tmp_path / "source", name, mask)
    convert(tmp_path / "source", tmp_path / "out", "--patient_pattern", r"(p\d)_", "--val_ratio", 0.5)
    split = json.loads((tmp_path / "out" / "splits.json").read_text())
    patients = [{name.split("_")[0] for name in split[part]} for part in ("train", "val")]
    assert not patients[0] & patients[1] and len(patients[1]) == 2


def test_explore(three_cases, tmp_path, capsys):
    (three_cases / "imagesTr" / "lung_002.nii.gz").write_bytes(b"")
    assert convert(three_cases, tmp_path / "out", "--explore") == 1
    assert "lung_002          cannot be read" in capsys.readouterr().out
    with (tmp_path / "out" / "explore.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert float(rows["lung_003"]["tumour_mm3"]) == pytest.approx(36 * 3 * 0.8 * 0.8, rel=1e-3)
    assert (tmp_path / "out" / "explore.png").stat().st_size > 1000
    assert not (tmp_path / "out" / "images").exists()


class SegmentArray:
    """Stands for the third-party class that the Kaggle set's labels are pickled from."""


def test_kaggle_layout(three_cases, tmp_path):
    task = tmp_path / "kaggle" / "Task006_Lung"
    (task / "GroundTruth").mkdir(parents=True)
    SegmentArray.__module__ = "evalseg"
    module = type(pickle)("evalseg")
    module.SegmentArray = SegmentArray
    with zipfile.ZipFile(task / "CT.zip", "w") as archive, pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "evalseg", module)
        for k in (1, 2, 3):
            archive.write(three_cases / "imagesTr" / f"lung_{k:03d}.nii.gz", f"{k}.nii.gz")
            label = load_label(three_cases / "labelsTr" / f"lung_{k:03d}.nii.gz")
            import nibabel

            xyz = np.asarray(nibabel.load(label.path).dataobj).astype(np.uint8)
            segments = [{"roi": tuple(slice(0, n) for n in xyz.shape), "data": xyz}]
            content = SegmentArray()
            content.shape, content.segments = xyz.shape, segments
            (task / "GroundTruth" / f"{k}.pkl").write_bytes(pickle.dumps(content))
    assert convert(tmp_path / "kaggle", tmp_path / "k") == 0
    convert(three_cases, tmp_path / "d")
    kaggle, decathlon = read_notes(tmp_path / "k", "volumes.json"), read_notes(tmp_path / "d", "volumes.json")
    for k in (1, 2, 3):
        assert kaggle[str(k)]["tumour_slices"] == decathlon[f"lung_{k:03d}"]["tumour_slices"]
        assert (tmp_path / "k" / "labels" / f"{k}_slice_0003.png").read_bytes() == (
            tmp_path / "d" / "labels" / f"lung_{k:03d}_slice_0003.png"
        ).read_bytes()
    with pytest.raises(SystemExit, match="(?i)liver"):
        convert(tmp_path / "kaggle", tmp_path / "k2", "--task", "Liver")


# ---- image and mask files ----


def test_masks_of_all_kinds_mean_the_same(tmp_path):
    truth = np.zeros((6, 5), np.uint8)
    truth[2:4, 1:3] = 1
    noisy = np.where(truth, 240, 9).astype(np.uint8)
    noisy[2, 1] = 128
    for name, pixels, clean in (
        ("a.png", truth, True),
        ("b.png", truth * 255, True),
        ("c.tif", truth.astype(np.float32), True),
        ("d.tif", truth.astype(np.float32) * 0.9, False),
        ("e.png", noisy, False),
        ("f.png", truth.astype(np.uint16) * 65535, True),
        ("g.png", np.dstack([truth * 255] * 3), True),
        ("h.png", np.dstack([truth * 255] * 3 + [np.full_like(truth, 255)]), True),
    ):
        cv2.imwrite(str(tmp_path / name), pixels)
        mask, is_clean = read_mask(tmp_path / name)
        assert np.array_equal(mask, truth) and mask.dtype == np.uint8, name
        assert is_clean == clean, name
    cv2.imwrite(str(tmp_path / "labels.png"), truth * 2 + (np.arange(5) == 4))
    with pytest.raises(ValueError, match="labels.png: mask values 0, 1, 2; expected 0 and 1, or 0 and 255"):
        read_mask(tmp_path / "labels.png")


def test_masks_with_grey_rims_are_cut_in_the_middle(tmp_path):
    write_png(tmp_path / "rim.png", np.array([[0, 60, 127, 128, 200, 255]], np.uint8))
    mask, is_clean = read_mask(tmp_path / "rim.png")
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1]] and not is_clean


def test_masks_take_the_nearest_pixel():
    """Of 0 1 0 0 the second and the fourth pixel lie nearest to the middles of two larger ones."""
    assert resize(np.uint8([[0, 1, 0, 0]]), (1, 2), is_mask=True).tolist() == [[1, 0]]


def test_an_unfinished_conversion_is_not_taken_for_a_finished_one(tmp_path):
    """dataset.json is written last; it goes as soon as there is a volume to convert."""
    (tmp_path / "dataset.json").write_text("{}")
    gone = Case("a", tmp_path / "none.nii.gz", tmp_path / "none.nii.gz")
    done, failed = conversion.convert_all([gone], tmp_path, conversion.Settings(1.0), 0)
    assert not done and list(failed) == ["a"] and not (tmp_path / "dataset.json").exists()


def test_training_takes_the_chosen_slices_of_volumes_that_have_a_choice(tmp_path):
    slices = [SliceFile(v, n, tmp_path / "i", tmp_path / "l") for v in ("a", "b") for n in (1, 2, 3)]
    chosen = training_slices(slices, {"a": {"kept": [2]}})
    assert [(s.volume, s.number) for s in chosen] == [("a", 2), ("b", 1), ("b", 2), ("b", 3)]


def test_images_of_all_kinds(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    alpha = np.dstack([grey] * 3 + [np.array([[0, 255], [255, 0]], np.uint8)])
    for name, pixels in (
        ("a.png", grey),
        ("b.png", grey.astype(np.uint16) * 257),
        ("c.png", np.dstack([grey] * 3)),
        ("d.png", alpha),
        ("é 1.bmp", grey),
        ("e.tif", grey.astype(np.float32) / 255),
    ):
        path = tmp_path / name
        path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
        assert np.array_equal(read_image(path), grey), name
    # To the nearest of 256 grey values: half of 257 is 128.5.
    between = np.array([[128, 129], [65_406, 65_407]], np.uint16)
    for name, pixels in (("f.png", between), ("g.tif", np.float32([[0.4, 0.6], [254.4, 254.6]]) / 255)):
        cv2.imwrite(str(tmp_path / name), pixels)
        assert read_image(tmp_path / name).tolist() == [[0, 1], [254, 255]], name
    (tmp_path / "not.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("not.png", "empty.png"):
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            read_image(tmp_path / name)
    cv2.imwrite(str(tmp_path / "hu.tif"), np.full((3, 3), -500, np.float32))
    with pytest.raises(ValueError, match="float image outside 0..1"):
        read_image(tmp_path / "hu.tif")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("shape", [(64, 64), (64, 40), (31, 64), (200, 100), (17, 33)])
def test_fit_to_square_and_back(shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    blob = ((y - shape[0] / 2) ** 2 + (x - shape[1] / 2) ** 2 < (min(shape) / 3) ** 2).astype(np.uint8)
    square = fit_to_square(blob * 255, 64)
    mask = fit_to_square(blob, 64, is_mask=True)
    assert square.shape == mask.shape == (64, 64) and set(np.unique(mask)) <= {0, 1}
    back = probs_from_square(square.astype(np.float32) / 255, shape, 64) > 0.5
    assert (back != blob).mean() < 0.05


def test_input_range_is_minus_one_to_one():
    """The public original fed 1/255 of this in training and the whole of it in prediction."""
    tensor = normalise(np.array([[0, 255]], np.uint8))
    assert tensor.tolist() == [[-1, 1]]


def test_slice_names():
    assert parse_slice_name("0_slice_0001") == ("0", 1)
    assert parse_slice_name("Task006_Lung_lung_slice_7_slice_0012") == ("Task006_Lung_lung_slice_7", 12)
    assert parse_slice_name("picture") == ("picture", 0)


def test_write_png_leaves_nothing_half_written(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(
        "common.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError):
        write_png(tmp_path / "a.png", np.ones((4, 4), np.uint8))
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated_gzip.nii.gz", "truncated or damaged"),
        ("git_lfs_pointer.nii.gz", "Git-LFS pointer"),
        ("4d_int16_scl_slope.nii", "4-D"),
        ("rgb24_single_slice.nii.gz", "RGB picture"),
        ("complex64.nii.gz", "complex values"),
    ],
)
def test_real_odd_headers(name, message, tmp_path, capsys):
    path = REAL_DATA / "odd_headers" / name
    if not path.is_file():
        pytest.skip("the real scans are not on this machine")
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / "source" / kind).mkdir(parents=True)
        shutil.copy(path, tmp_path / "source" / kind / path.name)
    assert convert(tmp_path / "source", tmp_path / "out") == 1
    assert message in capsys.readouterr().out


def test_real_scans(real_lung_ct, tmp_path):
    assert convert(real_lung_ct, tmp_path / "out", "--val_cases", "lung_002") == 0
    volumes = read_notes(tmp_path / "out", "volumes.json")
    assert {v: len(e["tumour_slices"]) for v, e in volumes.items()} == {"lung_001": 21, "lung_002": 26}
    assert volumes["lung_001"]["tumour_mm3"] == pytest.approx(158833, rel=1e-3)
    assert volumes["lung_001"]["file_orientation"] == "LPS"
