"""amos_lha: which files are cases; what preprocess.py stores, check_data.py finds and stats.py measures."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA

from amos_lha import check_data, preprocess, stats
from amos_lha.cases import list_any, list_data_set
from amos_lha.organs import ORGANS
from common.hdf5 import CaseFile
from common.intensity import mr_scaling
from common.label_measures import round_trip
from common.nifti import load_label, load_nifti, write_nifti

SHAPE, SPACING_MM, ORIGIN_MM = (16, 40, 44), (5.0, 2.0, 2.0), (-30.0, 12.0, 700.0)
# Boxes of organs in voxels z y x of the volume in RAS, where x grows to the right.
BOXES = {
    1: ((4, 10, 8), (10, 20, 14)),  # 360 voxels of 20 mm^3
    2: ((2, 10, 30), (6, 18, 34)),
    3: ((2, 22, 10), (6, 30, 13)),
    6: ((7, 12, 24), (14, 28, 36)),
    11: ((10, 8, 26), (12, 11, 28)),
    12: ((11, 6, 16), (13, 9, 18)),
}


def body(modality: str = "ct") -> tuple[np.ndarray, np.ndarray]:
    """(scan, label): a body with a box of its own grey value for each organ; x grows to the right."""
    label = np.zeros(SHAPE, np.uint8)
    scan = np.full(SHAPE, -1000 if modality == "ct" else 0, np.int16)
    scan[:, 7:34, 8:36] = 0 if modality == "ct" else 300
    scan[:, 7:10, 8:36] = -100 if modality == "ct" else 600
    for n, (start, stop) in BOXES.items():
        block = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        label[block], scan[block] = n, 10 * n + (0 if modality == "ct" else 300)
    return scan, label


def add_case(
    folder: Path,
    name: str = "amos_0001",
    part: str = "Tr",
    *,
    modality: str = "ct",
    scan: np.ndarray | None = None,
    label: np.ndarray | None = None,
    spacing_mm=SPACING_MM,
    orientation: str = "RAS",
    label_orientation: str | None = None,
    origin_mm=ORIGIN_MM,
) -> tuple[Path, Path]:
    """One more case of a data set in AMOS22's layout; paths of image and label."""
    made_scan, made_label = body(modality)
    scan, label = made_scan if scan is None else scan, made_label if label is None else label
    files = folder / f"images{part}" / f"{name}.nii.gz", folder / f"labels{part}" / f"{name}.nii.gz"
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(files[0], scan, spacing_mm, origin_mm=ORIGIN_MM, orientation=orientation)
    where = {"origin_mm": origin_mm, "orientation": label_orientation or orientation}
    write_nifti(files[1], label, spacing_mm, **where)
    return files


def convert(source: Path, out: Path, *flags: object) -> int:
    return preprocess.main(
        ["--data_path", str(source), "--out", str(out), "--workers", "0", *map(str, flags)]
    )


def check(source: Path, *flags: object) -> int:
    return check_data.main(["--data_path", str(source), "--workers", "0", *map(str, flags)])


def entries(out: Path) -> dict[str, dict]:
    return {e["name"]: e for e in json.loads((out / "preprocessing.json").read_text())["cases"]}


def stored(out: Path, name: str = "amos_0001") -> CaseFile:
    return CaseFile(out / "cases" / f"{name}.h5")


@pytest.fixture
def amos(tmp_path) -> Path:
    """Two CT and one MR for training, one CT for validation, one test scan without label."""
    source = tmp_path / "amos22"
    noise = np.random.default_rng(0).integers(-5, 6, SHAPE).astype(np.int16)
    parts = {"amos_0001": "Tr", "amos_0004": "Tr", "amos_0507": "Tr", "amos_0008": "Va", "amos_0010": "Ts"}
    for step, (name, part) in enumerate(parts.items()):
        scan, label = body("mr" if name == "amos_0507" else "ct")
        label[0, 0, :step] = 1  # no two labels or scans are equal
        add_case(source, name, part, scan=scan + noise * np.int16(step), label=label)
    shutil.rmtree(source / "labelsTs")
    return source


# ---- which files are cases ----


def test_layout_parts_and_modalities(amos):
    cases, problems = list_data_set(amos.parent)  # the folder above it will do
    found = [(case.name, case.part, case.modality, case.label is not None) for case in cases]
    assert found == [
        ("amos_0001", "train", "ct", True),
        ("amos_0004", "train", "ct", True),
        ("amos_0507", "train", "mr", True),
        ("amos_0008", "val", "ct", True),
        ("amos_0010", "test", "ct", False),
    ]
    assert problems == [] and cases[0].labelled == tuple(range(1, 16))


def test_500_is_the_first_mr(tmp_path):
    add_case(tmp_path, "amos_0499"), add_case(tmp_path, "amos_0500")
    assert [case.modality for case in list_data_set(tmp_path)[0]] == ["ct", "mr"]


@pytest.mark.parametrize(
    "notes, flag, expected",
    [
        ({}, None, {"a": range(1, 16), "b": range(1, 16)}),
        ({"labelled": [6, 1]}, None, {"a": [1, 6], "b": [1, 6]}),
        ({"labelled": {"a": [2], "b": [3, 2]}}, None, {"a": [2], "b": [2, 3]}),
        ({"labelled": [6, 1]}, [4, 5], {"a": [4, 5], "b": [4, 5]}),
        ({"labels": {"0": "background", "1": "Spleen", "6": "liver"}}, None, {"a": [1, 6], "b": [1, 6]}),
        ({"labels": {"background": 0, "Right Kidney": 2}}, None, {"a": [2], "b": [2]}),
    ],
)
def test_labelled_organs(notes, flag, expected, tmp_path):
    add_case(tmp_path, "a"), add_case(tmp_path, "b")
    (tmp_path / "dataset.json").write_text(json.dumps(notes))
    cases, _ = list_data_set(tmp_path, flag)
    assert {case.name: case.labelled for case in cases} == {n: tuple(o) for n, o in expected.items()}


@pytest.mark.parametrize(
    "notes, flag, message",
    [
        (
            {"labelled": {"b": [1]}},
            None,
            '"labelled" of a: expected numbers of labels .* found None',
        ),
        ({"labelled": [0, 1]}, None, "expected numbers of labels"),
        ({"labelled": "all"}, None, '"labelled" should be an object or a list, found a text'),
        ({"labelled": []}, None, "expected numbers of labels"),
        ({}, [16], "--labelled: expected numbers of labels from 1 to 15, found .16."),
        ({"labels": {"1": "liver", "2": "cancer"}}, None, "label 1 'liver', which is the spleen in AMOS"),
        ({"labels": {"2": "left kidney"}}, None, "label 2 'left kidney', which is the right kidney"),
    ],
)
def test_wrong_lists_of_organs(notes, flag, message, tmp_path):
    add_case(tmp_path, "a")
    (tmp_path / "dataset.json").write_text(json.dumps(notes))
    with pytest.raises(ValueError, match=message):
        list_data_set(tmp_path, flag)


def test_spellings_of_amos_are_known(tmp_path):
    add_case(tmp_path)
    names = dict(ORGANS) | {4: "Gall Bladder", 8: "arota", 9: "postcava", 5: "Oesophagus"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": names}))
    assert list_data_set(tmp_path)[0][0].labelled == tuple(range(1, 16))


def test_plain_sets_tell_their_modality_or_are_refused(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    add_case(source, "patient_7")
    with pytest.raises(SystemExit, match="tell whether patient_7 are CT or MR; give --modality ct or --mod"):
        convert(source, out)
    with pytest.raises(SystemExit, match="give --modality ct"):
        convert(source, out, "--modality", "both")
    assert convert(source, out, "--modality", "mr") == 0 and entries(out)["patient_7"]["modality"] == "mr"
    (source / "dataset.json").write_text('{"modality": {"0": "CT"}}')
    assert convert(source, out) == 0 and entries(out)["patient_7"]["modality"] == "ct"
    assert "1 case(s) were not finished, or made with other settings" in capsys.readouterr().out


def test_mr_is_left_out_of_a_ct_run_and_counted(amos, tmp_path, capsys):
    assert convert(amos, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "found: 2 train CT, 1 val CT, 1 test without labels" in printed
    assert "AMOS22 has 200 CT and 40 MR for training, 100 CT and 20 MR for validation" in printed
    assert "left out: 1 MR (amos_0507); --modality both converts them too" in printed
    assert "next: python amos_lha/train.py --config amos_lha/lha_net.yaml --data_path" in printed
    parts = {name: entry["part"] for name, entry in entries(tmp_path / "out").items()}
    assert parts == {"amos_0001": "train", "amos_0004": "train", "amos_0008": "val"}
    assert convert(amos, tmp_path / "mr", "--modality", "mr") == 0
    assert list(entries(tmp_path / "mr")) == ["amos_0507"]
    assert convert(amos, tmp_path / "both", "--modality", "both") == 0
    assert len(entries(tmp_path / "both")) == 4
    shutil.rmtree(amos / "imagesVa"), shutil.rmtree(amos / "labelsVa")
    for name in ("amos_0001", "amos_0004"):
        (amos / f"imagesTr/{name}.nii.gz").unlink(), (amos / f"labelsTr/{name}.nii.gz").unlink()
    with pytest.raises(SystemExit, match="no labelled CT case to convert; --modality mr converts"):
        convert(amos, tmp_path / "none")


# ---- what is stored ----


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL"])
def test_ct_at_its_own_spacing_is_cropped_and_otherwise_unchanged(orientation, tmp_path):
    """The body and the organs span y 6..33 and x 8..35; 10 mm are 5 voxels around the body."""
    add_case(tmp_path / "source", orientation=orientation)
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", *SPACING_MM) == 0
    case, (scan, label) = stored(tmp_path / "out"), body()
    about = case.attributes
    assert (about["crop_start"], about["crop_stop"]) == ([0, 1, 3], [16, 39, 41])
    scan, label = scan[:, 1:39, 3:41], label[:, 1:39, 3:41]
    assert case.image.dtype == np.int16 and case.label.dtype == np.uint8
    assert np.array_equal(case.image[...], scan) and np.array_equal(case.label[...], label)
    assert (about["name"], about["modality"], about["scaling"]) == ("amos_0001", "ct", None)
    assert about["labelled"] == list(range(1, 16)) and about["source_orientation"] == orientation
    assert about["source_shape"] == list(SHAPE) and about["source_image"] == "amos_0001.nii.gz"
    np.testing.assert_allclose(about["source_spacing_mm"], SPACING_MM)
    np.testing.assert_allclose(case.spacing_mm, SPACING_MM)
    np.testing.assert_allclose(np.array(about["affine"])[:3, 3], np.add(ORIGIN_MM, (3 * 2, 1 * 2, 0)))
    assert about["voxels"] == {str(n): int(np.count_nonzero(label == n)) for n in BOXES}
    assert set(case.index_names) == {"boundary"} | {f"{k}_{n}" for k in ("class", "boundary") for n in BOXES}
    for n in BOXES:
        for kind in ("class", "boundary"):
            assert (case.label[...][tuple(case.locations(f"{kind}_{n}").T)] == n).all()
    assert set(np.unique(about["foreground_sample"])) == {10 * n for n in BOXES}
    assert len(about["foreground_sample"]) == np.count_nonzero(label)


def test_entry_of_the_notes(amos, tmp_path):
    convert(amos, tmp_path / "out", "--labelled", 1, 2, 3, 6, 11, 12)
    notes = json.loads((tmp_path / "out/preprocessing.json").read_text())
    assert notes["spacing_mm"] == [2.0, 1.5, 1.5]
    entry = notes["cases"][0]
    assert entry["name"] == "amos_0001" and entry["labelled"] == [1, 2, 3, 6, 11, 12]
    assert entry["organ_ml"]["1"] == 7.2 and entry["organ_ml"]["11"] == 0.24, "360 and 12 voxels of 20 mm^3"
    assert entry["shape"] == list(stored(tmp_path / "out").shape) == [40, 51, 51]
    assert entry["settings"]["spacing_mm"] == [2.0, 1.5, 1.5] and len(entry["stamp"]) == 2
    with (tmp_path / "out/cases.csv").open() as file:
        assert [row["organs"] for row in csv.DictReader(file)] == ["6", "6", "6"]


def test_organs_lie_at_the_same_millimetres_on_the_working_grid(tmp_path):
    add_case(tmp_path / "source", orientation="LPI")
    convert(tmp_path / "source", tmp_path / "out")
    case = stored(tmp_path / "out")
    affine, label = np.array(case.attributes["affine"]), case.label[...]
    for n in (1, 2, 6):
        start, stop = BOXES[n]
        zyx = (np.add(start, stop) - 1) / 2 * SPACING_MM + ORIGIN_MM[::-1]
        centre = (affine @ [*np.argwhere(label == n).mean(0)[::-1], 1.0])[:3][::-1]
        np.testing.assert_allclose(centre, zyx, atol=0.5)
        volume_ml = np.count_nonzero(label == n) * np.prod(case.spacing_mm) / 1000
        assert volume_ml == pytest.approx(entries(tmp_path / "out")["amos_0001"]["organ_ml"][str(n)], rel=0.1)


def test_metal_and_padding_are_cut_before_resampling(tmp_path):
    scan, _ = body()
    scan[:, 20:22], scan[:, 30:32] = 30000, -3024
    add_case(tmp_path / "source", scan=scan)
    convert(tmp_path / "source", tmp_path / "out", "--spacing", 5, 4, 2)
    image = stored(tmp_path / "out").image[...]
    assert image.max() < 1500 and image.min() >= -1024
    convert(tmp_path / "source", tmp_path / "out", "--spacing", *SPACING_MM)
    image = stored(tmp_path / "out").image[...]
    assert image.max() == 1500 and image.min() == -1024


def test_labels_outside_of_the_body_are_never_cut(tmp_path):
    scan, label = body()
    label[0:3, 38:40, 42:44] = 15
    scan[:, :4] = -1000
    add_case(tmp_path / "source", scan=scan, label=label)
    convert(tmp_path / "source", tmp_path / "out", "--spacing", *SPACING_MM)
    assert stored(tmp_path / "out").attributes["voxels"]["15"] == 12


def test_mr_is_kept_whole_and_scaled_by_itself(tmp_path):
    scan, _ = body("mr")
    scan = scan * 2
    add_case(tmp_path / "source", "amos_0601", modality="mr", scan=scan)
    assert convert(tmp_path / "source", tmp_path / "out", "--modality", "mr", "--spacing", *SPACING_MM) == 0
    case, scaling = stored(tmp_path / "out", "amos_0601"), mr_scaling(scan)
    assert case.shape == SHAPE and case.image.dtype == np.int16
    assert case.attributes["scaling"] == pytest.approx(list(scaling))
    assert np.array_equal(case.image[...], np.clip(scan, scaling.low, scaling.high).astype(np.int16))


@pytest.mark.parametrize(
    "factor, dtype", [(0.001, np.float32), (0.3, np.float32), (2, np.int16), (100, np.float32)]
)
def test_mr_of_few_grey_levels_or_beyond_int16_stays_float(factor, dtype, tmp_path):
    """The scans have 0 to 600, so 0.3 leaves 180 levels and 100 goes to 60,000."""
    scan = body("mr")[0].astype(np.float32) * np.float32(factor)
    add_case(tmp_path / "source", "amos_0601", scan=scan)
    convert(tmp_path / "source", tmp_path / "out", "--modality", "mr")
    case = stored(tmp_path / "out", "amos_0601")
    assert case.image.dtype == dtype
    assert case.image[...].max() == pytest.approx(mr_scaling(scan).high, rel=1e-3)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["light"], [2.0, 1.5, 1.5]),
        (["fine"], [2.0, 1.0, 1.0]),
        (["native"], [2.0, 0.69, 0.69]),
        (["median"], [5.0, 2.0, 2.0]),
        ([4, 3, 2.5], [4.0, 3.0, 2.5]),
    ],
)
def test_spacing_presets(words, expected, tmp_path):
    add_case(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "--spacing", *words)
    assert json.loads((tmp_path / "out/preprocessing.json").read_text())["spacing_mm"] == expected
    np.testing.assert_allclose(stored(tmp_path / "out").spacing_mm, expected, rtol=0.05)


@pytest.mark.parametrize(
    "words", [["coarse"], [1, 1], [1, 0, 1], ["light", "fine"], ["nan", 1, 1], ["inf", 1, 1]]
)
def test_wrong_spacing(words, tmp_path):
    add_case(tmp_path / "source")
    with pytest.raises(SystemExit, match="spacing .*expected light, fine, native, median, or three"):
        convert(tmp_path / "source", tmp_path / "out", "--spacing", *words)


def test_thick_slices_are_pointed_out(tmp_path, capsys):
    """10 mm slices of 1 mm pixels: converted all the same."""
    add_case(tmp_path / "source", spacing_mm=(10, 1, 1))
    assert convert(tmp_path / "source", tmp_path / "out") == 0
    assert "the slices are 10 mm thick: --spacing median would save time" in capsys.readouterr().out
    assert stored(tmp_path / "out").shape[0] == 80
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", "median") == 0
    assert "--spacing median would" not in capsys.readouterr().out
    assert stored(tmp_path / "out").shape[0] == 16


# ---- bad cases ----


def test_bad_cases_are_named_and_cost_the_others_nothing(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    scan, label = body()
    add_case(source, "amos_0001")
    add_case(source, "amos_0002", label=np.where(label == 6, 16, label).astype(np.uint8))
    add_case(source, "amos_0003", label=label * np.float32(0.5))
    add_case(source, "amos_0004", label=label[:-1])
    add_case(source, "amos_0005", origin_mm=(-28.0, 12.0, 700.0))
    add_case(source, "amos_0006")[1].unlink()
    add_case(source, "amos_0007")[0].unlink()
    noise = np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)
    truncated = add_case(source, "amos_0008", scan=noise)[0]
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    add_case(source, "amos_0009", scan=scan[:1], label=label[:1])
    add_case(source, "amos_0010")[1].write_bytes(b"")
    add_case(source, "amos_0011", label=label.astype(np.float64))  # floats that are whole: fine
    add_case(source, "amos_0012", label_orientation="LPS")  # the same grid in other axes: fine
    add_case(
        source, "amos_0013", label=np.where(label == 11, 0, label).astype(np.uint8)
    )  # an organ less: fine
    assert convert(source, out) == 1
    assert list(entries(out)) == ["amos_0001", "amos_0011", "amos_0012", "amos_0013"]
    printed = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  amos_"):
            printed[line.split(":")[0].strip()] = line
    for number, *words in (
        (2, "labelsTr", "label value(s) 16; expected 1 to 15"),
        (3, "labelsTr", "is not a whole number"),
        (4, "labelsTr", "another grid", "15 x 40 x 44 and 16 x 40 x 44"),
        (5, "labelsTr", "another grid"),
        (6, "imagesTr", "has no label of the same name"),
        (7, "labelsTr", "has no scan of the same name"),
        (8, "imagesTr", "truncated or damaged"),
        (9, "only 5 x 80 x 88 mm", "single slice"),
        (10, "labelsTr", "empty file"),
    ):
        for word in words:
            assert word in printed[f"amos_{number:04d}"], printed
    assert len(printed) == 9


def test_organs_that_are_not_said_to_be_labelled_are_refused(tmp_path, capsys):
    add_case(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", "--labelled", 1, 2, 3, 6) == 1
    message = "holds 11 (right adrenal gland), 12 (left adrenal gland), which --labelled or dataset.json"
    assert message in capsys.readouterr().out
    assert not (tmp_path / "out/preprocessing.json").exists()


def test_suspicions_are_warned_of_and_noted(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    scan, label = body()
    add_case(source, "amos_0001", scan=scan + np.int16(1024))
    add_case(source, "amos_0002", label=np.zeros_like(label))
    tiny = np.zeros_like(label)
    tiny[8, 20, 20], tiny[4:10, 10:20, 8:14] = 4, 1
    add_case(source, "amos_0003", label=tiny)
    assert convert(source, out, "--spacing", 9, 4, 4) == 0
    printed = capsys.readouterr().out
    notes = {name: entry["notes"] for name, entry in entries(out).items()}
    assert "1024 must be subtracted" in notes["amos_0001"] and notes["amos_0002"] == "holds no organ"
    assert notes["amos_0003"] == "too small for these voxels, therefore gone: gallbladder"
    assert all(f"warning: {name}: {note}" in printed for name, note in notes.items())
    assert len(stored(out, "amos_0002").attributes["foreground_sample"]) == 0


def test_a_case_in_two_parts_or_two_files_is_refused(amos, tmp_path):
    add_case(amos, "amos_0004", "Va")
    with pytest.raises(SystemExit, match="amos_0004 is a case of train and of val; remove one of them"):
        convert(amos, tmp_path / "out")
    shutil.rmtree(amos / "imagesVa"), shutil.rmtree(amos / "labelsVa")
    shutil.copy(amos / "imagesTr/amos_0001.nii.gz", amos / "imagesTr/amos_0001.nii")
    with pytest.raises(SystemExit, match="amos_0001.nii and amos_0001.nii.gz are the same case"):
        convert(amos, tmp_path / "out")
    with pytest.raises(SystemExit, match="none: no folder imagesTr in it; expected AMOS22's layout"):
        convert(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_goes_on_where_it_stopped(amos, tmp_path, monkeypatch):
    out, converted, original = tmp_path / "out", [], preprocess.convert_case

    def interrupted(case, *rest):
        if len(converted) == 2:
            raise KeyboardInterrupt
        converted.append(case.name)
        return original(case, *rest)

    monkeypatch.setattr(preprocess, "convert_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(amos, out)
    assert list(entries(out)) == converted == ["amos_0001", "amos_0004"]
    converted.clear()
    assert convert(amos, out) == 0 and converted == ["amos_0008"]
    add_case(amos, "amos_0001", label=np.where(body()[1] == 2, 3, body()[1]).astype(np.uint8))
    converted.clear()
    assert convert(amos, out) == 0 and converted == ["amos_0001"]
    assert "2" not in entries(out)["amos_0001"]["organ_ml"]
    monkeypatch.setattr(preprocess, "convert_case", original)
    assert convert(amos, out, "--labelled", 1, 2, 3, 6, 11, 12) == 0
    assert {tuple(entry["labelled"]) for entry in entries(out).values()} == {(1, 2, 3, 6, 11, 12)}


def test_processes_give_the_same_as_one(amos, tmp_path):
    for workers in (0, 2):
        assert convert(amos, tmp_path / str(workers), "--modality", "both", "--workers", workers) == 0
    for name in ("preprocessing.json", "cases.csv"):
        assert (tmp_path / "0" / name).read_text() == (tmp_path / "2" / name).read_text()
    for name in entries(tmp_path / "0"):
        a, b = (tmp_path / workers / f"cases/{name}.h5" for workers in "02")
        assert a.read_bytes() == b.read_bytes()


# ---- check_data.py ----


def test_a_good_data_set_passes_and_is_counted(amos, tmp_path, capsys):
    assert check(amos, "--out", tmp_path / "check", "--speck_voxels", 0) == 0
    printed = capsys.readouterr().out
    for words in (
        "2 train CT, 1 train MR, 1 val CT, 1 test CT (AMOS22 has 200 CT",
        "  z: 5, 5, 5\n  y: 2, 2, 2\n",
        "slice thickness (the largest of the three): 5, 5, 5",
        "   1 spleen (large): 4 of 4\n",
        "   4 gallbladder (small): 0 of 4\n",
        "0 remark(s)\n0 problem(s)\n",
    ):
        assert words in printed
    with (tmp_path / "check/check.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows][-1] == "amos_0010" and rows[0]["labels"] == "1 2 3 6 11 12"
    assert {row["problems"] for row in rows} == {""}


def test_each_fault_is_found(tmp_path, capsys):
    scan, label = body()
    numbers = iter(range(1, 100))

    def add(part="Tr", **changes):
        """A case that equals no other one, but for what is changed."""
        n = next(numbers)
        changes.setdefault("scan", scan + np.int16(n))
        if "label" not in changes:
            changes["label"] = label.copy()
            changes["label"][0, 0, :n] = 6
        return add_case(tmp_path, f"amos_{n:04d}", part, **changes)

    def with_value(number):
        changed = label.copy()
        changed[15, 39, 40:] = number
        return changed

    add()  # 1: good
    add()[1].unlink()  # 2
    add()[0].unlink()  # 3
    add(origin_mm=(0, 0, 0))  # 4
    add(label=with_value(17))  # 5
    add(scan=scan + np.int16(1))  # 6: the scan of 1
    add(label=label)  # 7
    add(label=label)  # 8: the label of 7
    swapped = np.where(label == 2, 3, np.where(label == 3, 2, label)).astype(np.uint8)
    add(label=swapped)  # 9
    add(scan=scan[:, :, ::-1] + np.int16(10), label=label[:, :, ::-1])  # 10: mirrored
    specks = label.copy()
    specks[15, 39, 40:], specks[0, 0, 0] = 6, 6
    add(label=specks)  # 11: remark
    add(scan=scan + np.int16(1024))  # 12: remark
    add(label=label * np.float32(1.5))  # 13
    add()[0].write_bytes(b"")  # 14
    add_case(tmp_path, "amos_0001", "Va", scan=scan - np.int16(1), label=with_value(5))
    assert check(tmp_path) == 1
    problems = capsys.readouterr().out.split(" problem(s):\n")[1].splitlines()
    expected = {
        "amos_0001 is a case of train and of val": 1,
        "amos_0002 (train): ": "a scan without a label",
        "amos_0003 (train): ": "a label without a scan",
        "amos_0004 (train): ": "lies on another grid than amos_0004.nii.gz",
        "amos_0005 (train): ": "label value(s) 17; expected 1 to 15",
        "amos_0006 (train): ": "its scan is the same as that of amos_0001 (train)",
        "amos_0008 (train): ": "its label is the same as that of amos_0007 (train)",
        "amos_0009 (train): ": "wrong side: right kidney left of left kidney: two labels are exchanged",
        "amos_0010 (train): ": "left adrenal gland, liver left of spleen: the file is mirrored",
        "amos_0013 (train): ": "is not a whole number",
        "amos_0014 (train): ": "empty file",
    }
    assert len(problems) == len(expected), problems
    for line, (start, words) in zip(problems, expected.items(), strict=True):
        assert start in line and (words == 1 or words in line), line


def test_remarks_do_not_fail_a_data_set(tmp_path, capsys):
    scan, label = body()
    label[15, 39, 40:43], label[0, 0, 0], label[0, 20:23, 20:23] = 6, 6, 6
    label[3, 3, 3] = 4
    add_case(tmp_path, scan=scan + np.int16(1024), label=label)
    assert check(tmp_path) == 0
    printed = capsys.readouterr().out
    for words in (
        "3 remark(s):",
        "1024 must be subtracted",
        "amos_0001 (train): liver: 3 speck(s) of up to 9 voxel(s)",
        "amos_0001 (train): gallbladder: 1 voxel(s) in all",
    ):
        assert words in printed
    assert check(tmp_path, "--speck_voxels", 3) == 0
    assert "liver: 1 speck(s) of up to 1 voxel(s)" in capsys.readouterr().out


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAI", "SRP"])
def test_sides_are_judged_in_space_not_in_the_file(orientation, tmp_path, capsys):
    add_case(tmp_path, orientation=orientation)
    assert check(tmp_path) == 0
    scan, label = body()
    add_case(tmp_path, scan=scan[:, :, ::-1], label=label[:, :, ::-1], orientation=orientation)
    assert check(tmp_path) == 1
    assert "right kidney left of left kidney" in capsys.readouterr().out


def test_partly_labelled_sets_are_counted_so(tmp_path, capsys):
    label = np.where(np.isin(body()[1], [11, 12]), 0, body()[1]).astype(np.uint8)
    add_case(tmp_path, label=label)
    assert check(tmp_path, "--labelled", 1, 2, 3, 6) == 0
    assert "  11 right adrenal gland (small): 0 of 0" in capsys.readouterr().out
    assert check(tmp_path, "--labelled", 1, 2, 3) == 1
    assert "holds 6 (liver), which --labelled or dataset.json does not name" in capsys.readouterr().out


def test_labels_alone(tmp_path, capsys):
    files = add_case(tmp_path / "set", "amos_0013_label")
    shutil.copy(files[1], tmp_path / files[1].name)
    cases, problems = list_any(tmp_path / "set" / "labelsTr")
    assert [case.part for case in cases] == ["labels"] and problems == []
    assert check(tmp_path / "set" / "labelsTr") == 0
    assert "1 labels" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no folder imagesTr"):
        check(tmp_path / "none")


# ---- stats.py ----


def organ_rows(path: Path) -> dict[int, dict]:
    with (path / "statistics.csv").open() as file:
        return {int(row["label"]): row for row in csv.DictReader(file)}


def measure(source: Path, *flags: object) -> int:
    return stats.main(["--data_path", str(source), "--workers", "0", *map(str, flags)])


def test_statistics_by_hand(amos, tmp_path, capsys):
    """Spleens of 432, 361 and (MR) 362 voxels of 20 mm^3; of the last two one or two lie in the corner."""
    label = np.where(body()[1] == 11, 0, body()[1]).astype(np.uint8)
    label[4:10, 20:22, 8:14] = 1  # amos_0001: 72 voxels more
    add_case(amos, "amos_0001", label=label)
    assert measure(amos, "--out", tmp_path / "out", "--sizes_ml", 0.5, 7.24) == 0
    assert " 1 spleen: 3 of 3, median 7.24 mL (large), 50 x 40 x 28 mm (z y x)\n" in capsys.readouterr().out
    rows = organ_rows(tmp_path / "out")
    assert list(rows) == list(range(1, 16))
    assert float(rows[1]["ml"]) == pytest.approx(7.24)
    assert rows[1]["group_by_size"] == "large" and rows[1]["group"] == "large"
    assert [float(rows[6][f"extent_{axis}_mm"]) for axis in "zyx"] == [35.0, 32.0, 24.0]
    assert (rows[11]["scans"], rows[11]["labelled"]) == ("2", "3")
    assert float(rows[11]["presence"]) == pytest.approx(2 / 3, rel=1e-5)
    assert rows[11]["group_by_size"] == "small" and rows[2]["group_by_size"] == "medium"
    assert float(rows[6]["p50"]) == pytest.approx(60, abs=1), "of the CT only"
    assert rows[14]["scans"] == "0" and rows[14]["ml"] == rows[14]["group_by_size"] == ""


def test_grey_values_of_mr_are_no_hu(tmp_path):
    add_case(tmp_path / "source", "amos_0601", modality="mr")
    assert measure(tmp_path / "source", "--out", tmp_path / "out") == 0
    assert "p50" not in organ_rows(tmp_path / "out")[6]


@pytest.mark.parametrize("flag, group", [(74.9, "medium"), (75.1, "small")])
def test_thresholds(flag, group):
    assert stats.size_group(75.0, flag, 190.0) == group
    assert stats.size_group(190.0, flag, 190.0) == "large" and stats.size_group(float("nan"), 75, 190) == ""


def test_statistics_of_labels_alone_and_unreadable_ones(amos, tmp_path, capsys):
    (amos / "labelsTr/amos_0004.nii.gz").write_bytes(b"")
    out = tmp_path / "out"
    assert measure(amos / "labelsTr", "--out", out, "--round_trip", *SPACING_MM) == 1
    assert "1 case(s) could not be measured:\n  amos_0004: " in capsys.readouterr().out
    rows = organ_rows(out)
    assert rows[1]["scans"] == "2" and "p50" not in rows[1] and float(rows[1]["round_trip_dice"]) == 1
    with pytest.raises(SystemExit, match="spacing median: expected light, fine, native, or three"):
        measure(amos / "labelsTr", "--out", out, "--round_trip", "median")


def test_statistics_without_any_organ(tmp_path):
    add_case(tmp_path / "source", label=np.zeros(SHAPE, np.uint8))
    assert measure(tmp_path / "source", "--out", tmp_path / "out") == 0
    assert {row["ml"] for row in organ_rows(tmp_path / "out").values()} == {""}


# ---- real files ----


@pytest.fixture(scope="module")
def real_abdomen() -> Path:
    if not (REAL_DATA / "abdomen_ct").is_dir():
        pytest.skip("the real scans are not on this machine")
    return REAL_DATA / "abdomen_ct"


def test_real_scans(real_abdomen, tmp_path, capsys):
    assert check(real_abdomen) == 0
    assert "2 train CT, 1 train MR, 1 val CT, 1 test CT" in capsys.readouterr().out
    assert convert(real_abdomen, tmp_path / "out", "--modality", "both") == 0
    found = entries(tmp_path / "out")
    assert {n: e["part"] for n, e in found.items()} == {
        "amos_0001": "train",
        "amos_0004": "train",
        "amos_0507": "train",
        "amos_0008": "val",
    }
    assert found["amos_0001"]["organ_ml"]["6"] == pytest.approx(41733 * 0.027, abs=1e-3)
    assert "5" not in found["amos_0001"]["organ_ml"] and len(found["amos_0004"]["organ_ml"]) == 7
    for name, entry in found.items():
        case = stored(tmp_path / "out", name)
        voxel_ml = np.prod(case.spacing_mm) / 1000
        for n, ml in entry["organ_ml"].items():
            assert case.attributes["voxels"][n] * voxel_ml == pytest.approx(ml, rel=0.1), (name, n)
    assert stored(tmp_path / "out", "amos_0507").attributes["scaling"] is not None


def test_real_label_survives_the_round_trip(real_abdomen):
    """A true label of AMOS, whose geometry is in the qform alone, over the grid of `light`."""
    label = load_label(real_abdomen / "label_only/amos_0013_label.nii.gz")
    returned, dice = round_trip(label.array, label.spacing_mm, (2.0, 1.5, 1.5))
    assert returned.shape == label.array.shape and sorted(dice) == list(range(1, 16))
    assert min(dice[n] for n in (1, 2, 3, 6, 7)) >= 0.98
    assert min(dice[n] for n in (11, 12)) >= 0.90 and min(dice.values()) >= 0.90


def test_real_mr_is_refused_as_ct_and_taken_as_mr(tmp_path):
    chaos = REAL_DATA / "abdomen_mr_chaos"
    if not chaos.is_dir():
        pytest.skip("the real scans are not on this machine")
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / "source" / kind).mkdir(parents=True)
        shutil.copy(chaos / kind / "amos_0602.nii.gz", tmp_path / "source" / kind)
    with pytest.raises(SystemExit, match="no labelled CT case to convert; --modality mr converts"):
        convert(tmp_path / "source", tmp_path / "out")
    flags = ["--modality", "mr", "--labelled", 1, 2, 3, 6, "--spacing", "median"]
    assert convert(tmp_path / "source", tmp_path / "out", *flags) == 0
    case = stored(tmp_path / "out", "amos_0602")
    assert case.shape == (31, 256, 256) and case.image.dtype == np.int16, "at its own spacing, whole"
    label = load_label(chaos / "labelsTr/amos_0602.nii.gz")
    assert np.array_equal(case.label[...], label.array) and case.attributes["labelled"] == [1, 2, 3, 6]
    scan, scaling = load_nifti(chaos / "imagesTr/amos_0602.nii.gz").array, case.attributes["scaling"]
    assert scaling == pytest.approx(list(mr_scaling(scan)))
    assert np.array_equal(case.image[...], scan.clip(round(scaling[0]), round(scaling[1])))
