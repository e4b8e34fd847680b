"""amos_lha/phantoms.py: organs at their places, sides and volumes, and AMOS's layout of the synthetic CT."""

import hashlib
import json

import numpy as np
import pytest
from scipy import ndimage

from amos_lha.organs import ORGANS
from amos_lha.phantoms import ORIENTATIONS, abdomen_phantom, write_amos_phantoms
from common.nifti import load_label, load_nifti, open_nifti, same_grid

# Volumes in mL of grown-ups, as the task's table gives them, each range widened by half of its value.
VOLUMES_ML = {
    1: (100, 300),
    2: (75, 270),
    3: (75, 270),
    4: (15, 60),
    5: (10, 45),
    6: (700, 2250),
    7: (150, 600),
    8: (35, 165),
    9: (35, 165),
    10: (35, 165),
    11: (2, 7.5),
    12: (2, 7.5),
    13: (30, 105),
    14: (50, 375),
    15: (20, 90),
}
SPACING_MM = (3.0, 3.0, 3.0)


@pytest.fixture(scope="module")
def scans():
    """Four patients without noise: [(image, label), ...]."""
    return [abdomen_phantom(seed, spacing_mm=SPACING_MM, noise_hu=0) for seed in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_amos_phantoms(tmp_path_factory.mktemp("phantoms") / "amos", 5, 2, seed=3, in_plane_mm=5)


def volumes_ml(label: np.ndarray, spacing_mm) -> dict[int, float]:
    counts = np.bincount(label.ravel(), minlength=16)
    return {organ: counts[organ] * float(np.prod(spacing_mm)) / 1000 for organ in ORGANS}


def middle_mm(label: np.ndarray, organ: int) -> np.ndarray:
    return np.argwhere(label == organ).mean(0) * SPACING_MM


def test_every_organ_has_the_volume_of_a_grown_up(scans):
    for image, label in scans:
        assert (image.dtype, label.dtype) == (np.int16, np.uint8) and image.shape == label.shape
        for organ, volume in volumes_ml(label, SPACING_MM).items():
            low, high = VOLUMES_ML[organ]
            assert low < volume < high, f"{ORGANS[organ]}: {volume:.1f} mL"
    livers = [volumes_ml(label, SPACING_MM)[6] for _, label in scans]
    assert np.ptp(livers) > 50, "patients differ"


def test_organs_lie_on_their_sides_and_in_their_order(scans):
    for _, label in scans:
        z, y, x = ({organ: middle_mm(label, organ)[axis] for organ in ORGANS} for axis in range(3))
        for right, left in ((6, 1), (2, 3), (11, 12), (9, 8), (4, 7), (13, 7)):
            assert x[right] > x[left] + 8, f"{ORGANS[right]} lies to the right of the {ORGANS[left]}"
        for upper, lower in ((5, 7), (11, 2), (12, 3), (1, 3), (6, 13), (2, 14)):
            assert z[upper] > z[lower] + 8, f"{ORGANS[upper]} lies above the {ORGANS[lower]}"
        for front, back in ((7, 8), (10, 3), (4, 2), (13, 9)):
            assert y[front] > y[back] + 8, f"{ORGANS[front]} lies in front of the {ORGANS[back]}"


def test_every_organ_is_one_piece(scans):
    for _, label in scans:
        for organ, name in ORGANS.items():
            pieces, _ = ndimage.label(label == organ, np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            assert sizes.max() > 0.9 * sizes.sum(), f"{name}: {sizes}"


def test_grey_values_are_those_of_tissues_and_do_not_give_the_organs_away(scans):
    for image, label in scans:
        assert image.min() >= -1024 and image.max() <= 3071
        median = {organ: np.median(image[label == organ]) for organ in ORGANS}
        assert 60 < median[6] < 150 and 90 < median[2] < 240 and -15 < median[14] < 40
        assert -20 < median[4] < 45 and 80 < median[8] < 240
        for organ, hu in median.items():  # bowel, muscle, vessels, heart, other organs: as bright as it
            alike = np.count_nonzero(np.abs(image[label != organ] - hu) < 15)
            assert alike > 0.15 * np.count_nonzero(label == organ), ORGANS[organ]
        assert (image < -700).mean() > 0.2 and (image > 350).sum() > 3000  # air and lungs, bones
        fat = np.count_nonzero(np.abs(image + 100) < 15)
        assert fat > 0.1 * np.count_nonzero(image > -200)


def test_same_arguments_same_scan():
    first, again, other = (abdomen_phantom(s, spacing_mm=(8, 6, 6)) for s in (7, 7, 8))
    digests = [hashlib.sha256(i.tobytes() + v.tobytes()).hexdigest() for i, v in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_absent_organs_and_thick_slices():
    thin, thick = (abdomen_phantom(5, spacing_mm=(z, 3, 3), noise_hu=0)[1] for z in (1.5, 5))
    missing = abdomen_phantom(5, spacing_mm=(5, 3, 3), absent=(4, 15), noise_hu=0)[1]
    assert set(np.unique(missing)) == set(range(16)) - {4, 15}
    assert thin.shape[0] == pytest.approx(thick.shape[0] * 5 / 1.5, abs=3)
    for organ in (1, 2, 6, 7):  # the bending is drawn on the same places in the body
        small, large = volumes_ml(thin, (1.5, 3, 3))[organ], volumes_ml(thick, (5, 3, 3))[organ]
        assert small == pytest.approx(large, rel=0.25)


# ---- files ----


def test_layout_and_agreement_of_the_files(folder):
    notes = json.loads((folder / "dataset.json").read_text())
    assert notes["numTraining"] == len(notes["training"]) == 5 and len(notes["validation"]) == 2
    assert notes["labels"]["6"] == "liver" and len(notes["labels"]) == 16
    names = [f"amos_{number:04d}.nii.gz" for number in range(1, 8)]
    for part, expected in (("Tr", names[:5]), ("Va", names[5:])):
        for kind in ("images", "labels"):
            assert sorted(p.name for p in (folder / f"{kind}{part}").iterdir()) == expected
    orientations, thickness_mm, organs = set(), set(), []
    for entry in notes["training"] + notes["validation"]:
        image, label = load_nifti(folder / entry["image"]), load_label(folder / entry["label"])
        assert same_grid(image, label) and (image.array.dtype, label.array.dtype) == (np.int16, np.uint8)
        assert middle_mm(label.array, 6)[2] > middle_mm(label.array, 1)[2], "x grows to the right"
        orientations.add(image.orientation)
        thickness_mm.add(round(image.spacing_mm[0], 3))
        organs.append(set(np.unique(label.array)) - {0})
    assert orientations == set(ORIENTATIONS) and thickness_mm == {5.0, 3.0, 1.5}
    everything = set(ORGANS)
    assert organs == [everything if k not in (2, 4) else everything - {4 if k == 2 else 15} for k in range(7)]


def test_a_folder_with_phantoms_of_other_arguments_is_kept(folder):
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert write_amos_phantoms(folder, 5, 2, seed=3, in_plane_mm=5) == folder
    with pytest.raises(FileExistsError, match="'seed': 4"):
        write_amos_phantoms(folder, 5, 2, seed=4, in_plane_mm=5)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_a_case_does_not_depend_on_how_many_there_are(folder, tmp_path):
    small = write_amos_phantoms(tmp_path / "amos", 1, 1, seed=3, in_plane_mm=5)
    first, same = (load_nifti(root / "imagesTr/amos_0001.nii.gz").array for root in (folder, small))
    np.testing.assert_array_equal(first, same)
    moved, other = (folder / "imagesTr", small / "imagesVa")
    assert open_nifti(moved / "amos_0002.nii.gz").shape == open_nifti(other / "amos_0002.nii.gz").shape


def test_an_interrupted_write_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "common.phantoms.write_nifti", lambda *args, **_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        write_amos_phantoms(tmp_path / "demo", 1, 1, in_plane_mm=8)
    assert list(tmp_path.iterdir()) == []
