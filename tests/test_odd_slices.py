"""Images and masks of slices as strangers save them, and data sets made of plain folders of them."""

import json
import os
import re
import stat

import cv2
import numpy as np
import pytest

from lung_tumor import conversion
from lung_tumor.dataset import PackedSlices, likely_patients, load_splits, pack_slices
from lung_tumor.slice_files import list_slices, read_volumes
from lung_tumor.slices import read_image, read_mask


def save(path, values) -> str:
    assert cv2.imwrite(str(path), np.asarray(values))
    return str(path)


# ---- images ----


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        ([0, 100, 255], [0, 100, 255]),  # 8 bits in a file of 16
        ([0, 2048, 4095], [0, 128, 255]),  # 12 bits
        ([0, 300, 1000], [0, 19, 62]),
        ([0, 4096, 65535], [0, 16, 255]),
    ],
)
def test_the_range_that_a_16_bit_file_really_uses(tmp_path, values, grey):
    path = save(tmp_path / "a.png", np.array([values], np.uint16))
    assert read_image(path).tolist() == [grey]


# ---- masks ----


def block(*values, dtype=np.uint8) -> np.ndarray:
    """A background of 20 x 20 with a square of 4 x 4 of each value."""
    mask = np.zeros((20, 20), dtype)
    for k, value in enumerate(values):
        mask[2:6, 4 * k : 4 * k + 4] = value
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        np.where(block(1), np.uint8(255), np.uint8(1)),
        block(1, 255),  # a class and what is to be ignored
        block(1, 2, 255),
        block(128, 255),  # two classes
        block(85, 170, 255),
        block(1, 65535, dtype=np.uint16),
        block(20000, 40000, 65535, dtype=np.uint16),
        block(256, dtype=np.uint16),
        block(1, 300, dtype=np.uint16),
        block(1, 2),
        block(1, 2, np.nan, dtype=np.float32),
        block(-1, 1, dtype=np.float32),
        np.pad([[1]], 9) + np.uint8(254) * (np.indices((19, 19))[0] == 0),  # one pixel of 1 and a row of 254
    ],
    ids=lambda mask: f"{mask.dtype}_{'_'.join(f'{v:g}' for v in np.unique(mask))}",
)
def test_masks_of_several_classes_are_refused(tmp_path, mask):
    if mask.dtype == np.int64:
        mask = np.where(mask == 254, 255, mask).astype(np.uint8)
    path = save(tmp_path / ("a.tiff" if mask.dtype == np.float32 else "a.png"), mask)
    with pytest.raises(ValueError, match=re.escape(path) + ".*expected 0 and 1, or 0 and 255"):
        read_mask(path)


def test_masks_in_several_colours_or_in_the_transparency_are_refused(tmp_path):
    colours = np.zeros((20, 20, 3), np.uint8)
    colours[2:6, 2:6, 2], colours[2:6, 8:12, 1] = 255, 255
    with pytest.raises(ValueError, match=r"2 colours \(red green blue: .*255 0 0.*several classes"):
        read_mask(save(tmp_path / "colours.png", colours))
    colours[..., 1] = 0
    mask, is_clean = read_mask(save(tmp_path / "red.png", colours))
    assert is_clean and mask.sum() == 16 and mask[2, 2] == 1
    clear = np.zeros((20, 20, 4), np.uint8)
    clear[2:6, 2:6, 3] = 255
    with pytest.raises(ValueError, match="lies in its transparency alone"):
        read_mask(save(tmp_path / "clear.png", clear))


@pytest.mark.parametrize(
    ("mask", "pixels"),
    [
        (block(1), 16),
        (block(255), 16),
        (block(65535, dtype=np.uint16), 16),
        (block(0), 0),
        (np.full((5, 5), 255, np.uint8), 25),
        (np.where(block(1), np.uint8(200), np.uint8(12)), 16),  # two values, one class
    ],
)
def test_masks_of_one_class_are_read(tmp_path, mask, pixels):
    read, is_clean = read_mask(save(tmp_path / "a.png", mask))
    assert is_clean == (mask.max() != 200) and read.sum() == pixels


def test_smoothed_edges_and_noise_are_read(tmp_path):
    mask = cv2.resize(block(255), (80, 80), interpolation=cv2.INTER_LINEAR)
    read, is_clean = read_mask(save(tmp_path / "a.png", mask))
    assert not is_clean and read.sum() == (mask > 127).sum()
    read, is_clean = read_mask(save(tmp_path / "a.jpg", block(255)))
    assert read.sum() == 16


# ---- plain folders ----


def plain_folder(folder, names) -> list:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
        for name in names:
            save(folder / kind / f"{name}.png", block(255))
    return list_slices(folder)


def test_images_called_patient_and_number_are_of_that_patient(tmp_path, capsys):
    names = [f"p{p}_{n}" for p in range(5) for n in range(3)]
    split, patients = load_splits(tmp_path, plain_folder(tmp_path, names), seed=0)
    assert patients["p3_2"] == "p3" and len(set(patients.values())) == 5
    assert len(split["train"]) == 12 and len({name[:2] for name in split["val"]}) == 1
    assert "15 images of 5 patients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["img_1", "img_2", "img_3", "img_4"], 4),  # one word in front of all
        (["a_1", "a_2", "b_1", "b_2"], 4),  # two classes rather than two patients
        (["a_1", "b_1", "c_1"], 3),
        (["a_1", "a_2", "b_1", "c"], 4),
        (["a-01", "a-02", "b-01", "c-01"], 3),
    ],
)
def test_likely_patients(names, count):
    assert len(set(likely_patients(names, len(names)).values())) == count


def test_volumes_of_several_slices_are_patients_each():
    assert len(set(likely_patients(["a_1", "a_2", "b_1", "c_1"], 40).values())) == 4


def test_patient_pattern_of_a_plain_folder(tmp_path, capsys):
    slices = plain_folder(tmp_path, [f"{p}scan{n}" for p in "abcde" for n in range(2)])
    _, patients = load_splits(tmp_path, slices, 0, "^(.)")
    assert patients["cscan1"] == "c" and "warning" not in capsys.readouterr().out
    load_splits(tmp_path, slices, 0, "^(.)")
    with pytest.raises(ValueError, match=r"splits.json: was drawn with other patients .*'\(.+\)'"):
        load_splits(tmp_path, slices, 0, "(.+)")


# ---- conversion ----


def test_converting_a_volume_leaves_those_that_begin_alike(tmp_path, monkeypatch):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for name in ("lung_slice_0001", "lung_slice_0009", "lung_slice_7_slice_0001", "lung_slice_7x"):
            (tmp_path / kind / f"{name}.png").touch()

    class Scan:
        array, spacing_mm, voxel_mm3 = np.zeros((2, 4, 4), np.int16), (1.0, 1.0, 1.0), 1.0
        affine, orientation = np.eye(4), "RAS"

    monkeypatch.setattr(conversion, "load_case", lambda case: (Scan(), np.zeros((2, 4, 4), np.uint8)))
    monkeypatch.setattr(conversion, "source_files", lambda case: {})
    monkeypatch.setattr(conversion, "source_stamp", lambda case: [])
    case = conversion.Case("lung", tmp_path, tmp_path)
    conversion.convert_case(case, tmp_path, conversion.Settings(1.0, all_slices=True))
    left = sorted(path.stem for path in (tmp_path / "images").iterdir())
    assert left == ["lung_slice_0000", "lung_slice_0001", "lung_slice_7_slice_0001", "lung_slice_7x"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kept": ["1"]}, '"kept": expected 1 number'),
        ({"kept": None}, '"kept" should be a list'),
        ({"spacing_mm": [1.0, float("nan"), 1.0]}, '"spacing_mm": expected 3 number'),
        ({"slice_shape": 4}, '"slice_shape": expected 2 number'),
        ({"num_slices": None}, '"num_slices" should be a number'),
    ],
)
def test_notes_of_volumes(tmp_path, change, problem):
    entry = {"source": {}, "stamp": [], "kept": [1], "num_slices": 3, "voxel_mm3": 1.0}
    entry |= {"shape_zyx": [3, 4, 4], "spacing_mm": [1.0, 1.0, 1.0], "slice_shape": [4, 4]}
    (tmp_path / "volumes.json").write_text(json.dumps({"a": entry}))
    assert read_volumes(tmp_path)["a"]["kept"] == [1]
    (tmp_path / "volumes.json").write_text(json.dumps({"a": entry | change}))
    with pytest.raises(ValueError, match='volumes.json: "a": ' + re.escape(problem)):
        read_volumes(tmp_path)


# ---- cache ----


def packed_as(expected: PackedSlices, found: PackedSlices) -> bool:
    return np.array_equal(expected.images, found.images) and np.array_equal(expected.labels, found.labels)


def test_a_damaged_cache_is_made_again(tmp_path):
    slices = plain_folder(tmp_path, ["a_1", "b_1", "c_1"])
    whole = pack_slices(tmp_path, slices, 16)
    whole = PackedSlices(np.array(whole.images), np.array(whole.labels), whole.volumes, 0)
    (folder,) = (tmp_path / "cache").iterdir()
    for name in ("images.npy", "labels.npy", "info.json"):
        content = (folder / name).read_bytes()
        for damaged in (b"", content[: len(content) // 2], content[:-1], b"[" * 100_000):
            (folder / name).write_bytes(damaged)
            assert packed_as(whole, pack_slices(tmp_path, slices, 16)), (name, damaged[:20])
        (folder / name).unlink()
        assert packed_as(whole, pack_slices(tmp_path, slices, 16))
    np.save(folder / "images.npy", np.zeros((3, 16, 16)))
    assert packed_as(whole, pack_slices(tmp_path, slices, 16))


def test_a_cache_can_be_read_by_all_who_may_read_the_data(tmp_path):
    before = os.umask(0o022)
    try:
        pack_slices(tmp_path, plain_folder(tmp_path, ["a_1", "b_1"]), 16)
    finally:
        os.umask(before)
    (folder,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in folder.iterdir())
