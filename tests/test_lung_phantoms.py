"""lung_tumor/phantoms.py: densities, tumours, axes and the Decathlon's layout of the synthetic chest CT."""

import json

import numpy as np
import pytest
from scipy import ndimage

from common.nifti import load_nifti
from lung_tumor import phantoms
from lung_tumor.phantoms import chest_phantom, write_chest_phantoms

SEEDS = range(6)
SPACING_MM = (5.0, 2.7, 2.7)


@pytest.fixture(scope="module")
def scans():
    """Noise-free (image, label) by seed, all at SPACING_MM."""
    return {seed: chest_phantom(seed, spacing_mm=SPACING_MM, noise_hu=0) for seed in SEEDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chest_phantoms(tmp_path_factory.mktemp("phantoms") / "Task06_Lung", 6, 3, (36, 64, 64))


def body_mask(image):
    """The largest dense object of each slice with its holes filled: leaves out the table."""
    body = np.zeros(image.shape, bool)
    for z, dense in enumerate(image > -400):
        objects, _ = ndimage.label(dense)
        body[z] = ndimage.binary_fill_holes(objects == 1 + np.argmax(np.bincount(objects.ravel())[1:]))
    return body


def table_mask(image):
    """What is dense two voxels and more outside the body."""
    return (image > -700) & ~ndimage.binary_dilation(body_mask(image), np.ones((1, 3, 3)), iterations=2)


def diameters_mm(label, spacing_mm):
    """Diameters of spheres with the volumes of the label's connected parts."""
    parts, _ = ndimage.label(label, np.ones((3, 3, 3)))
    volumes_mm3 = np.bincount(parts.ravel())[1:] * np.prod(spacing_mm)
    return (6 * volumes_mm3 / np.pi) ** (1 / 3)


def test_same_seed_same_scan_and_other_seed_another_scan(scans):
    second = chest_phantom(2, noise_hu=0)
    np.testing.assert_array_equal(second[0], scans[2][0])
    np.testing.assert_array_equal(second[1], scans[2][1])
    assert (scans[2][0] != scans[3][0]).mean() > 0.3
    assert (scans[2][1] != scans[3][1]).any()


def test_types_shapes_and_range():
    image, label = chest_phantom(0, (30, 96, 80), (6.0, 3.5, 4.0), noise_hu=400)
    assert image.shape == label.shape == (30, 96, 80)
    assert (image.dtype, label.dtype) == (np.int16, np.uint8)
    assert image.min() == -1024 and 1000 < image.max() <= 3071
    assert set(np.unique(label)) == {0, 1}


@pytest.mark.parametrize("seed", SEEDS)
def test_tissues_have_their_densities(scans, seed):
    image, label = scans[seed]
    body = body_mask(image)
    assert np.percentile(image[~body], 50) == -1000
    lung = body & (image < -700)
    assert -900 < np.median(image[lung]) < -820
    assert 0.1 < lung.sum() / body.sum() < 0.45
    soft = body & (image > 0) & (image < 100)
    assert 35 < np.median(image[soft]) < 65
    assert 0.25 < soft.sum() / body.sum() < 0.75
    rim = body & ~ndimage.binary_erosion(body, np.ones((1, 3, 3)), iterations=2)
    assert np.percentile(image[rim & (image > -130)], 20) < -60  # fat under the skin
    bone = body & (image > 200)
    assert 0.01 < bone.sum() / body.sum() < 0.12
    assert 400 < image.max() < 1000
    core = ndimage.binary_erosion(label)
    assert core.any() and 0 <= np.median(image[core]) <= 90


@pytest.mark.parametrize("seed", SEEDS)
def test_axes_are_z_up_y_front_x_right(scans, seed):
    image, _ = scans[seed]
    body = body_mask(image)
    lung = body & (image < -700)
    middle = int(np.median(np.nonzero(body)[2]))
    assert lung[..., middle:].sum() > 1.03 * lung[..., :middle].sum()  # the heart lies on the left
    table_y = np.nonzero(table_mask(image))[1]
    body_y = np.nonzero(body)[1]
    assert table_y.min() < body_y.min() and table_y.max() < body_y.mean()  # the patient lies on the back
    windpipe = (body & (image < -920))[:, :, middle - 3 : middle + 6].sum((1, 2))
    assert windpipe[-8:].min() > 5 and windpipe[:8].max() == 0


def test_noise_has_the_asked_strength_and_is_correlated_in_the_slice():
    clean, label = chest_phantom(1, noise_hu=0)
    noisy, same_label = chest_phantom(1, noise_hu=40)
    np.testing.assert_array_equal(label, same_label)
    noise = (noisy.astype(float) - clean)[:, 50:80, 40:90]  # away from the air, which the range cuts off
    assert noise.std() == pytest.approx(40, rel=0.05)
    along_x = np.corrcoef(noise[..., 1:].ravel(), noise[..., :-1].ravel())[0, 1]
    along_z = np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]
    assert 0.3 < along_x < 0.8 and abs(along_z) < 0.05


def test_tumours_number_and_diameters(scans):
    counts = []
    for _, label in scans.values():
        diameters = diameters_mm(label, SPACING_MM)
        counts.append(len(diameters))
        assert 1 <= len(diameters) <= 3
        assert 15 <= diameters.max() < 42
        assert diameters.min() > 3.5
    assert len(set(counts)) > 1


def test_tumours_lie_in_the_body_and_reach_into_a_lung(scans):
    at_pleura = 0
    for image, label in scans.values():
        body = body_mask(image)
        assert not (label.astype(bool) & ~ndimage.binary_erosion(body, np.ones((1, 3, 3)))).any()
        lung = ndimage.binary_opening(body & (image < -700), np.ones((1, 3, 3)))
        parts, num_parts = ndimage.label(label, np.ones((3, 3, 3)))
        for part in range(1, num_parts + 1):
            around = ndimage.binary_dilation(parts == part, iterations=3) & (parts != part)
            share_of_lung = (lung & around).sum() / around.sum()
            assert share_of_lung > 0.2
            at_pleura += share_of_lung < 0.6
    assert at_pleura > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_tumour_smaller_than_a_voxel_is_labelled(monkeypatch, seed):
    monkeypatch.setattr(phantoms, "MAIN_TUMOUR_DIAMETER_MM", (1.0, 1.1))
    monkeypatch.setattr(phantoms, "TUMOUR_DIAMETER_MM", (1.0, 1.1))
    _, label = chest_phantom(seed, (24, 48, 48), (6.0, 7.0, 7.0))
    parts, num_parts = ndimage.label(label, np.ones((3, 3, 3)))
    assert 1 <= num_parts <= 3 and label.sum() == num_parts


def test_tumours_keep_apart(monkeypatch):
    monkeypatch.setattr(phantoms, "MAIN_TUMOUR_DIAMETER_MM", (30.0, 30.0))
    monkeypatch.setattr(phantoms, "TUMOUR_DIAMETER_MM", (30.0, 30.0))
    for seed in range(20):
        _, label = chest_phantom(seed, (24, 48, 48), (7.0, 7.0, 7.0))
        assert diameters_mm(label, (7.0, 7.0, 7.0)).max() < 35  # two in one: 38 mm


def test_density_alone_does_not_find_tumours(scans):
    for image, label in scans.values():
        dense = (image > -100) & (image < 120)
        assert 2 * (dense & (label == 1)).sum() / (dense.sum() + label.sum()) < 0.1
        # Vessels: spots as dense and as large in a slice as small tumours, apart from the chest wall.
        body, num_spots = body_mask(image), 0
        for z in range(len(image)):
            objects, _ = ndimage.label(body[z] & (image[z] > -400))
            sizes = np.bincount(objects.ravel())
            sizes[[0, *np.unique(objects[label[z] > 0])]] = 0
            num_spots += ((sizes >= 4) & (sizes <= 40)).sum()
        assert num_spots > 40


def test_too_small_a_field_is_refused():
    with pytest.raises(ValueError, match=r"\(36, 64, 64\).*180 x 172.8 x 172.8 mm.*120 x 240 x 240"):
        chest_phantom(0, (36, 64, 64), SPACING_MM)


def test_layout_is_that_of_the_decathlon(folder):
    contents = json.loads((folder / "dataset.json").read_text())
    assert contents["modality"] == {"0": "CT"}
    assert contents["labels"] == {"0": "background", "1": "cancer"}
    assert contents["numTraining"] == len(contents["training"]) == 6 and contents["test"] == []
    assert contents["training"][0] == {
        "image": "./imagesTr/lung_001.nii.gz",
        "label": "./labelsTr/lung_001.nii.gz",
    }
    listed = {(folder / case[key]).resolve() for case in contents["training"] for key in ("image", "label")}
    assert listed == {path.resolve() for path in folder.rglob("*.nii.gz")}
    assert {path.name for path in folder.parent.iterdir()} == {"Task06_Lung"}


def test_stored_cases_differ_in_geometry_and_agree_with_their_labels(folder):
    scans = [load_nifti(path) for path in sorted((folder / "imagesTr").iterdir())]
    for scan in scans:
        label = load_nifti(folder / "labelsTr" / scan.path.name)
        assert label.array.shape == scan.array.shape
        np.testing.assert_allclose(label.file_affine, scan.file_affine)
        assert (scan.header.get_data_dtype(), label.header.get_data_dtype()) == (np.int16, np.uint8)
        assert np.abs(scan.affine[:3, 3]).min() > 0
        z_mm, y_mm, x_mm = scan.spacing_mm
        assert 30 <= len(scan.array) <= 44 and 3 <= z_mm <= 6
        assert y_mm == x_mm and 2.4 <= x_mm * 64 / 128 <= 3.0
        assert diameters_mm(label.array, scan.spacing_mm).max() > 14
        assert np.nonzero(table_mask(scan.array))[1].mean() < 20  # the table comes back behind the patient
    assert {scan.orientation for scan in scans} == {"LPS", "RAS", "LAS"}
    assert len({scan.spacing_mm for scan in scans}) == 6
    assert len({scan.array.shape for scan in scans}) > 2


def test_a_folder_with_phantoms_of_other_arguments_is_kept(folder):
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert write_chest_phantoms(folder, 6, 3, (36, 64, 64)) == folder
    with pytest.raises(FileExistsError, match="7 synthetic chest CTs, seed 3"):
        write_chest_phantoms(folder, 7, 3, (36, 64, 64))
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_an_interrupted_write_leaves_nothing(monkeypatch, tmp_path):
    def interrupt_at_the_second_label(path, *args, **kwargs):
        if "labelsTr/lung_002" in path.as_posix():
            raise KeyboardInterrupt
        path.touch()

    monkeypatch.setattr("common.phantoms.write_nifti", interrupt_at_the_second_label)
    with pytest.raises(KeyboardInterrupt):
        write_chest_phantoms(tmp_path / "demo", 3, shape=(36, 48, 48))
    assert list(tmp_path.iterdir()) == []


def test_no_cases_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_cases is 0"):
        write_chest_phantoms(tmp_path / "demo", 0)
