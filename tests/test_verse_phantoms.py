"""verse_spine/phantoms.py: vertebrae, what looks like them, and VerSe's layout of the synthetic spine CT."""

import hashlib

import numpy as np
import pytest
from scipy import ndimage

from common.nifti import load_label, load_nifti, same_grid
from verse_spine import phantoms
from verse_spine.cases import find_cases
from verse_spine.labels import (
    centroids_to_mm,
    check_centroids,
    identification_rate,
    mask_centres,
    read_centroids,
)
from verse_spine.phantoms import spine_phantom, write_verse_phantoms

COARSE = (4.0, 4.0, 4.0)


@pytest.fixture(scope="module")
def whole():
    """C1 to L5 at 3 mm without noise: (image, label, centres_mm)."""
    return spine_phantom(5, spacing_mm=(3, 3, 3), noise_hu=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_verse_phantoms(tmp_path_factory.mktemp("phantoms") / "verse", 10, seed=3, spacing_scale=1.6)


def digest(image, label, centres):
    return hashlib.sha256(image.tobytes() + label.tobytes() + repr(centres).encode()).hexdigest()


def test_same_arguments_same_scan():
    first = spine_phantom(7, spacing_mm=COARSE, levels=(16, 24))
    assert digest(*first) == digest(*spine_phantom(7, spacing_mm=COARSE, levels=(16, 24)))
    assert digest(*first) != digest(*spine_phantom(8, spacing_mm=COARSE, levels=(16, 24)))


def test_all_vertebrae_are_there_and_in_order(whole):
    image, label, centres = whole
    assert (image.dtype, label.dtype) == (np.int16, np.uint8) and image.shape == label.shape
    assert image.min() >= -1024 and image.max() <= 3071
    assert set(np.unique(label)) == set(range(25)) and list(centres) == list(range(1, 25))
    heights = [centre[0] for centre in centres.values()]
    assert all(a > b + 8 for a, b in zip(heights, heights[1:], strict=False))  # from the head down
    affine = np.diag([3.0, 3, 3, 1])
    assert check_centroids(centres, label, affine) == ([], [])
    for number, centre in centres.items():
        if number > 1:  # C1 has no body
            assert label[tuple(np.rint(np.divide(centre, 3)).astype(int))] == number
    behind = [mask_centres(label, affine)[n][1] < centres[n][1] - 5 for n in range(3, 25)]
    assert all(behind)  # arch and processes pull the mask's centre backwards


def test_each_vertebra_is_one_piece_that_grows_downwards(whole):
    _, label, centres = whole
    volumes = []
    for number in range(3, 25):  # a spinous process reaches far behind the body
        y = np.nonzero((label == number).any((0, 2)))[0] * 3
        assert centres[number][1] - y.min() > 32 - 10 * (number < 8), number
    for number in range(1, 25):
        pieces, count = ndimage.label(label == number, np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel())[1:]
        assert sizes.max() > 0.97 * sizes.sum(), f"{number}: {count} pieces {sizes}"
        volumes.append(sizes.sum() * 27 / 1000)
    assert 5 < np.mean(volumes[1:6]) < 25 < np.mean(volumes[18:]) < 130  # ml
    assert np.mean(volumes[19:]) > 1.7 * np.mean(volumes[7:12]) > 1.7 * np.mean(volumes[2:6])


def test_densities(whole):
    image, label, centres = whole
    bone = image[label > 0]
    assert 130 < np.median(bone) < 420 and np.percentile(bone, 95) > 300 > np.percentile(bone, 25)
    inside = [image[tuple(np.rint(np.divide(centres[n], 3)).astype(int))] for n in range(8, 25)]
    assert 80 < np.mean(inside) < 320  # marrow
    between = [np.add(centres[n], centres[n + 1]) / 2 for n in range(20, 24)]
    discs = [image[tuple(np.rint(np.divide(p, 3)).astype(int))] for p in between]
    assert np.mean(discs) < 0.75 * np.mean(inside)


def test_bright_things_that_are_not_vertebrae(whole):
    """Ribs, skull, sacrum, contrast agent: a threshold must not do."""
    image, label, centres = whole
    bright = image > 150
    dice = 2 * (bright & (label > 0)).sum() / (bright.sum() + (label > 0).sum())
    assert dice < 0.9 and (bright & (label == 0)).sum() > 0.1 * (label > 0).sum()
    thorax = slice(int(centres[17][0] / 3), int(centres[9][0] / 3))
    far = ndimage.distance_transform_edt(label[thorax] == 0, sampling=3) > 12
    ribs, _ = ndimage.label((image[thorax] > 200) & far)
    sizes = np.bincount(ribs.ravel())[1:]
    assert (sizes >= 5).sum() >= 10
    assert (image[thorax] < -700).mean() > 0.03  # lungs


def test_the_sacrum_is_not_annotated():
    image, label, centres = spine_phantom(2, levels=(22, 24), spacing_mm=(3, 3, 3), noise_hu=0)
    below = label.shape[0] and slice(0, max(int((centres[24][0] - 16) / 3), 1))
    assert (image[below] > 200).any() and label.max() == 24


@pytest.mark.parametrize("levels", [(1, 7), (20, 24), (10, 22), (12, 12)])
def test_cut_fields_of_view(levels):
    image, label, centres = spine_phantom(3, levels=levels, spacing_mm=COARSE)
    assert set(range(levels[0], levels[1] + 1)) <= set(centres)
    assert set(centres) <= set(range(levels[0] - 2, levels[1] + 3))
    problems, _ = check_centroids(centres, label, np.diag([4.0, 4, 4, 1]))
    assert not problems
    cut = np.union1d(label[0], label[-1])
    assert cut.max() > 0  # a vertebra is cut by an end of the scan
    assert image.shape[0] * 4 < 640


def test_spacing_is_that_asked_for():
    thin = spine_phantom(4, levels=(20, 23), spacing_mm=(2, 2, 4))
    thick = spine_phantom(4, levels=(20, 23), spacing_mm=(4, 2, 2))
    np.testing.assert_allclose(
        np.multiply(thin[0].shape, (2, 2, 4)), np.multiply(thick[0].shape, (4, 2, 2)), atol=4
    )
    for number in (20, 21, 22, 23):
        np.testing.assert_allclose(thin[2][number], thick[2][number], atol=4)
        volumes = [(label == number).sum() * 16 for _, label, _ in (thin, thick)]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.12)


def test_variants_and_metal():
    _, label, centres = spine_phantom(1, levels=(17, 22), spacing_mm=COARSE, variant="T13")
    assert {18, 19, 28, 20, 21} <= set(centres) and centres[19][0] > centres[28][0] > centres[20][0]
    assert check_centroids(centres, label, np.diag([4.0, 4, 4, 1]))[0] == []
    _, _, centres = spine_phantom(1, levels=(20, 24), spacing_mm=COARSE, variant="L6")
    assert centres[25][0] < centres[24][0]
    plain = spine_phantom(1, levels=(15, 24), spacing_mm=(3, 3, 3))
    screws = spine_phantom(1, levels=(15, 24), spacing_mm=(3, 3, 3), metal=True)
    assert plain[0].max() < 1500 < screws[0].max()
    np.testing.assert_array_equal(plain[1], screws[1])


def test_bad_arguments():
    for arguments in ({"levels": (0, 5)}, {"levels": (9, 8)}, {"levels": (1, 25)}, {"variant": "L7"}):
        with pytest.raises(ValueError, match="levels are the first and the last vertebra, 1 to 24, variants"):
            spine_phantom(0, **arguments)


# ---- files ----


def test_layout_and_agreement_of_the_files(folder):
    cases = find_cases(folder)
    parts = [case.part for case in cases]
    assert [parts.count(part) for part in ("training", "validation", "test")] == [6, 2, 2]
    assert all(int(case.subject.removeprefix("sub-verse")) >= 801 for case in cases)
    orientations, kinds, anisotropic, numbers = set(), set(), set(), set()
    for case in cases:
        image, mask = load_nifti(case.image), load_label(case.mask)
        assert same_grid(image, mask) and (image.array.dtype, mask.array.dtype) == (np.int16, np.uint8)
        centres = centroids_to_mm(read_centroids(case.centroids), mask)
        assert read_centroids(case.centroids).direction == tuple(image.orientation)
        assert check_centroids(centres, mask.array, mask.affine)[0] == []
        found = mask_centres(mask.array, mask.affine)
        assert identification_rate({n: found[n] for n in centres}, centres)["rate"] > 0.9
        orientations.add(image.orientation)
        kinds.add(case.centroids.name.split("_seg-")[1])
        anisotropic.add(int(np.argmax(image.spacing_mm)))
        numbers |= set(centres)
        assert np.abs(image.affine[:3, 3]).min() > 0
    assert orientations == set(phantoms.ORIENTATIONS) and kinds == {"subreg_ctd.json", "vb_ctd.json"}
    assert anisotropic >= {0, 2} and numbers == {*range(1, 26), 28}
    names = " ".join(case.name for case in cases)
    assert "_dir-ax" in names and "_dir-sag" in names and "_split-verse" in names


def test_a_folder_with_phantoms_of_other_arguments_is_kept(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert write_verse_phantoms(folder, 10, seed=3, spacing_scale=1.6) == folder
    with pytest.raises(FileExistsError, match="'seed': 4"):
        write_verse_phantoms(folder, 10, seed=4, spacing_scale=1.6)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
    with pytest.raises(ValueError, match="num_cases is 2"):
        write_verse_phantoms(tmp_path / "demo", 2)


def test_an_interrupted_write_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(phantoms, "write_centroids", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_verse_phantoms(tmp_path / "demo", 3, spacing_scale=2.5)
    assert list(tmp_path.iterdir()) == []
