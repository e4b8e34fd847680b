import itertools
import json
import math

import nibabel as nib
import numpy as np
import pytest
from conftest import REAL_DATA

from common.nifti import load_label, write_nifti
from verse_spine.labels import (
    LABEL_NAMES,
    VERTEBRAE,
    Centroids,
    body_centres,
    centroids_to_mm,
    centroids_to_voxels,
    check_centroids,
    class_names,
    identification_rate,
    map_labels,
    mask_centres,
    num_classes,
    num_outputs,
    read_centroids,
    unmap_labels,
    write_centroids,
)
from verse_spine.phantoms import spine_phantom

ORIENTATIONS = [
    "".join(side[c] for side, c in zip(order, choice, strict=True))
    for order in itertools.permutations(("LR", "PA", "IS"))
    for choice in itertools.product((0, 1), repeat=3)
]
ALL = np.arange(29, dtype=np.uint8)


# ---- numbers and classes ----


def test_names():
    assert [LABEL_NAMES[n] for n in (1, 7, 8, 19, 20, 25, 28)] == ["C1", "C7", "T1", "T12", "L1", "L6", "T13"]
    assert sorted(LABEL_NAMES) == list(range(1, 29)) and len(VERTEBRAE) == 26


def test_modes():
    assert map_labels(ALL, "binary").tolist() == [0] + [1] * 25 + [0, 0, 1]
    assert map_labels(ALL, "region3").tolist() == [0] + [1] * 7 + [2] * 12 + [3] * 6 + [0, 0, 2]
    assert map_labels(ALL, "levels26").tolist() == [*range(26), 0, 0, 26]
    for mode, classes, outputs in (("binary", 2, 1), ("region3", 4, 4), ("levels26", 27, 27)):
        assert (num_classes(mode), num_outputs(mode), len(class_names(mode))) == (classes, outputs, classes)
        assert map_labels(ALL, mode).dtype == np.uint8 and map_labels(ALL, mode).max() == classes - 1
    assert class_names("levels26")[20] == "L1" and class_names("levels26")[26] == "T13"


def test_unmap_is_the_reverse():
    levels = map_labels(ALL.reshape(1, 29, 1), "levels26")
    expected = np.where(np.isin(ALL, (26, 27)), 0, ALL).reshape(1, 29, 1)
    np.testing.assert_array_equal(unmap_labels(levels.astype(np.int64), "levels26"), expected)
    assert unmap_labels(np.array([0, 3]), "region3").tolist() == [0, 3]
    with pytest.raises(ValueError, match=r"value\(s\) 27; mode levels26 has the classes 0-26"):
        unmap_labels(np.array([27]), "levels26")


def test_bad_labels():
    with pytest.raises(ValueError, match=r"unknown label value\(s\) 29, 99, 255; VerSe uses 0-28"):
        map_labels(np.array([[1, 29], [99, 255]], np.uint8), "binary")
    with pytest.raises(ValueError, match=r"unknown label value\(s\) -1"):
        map_labels(np.array([-1, 3], np.int16), "levels26")
    with pytest.raises(ValueError, match="type float32"):
        map_labels(np.ones(3, np.float32), "binary")
    with pytest.raises(ValueError, match="'levels' is unknown; use one of binary, region3, levels26"):
        map_labels(ALL, "levels")
    assert map_labels(np.zeros((0, 3), np.uint8), "binary").shape == (0, 3)


# ---- centroid files ----


@pytest.fixture(scope="module")
def oblique_scans(tmp_path_factory):
    """One grid, turned against the axes and uneven, stored in all 48 orientations."""
    folder, scans = tmp_path_factory.mktemp("orientations"), {}
    angle = math.radians(20)
    turn = np.array(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.0, 0.7, 3.0])  # x, y, z
    affine[:3, 3] = 30, -120, 55
    array = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(7, 6, 5)  # x, y, z
    for codes in ORIENTATIONS:
        turned = nib.Nifti1Image(array, affine).as_reoriented(
            nib.orientations.ornt_transform(
                nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
            )
        )
        nib.save(turned, folder / f"{codes}.nii")
        scans[codes] = load_label(folder / f"{codes}.nii")
    return scans


def test_voxels_lie_where_nibabel_puts_them(oblique_scans):
    for codes, scan in oblique_scans.items():
        voxels = {20: (1.25, 2.5, 3.0), 28: (0.0, 0.0, 0.0)}
        got = centroids_to_mm(Centroids(tuple(codes), voxels), scan)
        for label, place in voxels.items():
            expected = nib.affines.apply_affine(scan.file_affine, place)[::-1]
            np.testing.assert_allclose(got[label], expected, atol=1e-4)


def test_there_and_back_over_all_orientations(oblique_scans, tmp_path):
    """JSON -> mm -> JSON, also through a scan that is stored in another orientation than the JSON's."""
    for (codes, scan), other in zip(oblique_scans.items(), reversed(ORIENTATIONS), strict=True):
        write_centroids(
            tmp_path / "a_ctd.json", Centroids(tuple(other), {1: (1.25, 2.5, 3), 25: (4.75, 0, 1.5)})
        )
        read = read_centroids(tmp_path / "a_ctd.json")
        assert read.direction == tuple(other)
        centres = centroids_to_mm(read, scan)
        for label, place in read.voxels.items():  # where nibabel puts it in the file that is stored that way
            expected = nib.affines.apply_affine(oblique_scans[other].file_affine, place)[::-1]
            np.testing.assert_allclose(centres[label], expected, atol=1e-4)
        own = centroids_to_voxels(centres, scan)
        assert own.direction == tuple(codes)
        for label, place in centroids_to_mm(own, scan).items():
            np.testing.assert_allclose(place, centres[label], atol=1e-6)


def test_one_position_is_one_place_in_every_file(oblique_scans):
    """The same voxel, named in the orientation of each file, is the same point; `size - x` would miss it."""
    ras = oblique_scans["RAS"]
    target = centroids_to_mm(Centroids(("R", "A", "S"), {3: (1, 2, 4)}), ras)[3]
    for codes, scan in oblique_scans.items():
        voxel = centroids_to_voxels({3: target}, scan).voxels[3]
        stored = np.asarray(nib.load(scan.path).dataobj)
        assert stored[tuple(np.rint(voxel).astype(int))] == ras.array[4, 2, 1], codes


def test_file_content(tmp_path):
    path = tmp_path / "sub-verse004_seg-subreg_ctd.json"
    write_centroids(path, Centroids(("P", "I", "R"), {21: (1.23456, 2, 3), 5: (4, 5, 6.5)}))
    assert json.loads(path.read_text()) == [
        {"direction": ["P", "I", "R"]},
        {"label": 5, "X": 4, "Y": 5, "Z": 6.5},
        {"label": 21, "X": 1.23, "Y": 2, "Z": 3},
    ]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_nan_and_foreign_entries_are_left_out(tmp_path):
    path = tmp_path / "a_ctd.json"
    path.write_text(
        '[{"direction": ["L", "A", "S"]}, {"label": 20, "X": NaN, "Y": 1, "Z": 1}, {"software": "x"},'
        ' {"label": 21, "X": "2.5", "Y": 1, "Z": 1}, {"label": 22.0, "X": 1, "Y": 1, "Z": 1}]'
    )
    assert read_centroids(path) == Centroids(("L", "A", "S"), {21: (2.5, 1, 1), 22: (1, 1, 1)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not valid JSON"),
        ("{}", "expected a list"),
        ("[]", "expected a list"),
        ("[[1]]", "expected a list"),
        ('[{"label": 20, "X": 1, "Y": 1, "Z": 1}]', "names no orientation"),
        ('[{"direction": ["L", "R", "S"]}]', "names no orientation"),
        ('[{"direction": ["P", "I"]}]', "names no orientation"),
        ('[{"direction": "PIR"}]', "names no orientation"),
        ('[{"direction": ["P", "I", "R"]}, {"label": 20, "X": 1, "Y": 1}]', "is not complete"),
        ('[{"direction": ["P", "I", "R"]}, {"label": 20, "X": [], "Y": 1, "Z": 1}]', "is not complete"),
        ('[{"direction": ["P", "I", "R"]}, {"label": 99, "X": 1, "Y": 1, "Z": 1}]', "label 99"),
        ('[{"direction": ["P", "I", "R"]}, {"label": [20], "X": 1, "Y": 1, "Z": 1}]', r"label \[20\]"),
        (
            '[{"direction": ["P", "I", "R"]}, {"label": 20, "X": 1' + 400 * "0" + ', "Y": 1, "Z": 1}]',
            "complete",
        ),
        ('[{"direction": ["P", "I", "R"]}, {"label": "L1", "X": 1, "Y": 1, "Z": 1}]', "label 'L1'"),
        ('[{"direction": ["P", "I", "R"]}, {"label": 20, "X": Infinity, "Y": 1, "Z": 1}]', "infinite"),
        (
            '[{"direction": ["P", "I", "R"]}, {"label": 9, "X": 1, "Y": 1, "Z": 1},'
            ' {"label": 9, "X": 2, "Y": 1, "Z": 1}]',
            "label 9 stands there twice",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad_ctd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_centroids(path)
    assert str(path) in str(caught.value)


def test_absent_and_binary_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_centroids(tmp_path / "absent.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_centroids(tmp_path / "a.json")


# ---- centres ----


def test_mask_centres_of_boxes():
    labels = np.zeros((20, 30, 40), np.uint8)
    labels[2:5, 10:15, 20:30] = 20
    labels[8, 0, 0] = 28
    labels[12:15, 3:6, 3:6] = 26  # the sacrum is not annotated
    affine = np.diag([0.5, 2, 3, 1.0])  # x, y, z
    affine[:3, 3] = 100, 10, 1
    assert mask_centres(labels, affine) == {20: (10.0, 34.0, 112.25), 28: (25.0, 10.0, 100.0)}
    assert set(body_centres(labels, affine)) == {20, 28}
    assert mask_centres(np.zeros((2, 2, 2), np.uint8), affine) == body_centres(labels[:1], affine) == {}


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (3, 3, 3), (0.5, 0.4, 0.4), (1, 1, 2.5)])
def test_body_centre_ignores_a_long_process(spacing_mm):
    z, y, x = np.meshgrid(*(np.arange(0, 60, s) for s in spacing_mm), indexing="ij")
    body = (abs(z - 30) < 12) & ((y - 42) ** 2 + (x - 30) ** 2 < 15**2)
    process = (abs(z - 30) < 5) & (y < 42) & (abs(x - 30) < 4)
    labels = np.where(body | process, 21, 0).astype(np.uint8)
    affine = np.diag([*spacing_mm[::-1], 1.0])
    assert math.dist(body_centres(labels, affine)[21], (30, 42, 30)) < 1.6
    assert math.dist(mask_centres(labels, affine)[21], (30, 42, 30)) > 2.6


@pytest.mark.parametrize(
    ("other_mm", "why"),
    [
        ((12, 60, 60), "in mm it is half as deep as the body, which is just too little"),
        ((24, 8, 120), "in voxels it would be as deep as the body"),
    ],
)
def test_body_is_the_deepest_part_in_mm_not_in_voxels(other_mm, why):
    """3 x 0.4 x 0.4 mm; a cube of 24 mm is the body, beside it lies a larger and thinner part."""
    spacing_mm = (3.0, 0.4, 0.4)
    labels = np.zeros((12, 280, 320), np.uint8)
    labels[2:10, 10:70, 130:190] = 21
    z, y, x = (round(mm / s) for mm, s in zip(other_mm, spacing_mm, strict=True))
    labels[2 : 2 + z, 100 : 100 + y, 5 : 5 + x] = 21
    centre = body_centres(labels, np.diag([*spacing_mm[::-1], 1.0]))[21]
    np.testing.assert_allclose(centre, (5.5 * 3, 39.5 * 0.4, 159.5 * 0.4), atol=0.5, err_msg=why)


def test_body_centres_of_phantoms():
    _, label, centres = spine_phantom(1, levels=(8, 24))
    affine = np.diag([2.5, 2.5, 2.5, 1])
    found, plain = body_centres(label, affine), mask_centres(label, affine)
    inner = [n for n in centres if 9 <= n <= 23]
    assert np.mean([math.dist(found[n], centres[n]) for n in inner]) < 2.5
    assert np.mean([math.dist(plain[n], centres[n]) for n in inner]) > 8


@pytest.mark.parametrize(
    ("folder", "subject", "mask_mm", "body_mm"),
    [
        ("", "sub-verse901", 8.4, 1.0),
        ("", "sub-verse903", 14.6, 2.0),
        ("label_only", "sub-verse004", 11.7, 1.5),
    ],
)
def test_body_centres_of_real_masks(folder, subject, mask_mm, body_mm):
    where = REAL_DATA / "spine_ct" / folder / "derivatives" / subject
    if not where.is_dir():
        pytest.skip("the real scans are not on this machine")
    scan = load_label(where / f"{subject}_seg-vert_msk.nii.gz")
    centres = centroids_to_mm(read_centroids(where / f"{subject}_seg-subreg_ctd.json"), scan)
    assert check_centroids(centres, scan.array, scan.affine) == ([], [])
    plain, found = mask_centres(scan.array, scan.affine), body_centres(scan.array, scan.affine)
    assert np.mean([math.dist(plain[n], centres[n]) for n in centres]) == pytest.approx(mask_mm, abs=0.1)
    assert np.mean([math.dist(found[n], centres[n]) for n in centres]) < body_mm
    assert identification_rate(found, centres)["rate"] == 1


def test_check_centroids():
    labels = np.zeros((60, 60, 60), np.uint8)
    labels[10:15, 10:15, 10:15], labels[30:35, 10:15, 10:15] = 20, 21
    affine = np.eye(4)
    right = {20: (12, 22, 12), 21: (32, 12, 12)}
    assert check_centroids(right, labels, affine) == ([], [])
    assert check_centroids({21: (32, 12, 12), 22: (50, 12, 12)}, labels, affine) == (
        [],
        ["in the centroid file only: L3", "in the mask only: L1"],
    )
    problems, _ = check_centroids({20: (12, 12 + 26, 12), 21: (32, 12 + 24, 12)}, labels, affine)
    assert problems == ["L1: centroid 26 mm from the centre of the mask"]
    problems, notes = check_centroids({1: (12, 12, 12)}, labels, affine)
    assert problems == ["no label in common: centroids C1, mask L1, L2"] and len(notes) == 2
    assert check_centroids({}, labels, affine)[0] == []


def test_flipped_coordinates_are_a_problem(tmp_path):
    """A file whose orientation is wrong puts L1 where L5 is."""
    _, label, centres = spine_phantom(0, levels=(20, 24), spacing_mm=(3, 3, 3))
    write_nifti(tmp_path / "a.nii", label, (3, 3, 3), orientation="PIR")
    scan = load_label(tmp_path / "a.nii")
    right = centroids_to_voxels(centres, scan)
    assert check_centroids(centroids_to_mm(right, scan), scan.array, scan.affine)[0] == []
    wrong = centroids_to_mm(Centroids(("P", "S", "R"), right.voxels), scan)
    assert len(check_centroids(wrong, scan.array, scan.affine)[0]) >= 4


# ---- identification rate ----


def reference_hits(pred, target):
    """The challenge's rule with a distance matrix, for labels that both have."""
    both = sorted(set(pred) & set(target))
    if not both:
        return 0
    a, b = (np.array([points[n] for n in both], float) for points in (pred, target))
    matrix = np.linalg.norm(a[:, None] - b[None], axis=2)
    return int(((matrix.argmin(1) == np.arange(len(both))) & (np.diag(matrix) <= 20)).sum())


def test_identification_rate_by_hand():
    target = {n: (30.0 * n, 0, 0) for n in range(18, 24)}
    perfect = identification_rate(target, target)
    assert (perfect["hits"], perfect["targets"], perfect["rate"], perfect["d_mean_mm"]) == (6, 6, 1, 0)
    shifted = {n - 1: place for n, place in target.items()}  # every name off by one
    assert identification_rate(shifted, target)["hits"] == 0
    # On the limit; beyond it; right; nearer to L1; extra.
    pred = {18: (540, 20, 0), 19: (570, 20.5, 0), 20: (600, 12, 0), 21: (630 - 16, 0, 0), 25: (0, 0, 0)}
    got = identification_rate(pred, target)
    assert (got["hits"], got["targets"], got["predicted"]) == (2, 6, 5)
    assert got["rate"] == got["recall"] == pytest.approx(1 / 3) and got["precision"] == 0.4
    assert got["d_mean_mm"] == 16
    unpaired = identification_rate({20: (616, 0, 0)}, target)  # nearer to L2, which was not predicted
    assert unpaired["hits"] == 1
    nothing = identification_rate({}, target)
    assert nothing["rate"] == 0 and math.isnan(nothing["precision"]) and math.isnan(nothing["d_mean_mm"])
    assert math.isnan(identification_rate(target, {})["rate"])


def test_identification_rate_against_a_matrix():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        target = {int(n): (25.0 * n, *rng.normal(0, 5, 2)) for n in rng.choice(24, 8, replace=False) + 1}
        names = list(target)
        swapped = rng.permutation(names) if rng.uniform() < 0.3 else names
        pred = {int(s): tuple(target[n] + rng.normal(0, 9, 3)) for s, n in zip(swapped, names, strict=True)}
        for n in rng.choice(names, 2):
            pred.pop(int(n), None)
        hits = identification_rate(pred, target)["hits"]
        assert hits == reference_hits(pred, target)
        seen.add(hits)
    assert len(seen) > 4
