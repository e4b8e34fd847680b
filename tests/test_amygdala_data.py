"""amygdala: sources of every kind give the same cache, bad ones are named, folds keep subjects whole."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import REAL_DATA, ROOT

from amygdala.cases import list_data_set
from amygdala.dataset import Cohort, PatchDataset
from amygdala.labels import parse_label_map
from amygdala.preprocess import main
from amygdala.structures import DATASETS
from amygdala.training import data_lines
from common.hdf5 import CaseFile
from common.nifti import load_label, load_nifti, write_nifti
from common.volumes import resample_labels

SHAPE = (24, 40, 60)  # of a phantom head, z y x
LEFT, RIGHT = (12, 18, 16), (11, 20, 42)  # centres of its amygdalae: 26 mm apart along x


def head(seed: int = 0, scale: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """(image, labels) of an ellipsoid in air with a cube of 5^3 on each side."""
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    inside = ((z - 12) / 11) ** 2 + ((y - 20) / 19) ** 2 + ((x - 29) / 28) ** 2 < 1
    noise = np.random.default_rng(seed).integers(0, scale // 2, SHAPE)
    image = np.where(inside, scale // 2 + noise, 0)
    labels = np.zeros(SHAPE, np.uint8)
    for label, (z, y, x) in ((1, LEFT), (2, RIGHT)):
        labels[z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3] = label
    image[labels > 0] -= scale // 4
    return image.astype(np.int16), labels


def write_source(
    folder: Path, cases: dict[str, tuple[np.ndarray, np.ndarray | None]], part: str = "Tr", **options
) -> Path:
    """A folder in the Decathlon's layout; `options` are those of `write_nifti`."""
    spacing_mm = options.pop("spacing_mm", (1, 1, 1))
    for kind in ("images", "labels"):
        (folder / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
    for name, (image, labels) in cases.items():
        write_nifti(folder / f"images{part}" / f"{name}.nii.gz", image, spacing_mm, **options)
        if labels is not None:
            write_nifti(folder / f"labels{part}" / f"{name}.nii.gz", labels, spacing_mm, **options)
    return folder


def convert(source: Path, *flags: str, out: str = "out") -> tuple[int, Path]:
    folder = source.parent / out
    return main(["--source", str(source), "--out", str(folder), "--workers", "0", *flags]), folder


def cached(folder: Path, name: str) -> CaseFile:
    return CaseFile(folder / "cases" / f"{name}.h5")


# ---- what is written ----


def test_the_cache_of_a_head_by_hand(tmp_path):
    image, labels = head()
    source = write_source(tmp_path / "raw", {"a": (image, labels)}, orientation="LIA", origin_mm=(-3, 40, 5))
    code, out = convert(source)
    assert code == 0
    case = cached(out, "a")
    assert case.image.dtype == np.int16 and case.label.dtype == np.uint8
    np.testing.assert_array_equal(case.image[()], image)
    np.testing.assert_array_equal(case.label[()], labels)
    noted = case.attributes
    assert (noted["name"], noted["subject"], noted["site"]) == ("a", "a", "unknown")
    assert noted["voxels"] == {"1": 125, "2": 125} and noted["source_orientation"] == "LIA"
    np.testing.assert_allclose(noted["centre"], (11.5, 19, 29))  # halfway between LEFT and RIGHT
    np.testing.assert_allclose(case.spacing_mm, (1, 1, 1))
    np.testing.assert_allclose(noted["affine"] @ [0, 0, 0, 1], (-3, 40, 5, 1))
    notes = json.loads((out / "preprocessing.json").read_text())
    assert (notes["spacing_mm"], notes["dataset"]) == ([1, 1, 1], "Amygdala")
    (entry,) = notes["cases"]
    assert entry["volume_mm3"] == {"1": 125, "2": 125} and entry["shape"] == list(SHAPE)
    assert "left amygdala of 125 mm3, expected 500 to 3000" in entry["notes"]
    listed = yaml.safe_load((out / "list" / "dataset.yaml").read_text())
    (first,) = listed["cases"]
    assert (listed["dataset"], first["name"], first["site"]) == ("Amygdala", "a", "unknown")
    sha1 = subprocess.run(["sha1sum", source / "imagesTr" / "a.nii.gz"], capture_output=True, text=True)
    assert first["sha1"]["image"] == sha1.stdout.split()[0]


def test_labels_of_every_kind_give_the_same_cache(tmp_path):
    """Two labels by hand; FreeSurfer's, among other structures, as .mgz; a map of one's own; one label."""
    image, labels = head()
    aseg = np.array([0, 18, 54], np.int32)[labels]
    aseg[2:4, 20:24, 20:40] = 12175  # the cortex, numbered by FreeSurfer
    aseg[20, 20, 20] = 2
    own = np.array([7, 32, 31], np.int16)[labels]
    for name, drawn in {"manual": labels, "own": own, "one": (labels > 0) * np.uint8(255)}.items():
        write_source(tmp_path / name, {"a": (image, drawn)}, orientation="LPS")
    for kind, array in (("images", image), ("labels", aseg)):
        (tmp_path / "aseg" / f"{kind}Tr").mkdir(parents=True)
        stored = np.ascontiguousarray(array.transpose(2, 1, 0)[::-1])  # LAS
        affine = np.diag([-1.0, 1, 1, 1])
        affine[0, 3] = SHAPE[2] - 1
        nib.save(nib.MGHImage(stored, affine.astype(np.float32)), tmp_path / "aseg" / f"{kind}Tr" / "a.mgz")
    for name, word in {"manual": "manual", "aseg": "aseg", "own": "1=32,2=31", "one": "one_label"}.items():
        for flags in ((), ("--label_map", word)) if name != "own" else (("--label_map", word),):
            code, out = convert(tmp_path / name, *flags, out=f"{name}{len(flags)}")
            assert code == 0
            np.testing.assert_array_equal(cached(out, "a").label[()], labels)
            np.testing.assert_array_equal(cached(out, "a").image[()], image)


@pytest.mark.parametrize("orientation", ["RAS", "LIA"])
def test_sides_of_one_label_are_told_by_the_head_not_by_the_array(tmp_path, orientation):
    """Air of 40 voxels on one side: both amygdalae lie in one half of the array. A crumb goes to its side."""
    image, labels = (np.pad(volume, ((0, 0), (0, 0), (40, 0))) for volume in head())
    labels[12, 30, 40 + 27] = 1
    source = write_source(tmp_path / "raw", {"a": (image, np.minimum(labels, 1))}, orientation=orientation)
    code, out = convert(source)
    assert code == 0
    np.testing.assert_array_equal(cached(out, "a").label[()], labels)


def test_one_label_lying_in_an_oblique_head(tmp_path):
    """Turned by 40 degrees: sides go by world coordinates, as the affine tells them.

    A crumb at x = 34, y = 32 lies right of the middle of the head (29, 20) in the array, but left in the
    world: 34 cos 40 - 32 sin 40 = 5.5 mm, against 29 cos 40 - 20 sin 40 = 9.4 mm.
    """
    image, labels = head()
    labels[12, 32, 34] = 1
    turn = np.deg2rad(40)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    for kind, array in (("images", image), ("labels", np.minimum(labels, 1))):
        (tmp_path / "raw" / f"{kind}Tr").mkdir(parents=True)
        picture = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
        nib.save(picture, tmp_path / "raw" / f"{kind}Tr" / "a.nii.gz")
    code, out = convert(tmp_path / "raw")
    assert code == 0
    np.testing.assert_array_equal(cached(out, "a").label[()], labels)


def test_grey_values_are_not_coarsened(tmp_path):
    """int16 cannot hold a million; 0 to 1 would be lost in it; uint8 needs nothing."""
    image, labels = head()
    rng = np.random.default_rng(1)
    images = {
        "huge": (image * 1000.25 + rng.random(SHAPE)).astype(np.float32),
        "unit": (image / 1000).astype(np.float32),
        "bytes": (image // 4).astype(np.uint8),
        "negative": image - 500,
    }
    source = write_source(tmp_path / "raw", {name: (array, labels) for name, array in images.items()})
    code, out = convert(source)
    assert code == 0 and images["huge"].max() > 9e5
    dtypes = {name: cached(out, name).image.dtype.name for name in images}
    assert dtypes == {"huge": "float32", "unit": "float32", "bytes": "int16", "negative": "int16"}
    for name, array in images.items():
        np.testing.assert_array_equal(cached(out, name).image[()], array)


def test_other_voxels_become_1_mm_and_find_the_way_back(tmp_path):
    """Balls of 9 mm in voxels of 1 x 1.5 x 0.8 mm. There and back, Dice stays above 0.97."""
    image, labels = head()
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    for label, middle in ((1, 16), (2, 42)):
        labels[(z - 12) ** 2 + (1.5 * (y - 20)) ** 2 + (0.8 * (x - middle)) ** 2 < 81] = label
    source = write_source(tmp_path / "raw", {"a": (image, labels)}, spacing_mm=(1, 1.5, 0.8))
    code, out = convert(source)
    assert code == 0
    case = cached(out, "a")
    assert case.shape == (24, 60, 48)
    np.testing.assert_allclose(case.spacing_mm, (1, 1, 1))
    (entry,) = json.loads((out / "preprocessing.json").read_text())["cases"]
    for label in (1, 2):
        voxels = np.count_nonzero(labels == label)
        assert entry["volume_mm3"][str(label)] == pytest.approx(voxels * 1 * 1.5 * 0.8, abs=0.1)
    back = resample_labels(case.label[()], SHAPE)
    for label in (1, 2):
        both = np.count_nonzero((back == label) & (labels == label))
        assert 2 * both / (np.count_nonzero(back == label) + np.count_nonzero(labels == label)) > 0.97


# ---- what is refused, while the rest is converted ----


def exchanged():
    image, labels = head(9)
    return image, np.array([0, 2, 1], np.uint8)[labels]


def with_label(value: float, dtype=np.float32):
    image, labels = head(9)
    labels = labels.astype(dtype)
    labels[0, 0, 0] = value
    return image, labels


def one_label(kind: str):
    image, labels = head(9)
    mask = np.minimum(labels, 1)
    if kind == "bridged":
        mask[12, 19, LEFT[2] : RIGHT[2]] = 1
        mask[10:14, 17:22, LEFT[2] : RIGHT[2]] = 1
    if kind == "left":
        mask[..., 30:] = 0
    if kind == "both left":
        mask[:] = 0
        mask[10:15, 16:21, 2:7], mask[10:15, 16:21, 23:28] = 1, 1  # 21 mm apart, the head's middle is at 29
    return image, mask


BAD = {
    "exchanged": (exchanged(), "left and right are exchanged: left amygdala .1. is centred at x = 42 mm, "
                  "right amygdala .2. at 16 mm"),
    "no label": ((head(9)[0], None), "bad.nii.gz: has no label of the same name"),
    "nothing labelled": ((head(9)[0], np.zeros(SHAPE, np.uint8)), "nothing is labelled"),
    "not whole": (with_label(0.5), "label value 0.5 is not a whole number"),
    "negative": (with_label(-1, np.int16), "label values -1..2, expected whole numbers in 0..65535"),
    "outside the map": (with_label(3, np.uint8), "label value.s. 1, 2, 3 fit no label map"),
    "4-D": ((np.zeros((2, 3, 4)), None), r"4-D with shape \(4, 3, 2, 5\)"),
    "single slice": ((head(9)[0][:1], head(9)[1][12:13]), "only 1 x 40 x 60 mm .z y x.; a single slice"),
    "other grid": ((head(9)[0], head(9)[1][:, 1:]), "lies on another grid than bad.nii.gz"),
    "one piece": (one_label("bridged"), "one piece of it reaches across the middle"),
    "one side": (one_label("left"), "all of the mask lies left of the middle of the head"),
    "pieces of one side": (one_label("both left"), "all of the mask lies left of the middle of the head"),
    "constant": ((np.ones(SHAPE, np.int16), head(9)[1]), "shows nothing, all its voxels have the value 1"),
    "damaged": ((head(9)[0], head(9)[1]), "truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_case_is_named_in_one_sentence_and_the_others_are_converted(tmp_path, capsys, kind):
    content, reason = BAD[kind]
    source = write_source(tmp_path / "raw", {"good": head(), "bad": content})
    if kind == "4-D":
        picture = nib.Nifti1Image(np.zeros((4, 3, 2, 5), np.int16), np.eye(4))
        nib.save(picture, source / "imagesTr" / "bad.nii.gz")
        nib.save(nib.Nifti1Image(np.ones((4, 3, 2), np.uint8), np.eye(4)), source / "labelsTr" / "bad.nii.gz")
    if kind == "damaged":
        file = source / "imagesTr" / "bad.nii.gz"
        file.write_bytes(file.read_bytes()[:5000])
    code, out = convert(source)
    printed = capsys.readouterr().out
    (line,) = [text for text in printed.splitlines() if text.startswith("  bad: ")]
    assert code == 1 and "1 case(s) could not be converted" in printed
    assert re.search(reason, line) and "bad.nii.gz" in line
    assert [entry["name"] for entry in json.loads((out / "preprocessing.json").read_text())["cases"]] == [
        "good"
    ]
    assert list(Cohort(out).cases) == ["good"]


@pytest.mark.parametrize(("left", "right"), [(1, 2), (18, 54)])
def test_exchanged_labels_of_a_whole_data_set_can_be_exchanged_back(tmp_path, capsys, left, right):
    """By the flag that the message names, with the numbers that the files have."""
    image, labels = exchanged()
    source = write_source(tmp_path / "raw", {"a": (image, np.array([0, left, right], np.uint8)[labels])})
    assert convert(source)[0] == 1
    remedy = re.search(r"Where all files are so: --label_map (\S+)", capsys.readouterr().out)[1]
    assert remedy == f"1={right},2={left}"
    code, out = convert(source, "--label_map", remedy)
    assert code == 0
    np.testing.assert_array_equal(cached(out, "a").label[()], head()[1])


def test_a_trailing_axis_of_one_is_taken_and_a_missing_side_is_noted(tmp_path, capsys):
    image, labels = head()
    labels[..., :30] = 0  # the right one only
    source = write_source(tmp_path / "raw", {})
    for kind, array in (("images", image), ("labels", labels)):
        picture = nib.Nifti1Image(array.transpose(2, 1, 0)[..., None], np.eye(4))
        nib.save(picture, source / f"{kind}Tr" / "a.nii.gz")
    code, out = convert(source)
    assert code == 0 and cached(out, "a").attributes["voxels"] == {"1": 0, "2": 125}
    assert "warning: a: holds no left amygdala" in capsys.readouterr().out


@pytest.mark.parametrize("number", [18, 54])
def test_one_side_of_freesurfer_is_that_side_and_not_a_mask_of_both(tmp_path, number):
    image, labels = head()
    label = {18: 1, 54: 2}[number]
    source = write_source(tmp_path / "raw", {"a": (image, (labels == label) * np.uint8(number))})
    code, out = convert(source)
    assert code == 0
    np.testing.assert_array_equal(cached(out, "a").label[()], labels * (labels == label))


def test_nan_becomes_the_lowest_value_of_the_scan(tmp_path):
    """Run as a script, whose warnings are sentences."""
    image, labels = head()
    image = (image - 7).astype(np.float32)
    image[3, 4, 5:7] = np.nan
    source = write_source(tmp_path / "raw", {"a": (image, labels)})
    command = [sys.executable, "amygdala/preprocess.py", "--source", source, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    file = source / "imagesTr" / "a.nii.gz"
    assert done.stderr == f"warning: {file}: 2 NaN or infinite voxels set to -7\n"
    np.testing.assert_array_equal(cached(tmp_path / "out", "a").image[3, 4, 4:8], image[3, 4, [4, 0, 0, 7]])


def test_label_maps_that_make_no_sense():
    amygdala, hippocampus = DATASETS["Amygdala"], DATASETS["Hippocampus"]
    assert parse_label_map("1=32, 2=31", amygdala) == {32: 1, 31: 2}
    assert parse_label_map("auto", hippocampus) == "auto"
    for text in ("nonsense", "1=32", "1=32,2=32", "1=0,2=5", "1=3,2=4,3=5", "32=1,31=2", "1=a,2=b", ""):
        with pytest.raises(
            ValueError, match=f"--label_map {text}: expected auto, aseg, manual, one_label, or"
        ):
            parse_label_map(text, amygdala)
    for text in ("aseg", "one_label"):
        with pytest.raises(ValueError, match=f"--label_map {text}: tells left from right, not anterior"):
            parse_label_map(text, hippocampus)


@pytest.mark.parametrize(
    ("word", "number", "reason"),
    [
        ("manual", 9, "label value(s) 9 outside the map; expected 1 and 2 only"),
        ("one_label", 9, "holds the labels 1, 2, 9; --label_map one_label expects a single one"),
        ("aseg", 9, "holds none of 18, 54; found 1, 2, 9"),
        ("1=32,2=31", 9, "holds none of 32, 31; found 1, 2, 9"),
    ],
)
def test_numbers_that_do_not_fit_the_map(tmp_path, capsys, word, number, reason):
    source = write_source(tmp_path / "raw", {"a": with_label(number, np.uint8)})
    assert convert(source, "--label_map", word)[0] == 1
    assert reason in capsys.readouterr().out


def test_a_folder_without_scans_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="error: --source .*nowhere: no folder imagesTr in it"):
        convert(tmp_path / "nowhere")
    write_source(tmp_path / "empty", {})
    with pytest.raises(SystemExit, match="no scan .* in imagesTr or imagesTs"):
        convert(tmp_path / "empty")


# ---- subjects and sites ----


def names_only(folder: Path, train: list[str], test: list[str] = ()) -> Path:
    """A layout of empty files: listing does not read them."""
    for part, names in (("Tr", train), ("Ts", test)):
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
            for name in names:
                (folder / f"{kind}{part}" / f"{name}.nii.gz").touch()
    return folder


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


def test_subjects_and_sites_of_a_table(tmp_path):
    source = names_only(tmp_path / "raw", ["a1", "a2", "b", "c"])
    rows = ("name, subject, site", "a1,anna,X", "a2,anna,X", "b,ben,X", "d,dora,Y")
    cases, warnings, refused = list_data_set(source, table(tmp_path / "t.csv", *rows))
    assert [(c.name, c.subject, c.site) for c in cases] == [
        ("a1", "anna", "X"), ("a2", "anna", "X"), ("b", "ben", "X")
    ]  # fmt: skip
    assert warnings == [f"{tmp_path / 't.csv'}: no case belongs to its row(s) of d; are the names right?"]
    assert refused == {"c": f"{tmp_path / 't.csv'}: has no row of this name; add its subject and site"}


def test_bids_names_and_a_site_of_one_subject(tmp_path):
    """sub-01_ses-1 is of sub-01; sub-011 is not."""
    source = names_only(tmp_path / "raw", ["sub-01_ses-1", "sub-01_ses-2", "sub-02", "sub-011"])
    rows = ("participant_id\tage\tsite", "sub-01\t30\tX", "sub-02\t40\tY")
    table(source / "participants.tsv", *rows)
    cases, warnings, refused = list_data_set(source)
    assert [(c.subject, c.site) for c in cases] == [
        ("sub-01", "X"), ("sub-01", "X"), ("sub-02", "Y"), ("sub-011", "unknown")
    ]  # fmt: skip
    assert refused == {}
    assert "has no row of sub-011; each counts as a subject of its own" in warnings[0]
    assert warnings[1].startswith("site X has one subject only (sub-01)") and len(warnings) == 4


def test_a_subject_in_training_and_test_is_refused(tmp_path):
    source = names_only(tmp_path / "raw", ["a1", "b"], ["a2", "c"])
    rows = ("name,subject,site", "a1,anna,X", "a2,anna,X", "b,ben,X", "c,carl,X")
    cases, _, refused = list_data_set(source, table(tmp_path / "t.csv", *rows))
    assert [(c.name, c.part) for c in cases] == [("a1", "train"), ("b", "train"), ("c", "test")]
    assert refused["a2"].startswith("subject anna stands in test and, as a1, in train")


def test_the_same_scan_of_two_subjects_is_refused(tmp_path, capsys):
    source = write_source(tmp_path / "raw", {"a": head(0), "b": head(1), "copy_of_a": head(0)})
    code, out = convert(source)
    assert code == 1 and list(Cohort(out).cases) == ["a", "b"]
    assert "  copy_of_a: the same scan as a, but of subject copy_of_a instead of a" in capsys.readouterr().out
    rows = ("name,subject,site", "a,anna,X", "copy_of_a,anna,X", "b,ben,X")
    code, out = convert(source, "--subjects", str(table(tmp_path / "t.csv", *rows)))
    assert code == 0 and Cohort(out).subjects == {"a": "anna", "b": "ben", "copy_of_a": "anna"}
    assert cached(out, "copy_of_a").attributes["subject"] == "anna"


# ---- who is in which part ----


@pytest.fixture(scope="module")
def cohort_folder(tmp_path_factory) -> Path:
    """12 subjects of site X, 6 of site Y, two of them scanned twice; 3 published test cases."""
    folder = tmp_path_factory.mktemp("cohort")
    train = {f"x{n}": head(n) for n in range(12)} | {f"y{n}": head(20 + n) for n in range(6)}
    train |= {"x0_again": head(40), "y0_again": head(41)}
    source = write_source(folder / "raw", train)
    write_source(source, {f"t{n}": head(50 + n) for n in range(3)} | {"unlabelled": (head()[0], None)}, "Ts")
    names = [*train, "t0", "t1", "t2", "unlabelled"]
    rows = ["name,subject,site", *(f"{name},{name.split('_')[0]},{name[0].upper()}" for name in names)]
    assert convert(source, "--subjects", str(table(folder / "t.csv", *rows)))[0] == 0
    return folder / "out"


def test_the_log_counts_the_subjects_of_the_fold():
    """Three scans of two subjects of site X; the published test scan of site Y takes no part in a fold."""
    subjects, sites = dict(a="s", b="s", c="t", z="u"), dict(a="X", b="X", c="X", z="Y")
    split = {"train": ["a", "b"], "val": [], "test": ["c"]}
    data = SimpleNamespace(split=split, subjects=subjects, sites=sites)
    assert data_lines(data, 4, 2, None)[0] == (
        "cases: 2 training, 0 validation, 1 test; 2 subjects of 1 site(s): X"
    )


def test_folds_test_every_subject_once(cohort_folder):
    """18 subjects: 12 of X and 6 of Y in 5 folds are 4, 4, 4, 3 and 3; 2 of the others choose the epoch."""
    tested = []
    for fold in range(5):
        cohort = Cohort(cohort_folder, fold=fold)
        split, subjects = cohort.split, cohort.subjects
        of = {part: {subjects[name] for name in names} for part, names in split.items()}
        assert not of["train"] & of["val"] and not (of["train"] | of["val"]) & of["test"]
        assert len(of["test"]) == (4 if fold < 3 else 3) and len(of["val"]) == 2
        assert sum(s[0] == "x" for s in of["test"]) in (2, 3)
        assert sorted(sum(split.values(), [])) == sorted(n for n in cohort.cases if n[0] != "t")
        whole = Cohort(cohort_folder, fold=fold, validation=False).split
        assert sorted(whole["train"]) == sorted(split["train"] + split["val"]) and whole["val"] == []
        tested += split["test"]
    assert sorted(tested) == sorted(n for n in Cohort(cohort_folder).cases if n[0] != "t")


def test_without_a_fold_the_published_test_cases_test(cohort_folder):
    cohort = Cohort(cohort_folder, dataset="Amygdala", validation=False)
    assert cohort.split["test"] == ["t0", "t1", "t2"] and cohort.split["val"] == []
    assert len(cohort.split["train"]) == 20 and "unlabelled" not in cohort.cases
    chosen_by_some = Cohort(cohort_folder, dataset="Amygdala").split
    assert chosen_by_some["test"] == cohort.split["test"] and len(chosen_by_some["val"]) == 3
    assert sorted(chosen_by_some["train"] + chosen_by_some["val"]) == sorted(cohort.split["train"])
    assert cohort.preprocessing == {
        "spacing_mm": [1, 1, 1], "dataset": "Amygdala", "data_path": str(cohort_folder.resolve())
    }  # fmt: skip


def test_leaving_a_site_out(cohort_folder):
    cohort = Cohort(cohort_folder, leave_site_out="Y")
    assert {cohort.sites[name] for name in cohort.split["train"] + cohort.split["val"]} == {"X"}
    assert len(cohort.split["test"]) == 7 and len(cohort.split["val"]) in (2, 3)  # 2 of 12 subjects
    with pytest.raises(ValueError, match="'Z' cannot be left out: the cases are of X, Y"):
        Cohort(cohort_folder, leave_site_out="Z")
    with pytest.raises(ValueError, match="--fold and --leave_site_out exclude each other"):
        Cohort(cohort_folder, leave_site_out="Y", fold=1)


def test_folds_of_ones_own_must_not_divide_a_subject(cohort_folder):
    names = [name for name in Cohort(cohort_folder).cases if name[0] != "t"]
    first = [name for name in names if name.startswith("x0")]
    own = cohort_folder / "folds.json"
    try:
        own.write_text(json.dumps([first, [name for name in names if name not in first]]))
        assert Cohort(cohort_folder, fold=0).split["test"] == first
        with pytest.raises(ValueError, match="--fold 2: with 2 folds choose 0 to 1"):
            Cohort(cohort_folder, fold=2)
        own.write_text(json.dumps([first[:1], [name for name in names if name not in first[:1]]]))
        with pytest.raises(ValueError, match="folds.json: patient x0 stands in fold 0 .* and in fold 1"):
            Cohort(cohort_folder, fold=0)
        own.write_text(json.dumps(["x0"]))
        with pytest.raises(ValueError, match="folds.json: fold 0: expected a list of names, found x0"):
            Cohort(cohort_folder, fold=0)
    finally:
        own.unlink()


def test_folders_that_are_not_a_cohort_of_this_data_set(cohort_folder, tmp_path):
    with pytest.raises(ValueError, match="holds Amygdala, not Hippocampus; choose another --data_path"):
        Cohort(cohort_folder, dataset="Hippocampus")
    with pytest.raises(
        FileNotFoundError, match="python amygdala/preprocess.py --dataset Hippocampus --source"
    ):
        Cohort(tmp_path, dataset="Hippocampus")
    with pytest.raises(ValueError, match="--fold 5: with 5 folds choose 0 to 4"):
        Cohort(cohort_folder, fold=5)


# ---- patches ----


def test_a_patch_lies_around_what_is_labelled_and_moves_by_the_jitter(cohort_folder):
    """The centre is (11.5, 19, 29), so that 7 x 9 x 11 voxels begin at (8.5, 15, 24), give or take 2."""
    cohort = Cohort(cohort_folder)
    patches = PatchDataset(cohort, ["x3", "y1"], (7, 9, 11), 6, jitter=2)
    assert len(patches) == 6
    starts = np.array([patches.start(patches.cases[0], seed) for seed in range(200)])
    assert starts.min(0).tolist() == [6, 13, 22] and starts.max(0).tolist() == [10, 17, 26]
    item = patches[3, 77]
    z, y, x = patches.start(patches.cases[1], 77)
    assert (item["case"], item["seed"]) == (1, 77)
    image, labels = head(21)
    box = np.s_[z : z + 7, y : y + 9, x : x + 11]
    np.testing.assert_array_equal(item["image"][0].numpy(), image[box])
    np.testing.assert_array_equal(item["label"].numpy(), labels[box])
    assert item["image"].dtype.is_floating_point and item["image"].shape == (1, 7, 9, 11)
    assert str(item["label"].dtype) == "torch.uint8"


def test_a_patch_larger_than_a_crop_repeats_its_border(tmp_path):
    image, labels = (volume[4:20, 10:30, 8:28] for volume in head())
    labels = np.maximum(labels, np.pad(np.full((3, 3, 3), 2, np.uint8), ((5, 8), (2, 15), (10, 7))))
    code, out = convert(write_source(tmp_path / "raw", {"a": (image, labels)}), "--dataset", "Hippocampus")
    assert code == 0
    patches = PatchDataset(Cohort(out), ["a"], (20, 24, 24), 1, jitter=0)
    item = patches[0, 5]
    np.testing.assert_array_equal(item["image"][0].numpy(), np.pad(image, 2, "edge"))
    np.testing.assert_array_equal(item["label"].numpy(), np.pad(labels, 2, "edge"))


# ---- real heads ----

needs_data = pytest.mark.skipif(
    not (REAL_DATA / "brain_t1_manual").is_dir(), reason="the real scans are not on this machine"
)


def link_cases(
    folder: Path, data: Path, names: list[str], labels: str = "labelsTr", ending: str = ""
) -> Path:
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for name in names:
        (folder / "imagesTr" / f"{name}.nii.gz").symlink_to(data / "imagesTr" / f"{name}.nii.gz")
        (folder / "labelsTr" / f"{name}.nii.gz").symlink_to(data / labels / f"{name}{ending}.nii.gz")
    return folder


@needs_data
def test_a_real_head_by_hand_and_back_to_its_own_grid(tmp_path):
    """oasis_1000: 1093 and 1075 voxels of 1 mm3, as the README of the data says."""
    data = REAL_DATA / "brain_t1_manual"
    code, out = convert(link_cases(tmp_path / "raw", data, ["oasis_1000"]))
    case = cached(out, "oasis_1000")
    assert code == 0 and case.attributes["voxels"] == {"1": 1093, "2": 1075}
    scan = load_nifti(data / "imagesTr" / "oasis_1000.nii.gz")
    np.testing.assert_array_equal(case.image[()], scan.array)
    drawn = load_label(data / "labelsTr" / "oasis_1000.nii.gz")
    np.testing.assert_array_equal(resample_labels(case.label[()], drawn.shape), drawn.array)
    glm = link_cases(tmp_path / "glm", data, ["oasis_1000"], "all_structures", "_glm")
    code, out = convert(glm, "--label_map", "1=32,2=31", out="glm_out")
    np.testing.assert_array_equal(cached(out, "oasis_1000").label[()], case.label[()])


@needs_data
def test_a_real_map_of_freesurfer_holds_the_same_amygdalae(tmp_path):
    data = REAL_DATA / "brain_t1_amygdala"
    code, out = convert(link_cases(tmp_path / "raw", data, ["amyg_004"]))
    assert code == 0 and cached(out, "amyg_004").attributes["voxels"] == {"1": 2138, "2": 2409}
    code, aseg = convert(link_cases(tmp_path / "aseg", data, ["amyg_004"], "aseg", "_aseg"), out="aseg_out")
    np.testing.assert_array_equal(cached(aseg, "amyg_004").label[()], cached(out, "amyg_004").label[()])


@needs_data
def test_real_hippocampi_with_grey_values_up_to_a_million(tmp_path):
    data = REAL_DATA / "hippocampus_mr"
    names = ["hippocampus_001", "hippocampus_044"]
    code, out = convert(link_cases(tmp_path / "raw", data, names), "--dataset", "Hippocampus")
    assert code == 0
    for name in names:
        scan = load_nifti(data / "imagesTr" / f"{name}.nii.gz")
        np.testing.assert_array_equal(cached(out, name).image[()], scan.array)
    assert cached(out, "hippocampus_044").image.dtype == np.float32
    assert cached(out, "hippocampus_001").attributes["voxels"] == {"1": 1324, "2": 1624}
