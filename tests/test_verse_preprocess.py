"""VerSe to HDF5: geometry, values, labels, what is set aside, interruptions, splits."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA
from scipy import ndimage

from common.hdf5 import CaseFile
from common.nifti import load_label, load_nifti, write_nifti
from verse_spine import preprocess
from verse_spine.cases import find_cases
from verse_spine.dataset import VerSe
from verse_spine.labels import centroids_to_mm, centroids_to_voxels, read_centroids, write_centroids

SPACING_MM, SHAPE = (3.0, 1.5, 2.0), (30, 60, 50)  # z y x: 90 x 90 x 100 mm
BLOB = (44.0, 40.0, 55.0)  # mm from the middle of voxel 0


def convert(source, out, *flags: object) -> int:
    return preprocess.main(["--source", str(source), "--out", str(out), "--workers", "0", *map(str, flags)])


def entries(out: Path) -> dict[str, dict]:
    return {e["name"]: e for e in json.loads((out / "preprocessing.json").read_text())["cases"]}


def places_mm(shape, affine) -> np.ndarray:
    """(z, y, x, 3): position (z, y, x) in mm of every voxel, through the affine."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)[..., ::-1]  # x y z
    return (index @ affine[:3, :3].T + affine[:3, 3])[..., ::-1]


def make_case(
    source: Path,
    name: str = "sub-verse001",
    *,
    orientation: str = "RAS",
    spacing_mm=SPACING_MM,
    origin_mm=(11.0, -30.0, 250.0),
    part: str | None = None,
    shift_mm: float = 0.0,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> tuple[Path, Path, Path]:
    """A body of 0 HU in air with one bright Gaussian blob, L1 (20), and its centroid; image, mask, json."""
    root = source / f"dataset-01{part}" if part else source
    raw, derived = (root / kind / name.split("_")[0] for kind in ("rawdata", "derivatives"))
    raw.mkdir(parents=True, exist_ok=True)
    derived.mkdir(parents=True, exist_ok=True)
    mm = [np.arange(n) * s for n, s in zip(SHAPE, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*mm, indexing="ij")
    square = (z - BLOB[0]) ** 2 + (y - BLOB[1]) ** 2 + (x - BLOB[2]) ** 2
    if image is None:
        body = (y > 12) & (y < 75) & (x > 25) & (x < 85)
        image = np.where(body, 1000 * np.exp(-square / (2 * 6.0**2)), -1000).round().astype(np.int16)
    if mask is None:
        mask = np.where(square < 12.0**2, 20, 0).astype(np.uint8)
    files = raw / f"{name}_ct.nii.gz", derived / f"{name}_seg-vert_msk.nii.gz"
    files = (*files, derived / f"{name}_seg-subreg_ctd.json")
    where = dict(origin_mm=origin_mm, orientation=orientation)
    write_nifti(files[0], image, spacing_mm, **where)
    write_nifti(files[1], mask, spacing_mm, **where)
    centre = tuple(o + b + shift_mm * k for o, b, k in zip(origin_mm[::-1], BLOB, (1, 0, 0), strict=True))
    write_centroids(files[2], centroids_to_voxels({20: centre}, load_nifti(files[0])))
    return files


def centre_of(image: np.ndarray, affine) -> np.ndarray:
    weight = np.clip(np.asarray(image, float), 0, None)[..., None]
    return (weight * places_mm(image.shape, affine)).sum((0, 1, 2)) / weight.sum()


# ---- geometry ----


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "ILA", "SAL"])
@pytest.mark.parametrize(
    ("spacing_mm", "wanted"),
    [(SPACING_MM, (2, 2, 2)), ((3, 1.8, 2), (1.5, 3, 1.7)), (SPACING_MM, SPACING_MM)],
)
def test_affine_maps_to_the_same_millimetres(orientation, spacing_mm, wanted, tmp_path):
    source = tmp_path / "source"
    make_case(source, orientation=orientation, spacing_mm=spacing_mm)
    assert convert(source, tmp_path / "out", "--spacing", *wanted) == 0
    case = CaseFile(tmp_path / "out" / "cases" / "sub-verse001.h5")
    affine = np.array(case.attributes["affine"])
    truth = np.add((250.0, -30.0, 11.0), BLOB)  # z y x
    np.testing.assert_allclose(centre_of(case.image[...], affine), truth, atol=0.1)
    np.testing.assert_allclose(centre_of(case.label[...], affine), truth, atol=0.3)
    assert case.attributes["centroids"][0][0] == 20
    np.testing.assert_allclose(case.attributes["centroids"][0][1:], truth, atol=0.02)
    np.testing.assert_allclose(case.spacing_mm, wanted, rtol=0.06)  # whole voxels
    np.testing.assert_allclose(np.diag(affine)[:3][::-1], case.spacing_mm, rtol=1e-9)
    assert case.attributes["source_orientation"] == orientation
    assert case.attributes["source_shape"] == list(SHAPE)
    start, stop = (np.array(case.attributes[f"crop_{end}"]) for end in ("start", "stop"))
    extent_mm = np.multiply(case.shape, case.spacing_mm)
    np.testing.assert_allclose(extent_mm, np.multiply(stop - start, spacing_mm), rtol=1e-6)


def test_oblique_scan(tmp_path):
    """Gantry tilt: the affine of the small grid is oblique as well."""
    import nibabel as nib

    image_file, mask_file, centroid_file = make_case(tmp_path / "source")
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    for path in (image_file, mask_file):
        stored = nib.load(path)
        affine = tilt @ stored.affine
        nib.save(nib.Nifti1Image(np.asarray(stored.dataobj), affine), path)
    x, y, z = np.add((11.0, -30.0, 250.0), BLOB[::-1])
    truth = (tilt @ [x, y, z, 1])[:3][::-1]
    write_centroids(centroid_file, centroids_to_voxels({20: tuple(truth)}, load_nifti(image_file)))
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", 2, 2, 2) == 0
    case = CaseFile(tmp_path / "out" / "cases" / "sub-verse001.h5")
    affine = np.array(case.attributes["affine"])
    np.testing.assert_allclose(centre_of(case.image[...], affine), truth, atol=0.1)
    np.testing.assert_allclose(case.attributes["centroids"][0][1:], truth, atol=0.02)
    assert case.spacing_mm == pytest.approx((2, 2, 2), rel=0.06) and abs(affine[1, 2]) > 0.3


def test_volume_of_a_tilted_gantry(tmp_path):
    """Slices moved by 1.5 mm for each 3 mm upwards: 3.35 mm along the axis, but 3 x 1.5 x 2 mm hold as much.

    The 30 slices become 34 (of 3.35 mm to 3), so that a voxel of the case holds 30 / 34 of it.
    """
    import nibabel as nib

    mask = np.zeros((30, 60, 50), np.uint8)
    mask[10:20, 20:40, 20:40] = 20
    image_file, mask_file, centroid_file = make_case(tmp_path / "source", mask=mask)
    centroid_file.unlink()
    for path in (image_file, mask_file):
        stored = nib.load(path)
        affine = stored.affine.copy()
        affine[1, 2] = 1.5  # y moves with z
        nib.save(nib.Nifti1Image(np.asarray(stored.dataobj), affine), path)
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", *SPACING_MM) == 0
    case = CaseFile(tmp_path / "out" / "cases" / "sub-verse001.h5")
    expected = np.count_nonzero(case.label[...]) * 9 * 30 / 34 / 1000
    assert case.shape[0] == 34 and expected == pytest.approx(36, rel=0.07)
    assert entries(tmp_path / "out")["sub-verse001"]["vertebra_ml"] == pytest.approx(expected, abs=0.06)


def test_cropped_to_the_body_with_its_margin(tmp_path):
    make_case(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "--spacing", *SPACING_MM)
    case = CaseFile(tmp_path / "out" / "cases" / "sub-verse001.h5")
    # The body lies at y 13.5 .. 73.5 mm and x 26 .. 84 mm, the scan ends at 88.5 and 98 mm.
    assert list(case.attributes["crop_start"]) == [0, 0, 3]
    assert list(case.attributes["crop_stop"]) == [30, 60, 50]
    image = load_nifti(tmp_path / "source/rawdata/sub-verse001/sub-verse001_ct.nii.gz").array
    assert np.array_equal(case.image[...], image[:, :, 3:]), "same spacing: the very voxels"


def test_vertebrae_outside_of_the_largest_body_part_stay(tmp_path):
    """Scans in which everything but the bones is blanked out fall apart."""
    image, mask = np.full((40, 40, 40), -1000, np.int16), np.zeros((40, 40, 40), np.uint8)
    for number, start, size in ((20, 2, 4), (21, 30, 6)):
        block = (slice(start, start + size),) * 3
        image[block], mask[block] = 400, number
    _, _, centroids = make_case(tmp_path / "source", image=image, mask=mask, spacing_mm=(4, 4, 4))
    centroids.unlink()
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", 4, 4, 4) == 0
    entry = entries(tmp_path / "out")["sub-verse001"]
    assert entry["vertebrae"] == [20, 21]
    assert entry["vertebra_ml"] == pytest.approx((64 + 216) * 0.064, abs=0.1)
    assert entry["notes"] == "no centroid file: centres from the mask"
    centroids = CaseFile(tmp_path / "out/cases/sub-verse001.h5").attributes["centroids"]
    np.testing.assert_allclose(np.array(centroids)[0, 1:], np.add((250, -30, 11), 3.5 * 4), atol=0.1)


# ---- values, labels, what training reads ----


def test_scans_that_are_not_in_hu_are_named_and_noted(tmp_path, capsys):
    image, mask = np.full((40, 40, 40), 200, np.int16), np.zeros((40, 40, 40), np.uint8)
    image[10:30, 10:30, 10:30], mask[10:20, 10:20, 10:20] = 700, 20
    make_case(tmp_path / "source", image=image, mask=mask, spacing_mm=(4, 4, 4))
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", 4, 4, 4) == 0
    sentence = "values from 200 to 700, hardly any below -60"
    assert f"warning: sub-verse001: {sentence}" in capsys.readouterr().out
    assert sentence in entries(tmp_path / "out")["sub-verse001"]["notes"]


def test_values_are_int16_hu_clipped_to_twelve_bits(tmp_path):
    image = np.zeros((30, 60, 50), np.int16)
    image[:, 10:20], image[:, 30:40] = -3000, 9000
    make_case(tmp_path / "source", image=image)
    convert(tmp_path / "source", tmp_path / "out", "--spacing", *SPACING_MM)
    stored = CaseFile(tmp_path / "out" / "cases" / "sub-verse001.h5").image
    assert stored.dtype == np.int16 and set(np.unique(stored[...])) == {-1024, 0, 3071}


def test_values_are_cut_before_they_are_resampled_and_rounded(tmp_path):
    """By hand, rows averaged in pairs with weights 1/8 3/8 3/8 1/8: metal and padding in two rows of 0 HU."""
    image = np.zeros((30, 60, 50), np.int16)
    image[:, 20:22], image[:, 40:42], image[:, 46] = 9000, -3024, -3
    make_case(tmp_path / "source", image=image)
    convert(tmp_path / "source", tmp_path / "out", "--spacing", 3, 3, 2)
    case = CaseFile(tmp_path / "out" / "cases" / "sub-verse001.h5")
    assert list(case.attributes["crop_start"]) == [0, 0, 0] and case.shape[1] == 27
    row = case.image[10, :, 20].tolist()
    assert row[9:12] == [384, 2303, 384]  # 383.875, 2303.25: 3071, of which nothing more spreads
    assert row[19:22] == [-128, -768, -128]
    assert row[22:25] == [0, -1, 0]  # -0.375, -1.125, -0.375: rounded, not cut off


def test_unsigned_scans_can_be_cut(tmp_path):
    """-1024 does not exist in uint16, in which some tools store CT with an offset."""
    make_case(tmp_path / "source", image=np.full((30, 60, 50), 5000, np.uint16))
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", *SPACING_MM) == 0
    assert (CaseFile(tmp_path / "out" / "cases" / "sub-verse001.h5").image[...] == 3071).all()


def test_phantoms_labels_boxes_index_centroids(verse_source, verse_h5):
    cases = {case.name: case for case in find_cases(verse_source)}
    assert sorted(cases) == sorted(entries(verse_h5))
    for name, case in cases.items():
        stored = CaseFile(verse_h5 / "cases" / f"{name}.h5")
        label, image = stored.label[...], stored.image[...]
        source = load_label(case.mask)
        # Label of the source voxel that lies nearest to each voxel of the small grid.
        affine = np.array(stored.attributes["affine"])
        to_voxel = np.linalg.inv(source.affine)
        at = places_mm(label.shape, affine)[..., ::-1] @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        nearest = tuple(
            np.clip(np.rint(at[..., 2 - axis]), 0, source.array.shape[axis] - 1).astype(int)
            for axis in range(3)
        )
        expected = source.array[nearest]
        assert expected.any() and set(np.unique(label)) <= set(np.unique(source.array))

        def agreement(shifted: np.ndarray, label=label) -> float:
            both = (label == shifted) & (label > 0)
            return 2 * both.sum() / ((label > 0).sum() + (shifted > 0).sum())

        # Thin arches of one or two voxels: no more than that, but every shift by a voxel is worse.
        assert agreement(expected) > 0.8
        for axis in range(3):
            for step in (-1, 1):
                assert agreement(np.roll(expected, step, axis)) < agreement(expected) - 0.1
        # Boxes: as tight as find_objects, by number.
        boxes = {int(b[0]): b[1:] for b in stored.attributes["boxes"]}
        assert sorted(boxes) == [n for n in np.unique(label) if n] == entries(verse_h5)[name]["vertebrae"]
        for number, box in boxes.items():
            found = ndimage.find_objects((label == number).astype(int))[0]
            assert list(box) == [s.start for s in found] + [s.stop for s in found]
        # Index.
        assert {n for n in stored.index_names if n.startswith("class_")} == {f"class_{n}" for n in boxes}
        for number in boxes:
            assert (label[tuple(stored.locations(f"class_{number}").T)] == number).all()
        negative = tuple(stored.locations("hard_negative").T)
        assert (label[negative] == 0).all() and (image[negative] > 150).all()
        # Centroids: those of the file, in mm.
        truth = centroids_to_mm(read_centroids(case.centroids), load_nifti(case.image))
        kept = {int(n): tuple(zyx) for n, *zyx in stored.attributes["centroids"]}
        assert kept.keys() == truth.keys() and all(kept[n] == pytest.approx(truth[n]) for n in kept)


def test_sacrum_and_coccyx_are_background(tmp_path):
    mask = np.zeros((30, 60, 50), np.uint8)
    make_case(tmp_path / "source")
    block = (slice(11, 18), slice(20, 34), slice(22, 33))
    mask[block], mask[2:5, 10:20, 20:30], mask[6:8, 10:20, 20:30] = 20, 26, 27
    make_case(tmp_path / "source", mask=mask)
    convert(tmp_path / "source", tmp_path / "out", "--spacing", *SPACING_MM)
    case = CaseFile(tmp_path / "out" / "cases" / "sub-verse001.h5")
    assert set(np.unique(case.label[...])) == {0, 20} and len(case.attributes["boxes"]) == 1
    assert entries(tmp_path / "out")["sub-verse001"]["vertebrae"] == [20]


# ---- bad cases ----


def test_centroids_of_another_scan_are_set_aside(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    make_case(source, "sub-verse001")
    _, _, centroids = make_case(source, "sub-verse002", shift_mm=40)
    assert convert(source, out, "--spacing", 4, 4, 4) == 1
    with (out / "quarantine.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["case"] == "sub-verse002" and "L1: centroid 40 mm from the centre of the mask" in row["reason"]
    assert str(centroids) in row["reason"] and list(entries(out)) == ["sub-verse001"]
    assert "1 case(s) set aside, see quarantine.csv" in capsys.readouterr().out
    assert not (out / "cases/sub-verse002.h5").exists()
    make_case(source, "sub-verse002", shift_mm=10)  # mended: as far as a body's centre may be
    assert convert(source, out, "--spacing", 4, 4, 4) == 0
    assert not (out / "quarantine.csv").exists() and len(entries(out)) == 2


def test_bad_cases_are_named_and_cost_the_others_nothing(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    good = np.zeros(SHAPE, np.uint8)
    good[10:20, 20:40, 20:40] = 20
    make_case(source, "sub-verse001")
    make_case(source, "sub-verse002", mask=good[:-1])
    make_case(source, "sub-verse003", mask=np.zeros_like(good))
    make_case(source, "sub-verse004", mask=np.where(good, 99, 0).astype(np.uint8))
    make_case(source, "sub-verse005")[2].write_text('[{"direction": ["P", "I"')
    noise = np.random.default_rng(0).integers(-100, 900, SHAPE).astype(np.int16)
    truncated = make_case(source, "sub-verse006", image=noise)[0]
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    make_case(source, "sub-verse007")[1].unlink()
    mirrored = make_case(source, "sub-verse008", orientation="LPS")
    make_case(tmp_path / "other", "sub-verse008", orientation="RAS")  # the same grid in other axes: fine
    shutil.copy(tmp_path / "other/derivatives/sub-verse008" / mirrored[1].name, mirrored[1])
    make_case(source, "sub-verse009", mask=np.where(good, 26, 0).astype(np.uint8))
    make_case(tmp_path / "other", "sub-verse010", origin_mm=(11.0, -30.0, 253.0))
    moved = make_case(source, "sub-verse010")
    shutil.copy(tmp_path / "other/derivatives/sub-verse010" / moved[1].name, moved[1])
    make_case(source, "sub-verse011")[0].write_bytes(b"")
    thin = np.zeros((2, 60, 50), np.int16)
    make_case(source, "sub-verse012", image=thin, mask=(thin + 20).astype(np.uint8))
    assert convert(source, out, "--spacing", 4, 4, 4) == 1
    assert sorted(entries(out)) == ["sub-verse001", "sub-verse005", "sub-verse008"]
    printed = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  sub-verse"):
            printed[line.split(":")[0].strip()] = line
    for number, *words in (
        (
            2,
            "_seg-vert_msk",
            "another grid",
            "29 x 60 x 50 and 30 x 60 x 50 voxels",
            "take the file that was drawn",
        ),
        (3, "_seg-vert_msk", "holds no vertebra", "remove"),
        (4, "_seg-vert_msk", "unknown label value(s) 99", "map yours to these"),
        (6, "_ct.nii.gz", "truncated or damaged"),
        (7, "_ct.nii.gz", "has no mask", "_seg-vert_msk"),
        (9, "holds no vertebra"),
        (10, "another grid"),
        (11, "_ct.nii.gz"),
        (12, "only 6 x 90 x 100 mm", "single slice"),
    ):
        for word in words:
            assert word in printed[f"sub-verse{number:03d}"], printed[f"sub-verse{number:03d}"]
    assert len(printed) == 9


@pytest.mark.parametrize("content", ["[", '[{"label": [20], "X": 1, "Y": 1, "Z": 1}]', '{"20": [1, 2, 3]}'])
def test_a_centroid_file_in_another_form_costs_its_centroids_and_not_the_case(tmp_path, capsys, content):
    _, _, centroids = make_case(tmp_path / "source")
    centroids.write_text(content)
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", 4, 4, 4) == 0
    assert f"warning: sub-verse001: centroid file left out: {centroids}: " in capsys.readouterr().out
    notes = entries(tmp_path / "out")["sub-verse001"]["notes"]
    assert notes.startswith("centroid file left out: ") and notes.endswith(": centres from the mask")
    stored = CaseFile(tmp_path / "out/cases/sub-verse001.h5").attributes["centroids"]
    centroids.unlink()
    assert convert(tmp_path / "source", tmp_path / "without", "--spacing", 4, 4, 4) == 0
    np.testing.assert_array_equal(
        stored, CaseFile(tmp_path / "without/cases/sub-verse001.h5").attributes["centroids"]
    )


def test_subregion_masks_and_other_files_are_ignored(tmp_path):
    _, mask, _ = make_case(tmp_path / "source", "sub-verse001")
    for name in ("sub-verse001_seg-subreg_msk.nii.gz", "._sub-verse001_seg-vert_msk.nii.gz", "snp.png"):
        (mask.parent / name).write_bytes(b"garbage")
    assert convert(tmp_path / "source", tmp_path / "out", "--spacing", 4, 4, 4) == 0
    assert list(entries(tmp_path / "out")) == ["sub-verse001"]


def test_wrong_folders_and_flags(tmp_path):
    (tmp_path / "empty").mkdir()
    make_case(tmp_path / "source")
    for source, flags, message in (
        ("none", (), "none: no such folder; verse_spine/download.py"),
        ("empty", (), "empty: no scan rawdata/sub-.*give the folder above"),
        ("source", ("--spacing", 1, 2000, 1), "--spacing 1.0 2000.0 1.0: millimetres between 0 and 1000"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert(tmp_path / source, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


# ---- interruptions ----


@pytest.fixture
def three(tmp_path) -> Path:
    for number in (1, 2, 3):
        make_case(tmp_path / "source", f"sub-verse00{number}")
    return tmp_path / "source"


@pytest.fixture
def converted(monkeypatch) -> list[str]:
    """Names of the cases that are converted from now on."""
    names, original = [], preprocess.convert_case

    def counted(case, *rest):
        names.append(case.name)
        return original(case, *rest)

    monkeypatch.setattr(preprocess, "convert_case", counted)
    return names


def test_goes_on_where_it_stopped(three, tmp_path, monkeypatch, converted, capsys):
    out, flags, counted = tmp_path / "out", ("--spacing", 4, 4, 4), preprocess.convert_case

    def interrupted(case, *rest):
        if len(converted) == 2:
            raise KeyboardInterrupt
        return counted(case, *rest)

    monkeypatch.setattr(preprocess, "convert_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(three, out, *flags)
    monkeypatch.setattr(preprocess, "convert_case", counted)
    assert sorted(entries(out)) == ["sub-verse001", "sub-verse002"]

    def again(*expected: str, spacing=(4, 4, 4)) -> None:
        converted.clear()
        assert convert(three, out, "--spacing", *spacing) == 0
        assert converted == list(expected) and len(entries(out)) == 3

    again("sub-verse003")
    assert "2 of 3 cases are converted already" in capsys.readouterr().out
    again()
    make_case(three, "sub-verse002", shift_mm=3)  # another centroid file
    again("sub-verse002")
    path = out / "cases" / "sub-verse001.h5"
    path.write_bytes(path.read_bytes()[:-500])
    again("sub-verse001")
    path.unlink()
    again("sub-verse001")
    again("sub-verse001", "sub-verse002", "sub-verse003", spacing=(5, 5, 5))
    assert {e["settings"]["spacing_mm"][0] for e in entries(out).values()} == {5.0}
    assert json.loads((out / "preprocessing.json").read_text())["spacing_mm"] == [5, 5, 5]


def test_an_interrupted_change_of_spacing_mixes_nothing(three, tmp_path, monkeypatch, converted):
    """Files of the earlier spacing still lie there, but are no longer part of the data set."""
    out, counted = tmp_path / "out", preprocess.convert_case
    convert(three, out, "--spacing", 4, 4, 4)
    converted.clear()

    def interrupted(case, *rest):
        if len(converted) == 2:
            raise KeyboardInterrupt
        return counted(case, *rest)

    monkeypatch.setattr(preprocess, "convert_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(three, out, "--spacing", 6, 6, 6)
    assert sorted(VerSe(out).cases) == ["sub-verse001", "sub-verse002"]
    assert all(case.spacing_mm[0] > 5 for case in VerSe(out).cases.values())


def test_disk_full_keeps_what_is_finished(three, tmp_path, monkeypatch, converted, capsys):
    out, fsync = tmp_path / "out", os.fsync

    def full(descriptor):
        if len(converted) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("common.hdf5.os.fsync", full)
    assert convert(three, out, "--spacing", 4, 4, 4) == 1
    printed = capsys.readouterr().out
    assert printed.count("No space left on device") == 2 and "run the same command again" in printed
    assert list(entries(out)) == ["sub-verse001"]
    assert [p.name for p in (out / "cases").iterdir()] == ["sub-verse001.h5"], "nothing half-made is left"
    monkeypatch.setattr("common.hdf5.os.fsync", fsync)
    converted.clear()
    assert convert(three, out, "--spacing", 4, 4, 4) == 0
    assert converted == ["sub-verse002", "sub-verse003"] and len(entries(out)) == 3


def test_disk_full_while_the_notes_are_written(three, tmp_path, monkeypatch, converted):
    out, replace = tmp_path / "out", os.replace

    def full(source, target):
        if len(converted) == 2 and str(target).endswith(".json"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr("common.conversion.os.replace", full)
    with pytest.raises(SystemExit, match="preprocessing.json: No space left on device; make room"):
        convert(three, out, "--spacing", 4, 4, 4)
    assert list(entries(out)) == ["sub-verse001"]
    monkeypatch.setattr("common.conversion.os.replace", replace)
    assert convert(three, out, "--spacing", 4, 4, 4) == 0 and len(entries(out)) == 3


def test_processes_give_the_same_as_one(three, tmp_path):
    make_case(three, "sub-verse004", shift_mm=40)
    outs = tmp_path / "one", tmp_path / "two"
    assert convert(three, outs[0], "--spacing", 4, 4, 4) == 1
    assert convert(three, outs[1], "--spacing", 4, 4, 4, "--workers", 2) == 1
    for name in ("preprocessing.json", "cases.csv", "quarantine.csv"):
        assert (outs[0] / name).read_text() == (outs[1] / name).read_text()
    for name in entries(outs[0]):
        a, b = (CaseFile(out / "cases" / f"{name}.h5") for out in outs)
        assert np.array_equal(a.image[...], b.image[...]) and np.array_equal(a.label[...], b.label[...])
        assert a.index_names == b.index_names
        for places in a.index_names:
            assert np.array_equal(a.locations(places), b.locations(places))


# ---- parts ----


def test_parts_of_verse_become_the_split(tmp_path, verse_h5):
    for number, part in ((1, "training"), (2, "training"), (3, "validation"), (4, "test")):
        make_case(tmp_path / "source", f"sub-verse00{number}", part=part)
    make_case(tmp_path / "source", "sub-verse002_split-verse102", part="training")
    convert(tmp_path / "source", tmp_path / "out", "--spacing", 6, 6, 6)
    split = VerSe(tmp_path / "out").split
    assert split == {
        "train": ["sub-verse001", "sub-verse002", "sub-verse002_split-verse102"],
        "val": ["sub-verse003"],
        "test": ["sub-verse004"],
    }
    assert {part: len(names) for part, names in VerSe(verse_h5).split.items()} == {
        "train": 4,
        "val": 1,
        "test": 1,
    }
    make_case(tmp_path / "source", "sub-verse001_split-verse101", part="test")
    with pytest.raises(SystemExit, match=r"sub-verse001 \(t\w+, t\w+\).*a patient belongs to one part"):
        convert(tmp_path / "source", tmp_path / "out")


def test_without_parts_scans_of_a_patient_stay_together(tmp_path):
    for number in (1, 2, 3, 4):
        for scan in ("_split-verse101", "_split-verse102"):
            make_case(tmp_path / "source", f"sub-verse00{number}{scan}")
    convert(tmp_path / "source", tmp_path / "out", "--spacing", 8, 8, 8)
    for seed in range(5):
        split = VerSe(tmp_path / "out", seed=seed).split
        subjects = [{name.split("_")[0] for name in split[part]} for part in ("train", "val")]
        assert len(subjects[0]) == 3 and len(subjects[1]) == 1 and not subjects[0] & subjects[1]


def test_editions(tmp_path):
    for edition, number, part in ((19, 1, "training"), (19, 2, "validation"), (20, 501, "training")):
        make_case(tmp_path / "source" / f"verse{edition}", f"sub-verse{number:03d}", part=part)
    convert(tmp_path / "source", tmp_path / "out", "--spacing", 8, 8, 8)
    assert sorted(VerSe(tmp_path / "out", 19).cases) == ["sub-verse001", "sub-verse002"]
    assert len(VerSe(tmp_path / "out", 20).cases) == len(VerSe(tmp_path / "out").cases) == 3
    shutil.rmtree(tmp_path / "source" / "verse19")
    convert(tmp_path / "source", tmp_path / "out", "--spacing", 8, 8, 8)
    with pytest.raises(ValueError, match="1 cases, but none of --dataset_edition 19"):
        VerSe(tmp_path / "out", 19)


# ---- real scans ----


def test_real_scans(real_spine_ct, tmp_path):
    out = tmp_path / "out"
    assert convert(real_spine_ct, out, "--spacing", 3, 3, 3) in (0, 1)
    found = entries(out)
    assert found["sub-verse901"]["vertebrae"] == list(range(18, 25))
    # Its voxels are 3 mm already: 13,406 of them are vertebra.
    assert found["sub-verse901"]["vertebra_ml"] == pytest.approx(13406 * 0.027, rel=0.01)
    assert found["sub-verse903"]["vertebrae"] == [21, 22, 23], "its seg-subreg_msk is not a vertebra mask"
    assert found["sub-verse903"]["vertebra_ml"] == pytest.approx(36348 * 1.5**3 / 1000, rel=0.05)
    for name in found:
        case = CaseFile(out / "cases" / f"{name}.h5")
        affine, label = np.array(case.attributes["affine"]), case.label[...]
        for number, *centre in case.attributes["centroids"]:
            if np.count_nonzero(label == number) > 100:
                mean_mm = places_mm(label.shape, affine)[label == number].mean(0)
                assert np.linalg.norm(mean_mm - centre) < 25


def test_real_label_without_scan_is_named(tmp_path):
    folder = REAL_DATA / "spine_ct" / "label_only"
    if not folder.is_dir():
        pytest.skip("the real scans are not on this machine")
    with pytest.raises(SystemExit, match="sub-verse004|no scan"):
        convert(folder, tmp_path / "out")
