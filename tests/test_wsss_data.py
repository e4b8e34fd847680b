"""wsss_medical: volumes to slices, layouts, splits and data sets; numbers worked out by hand."""

import csv
import json
import shutil
import warnings
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from common.mit import to_network_input
from common.nifti import load_label, load_nifti, write_nifti
from common.par import image01
from common.raw_layouts import find_layout, list_records
from common.slices import read_scan, to_scan_grid, volume_to_slices
from wsss_medical.dataset import (
    MedicalClsDataset,
    MedicalClsValDataset,
    MedicalSliceDataset,
    find_root,
    list_names,
    load_cls_labels_from_filenames,
    load_slice_list,
    patient_of,
    split_lines,
    split_slices,
    suggested_split,
)
from wsss_medical.phantoms import write_wsss_phantoms
from wsss_medical.preprocess import main
from wsss_medical.training import open_data

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "left_atrium_lge").is_dir(), reason="no ../shared/data")


def names_of(num_patients, num_slices, positive=lambda z: z % 2, prefix="LASC"):
    return [
        f"{prefix}_{p:03d}_{z:03d}_{int(positive(z))}"
        for p in range(1, num_patients + 1)
        for z in range(num_slices)
    ]


@pytest.fixture
def heart(tmp_path):
    """Three patients in the Decathlon's layout, 4 slices of 3 x 5 pixels of 2 x 1 mm, areas 0, 1, 4, 0."""
    source = tmp_path / "Task02_Heart"
    rng = np.random.default_rng(0)
    for number in (3, 10, 20):
        image = rng.integers(1, 1000, (4, 3, 5)).astype(np.int16)
        image[3] = 0
        label = np.zeros((4, 3, 5), np.uint8)
        label[1, 0, 4], label[2, :2, :2] = 2, 1
        for kind, array in (("imagesTr", image), ("labelsTr", label)):
            (source / kind).mkdir(parents=True, exist_ok=True)
            write_nifti(source / kind / f"la_{number:03d}.nii.gz", array, (3.0, 2.0, 1.0), orientation="LPS")
        (source / "imagesTr" / "._la_003.nii.gz").write_bytes(b"macOS")
    return source


def run(source, out, *flags, dataset="Heart"):
    return main(
        ["--dataset", dataset, "--source", *map(str, (source, "--out", out)), "--workers", "0", *flags]
    )


def read_manifest(out):
    with (out / "manifest.csv").open() as file:
        return {row["stem"]: row for row in csv.DictReader(file)}


# ---- slices ----


def test_slices_are_turned_as_a_radiologist_sees_them_and_back(tmp_path):
    """Row 0 is the front (the last y of RAS), column 0 the patient's right (the last x)."""
    volume = np.zeros((2, 3, 4), np.int16)
    volume[1, 2, 3] = 50
    slices = volume_to_slices(volume)
    assert slices.shape == (2, 3, 4) and slices.dtype == np.uint8
    assert slices[1, 0, 0] > 0 and np.count_nonzero(slices) == 1
    write_nifti(tmp_path / "scan.nii", volume, (3.0, 2.0, 1.0), orientation="PIL")
    slices, scan = read_scan([(tmp_path / "scan.nii", None)])
    assert slices[1, 0, 0] > 0
    np.testing.assert_array_equal(to_scan_grid(slices.astype(np.float32), scan) > 0, volume > 0)


def test_pixels_of_a_chosen_size_and_back(tmp_path):
    volume = np.ones((1, 3, 8), np.int16)
    volume[:, :, 4:] = 3  # x grows to the right, so the left half of a slice
    write_nifti(tmp_path / "scan.nii", volume, (3.0, 2.0, 1.0))
    slices, scan = read_scan([(tmp_path / "scan.nii", None)], pixel_mm=2.0)
    assert slices.shape == (1, 3, 4) and (slices[0, :, :2] == 255).all() and (slices[0, :, 2:] == 1).all()
    assert to_scan_grid(slices.astype(np.float32), scan).shape == (1, 3, 8)


def test_three_volumes_become_colours_each_by_its_own_values():
    one = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)
    slices = volume_to_slices([one, 1000 * one, np.zeros_like(one)])
    assert slices.shape == (2, 3, 4, 3)
    np.testing.assert_array_equal(slices[..., 0], slices[..., 1])
    assert slices[..., 0].max() == 255 and not slices[..., 2].any()


def test_channels_that_do_not_fit_are_named(tmp_path):
    for name, shape in (("a", (2, 3, 4)), ("b", (3, 3, 4))):
        write_nifti(tmp_path / f"{name}.nii", np.ones(shape, np.int16), (1, 1, 1))
    with pytest.raises(ValueError, match="b.nii.*a.nii .3 x 3 x 4 and 2 x 3 x 4"):
        read_scan([(tmp_path / "a.nii", None), (tmp_path / "b.nii", None)])


def test_network_input_by_hand():
    image = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).repeat(1, 3, 1, 1)
    found = to_network_input(image)
    assert found.dtype == torch.float32
    expected = [[-123.675 / 58.395, 131.325 / 58.395], [-116.28 / 57.12, 138.72 / 57.12]]
    torch.testing.assert_close(found[0, :2, 0], torch.tensor(expected))
    torch.testing.assert_close(found[0, 2, 0, 1], torch.tensor((255 - 103.53) / 57.375))
    assert image01(image)[0, 0, 0].tolist() == [0, 1]


# ---- names and splits ----


def test_names():
    assert [patient_of(n) for n in ("BRATS_001_012_1", "LASC_3_1", "image_1", "a_b_007_0")] == [
        "BRATS_001",
        "LASC",
        "image",
        "a_b",
    ]
    assert load_cls_labels_from_filenames(["a_001_1", "a_002_0.npy"]).tolist() == [1, 0]
    for wrong in ("LASC_001_012", "LASC_001_012_2.npy", "_1", "1"):
        with pytest.raises(ValueError, match=f"slice {wrong}: its name does not end in _0 or _1"):
            load_cls_labels_from_filenames([wrong])


def write_slices(root, names, shape=(4, 5)):
    (root / "imageSlice").mkdir(parents=True)
    for i, name in enumerate(names):
        np.save(root / "imageSlice" / f"{name}.npy", np.full(shape, i + 1, np.uint8))
    return root


def test_the_list_of_slices(tmp_path):
    names = ["B_1_2_1", "B_1_10_0", "B_2_1_1", "B_2_3_0"]
    root = write_slices(tmp_path / "BraTS", names)
    for stray in ("._B_1_2_1.npy", ".DS_Store", "notes.txt"):
        (root / "imageSlice" / stray).write_bytes(b"x")
    assert list_names(root) == names, "slice 10 behind slice 2"
    assert find_root(tmp_path / "BRATS").name == "BraTS"
    np.save(root / "imageSlice" / "B_10_1_1.npy", np.ones((4, 5), np.uint8))
    assert list_names(root) == ["B_10_1_1", "B_1_10_0", "B_1_2_1", "B_2_1_1", "B_2_3_0"], (
        "patient 10 stands before 1 and 2 in the published lists, as the characters say"
    )
    np.save(root / "imageSlice" / "B_10_1.npy", np.ones((4, 5), np.uint8))
    np.save(root / "imageSlice" / "nolabel.npy", np.ones((4, 5), np.uint8))
    with pytest.raises(ValueError, match="slice nolabel: "):
        list_names(root)
    with pytest.raises(
        FileNotFoundError, match="no folder imageSlice/ in it; make it with wsss_medical/prep"
    ):
        list_names(tmp_path / "none")
    shutil.rmtree(root / "imageSlice")
    (root / "imageSlice").mkdir()
    with pytest.raises(ValueError, match="holds no .npy file"):
        list_names(root)


@pytest.mark.parametrize(
    "patients, slices, bounds, counts",
    [(154, 44, [4400, 4884], (1892, 484, 4400)), (484, 155, [15500, 27435], (47585, 11935, 15500))],
)
def test_published_splits(patients, slices, bounds, counts):
    """LASC and BraTS as published: 43 + 11 + 100 and 307 + 77 + 100 patients, none in two parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_slices(names_of(patients, slices), bounds)
    assert tuple(len(split[part]) for part in ("train", "val", "test")) == counts
    groups = [set(map(patient_of, split[part])) for part in split]
    assert sum(map(len, groups)) == len(set.union(*groups)) == patients
    assert len(set(sum(split.values(), []))) == patients * slices


def test_shares_of_the_patients():
    names = names_of(14, 88)
    split = split_slices(names, (0.2, 0.35))
    assert {part: len(stems) // 88 for part, stems in split.items()} == {"train": 9, "val": 2, "test": 3}
    assert split["test"] == names[: 3 * 88] and suggested_split(names) == [264, 440]
    assert suggested_split(names[:176]) is None and suggested_split(names[:264]) == [88, 176]
    assert split_slices(names, (0, 0.2))["test"] == []


def test_splits_that_do_not_fit_are_explained():
    names = names_of(4, 10)
    for bounds in ([4400, 4884], [20, 20], [-1, 20], [10, 40], [0.5, 20], [10.5, 20]):
        text = (
            rf"slice_split \[{bounds[0]}, {bounds[1]}\]: there are N = 40, .*LASC as published has 6776 slic"
        )
        with pytest.raises(ValueError, match=text):
            split_slices(names, bounds)
    one_kind = names_of(4, 10, lambda z: 1)
    with pytest.raises(
        ValueError, match="the part 'train' has 20 slices, 20 of them positive; it needs both"
    ):
        split_slices(one_kind, [10, 20])
    with pytest.raises(ValueError, match="2 patient.s. are too few"):
        split_slices(names[:20], [0.2, 0.4])


def test_a_patient_in_two_parts_is_told():
    names = names_of(4, 10)
    with pytest.warns(UserWarning, match=r"15 cuts patient LASC_002 in two; scores will be too good"):
        assert len(split_slices(names, [10, 15])["val"]) == 5


def test_split_lines_and_lists(tmp_path):
    root = write_slices(tmp_path / "LASC", names_of(4, 4))
    assert load_slice_list(root, "val", [4, 8]) == names_of(4, 4)[4:8]
    assert load_slice_list(root, "all", [4, 8]) == names_of(4, 4)
    lines = split_lines(split_slices(names_of(4, 4), [4, 8]))
    assert [line.split() for line in lines] == [
        ["part", "slices", "patients", "positive"],
        ["train", "8", "2", "4"],
        ["val", "4", "1", "2"],
        ["test", "4", "1", "2"],
    ]


# ---- data sets ----


@pytest.fixture
def folder(tmp_path):
    """Two slices of 6 x 4 pixels: 1..24 without a mask, and 255 with one."""
    root = write_slices(tmp_path / "set", ["a_001_000_0", "a_001_001_1"])
    np.save(root / "imageSlice" / "a_001_000_0.npy", np.arange(1, 25, dtype=np.uint8).reshape(6, 4))
    np.save(root / "imageSlice" / "a_001_001_1.npy", np.full((6, 4, 3), 255, np.uint8))
    (root / "maskSlice").mkdir()
    np.save(root / "maskSlice" / "a_001_001_1.npy", np.eye(6, 4, dtype=np.uint8) * 255)
    return root


def test_slices_at_their_own_size(folder):
    data = MedicalClsValDataset(folder, list_names(folder))
    first, second = data[0], data[1]
    assert first["name"] == "a_001_000_0" and first["label"].tolist() == [0] and "mask" not in first
    assert first["image"].shape == (3, 6, 4) and first["image"].dtype == torch.uint8
    assert first["image"][1, 0].tolist() == [1, 2, 3, 4]
    assert second["label"].dtype == torch.float32 and second["mask"].sum() == 4 and second["mask"].max() == 1
    assert data.labels.tolist() == [0, 1] and len(data) == 2 and not data.has_masks
    assert MedicalSliceDataset(folder, ["a_001_001_1"]).has_masks


def test_masks_as_labels_of_pixels_may_be_0_and_255(folder):
    """Of labels of pixels 255 means unknown, of masks the structure."""
    for names, targets in ((["a_001_001_1"], folder / "maskSlice"), (["a_001_000_0"], folder / "labels")):
        targets.mkdir(exist_ok=True)
        np.save(targets / f"{names[0]}.npy", np.eye(6, 4, dtype=np.uint8) * 255)
        data = MedicalClsDataset(folder, names, 32, scale_range=(1, 1), flip=0, targets=targets)
        top, bottom, left, right = data[0, 0]["box"].tolist()
        inside = data[0, 0]["target"][top:bottom, left:right]
        assert inside.max() == (1 if targets.name == "maskSlice" else 255) and (inside > 0).sum() == 4


def test_a_training_item_is_where_its_box_says(folder):
    """Without scaling and mirror the box of 10 x 10 holds the slice, and the rest is 0."""
    options = {"scale_range": (1.0, 1.0), "flip": 0.0}
    data = MedicalClsDataset(folder, list_names(folder), 10, **options)
    places = set()
    for seed in range(60):
        item = data[0, seed]
        top, bottom, left, right = item["box"].tolist()
        assert (bottom - top, right - left) == (6, 4) and item["box"].dtype == torch.int64
        inside = item["image"][:, top:bottom, left:right]
        assert torch.equal(inside[0], torch.arange(1, 25).reshape(6, 4).byte()) and torch.equal(*inside[:2])
        assert item["image"].sum() == inside.sum()
        places.add((top, left))
    assert {top for top, _ in places} == set(range(5)) and {left for _, left in places} == set(range(7))


def test_a_slice_larger_than_the_square_is_cut(folder):
    data = MedicalClsDataset(folder, list_names(folder), 3, scale_range=(1.0, 1.0), flip=0.0)
    corners = set()
    for seed in range(60):
        item = data[0, seed]
        assert item["box"].tolist() == [0, 3, 0, 3] and item["image"].shape == (3, 3, 3)
        row, column = divmod(int(item["image"][0, 0, 0]) - 1, 4)
        assert item["image"][0, 2, 2] == (row + 2) * 4 + column + 3
        corners.add((row, column))
    assert corners == {(row, column) for row in range(4) for column in range(2)}


def test_scale_mirror_and_seed(folder):
    data = MedicalClsDataset(folder, list_names(folder), 16, scale_range=(0.5, 2.0))
    sizes, mirrored = set(), 0
    for seed in range(200):
        item = data[1, seed]
        top, bottom, left, right = item["box"].tolist()
        sizes.add((bottom - top, right - left))
        assert (item["image"][:, top:bottom, left:right] == 255).all()
        other = data[0, seed]
        top, bottom, left, right = other["box"].tolist()
        mirrored += int(other["image"][0, top, left] > other["image"][0, top, right - 1])
    assert min(sizes) == (3, 2) and max(sizes) == (11, 7), "int of 2 times the side is reached at 2.0 only"
    assert 75 < mirrored < 125
    again = MedicalClsDataset(folder, list_names(folder), 16)
    for key in ((0, 5), (1, 6)):
        assert all(torch.equal(data[key][k], again[key][k]) for k in ("image", "box", "label"))
    assert not torch.equal(data[0, 5]["image"], data[0, 6]["image"])


def test_a_length_of_its_own_wraps_around(folder):
    data = MedicalClsDataset(folder, list_names(folder), 8, length=7)
    assert len(data) == 7 and data[5, 1]["name"] == "a_001_001_1"
    assert len(MedicalClsDataset(folder, list_names(folder), 8)) == 2


def test_rotation_and_grey_values_leave_background_alone(folder):
    data = MedicalClsDataset(folder, list_names(folder), 12, rotate_deg=20, grey_values=True)
    values = Counter()
    for seed in range(20):
        item = data[0, seed]
        top, bottom, left, right = item["box"].tolist()
        outside = item["image"].clone()
        outside[:, top:bottom, left:right] = 0
        assert not outside.any()
        values[int(item["image"].max())] += 1
    assert len(values) > 5


# ---- layouts ----


def test_decathlon_keeps_its_numbers(heart):
    assert find_layout(heart) == "decathlon"
    records = list_records(heart, "decathlon", [])
    assert [(r.patient, r.name) for r in records] == [(3, "la_003"), (10, "la_010"), (20, "la_020")]
    (heart / "dataset.json").write_text(json.dumps({"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd"}}))
    chosen = list_records(heart, "decathlon", ["t1gd", "0", "t1"])[0].images
    assert [(name, channel) for name, _, channel in chosen] == [("t1ce", 2), ("flair", 0), ("t1", 1)]
    with pytest.raises(ValueError, match="--modality t2: la_003 only has flair, t1, t1ce"):
        list_records(heart, "decathlon", ["t2"])


def test_numbers_that_cannot_be_told_apart(heart):
    for kind in ("imagesTr", "labelsTr"):
        shutil.copy(heart / kind / "la_003.nii.gz", heart / kind / "other_3.nii.gz")
    with pytest.raises(ValueError, match="la_003 and other_3 both have the number 3; rename one"):
        list_records(heart, "decathlon", [])
    for kind in ("imagesTr", "labelsTr"):
        (heart / kind / "other_3.nii.gz").rename(heart / kind / "other.nii.gz")
    with pytest.raises(ValueError, match="other: no number in this name"):
        list_records(heart, "decathlon", [])


def write_files(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith(".nrrd"):
            import nrrd

            space = {"space": "left-posterior-superior", "space directions": np.eye(3)}
            array = np.ones((5, 4, 3), np.uint8)
            if "laendo" in name:
                array[...] = 0
                array[0, :2, 2] = 255
            nrrd.write(str(path), array, space)
        else:
            write_nifti(path, np.ones((3, 4, 5), np.uint8), (1.0, 1.0, 1.0))
    return root


def test_lasc_counts_training_before_test(tmp_path, capsys):
    pytest.importorskip("nrrd")
    names = [f"{part}/{p}/{f}.nrrd" for part, p in (("Testing Set", "A1"), ("Training Set", "Z9")) for f in
             ("lgemri", "laendo")]  # fmt: skip
    names += ["Training Set/B10/lgemri.nrrd", "Training Set/B10/laendo.nii.gz", "Training Set/C/lgemri.nrrd"]
    root = write_files(tmp_path / "LASC", names)
    assert find_layout(root) == "lasc"
    found = [(r.patient, r.name, r.label.name) for r in list_records(root, "lasc", [])]
    assert found == [
        (1, "Training Set/B10", "laendo.nii.gz"),
        (2, "Training Set/Z9", "laendo.nrrd"),
        (3, "Testing Set/A1", "laendo.nrrd"),
    ]
    assert "left out: 1 case(s) without a file laendo" in capsys.readouterr().out
    shutil.rmtree(root / "Training Set" / "B10")
    assert run(root, tmp_path / "out", dataset="LASC") == 0
    assert read_manifest(tmp_path / "out")["LASC_001_002_1"]["area"] == "2"
    mask = np.load(tmp_path / "out" / "maskSlice" / "LASC_001_002_1.npy")
    assert mask.shape == (4, 5) and mask.dtype == np.uint8 and mask[:2, 0].all() and mask.sum() == 2


def test_brats_of_all_years(tmp_path, capsys):
    for year, case, sequences in (
        (2020, "BraTS20_Training_104", ("_flair", "_t1", "_t1ce", "_t2", "_seg")),
        (2021, "BraTS2021_00017", ("_flair", "_t1ce", "_seg")),
        (2023, "BraTS-GLI-00005-001", ("-t2f", "-t1c", "-t1n", "-t2w", "-seg")),
        (2023, "BraTS-GLI-00005-000", ("-t2f", "-t1c", "-seg")),
        (2023, "BraTS-GLI-00009-000", ("-t2f",)),
    ):
        write_files(tmp_path / str(year), [f"{case}/{case}{sequence}.nii" for sequence in sequences])
    for year, numbers in ((2020, [(104, 0)]), (2021, [(17, 0)]), (2023, [(5, 0), (5, 1)])):
        assert find_layout(tmp_path / str(year)) == "brats"
        records = list_records(tmp_path / str(year), "brats", [])
        assert [r[:2] for r in records] == numbers and all(r.images[0][0] == "flair" for r in records)
        assert {name for name, *_ in list_records(tmp_path / str(year), "brats", ["t1gd"])[0].images} == {
            "t1ce"
        }
    assert "left out: 1 case(s) without a file seg" in capsys.readouterr().out
    assert run(tmp_path / "2023", tmp_path / "out", dataset="BraTS") == 0
    stems = sorted(read_manifest(tmp_path / "out"))
    assert len(stems) == 6 and set(map(patient_of, stems)) == {"BRATS_005"}, "both scans are of one patient"
    assert [stem for stem in stems if "_000_" in stem or "_1000_" in stem] == ["BRATS_005_000_1",
                                                                              "BRATS_005_1000_1"]  # fmt: skip


def test_what_has_no_layout_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither imagesTr/ .Decathlon.*lgemri.nrrd.*_seg.nii.gz"):
        find_layout(tmp_path)
    with pytest.raises(SystemExit, match="neither imagesTr/"):
        run(tmp_path, tmp_path / "out")


# ---- the whole conversion ----


def test_slices_masks_and_notes(heart, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(heart, out) == 0
    rows = read_manifest(out)
    stems = [f"HEART_{p:03d}_{z:03d}_{y}" for p in (3, 10, 20) for z, y in enumerate((0, 1, 1, 0))]
    assert list(rows) == stems == sorted(stems) == list_names(out)
    assert [row["area"] for row in rows.values()] == ["0", "1", "4", "0"] * 3
    expected = {"stem": stems[1], "patient": "HEART_003", "z": "1", "label": "1", "area": "1"}
    assert rows[stems[1]] == expected | {"height": "3", "width": "5"}
    notes = json.loads((out / "slices.json").read_text())
    assert (notes["slices"], notes["positives"], notes["channels"]) == (12, 6, ["image"])
    assert notes["slice_mm"]["HEART_010"] == [3, 2, 1] and notes["suggested_split"] == [4, 8]
    assert notes["dataset"] == "Heart" and notes["pixel_mm"] is None and notes["channel_numbers"] == [0]
    printed = capsys.readouterr().out
    assert "12 slices" in printed and "50 % of them positive" in printed and "slice_split: [4, 8]" in printed
    for name in ("la_010",):
        image = load_nifti(heart / "imagesTr" / f"{name}.nii.gz").array
        label = load_label(heart / "labelsTr" / f"{name}.nii.gz").array
        slices = volume_to_slices(image)
        for z in range(4):
            stem = stems[4 + z]
            stored = np.load(out / "imageSlice" / f"{stem}.npy")
            np.testing.assert_array_equal(stored, slices[z])
            mask = np.load(out / "maskSlice" / f"{stem}.npy")
            np.testing.assert_array_equal(mask, label[z, ::-1, ::-1] > 0)


def test_flags_that_choose_slices_and_labels(heart, tmp_path):
    def labels(*flags):
        out = tmp_path / "_".join(flags).replace("--", "")
        assert run(heart, out, "--limit", "1", *flags) == 0
        return [(row["z"], row["label"], row["area"]) for row in read_manifest(out).values()]

    whole = [("0", "0", "0"), ("1", "1", "1"), ("2", "1", "4"), ("3", "0", "0")]
    assert labels() == whole
    assert labels("--step", "2") == [whole[0], whole[2]]
    assert labels("--skip_empty") == whole[:3]
    assert labels("--min_pixels", "4") == [whole[0], whole[2], whole[3]]
    assert labels("--min_pixels", "1") == whole, "one pixel is enough"
    assert labels("--min_pixels", "5", "--below_min", "positive") == whole
    negative = [("0", "0", "0"), ("1", "0", "1"), ("2", "1", "4"), ("3", "0", "0")]
    assert labels("--min_pixels", "2", "--below_min", "negative") == negative
    assert labels("--label_values", "2") == [whole[0], whole[1], ("2", "0", "0"), whole[3]]
    assert labels("--pixel_mm", "0.5")[2] == ("2", "1", "32")  # 4 pixels of 2 x 1 mm
    notes = json.loads((tmp_path / "pixel_mm_0.5" / "slices.json").read_text())
    assert notes["slice_mm"] == {"HEART_003": [3, 0.5, 0.5]} and notes["pixel_mm"] == 0.5
    assert json.loads((tmp_path / "step_2" / "slices.json").read_text())["slice_mm"]["HEART_003"] == [6, 2, 1]


def test_a_label_is_not_lost_between_large_pixels(heart, tmp_path):
    """One pixel of 5 mm a slice: the small structure of slice 1 is not in it, its label stays."""
    assert run(heart, tmp_path / "out", "--limit", "1", "--pixel_mm", "5") == 0
    rows = read_manifest(tmp_path / "out")
    assert [(row["label"], row["height"], row["width"]) for row in rows.values()] == [
        ("0", "1", "1"),
        ("1", "1", "1"),
        ("1", "1", "1"),
        ("0", "1", "1"),
    ]
    assert rows["HEART_003_001_1"]["area"] == "0"


def test_an_interrupted_change_of_settings_leaves_nothing_behind(heart, tmp_path, monkeypatch):
    from wsss_medical import preprocess

    out, flags = tmp_path / "out", ("--min_pixels", "2", "--below_min", "negative")
    run(heart, out)
    convert_record = preprocess.convert_record

    def stop_at_the_second(record, *arguments):
        if record.patient == 10:
            raise KeyboardInterrupt
        return convert_record(record, *arguments)

    monkeypatch.setattr(preprocess, "convert_record", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(heart, out, *flags)
    monkeypatch.undo()
    assert run(heart, out, *flags) == 0
    assert len(list_names(out)) == 12 == len(read_manifest(out))


def test_a_second_run_does_only_what_is_missing(heart, tmp_path, capsys):
    out = tmp_path / "out"
    run(heart, out)

    def times():
        return {p.name: p.stat().st_mtime_ns for p in (out / "imageSlice").iterdir()}

    before, content = times(), {p.name: p.read_bytes() for p in out.rglob("*.npy")}
    notes = {name: (out / name).read_bytes() for name in ("manifest.csv", "slices.json")}
    capsys.readouterr()
    run(heart, out)
    assert times() == before and "3 of 3 cases are converted already" in capsys.readouterr().out
    assert notes == {name: (out / name).read_bytes() for name in notes}
    (out / "imageSlice" / "HEART_010_002_1.npy").unlink()
    run(heart, out)
    changed = {name for name, time in times().items() if before.get(name) != time}
    assert changed == {f"HEART_010_{z:03d}_{y}.npy" for z, y in enumerate((0, 1, 1, 0))}
    assert content == {p.name: p.read_bytes() for p in out.rglob("*.npy")}
    run(heart, out, "--min_pixels", "2", "--below_min", "negative")
    assert "HEART_010_001_0" in list_names(out) and "HEART_010_001_1" not in list_names(out)
    assert len(list_names(out)) == len(list((out / "maskSlice").iterdir())) == 12
    run(heart, out, "--limit", "1")
    assert len(list_names(out)) == 4, "slices of a smaller conversion stand alone"
    np.save(out / "imageSlice" / "HEART_099_000_1.npy", np.ones((3, 5), np.uint8))
    capsys.readouterr()
    run(heart, out, "--limit", "1")
    assert "1 more file(s), which shift splits by slice numbers" in capsys.readouterr().out
    assert len(list_names(out)) == 5


def test_a_case_that_fails_is_named_and_costs_the_others_nothing(heart, tmp_path, capsys):
    write_nifti(heart / "labelsTr" / "la_010.nii.gz", np.zeros((4, 3, 6), np.uint8), (3.0, 2.0, 1.0))
    out = tmp_path / "out"
    assert run(heart, out) == 1
    printed = capsys.readouterr().out
    assert "1 case(s) could not be converted" in printed and "la_010" in printed
    assert {patient_of(name) for name in list_names(out)} == {"HEART_003", "HEART_020"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda notes: "[" * 100_000,
        lambda notes: notes[: len(notes) // 2],
        lambda notes: json.dumps({"cases": [1, {"name": "la_003"}, {"name": 5}], "outdated": [7]}),
        lambda notes: notes.replace('"slice_mm"', '"slice"'),
    ],
)
def test_damaged_notes_cost_a_second_conversion(heart, tmp_path, damage):
    out = tmp_path / "out"
    run(heart, out)
    wanted = read_manifest(out), (out / "slices.json").read_text()
    (out / "preprocessing.json").write_text(damage((out / "preprocessing.json").read_text()))
    assert run(heart, out) == 0
    assert wanted == (read_manifest(out), (out / "slices.json").read_text())


def test_notes_cannot_remove_what_lies_elsewhere(heart, tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine.npy"
    run(heart, out)
    mine.touch()
    notes = json.loads((out / "preprocessing.json").read_text())
    notes["outdated"] = ["../mine.npy", str(mine)]
    notes["cases"][0]["files"].append("imageSlice/../../mine.npy")
    (out / "preprocessing.json").write_text(json.dumps(notes))
    assert run(heart, out, "--step", "2") == 0 and mine.is_file() and len(list_names(out)) == 6


def test_what_the_numbers_of_labels_mean_is_told(heart, tmp_path, capsys):
    """255 beside others is not taken for the structure; a --label_values that no map holds is named."""
    run(heart, tmp_path / "all")
    assert "label values 1, 2 all count; --label_values chooses" in capsys.readouterr().out
    run(heart, tmp_path / "one", "--label_values", "2", "4")
    assert "warning: --label_values 4 is in no label map; there are 1, 2" in capsys.readouterr().out
    label = load_label(heart / "labelsTr" / "la_010.nii.gz").array.copy()
    label[label == 2] = 255
    write_nifti(heart / "labelsTr" / "la_010.nii.gz", label, (3.0, 2.0, 1.0), orientation="LPS")
    assert run(heart, tmp_path / "ignored") == 1
    assert "la_010.nii.gz: label values 1, 255; 255 beside others" in capsys.readouterr().out
    assert run(heart, tmp_path / "chosen", "--label_values", "1") == 0
    assert read_manifest(tmp_path / "chosen")["HEART_010_002_1"]["area"] == "4"


def test_nothing_is_converted_among_the_scans(heart, tmp_path):
    with pytest.raises(SystemExit, match="--out .*other: holds scans .imagesTr/"):
        run(heart, Path(shutil.copytree(heart, tmp_path / "other")))
    root = write_files(tmp_path / "raw", ["1/BraTS_001_flair.nii", "1/BraTS_001_seg.nii"])
    with pytest.raises(SystemExit, match="--out .*raw: holds the scans, which stay as they are"):
        run(root, root)
    assert sorted(path.name for path in root.iterdir()) == ["1"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"channels": "lge"}, '"channels" should be a list'),
        ({"pixel_mm": "1"}, '"pixel_mm" should be a number'),
        ({"pixel_mm": 0}, '"pixel_mm" is 0, a size above 0 is needed'),
        ({"dataset": ["LASC"]}, '"dataset" should be a text'),
    ],
)
def test_notes_of_slices_are_checked_before_the_training(folder, change, problem):
    (folder / "slices.json").write_text(json.dumps({"dataset": "LASC", "channels": ["lge"]} | change))
    with pytest.raises(ValueError, match=f"slices.json: {problem}"):
        open_data(Namespace(data_path=str(folder), dataset=None, slice_split=[0.2, 0.35]))


def test_bad_flags_are_one_line(heart, tmp_path):
    (heart / "dataset.json").write_text(json.dumps({"modality": {"0": "FLAIR", "1": "T1w"}}))
    with pytest.raises(SystemExit, match="--modality 0 1: choose one sequence, or three"):
        run(heart, tmp_path / "out", "--modality", "0", "1")
    with pytest.raises(SystemExit, match="--dataset a/b: letters and digits only"):
        run(heart, tmp_path / "out", dataset="a/b")


# ---- phantoms and real data ----


def test_phantoms(tmp_path):
    source = write_wsss_phantoms(tmp_path / "heads")
    assert run(source, tmp_path / "out", dataset="demo") == 0
    rows = read_manifest(tmp_path / "out").values()
    assert Counter(row["patient"] for row in rows) == {f"DEMO_{p:03d}": 16 for p in range(1, 9)}
    for patient in range(1, 9):
        positive = [row for row in rows if row["patient"] == f"DEMO_{patient:03d}" and row["label"] == "1"]
        assert 6 <= len(positive) <= 9 and all(int(row["area"]) > 80 for row in positive)
    data = MedicalClsValDataset(tmp_path / "out", list_names(tmp_path / "out"))
    for i in np.flatnonzero(data.labels)[:10]:
        image, mask = data.read(i)[..., 0], data.read_mask(i) > 0
        assert image.shape == (64, 64) and image[mask].mean() > 2 * image[(image > 0) & ~mask].mean()
        assert (image[:8, :8] == 0).all(), "nothing outside of the head"
    before = (source / "imagesTr" / "head_001.nii.gz").stat().st_mtime_ns
    write_wsss_phantoms(source)
    assert (source / "imagesTr" / "head_001.nii.gz").stat().st_mtime_ns == before
    first = load_nifti(source / "imagesTr" / "head_001.nii.gz").array
    again = load_nifti(write_wsss_phantoms(tmp_path / "again") / "imagesTr" / "head_001.nii.gz").array
    np.testing.assert_array_equal(first, again)


@needs_data
def test_real_atria(tmp_path):
    assert run(DATA / "left_atrium_lge", tmp_path, "--limit", "2", dataset="LASC") == 0
    rows = read_manifest(tmp_path)
    assert len(rows) == 2 * 88 and sum(int(row["area"]) for row in rows.values()) == sum(
        int(load_label(DATA / f"left_atrium_lge/labelsTr/lasc_00{k}.nii.gz").array.sum()) for k in (1, 2)
    )
    assert json.loads((tmp_path / "slices.json").read_text())["channels"] == ["lge-mri"]


@needs_data
def test_real_tumours_in_both_layouts(tmp_path):
    """BRATS_001: 53,050 + 27,189 + 31,485 labelled voxels (README of the data); three channels as colours."""
    source = DATA / "brain_tumor_mr"
    assert (
        run(source, tmp_path / "a", "--limit", "1", "--modality", "flair", "t1gd", "0", dataset="BraTS") == 0
    )
    rows = read_manifest(tmp_path / "a")
    assert len(rows) == 155 and sum(int(row["area"]) for row in rows.values()) == 53050 + 27189 + 31485
    top = max(rows, key=lambda stem: int(rows[stem]["area"]))
    colours = np.load(tmp_path / "a" / "imageSlice" / f"{top}.npy")
    assert colours.shape == (240, 240, 3) and np.array_equal(colours[..., 0], colours[..., 2])
    assert not np.array_equal(colours[..., 0], colours[..., 1])
    flair = load_nifti(source / "imagesTr" / "BRATS_001.nii.gz", channel=0).array
    z = int(rows[top]["z"])
    np.testing.assert_array_equal(colours[..., 0] > 0, flair[z, ::-1, ::-1] > 0)
    mask = np.load(tmp_path / "a" / "maskSlice" / f"{top}.npy") > 0
    brain = colours[..., 0][colours[..., 0] > 0]
    assert colours[..., 0][mask].mean() > 1.3 * brain.mean(), "tumours are bright in FLAIR"
    assert run(source / "brats_folder", tmp_path / "b", dataset="BraTS") == 0
    rows = read_manifest(tmp_path / "b")
    assert sum(int(row["area"]) for row in rows.values()) == 57655 + 45203 + 17816
    assert {row["patient"] for row in rows.values()} == {"BRATS_904"}
