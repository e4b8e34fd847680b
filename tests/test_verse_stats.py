"""verse_spine/stats.py on tiny scans with known numbers, on phantoms and on the real scans."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import REAL_DATA

from common.nifti import open_nifti, write_nifti
from verse_spine import stats
from verse_spine.phantoms import write_verse_phantoms
from verse_spine.stats import densities, describe, find_scans, main, obliqueness
from verse_spine.stats_report import HU_EDGES, unusual, vertebra_rows


def table(path):
    with path.open(encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


def verse_case(root, image, mask, name="sub-verse001", spacing_mm=(2.0, 1.0, 0.5), **of_mask):
    raw, derived = root / "rawdata" / name, root / "derivatives" / name
    raw.mkdir(parents=True)
    derived.mkdir(parents=True)
    write_nifti(raw / f"{name}_ct.nii.gz", image, spacing_mm, orientation="PIR")
    write_nifti(
        derived / f"{name}_seg-vert_msk.nii.gz", mask, spacing_mm, **({"orientation": "PIR"} | of_mask)
    )
    return derived / f"{name}_seg-subreg_ctd.json"


def save_with_affine(path, affine, shape=(6, 5, 4)):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), affine), path)
    return open_nifti(path)


def rotation(axis, degrees):
    a, b = [i for i in range(3) if i != axis]
    matrix, angle = np.eye(4), np.radians(degrees)
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


# ---- one scan ----


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_oblique_angle_is_that_of_the_rotation(tmp_path, axis, flips):
    affine = rotation(axis, 17.0) @ np.diag([0.5 * flips[0], 0.7 * flips[1], 3.0 * flips[2], 1])
    degrees, sheared = obliqueness(save_with_affine(tmp_path / "a.nii", affine).affine)
    assert degrees == pytest.approx(17, abs=1e-3) and not sheared


def test_axes_in_another_order_are_not_oblique(tmp_path):
    file = save_with_affine(tmp_path / "a.nii", np.diag([1.1, 2, 3, 1])[[2, 0, 1, 3]])
    assert obliqueness(file.affine) == (0.0, False)
    # float32 headers: the arc cosine would make 0.03 degrees of this
    nearly = np.eye(4)
    nearly[0, 1] = 1e-7
    assert obliqueness(nearly)[0] < 1e-4


def test_gantry_tilt_is_shear_and_not_rotation(tmp_path):
    affine = np.diag([1.0, 1, 2, 1])
    affine[1, 2] = 2 * np.tan(np.radians(15))  # slices slide to the front
    degrees, sheared = obliqueness(save_with_affine(tmp_path / "a.nii", affine).affine)
    assert sheared and degrees == pytest.approx(15, abs=1e-3)


def test_percentiles_by_hand(tmp_path):
    image = np.full((4, 10, 10), -1000, np.int16)
    image[1:3] = np.arange(200).reshape(2, 10, 10)  # the body: 0..199
    mask = np.zeros(image.shape, np.uint8)
    mask[2, :, :] = 20  # 100..199
    mask[2, 9, 9] = 26  # the sacrum does not count: 100..198
    write_nifti(tmp_path / "a.nii.gz", image, (1, 1, 1))
    columns, shares = densities(open_nifti(tmp_path / "a.nii.gz"), mask)
    assert columns == pytest.approx(
        {
            "hu_p0.5": 0.995, "hu_median": 99.5, "hu_p99.5": 198.005, "hu_min": -1000, "hu_max": 199,
            "bone_hu_p0.5": 100.49, "bone_hu_median": 149, "bone_hu_p99.5": 197.51,
        }
    )  # fmt: skip
    assert type(columns["hu_min"]) is type(columns["hu_max"]) is int
    assert shares["body"].sum() == pytest.approx(1) and shares["vertebrae"].sum() == pytest.approx(1)
    assert shares["body"][np.flatnonzero(HU_EDGES == 75)[0]] == 25 / 200  # 75..99


def test_air_alone_and_no_mask_give_nan(tmp_path):
    write_nifti(tmp_path / "a.nii", np.full((3, 4, 5), -1000, np.int16), (1, 1, 1))
    columns, shares = densities(open_nifti(tmp_path / "a.nii"), None)
    assert np.isnan([columns["hu_median"], columns["bone_hu_median"]]).all()
    assert (columns["hu_min"], columns["hu_max"]) == (-1000, -1000) and not shares["body"].any()


@pytest.mark.parametrize("orientation", ["RAS", "PIR", "LSA"])
def test_slabs_see_every_voxel_once(tmp_path, monkeypatch, orientation):
    rng = np.random.default_rng(0)
    image = rng.integers(-400, 1500, (13, 11, 9)).astype(np.int16)
    mask = (rng.random(image.shape) > 0.7).astype(np.uint8) * 8
    write_nifti(tmp_path / "a.nii.gz", image, (1, 1, 1), orientation=orientation)
    file = open_nifti(tmp_path / "a.nii.gz")
    whole = densities(file, mask)[0]
    monkeypatch.setattr(stats, "BLOCK_VOXELS", 250)
    assert densities(file, mask)[0] == whole
    cut = {"RAS": 0, "PIR": 2, "LSA": 1}[orientation]  # the slowest axis of the file: no byte is read twice
    places = [place for place, _ in stats._blocks(file, 1)]
    assert len(places) > 1 and all(len({p[axis].start for p in places}) == 1 for axis in {0, 1, 2} - {cut})
    assert whole["bone_hu_median"] == np.median(image[mask > 0])
    # a sample: the same voxels whether read in slabs or at once
    monkeypatch.setattr(stats, "SAMPLE_VOXELS", 200)
    columns = densities(file, mask)[0]
    assert columns["hu_median"] == np.median(image[::2, ::2, ::2])
    assert columns["hu_max"] == whole["hu_max"] and columns["bone_hu_median"] == whole["bone_hu_median"]


def test_a_case_by_hand(tmp_path):
    image = np.full((6, 8, 10), 40, np.int16)
    mask = np.zeros(image.shape, np.uint8)
    mask[4:6, :2, :4], mask[2:4, :1, :4], mask[:2, :1, :1] = 19, 28, 20  # T12 16, T13 8, L1 2 voxels
    centroids = verse_case(tmp_path, image, mask)
    # T12's centre is z 4.5, y 0.5, x 1.5 in RAS voxels; PIR: (P, I, R) = (7 - y, 5 - z, x); 3 voxels left
    items = [{"direction": ["P", "I", "R"]}, {"label": 19, "X": 6.5, "Y": 0.5, "Z": 4.5}]
    centroids.write_text(json.dumps(items))
    result = describe(find_scans(tmp_path)[0], tmp_path)
    row = result["row"]
    assert row["file"] == "rawdata/sub-verse001/sub-verse001_ct.nii.gz" and row["orientation"] == "PIR"
    assert [row[f"shape_{a}"] for a in "zyx"] == [6, 8, 10]
    assert [row[f"spacing_{a}_mm"] for a in "zyx"] == [2, 1, 0.5]
    assert [row[f"fov_{a}_mm"] for a in "zyx"] == [12, 8, 5]
    assert (row["first_level"], row["last_level"], row["vertebrae"]) == ("T12", "L1", 3)
    assert result["volumes_ml"] == pytest.approx({19: 0.016, 28: 0.008, 20: 0.002})  # voxels of 1 mm3
    assert list(result["volumes_ml"]) == [19, 28, 20], "T13 between T12 and L1"
    assert row["vertebra_ml"] == pytest.approx(0.026) and row["centroid_max_mm"] == pytest.approx(1.5)
    assert row["mask_on_grid"] == "yes" and row["dtype"] == "int16" and row["notes"] == ""
    assert unusual(result)["a thirteenth thoracic vertebra (T13)"]
    assert unusual(result)["longer (z) than twice the width (x)"]  # 12 > 2 * 5
    assert not unusual(result)["voxels longer than 3 mm"]


def test_a_centroid_file_in_another_form_is_a_note(tmp_path):
    mask = np.zeros((6, 8, 10), np.uint8)
    mask[:, :2, :2] = 24
    centroids = verse_case(tmp_path, np.zeros(mask.shape, np.int16), mask)
    centroids.write_text('{"L5": [1, 2, 3]}')
    row = describe(find_scans(tmp_path)[0], tmp_path)["row"]
    assert row["notes"].startswith(f"centroid file left out: {centroids}: expected a list")
    assert row["vertebrae"] == 1 and np.isnan(row["centroid_max_mm"])


def test_mask_on_another_grid_has_volumes_but_no_densities(tmp_path):
    image, mask = np.zeros((6, 8, 10), np.int16), np.zeros((6, 8, 10), np.uint8)
    mask[:, :2, :2] = 24
    centroids = verse_case(tmp_path, image, mask, origin_mm=(0, 0, 60))
    items = [{"direction": ["R", "A", "S"]}, {"label": 24, "X": 0.5, "Y": 0.5, "Z": 2.5}]
    centroids.write_text(json.dumps(items))
    result = describe(find_scans(tmp_path)[0], tmp_path)
    row, found = result["row"], unusual(result)
    assert row["mask_on_grid"] == "no" and np.isnan(row["bone_hu_median"]) and row["vertebrae"] == 1
    assert row["centroid_max_mm"] == pytest.approx(60) and "L5: centroid 60 mm from" in row["notes"]
    assert found["mask on another grid"] and found["centroid > 25 mm from its mask"]


def test_volumes_of_a_sheared_scan_are_those_of_its_voxels(tmp_path):
    """A tilted gantry makes the edge between two slices longer than they are apart."""
    mask = np.zeros((6, 8, 10), np.uint8)
    mask[:2, :2, :3] = 22
    verse_case(tmp_path, np.zeros(mask.shape, np.int16), mask)
    affine = np.diag([0.5, 1.0, 2.0, 1])
    affine[1, 2] = 1.5  # spacing along z: 2.5 mm; distance of the slices: 2 mm
    for path in tmp_path.rglob("*.nii.gz"):
        array = np.asarray(nib.load(path).dataobj)
        nib.save(nib.Nifti1Image(array, affine), path)
    result = describe(find_scans(tmp_path)[0], tmp_path)
    assert result["row"]["spacing_z_mm"] == pytest.approx(2.5)
    assert result["volumes_ml"] == pytest.approx({22: 12 * 0.5 * 1 * 2 / 1000})


def test_mask_with_foreign_numbers_is_named(tmp_path):
    mask = np.full((6, 8, 10), 47, np.uint8)
    verse_case(tmp_path, np.zeros(mask.shape, np.int16), mask)
    with pytest.raises(ValueError, match=r"sub-verse001_seg-vert_msk.nii.gz: unknown label value\(s\) 47"):
        describe(find_scans(tmp_path)[0], tmp_path)


def test_label_rows_count_scans_and_order_levels():
    results = [{"volumes_ml": {19: 10.0, 28: 3.0}}, {"volumes_ml": {19: 14.0}}, {"volumes_ml": {}}]
    rows = {row["name"]: row for row in vertebra_rows(results)}
    names = list(rows)
    assert len(names) == 26 and names[0] == "C1" and names[-1] == "L6"
    assert names[names.index("T12") : names.index("L1") + 1] == ["T12", "T13", "L1"]
    assert (rows["T12"]["label"], rows["T12"]["scans"], rows["T12"]["mean_ml"]) == (19, 2, 12)
    assert rows["T12"]["sd_ml"] == pytest.approx(8**0.5)
    assert rows["T13"]["scans"] == 1 and np.isnan(rows["T13"]["sd_ml"])
    assert rows["C1"]["scans"] == 0 and np.isnan(rows["C1"]["mean_ml"])


# ---- the script ----


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_verse_phantoms(tmp_path_factory.mktemp("stats") / "verse20", 3, spacing_scale=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_phantoms(phantoms, tmp_path, capsys, workers):
    assert main(["--source", str(phantoms), "--out", str(tmp_path / "o"), "--workers", str(workers)]) == 0
    rows, labels = table(tmp_path / "o" / "scans.csv"), table(tmp_path / "o" / "labels.csv")
    assert [row["part"] for row in rows] == ["training", "validation", "test"]
    assert [row["orientation"] for row in rows] == ["PIR", "LPS", "RAS"]
    assert {row["edition"] for row in rows} == {"20"}, "whole numbers stay whole"
    masks = {path.name.split("_seg")[0]: path for path in phantoms.rglob("*_msk.nii.gz")}
    present = {n: set(np.unique(np.asarray(nib.load(p).dataobj)).tolist()) - {0} for n, p in masks.items()}
    for row in rows:
        assert int(row["vertebrae"]) == len(present[row["case"]])
        assert all(row[f"shape_{axis}"].isdecimal() for axis in "zyx")
        assert row["mask_on_grid"] == "yes" and row["hu_min"] == "-1024" and row["notes"] == ""
        assert 0 < float(row["centroid_max_mm"]) < 25
        assert float(row["hu_median"]) < 100 < float(row["bone_hu_median"])
    for label in labels:
        assert int(label["scans"]) == sum(int(label["label"]) in of for of in present.values())
    text = (tmp_path / "o" / "statistics.md").read_text()
    assert "| training | 20 | 1 | 1 |" in text and "| all |  | 3 | 3 |" in text
    assert "| PIR | 1 |" in text and "Could not be read" not in text
    assert (tmp_path / "o" / "statistics.png").read_bytes()[:4] == b"\x89PNG"
    assert f"3 scans, {sum(map(len, present.values()))} vertebrae" in capsys.readouterr().out


def test_scans_are_listed_by_number_not_by_letter(tmp_path):
    (tmp_path / "scans").mkdir()
    for name in ("s10", "s9", "s100"):
        write_nifti(tmp_path / "scans" / f"{name}.nii", np.zeros((4, 4, 4), np.int16), (1, 1, 1))
    assert [case.name for case in find_scans(tmp_path / "scans")] == ["s9", "s10", "s100"]
    assert main(["--source", str(tmp_path / "scans"), "--out", str(tmp_path / "out")]) == 0
    assert [row["case"] for row in table(tmp_path / "out" / "scans.csv")] == ["s9", "s10", "s100"]


def test_unreadable_files_are_listed_and_the_others_finished(phantoms, tmp_path, capsys):
    source, out = tmp_path / "scans", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    whole = next(phantoms.rglob("*_ct.nii.gz"))
    shutil.copy(whole, source / "good.nii.gz")
    shutil.copy(whole, source / "deep" / "good.nii.gz")
    (source / "deep" / "cut.nii.gz").write_bytes(whole.read_bytes()[:-2000])
    (source / "._good.nii.gz").write_bytes(b"macOS")
    assert main(["--source", str(source), "--out", str(out)]) == 0
    assert [row["case"] for row in table(out / "scans.csv")] == ["good"]
    capsys.readouterr()
    assert main(["--source", str(source), "--out", str(out), "--recursive"]) == 1
    said = capsys.readouterr().out
    assert "1 of 3 scans could not be read:\n  deep/cut.nii.gz: truncated or damaged" in said
    rows = table(out / "scans.csv")
    assert sorted(row["case"] for row in rows) == ["deep/good", "good"]
    assert rows[0]["vertebrae"] == rows[0]["part"] == rows[0]["mask_on_grid"] == ""
    assert "- deep/cut.nii.gz: truncated" in (out / "statistics.md").read_text()


def test_nothing_readable_writes_nothing(tmp_path, capsys):
    (tmp_path / "a.nii.gz").write_bytes(b"")
    assert main(["--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "a.nii.gz: an empty file" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_mistakes_are_clear(tmp_path):
    with pytest.raises(SystemExit, match="absent: no such folder; verse_spine/download.py"):
        main(["--source", str(tmp_path / "absent")])
    (tmp_path / "sub").mkdir()
    with pytest.raises(SystemExit, match=r"neither VerSe .* nor \*.nii, \*.nii.gz; --recursive also looks"):
        main(["--source", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"nor \*.nii, \*.nii.gz$"):
        main(["--source", str(tmp_path), "--recursive"])


def test_a_contradictory_verse_folder_is_not_taken_for_loose_files(tmp_path):
    mask = np.zeros((6, 8, 10), np.uint8)
    verse_case(tmp_path, np.zeros(mask.shape, np.int16), mask)
    next(tmp_path.rglob("*_ct.nii.gz")).rename(tmp_path / "rawdata" / "sub-verse002_ct.nii.gz")
    with pytest.raises(SystemExit, match="no scan for"):
        main(["--source", str(tmp_path), "--out", str(tmp_path / "out"), "--recursive"])


# ---- real scans ----


def test_real_spines(tmp_path):
    if not (REAL_DATA / "spine_ct").is_dir():
        pytest.skip("the real scans are not on this machine")
    assert main(["--source", str(REAL_DATA / "spine_ct"), "--out", str(tmp_path)]) == 0
    rows = table(tmp_path / "scans.csv")
    assert [(r["first_level"], r["last_level"], r["vertebrae"]) for r in rows] == [
        ("T11", "L5", "7"),
        ("T11", "T12", "2"),
        ("L2", "L4", "3"),
    ]
    assert float(rows[0]["vertebra_ml"]) == pytest.approx(13406 * 27 / 1000, rel=1e-5)  # voxels of 3 mm


def test_real_odd_headers(tmp_path, capsys):
    if not (REAL_DATA / "odd_headers").is_dir():
        pytest.skip("the real scans are not on this machine")
    assert main(["--source", str(REAL_DATA / "odd_headers"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert all(f"  {name}.nii" in said for name in ("truncated_gzip", "git_lfs_pointer", "complex64"))
    rows = {row["case"]: row for row in table(tmp_path / "scans.csv")}
    assert [name for name, row in rows.items() if row["sheared"] == "yes"] == [
        "sheared_affine_ct_uint8_slope"
    ]
    same = [row for name, row in rows.items() if name.startswith("same_brain")]
    columns = [c for c in same[0] if c not in ("case", "subject", "file", "orientation")]
    assert len(same) == 5 and len({tuple(row[c] for c in columns) for row in same}) == 1
    assert {row["orientation"] for row in same} == {"RAS", "LPI", "AIL", "PSR", "SPL"}
    assert "153 NaN" in rows["big_endian_float32_nan_3slices"]["notes"]
    assert float(rows["oblique_ct_head"]["oblique_degrees"]) == pytest.approx(16.5, abs=0.1)
