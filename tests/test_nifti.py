"""common/nifti.py: geometry, values and errors, on files made with nibabel and on real ones."""

import errno
import gzip
import itertools
import pickle
import re
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.nifti import (
    case_name,
    is_nifti,
    load_label,
    load_nifti,
    open_nifti,
    same_grid,
    save_label,
    save_probability,
    to_ras,
    write_nifti,
)
from common.scan_files import voxel_mm3

ORIENTATIONS = [
    "".join(ends) for axes in itertools.permutations(("LR", "PA", "IS")) for ends in itertools.product(*axes)
]
SHAPE_XYZ = (4, 5, 3)
DATATYPE_OFFSET, SLOPE_OFFSET, QUATERN_B_OFFSET, SROW_OFFSET = 70, 112, 256, 280  # bytes in a NIfTI-1 header
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "odd_headers").is_dir(), reason="no ../shared/data")


def rotation(degrees, first, second):
    turn = np.eye(3)
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn[[first, second], [first, second]] = c
    turn[first, second], turn[second, first] = -s, s
    return turn


def affine_of(matrix, origin=(-31.5, 12.25, 100.0)):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, origin
    return affine.astype(np.float32).astype(np.float64)  # what a NIfTI-1 file can hold


SPACING_XYZ = np.array([0.7, 1.3, 5.0])
TILT = np.array([[1, 0, 0], [0, 1, 0.35], [0, 0, 1]])  # a gantry tilted by 19 degrees
AFFINES = {
    "anisotropic": affine_of(np.diag(SPACING_XYZ)),
    "oblique": affine_of(rotation(21, 0, 1) @ rotation(-13, 1, 2) @ rotation(8, 0, 2) @ np.diag(SPACING_XYZ)),
    "sheared": affine_of(rotation(7, 0, 1) @ TILT @ np.diag(SPACING_XYZ)),
}


def stored_as(volume, affine, orientation):
    """RAS+ (x, y, z) volume and its affine as a file of that orientation holds them; without nibabel."""
    axes = [next(k for k, ends in enumerate(("LR", "PA", "IS")) if code in ends) for code in orientation]
    flipped = [code in "LPI" for code in orientation]
    stored = volume.transpose(axes)[tuple(slice(None, None, -1 if f else 1) for f in flipped)]
    to_volume = np.zeros((4, 4))  # voxel of the file -> voxel of the volume
    to_volume[3, 3] = 1
    for i, (axis, flip) in enumerate(zip(axes, flipped, strict=True)):
        to_volume[axis, i] = -1 if flip else 1
        to_volume[axis, 3] = volume.shape[axis] - 1 if flip else 0
    return np.ascontiguousarray(stored), affine @ to_volume


def write(path, stored, affine, *, sform=1, qform=1, kind=nib.Nifti1Image, order="<", dtype=None):
    """A file by nibabel alone; a form's code 0 leaves that form out."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(dtype or stored.dtype).newbyteorder(order))
    image = kind(stored, affine, header)
    image.set_qform(affine if qform else None, qform)
    image.set_sform(affine if sform else None, sform)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def patch(path, offset, value):
    """Overwrite header bytes of an uncompressed file."""
    content = bytearray(path.read_bytes())
    content[offset : offset + value.nbytes] = value.tobytes()
    path.write_bytes(content)


def random_volume(low=-1000, high=2000, dtype=np.int16, shape=SHAPE_XYZ):
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


def check_lazy_reading(file, scan):
    """Whole, boxes and block means read from the file equal those of the loaded array."""
    assert file.shape == scan.array.shape and file.spacing_mm == scan.spacing_mm
    np.testing.assert_array_equal(file.affine, scan.affine)
    np.testing.assert_array_equal(file.read_box((0, 0, 0), file.shape), scan.array)
    rng = np.random.default_rng(1)
    for _ in range(4):
        start = [int(rng.integers(n)) for n in file.shape]
        stop = [int(rng.integers(a, n)) + 1 for a, n in zip(start, file.shape, strict=True)]
        box = file.read_box(start, stop)
        assert box.flags.c_contiguous and box.dtype.isnative and box.flags.writeable
        np.testing.assert_array_equal(box, scan.array[tuple(map(slice, start, stop))])
    np.testing.assert_array_equal(file[0:1], scan.array[:1])
    for factors in ((1, 1, 1), (2, 3, 2), (7, 4, 50)):
        np.testing.assert_allclose(
            file.read_reduced(factors), block_means(scan.array, factors), rtol=1e-5, atol=1e-4
        )


def block_means(array, factors):
    for axis, f in enumerate(factors):
        blocks = [
            np.take(array, range(a, min(a + f, array.shape[axis])), axis)
            for a in range(0, array.shape[axis], f)
        ]
        array = np.stack([b.mean(axis, dtype=np.float64) for b in blocks], axis)
    return array


def geometry(path):
    """All header fields that say where the voxels are, as bytes in the file's own order."""
    header = nib.load(path).header
    names = "srow_x srow_y srow_z quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z".split()
    names += ["sform_code", "qform_code", "xyzt_units"]
    return {name: header[name].tobytes() for name in names} | {"pixdim": header["pixdim"][:4].tobytes()}


def stored_slope(path):
    """Slope and intercept as written; nibabel clears them in a header that it has read."""
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as file:
        kind = type(nib.load(path).header)
        header = kind.from_fileobj(file)
    return float(header["scl_slope"]), float(header["scl_inter"])


def check_label_lies_on(path, scan_path, labels_zyx, dtype=np.uint8):
    """The label file, read by nibabel alone, has the scan file's geometry and the right voxels."""
    scan, label = nib.load(scan_path), nib.load(path)
    assert geometry(path) == geometry(scan_path)
    assert type(label.header) is type(scan.header)
    assert label.header.endianness == scan.header.endianness
    np.testing.assert_array_equal(label.affine, scan.affine)
    assert label.get_data_dtype().newbyteorder("=") == dtype
    assert stored_slope(path) == (1.0, 0.0)
    orientation = "".join(nib.aff2axcodes(scan.affine))
    expected, _ = stored_as(labels_zyx.transpose(2, 1, 0), np.eye(4), orientation)
    np.testing.assert_array_equal(np.asarray(label.dataobj.get_unscaled()), expected)


# ---- geometry ----


ORIENTATIONS_AND_AFFINES = [(o, "oblique") for o in ORIENTATIONS]
ORIENTATIONS_AND_AFFINES += [(o, name) for o in ("RAS", "LPI", "SPL") for name in ("anisotropic", "sheared")]


@pytest.mark.filterwarnings("ignore:.*sform and qform")  # a qform cannot hold a shear
@pytest.mark.parametrize(("orientation", "name"), ORIENTATIONS_AND_AFFINES)
def test_any_orientation_loads_as_the_same_volume_and_takes_its_label_back(tmp_path, orientation, name):
    volume, affine = random_volume(), AFFINES[name]
    path = write(tmp_path / "scan.nii", *stored_as(volume, affine, orientation))
    scan = load_nifti(path)
    np.testing.assert_array_equal(scan.array, volume.transpose(2, 1, 0))
    assert scan.array.dtype == np.int16 and scan.array.flags.c_contiguous
    assert scan.orientation == orientation
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
    np.testing.assert_allclose(scan.spacing_mm, np.linalg.norm(affine[:3, :3], axis=0)[::-1], rtol=1e-6)
    assert scan.voxel_mm3 == pytest.approx(0.7 * 1.3 * 5.0, rel=1e-5)  # a shear changes lengths, not volume
    assert scan.file_shape == nib.load(path).shape

    labels = random_volume(0, 4, np.int64, SHAPE_XYZ[::-1])
    save_label(tmp_path / "label.nii.gz", labels, scan)
    check_label_lies_on(tmp_path / "label.nii.gz", path, labels)
    read_back = load_label(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(read_back.array, labels)
    assert same_grid(read_back, scan, 0.0)


# One for each order of the axes, each with other axes reversed: the axes are turned as for labels, above.
@pytest.mark.parametrize("orientation", ["RAS", "LSP", "AIL", "PRI", "SLA", "IPR"])
def test_write_nifti_in_any_orientation(tmp_path, orientation):
    array = random_volume(shape=SHAPE_XYZ[::-1])  # z y x
    path = tmp_path / "scan.nii"
    write_nifti(path, array, (5.0, 1.3, 0.7), origin_mm=(-31.5, 12.25, 100.0), orientation=orientation)
    stored, affine = stored_as(array.transpose(2, 1, 0), AFFINES["anisotropic"], orientation)
    image = nib.load(path)
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    np.testing.assert_array_equal(np.asarray(image.dataobj), stored)
    np.testing.assert_allclose(image.get_sform(), affine, atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), affine, atol=1e-5)
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    scan = load_nifti(path)
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_allclose(scan.spacing_mm, (5.0, 1.3, 0.7), rtol=1e-6)
    np.testing.assert_allclose(scan.affine @ [0, 0, 0, 1], [-31.5, 12.25, 100.0, 1], atol=1e-4)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SLA"])
def test_to_ras_brings_an_array_of_the_files_axes_onto_the_scan(tmp_path, orientation):
    stored, affine = stored_as(random_volume(), AFFINES["oblique"], orientation)
    scan = load_nifti(write(tmp_path / "scan.nii", stored, affine))
    np.testing.assert_array_equal(to_ras(stored, scan), scan.array)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR"])
def test_a_probability_map_is_stored_in_bytes_and_read_as_0_to_1(tmp_path, orientation):
    stored, affine = stored_as(random_volume(), AFFINES["oblique"], orientation)
    scan = load_nifti(write(tmp_path / "scan.nii", stored, affine))
    share = np.random.default_rng(0).integers(0, 256, scan.shape).astype(np.uint8)
    share.flat[:2] = 0, 255
    save_probability(tmp_path / "map.nii.gz", share, scan)
    back = load_nifti(tmp_path / "map.nii.gz")
    assert nib.load(tmp_path / "map.nii.gz").get_data_dtype() == np.uint8 and same_grid(back, scan)
    np.testing.assert_allclose(back.array, share / 255, atol=1e-6)
    assert back.array.max() == 1 and back.array.min() == 0
    with pytest.raises(ValueError, match=r"map\.nii\.gz: an array .* does not fit"):
        save_probability(tmp_path / "map.nii.gz", share[1:], scan)


FORMS = {
    "both": {"sform": 1, "qform": 1},
    "sform only": {"sform": 2, "qform": 0},
    "qform only": {"sform": 0, "qform": 1},  # as AMOS writes them
    "codes 4 and 3": {"sform": 4, "qform": 3},
    "neither": {"sform": 0, "qform": 0},
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("forms", FORMS)
def test_label_keeps_version_byte_order_and_forms(tmp_path, forms, kind, order):
    stored, affine = stored_as(random_volume(), AFFINES["oblique"], "PIR")
    path = write(tmp_path / "scan.nii.gz", stored, affine, kind=kind, order=order, **FORMS[forms])
    scan = load_nifti(path)
    assert scan.array.dtype == np.int16 and scan.array.dtype.isnative
    if forms != "neither":
        np.testing.assert_array_equal(scan.array, random_volume().transpose(2, 1, 0))
        np.testing.assert_allclose(scan.affine, AFFINES["oblique"], atol=1e-4)
    labels = random_volume(0, 3, np.uint8, scan.array.shape)
    save_label(tmp_path / "label.nii", labels, scan)
    check_label_lies_on(tmp_path / "label.nii", path, labels)


@pytest.mark.parametrize("units", ["mm", "micron", "meter", "unknown"])
def test_label_keeps_units_and_both_forms_when_they_differ(tmp_path, units):
    mm = {"micron": 1e-3, "meter": 1e3}.get(units, 1)
    in_unit = np.diag([1 / mm, 1 / mm, 1 / mm, 1])
    image = nib.Nifti1Image(random_volume(), in_unit @ AFFINES["sheared"])
    image.set_sform(in_unit @ AFFINES["sheared"], 4)
    image.set_qform(in_unit @ AFFINES["oblique"], 1)
    image.header.set_xyzt_units(units)
    nib.save(image, tmp_path / "scan.nii")
    with pytest.warns(UserWarning, match=r"scan\.nii: sform and qform 3.02 mm apart; the sform is used"):
        scan = load_nifti(tmp_path / "scan.nii")
    expected = AFFINES["sheared"]
    np.testing.assert_allclose(scan.affine, expected, rtol=1e-5, atol=1e-5)  # sform first
    np.testing.assert_allclose(scan.spacing_mm, np.linalg.norm(expected[:3, :3], axis=0)[::-1], rtol=1e-5)
    assert scan.voxel_mm3 == pytest.approx(0.7 * 1.3 * 5, rel=1e-5)
    np.testing.assert_allclose(scan.file_affine, in_unit @ AFFINES["sheared"], rtol=1e-5, atol=1e-5 / mm)
    labels = random_volume(0, 3, np.uint8, scan.array.shape)
    save_label(tmp_path / "label.nii", labels, scan)
    check_label_lies_on(tmp_path / "label.nii", tmp_path / "scan.nii", labels)
    assert nib.load(tmp_path / "label.nii").header.get_xyzt_units()[0] == units


def test_unusable_qform_beside_a_good_sform_does_not_stop_saving(tmp_path):
    path = write(tmp_path / "scan.nii", random_volume(), AFFINES["anisotropic"])
    patch(path, QUATERN_B_OFFSET, np.float32(1.5))  # beyond 1: no rotation
    scan = load_nifti(path)
    labels = random_volume(0, 3, np.uint8, scan.array.shape)
    save_label(tmp_path / "label.nii", labels, scan)
    check_label_lies_on(tmp_path / "label.nii", path, labels)


@pytest.mark.parametrize(
    "highest, dtype", [(0, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16)]
)
def test_label_type_follows_the_highest_label(tmp_path, highest, dtype):
    path = write(tmp_path / "scan.nii", random_volume(), AFFINES["anisotropic"])
    labels = np.zeros(SHAPE_XYZ[::-1], np.int64)
    labels[1, 2, 3] = highest
    save_label(tmp_path / "label.nii", labels, load_nifti(path))
    check_label_lies_on(tmp_path / "label.nii", path, labels, dtype)
    read_back = load_label(tmp_path / "label.nii")
    assert read_back.array.dtype == dtype and read_back.array[1, 2, 3] == highest


def test_label_of_a_scan_with_scaling_has_slope_one(tmp_path):
    image = nib.Nifti1Image(random_volume(), AFFINES["anisotropic"])
    image.header.set_data_dtype(np.uint16)
    image.header.set_slope_inter(1, -1024)
    image.header["cal_max"] = 2000  # display range of the scan: a label would show black
    nib.save(image, tmp_path / "scan.nii")
    labels = random_volume(0, 3, bool, SHAPE_XYZ[::-1])
    save_label(tmp_path / "label.nii", labels, load_nifti(tmp_path / "scan.nii"))
    check_label_lies_on(tmp_path / "label.nii", tmp_path / "scan.nii", labels)
    assert nib.load(tmp_path / "label.nii").header["cal_max"] == 0


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.zeros((3, 5, 5), np.uint8), r"\(3, 5, 5\) does not fit the scan's grid \(3, 5, 4\)"),
        (np.full((3, 5, 4), -1), "label values -1..-1, expected whole numbers in 0..65535"),
        (np.full((3, 5, 4), 65536), "label values 65536..65536, expected whole numbers in 0..65535"),
        (np.full((3, 5, 4), 0.5), "label values 0.5..0.5, expected whole numbers in 0..65535"),
        (np.full((3, 5, 4), np.nan), "label values nan..nan, expected whole numbers in 0..65535"),
    ],
)
def test_labels_that_a_file_cannot_hold_are_refused(tmp_path, labels, message):
    scan = load_nifti(write(tmp_path / "scan.nii", random_volume(), AFFINES["anisotropic"]))
    with pytest.raises(ValueError, match=message):
        save_label(tmp_path / "label.nii", labels, scan)
    assert not (tmp_path / "label.nii").exists()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_full_disk_leaves_no_partial_file_and_the_old_one_intact(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    scan = load_nifti(write(tmp_path / "scan.nii", random_volume(shape=(40, 40, 40)), AFFINES["anisotropic"]))
    path = tmp_path / f"label{suffix}"
    save_label(path, np.ones_like(scan.array), scan)
    before = path.read_bytes()
    labels = random_volume(0, 250, np.uint8, (40, 40, 40))  # 64 kB that do not compress
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # what a full disk does, at 10 kB
    try:
        with pytest.raises(OSError) as error:
            save_label(path, labels, scan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, "scan.nii"])


# ---- lazy reading ----


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_boxes_in_any_orientation_equal_slices(tmp_path, monkeypatch, orientation):
    monkeypatch.setattr("common.scan_files.CHUNK_BYTES", 100)  # one or two slices at a time
    volume = random_volume(shape=(6, 5, 7))
    path = write(tmp_path / "scan.nii", *stored_as(volume, AFFINES["oblique"], orientation))
    check_lazy_reading(open_nifti(path), load_nifti(path))
    np.testing.assert_array_equal(load_nifti(path).array, volume.transpose(2, 1, 0))


def test_boxes_of_a_compressed_file_equal_slices(tmp_path, monkeypatch):
    monkeypatch.setattr("common.scan_files.CHUNK_BYTES", 100)
    stored, affine = stored_as(random_volume(shape=(6, 5, 7)), AFFINES["oblique"], "IRP")
    path = write(tmp_path / "scan.nii.gz", stored, affine)
    check_lazy_reading(open_nifti(path), load_nifti(path))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_boxes_of_any_type_and_scaling(tmp_path, dtype, order, kind):
    stored, affine = stored_as(random_volume(0, 200, dtype, (6, 5, 7)), AFFINES["oblique"], "PIR")
    path = write(tmp_path / "scan.nii", stored, affine, order=order, kind=kind)
    check_lazy_reading(open_nifti(path), load_nifti(path))
    for slope, intercept in ((1, -1024), (2, 0), (0.25, 3)):
        offset, size = (SLOPE_OFFSET, np.float32) if kind is nib.Nifti1Image else (176, np.float64)
        patch(path, offset, np.array([slope, intercept]).astype(np.dtype(size).newbyteorder(order)))
        scan = load_nifti(path)
        assert scan.array.min() == float(stored.min()) * slope + intercept
        check_lazy_reading(open_nifti(path), scan)


def test_type_of_a_box_follows_from_the_stored_type(tmp_path):
    path = write(tmp_path / "ct.nii", random_volume(0, 3000, np.uint16), np.eye(4))
    patch(path, SLOPE_OFFSET, np.array([1, -1024], np.float32))
    assert load_nifti(path).array.dtype == np.int16
    assert open_nifti(path).read_box((0, 0, 0), (1, 1, 1)).dtype == np.int32  # 65535 - 1024 needs it


def test_nan_in_a_box_becomes_the_lowest_of_the_file(tmp_path):
    volume = random_volume(5, 100, np.float32)
    volume[0, 0, :2] = np.nan, -np.inf
    volume[3, 4, 2] = 1  # outside the box
    file = open_nifti(write(tmp_path / "scan.nii.gz", volume, np.eye(4)))
    with pytest.warns(UserWarning, match=r"scan\.nii\.gz: 2 NaN or infinite voxels set to 1$"):
        box = file.read_box((0, 0, 0), (3, 1, 1))
    assert box[:, 0, 0].tolist() == [1, 1, volume[0, 0, 2]]
    with pytest.warns(UserWarning, match="2 NaN"):
        reduced = open_nifti(file.path).read_reduced((1, 1, 1))
    assert reduced[:, 0, 0].tolist() == [1, 1, volume[0, 0, 2]]
    empty = write(tmp_path / "empty.nii", np.full(SHAPE_XYZ, np.nan, np.float32), np.eye(4))
    for read in (lambda f: f.read_box((0, 0, 0), (1, 1, 1)), lambda f: f.read_reduced((1, 1, 1))):
        with pytest.raises(ValueError, match=r"empty\.nii: holds no finite value"):
            read(open_nifti(empty))


@pytest.mark.parametrize("slice_of_the_lowest", [0, 1, 2])
def test_lowest_is_that_of_all_parts_of_the_file(tmp_path, monkeypatch, slice_of_the_lowest):
    """Read slice by slice, the lowest value in any of them counts."""
    monkeypatch.setattr("common.scan_files.CHUNK_BYTES", 1)
    volume = random_volume(5, 100, np.float32)
    volume[0, 1, slice_of_the_lowest], volume[1, 1] = 1, np.nan
    with pytest.warns(UserWarning, match="voxels set to 1$"):
        assert open_nifti(write(tmp_path / "scan.nii", volume, np.eye(4))).lowest == 1


def test_values_are_cut_before_they_are_averaged(tmp_path):
    """By hand: of -3024 and 40 HU, cut to -1024 and 40, the mean is -492; of 0 and 30,000 it is 1535.5."""
    volume = np.array([-3024, 40, 0, 30_000], np.int16).reshape(4, 1, 1)
    file = open_nifti(write(tmp_path / "scan.nii", volume, np.eye(4)))
    assert file.read_reduced((1, 1, 2), (-1024, 3071)).ravel().tolist() == [-492, 1535.5]
    assert file.read_reduced((1, 1, 2)).ravel().tolist() == [-1492, 15_000]


def test_volume_of_a_voxel_is_the_determinant():
    """Axes of 2, 3 and 5 mm at right angles, in another order; then one of them leans by 60 degrees."""
    affine = np.array([[0, -3.0, 0, 7], [2, 0, 0, 8], [0, 0, 5, 9], [0, 0, 0, 1]])
    assert voxel_mm3(affine) == 30
    affine[:3, 2] = 5 * np.sin(np.pi / 3), 0, 5 * np.cos(np.pi / 3)
    assert voxel_mm3(affine) == pytest.approx(15)


@pytest.mark.parametrize(
    "start, stop", [((0, 0, 0), (3, 5, 5)), ((-1, 0, 0), (1, 1, 1)), ((1, 1, 1), (1, 2, 2))]
)
def test_box_outside_or_empty_is_refused(tmp_path, start, stop):
    file = open_nifti(write(tmp_path / "scan.nii", random_volume(), np.eye(4)))
    with pytest.raises(ValueError, match=re.escape(f"box {start} to {stop} is not inside (3, 5, 4) (z y x)")):
        file.read_box(start, stop)


@pytest.mark.parametrize("factors", [(0, 1, 1), (1, 1), (1.5, 1, 1)])
def test_bad_factors_are_refused(tmp_path, factors):
    file = open_nifti(write(tmp_path / "scan.nii", random_volume(), np.eye(4)))
    with pytest.raises(ValueError, match=r"scan\.nii: factors .* three whole numbers above 0"):
        file.read_reduced(factors)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_memory_of_a_box_is_not_that_of_the_volume(tmp_path, monkeypatch, name):
    monkeypatch.setattr("common.scan_files.CHUNK_BYTES", 2**19)  # 2 MB as float64, with the sums beside it
    shape = (128, 128, 600)  # 19.7 MB as int16
    path = tmp_path / name
    write(path, np.broadcast_to(random_volume(shape=(128, 128, 1)), shape), np.eye(4))
    file = open_nifti(path)
    for read in (lambda: file.read_box((550, 10, 20), (590, 60, 60)), lambda: file.read_reduced((8, 4, 4))):
        tracemalloc.start()
        try:
            read()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8e6, f"{peak / 1e6:.1f} MB"


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_truncated_file_gives_what_lies_before_the_cut(tmp_path, monkeypatch, name):
    monkeypatch.setattr("common.scan_files.CHUNK_BYTES", 1)
    path = write(tmp_path / name, random_volume(shape=(30, 30, 30)), np.eye(4))
    first = load_nifti(path).array[:2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    file = open_nifti(path)
    np.testing.assert_array_equal(file.read_box((0, 0, 0), (2, 30, 30)), first)
    for read in (lambda: file.read_box((20, 0, 0), (30, 1, 1)), lambda: file.read_reduced((2, 2, 2))):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}: truncated or damaged .*; fetch it again"):
            read()


def test_gzip_that_holds_less_than_the_header_promises(tmp_path):
    path = write(tmp_path / "scan.nii", random_volume(shape=(8, 8, 8)), np.eye(4))
    short = tmp_path / "short.nii.gz"
    short.write_bytes(gzip.compress(path.read_bytes()[:-200]))  # a sound gzip stream
    message = r"short\.nii\.gz: truncated or damaged \(ends between slice 0 and 8 of 8\); fetch it again"
    for read in (load_nifti, lambda p: open_nifti(p).read_box((7, 0, 0), (8, 1, 1))):
        with pytest.raises(ValueError, match=message.replace("0 and", r"\d and")):
            read(short)


def test_opened_file_takes_a_label_and_survives_pickling(tmp_path):
    stored, affine = stored_as(random_volume(), AFFINES["oblique"], "PIR")
    path = write(tmp_path / "scan.nii.gz", stored, affine)
    file = pickle.loads(pickle.dumps(open_nifti(path)))
    labels = random_volume(0, 3, np.uint8, file.shape)
    save_label(tmp_path / "label.nii", labels, file)
    check_label_lies_on(tmp_path / "label.nii", path, labels)
    assert same_grid(file, load_label(tmp_path / "label.nii"), 0.0)


# ---- same_grid ----


def test_same_grid_whatever_the_orientation(tmp_path):
    scans = [
        load_nifti(write(tmp_path / f"{o}.nii", *stored_as(random_volume(), AFFINES["oblique"], o)))
        for o in ("RAS", "LPI", "SLA")
    ]
    assert same_grid(scans[0], scans[1]) and same_grid(scans[0], scans[2])


def test_same_grid_tolerance_holds_at_every_corner(tmp_path):
    scan = load_nifti(write(tmp_path / "scan.nii", random_volume(), AFFINES["anisotropic"]))
    shifted, turned, *stretched = (scan.affine.copy() for _ in range(5))
    shifted[1, 3] += 0.05
    turned[:3, :3] = rotation(1, 0, 1) @ turned[:3, :3]
    for axis, affine in enumerate(stretched):
        affine[axis, axis] += 0.05  # 0 mm off at the first voxel, most at the last
    off_mm = [0.05, *(0.05 * (n - 1) for n in SHAPE_XYZ)]
    for affine, error_mm in zip([shifted, *stretched], off_mm, strict=True):
        other = replace(scan, affine=affine)
        assert same_grid(scan, other, error_mm * 1.01) and same_grid(other, scan, error_mm * 1.01)
        assert not same_grid(scan, other, error_mm * 0.99)
        assert not same_grid(scan, other)
    assert not same_grid(scan, replace(scan, affine=turned))
    within = scan.affine.copy()
    within[:3, 3] += 0.0099
    assert same_grid(scan, replace(scan, affine=within))


def test_same_grid_of_different_shapes_is_false(tmp_path):
    a = load_nifti(write(tmp_path / "a.nii", random_volume(), AFFINES["anisotropic"]))
    b = load_nifti(write(tmp_path / "b.nii", random_volume(shape=(4, 5, 4)), AFFINES["anisotropic"]))
    assert not same_grid(a, b)


# ---- values ----


def test_ct_with_intercept_stays_int16_and_reads_as_hu(tmp_path):
    hu = random_volume(-1024, 3071)
    path = write(tmp_path / "ct.nii", (hu + 1024).astype(np.uint16), np.eye(4))
    patch(path, SLOPE_OFFSET, np.array([1, -1024], np.float32))
    scan = load_nifti(path)
    assert scan.array.dtype == np.int16
    np.testing.assert_array_equal(scan.array, hu.transpose(2, 1, 0))


@pytest.mark.parametrize(
    "stored, slope, intercept, dtype",
    [
        (np.array([0, 32767], np.int16), 1, 0, np.int16),
        (np.array([0, 65535], np.uint16), 1, 0, np.uint16),
        (np.array([0, 20000], np.int16), 2, -5000, np.int32),  # 35000 does not fit int16
        (np.array([0, 16000], np.int16), -2, 0, np.int16),
        (np.array([0, 2**30], np.int32), 4, 0, np.float32),  # fits no int32
        (np.array([0, 100], np.int16), 0.5, 0, np.float32),
        (np.array([0, 100], np.int16), 1, 0.5, np.float32),
        (np.array([0, 1.5], np.float64), 1, 0, np.float32),
        (np.array([0, 1.5], np.float32), 3, 1, np.float32),
    ],
)
def test_scaling_is_applied_and_integers_stay_when_it_allows(tmp_path, stored, slope, intercept, dtype):
    path = write(tmp_path / "scan.nii", np.tile(stored, (3, 2, 1)), np.eye(4))
    patch(path, SLOPE_OFFSET, np.array([slope, intercept], np.float32))
    scan = load_nifti(path)
    assert scan.array.dtype == dtype
    np.testing.assert_array_equal(scan.array[:, 0, 0], stored.astype(np.float64) * slope + intercept)


def test_nan_and_infinity_become_the_lowest_value_with_a_count(tmp_path):
    volume = random_volume(5, 100, np.float32)
    lowest = volume[1:].min()
    volume[0, 0, :3] = np.nan, np.inf, -np.inf
    path = write(tmp_path / "scan.nii", volume, np.eye(4))
    with pytest.warns(UserWarning, match=rf"scan.nii: 3 NaN or infinite voxels set to {lowest:g}$"):
        scan = load_nifti(path)
    np.testing.assert_array_equal(scan.array[:, 0, 0], lowest)
    np.testing.assert_array_equal(scan.array[:, 1:], volume.transpose(2, 1, 0)[:, 1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_stored_as_float_are_rounded(tmp_path, dtype):
    volume = np.zeros(SHAPE_XYZ, dtype)
    volume[0, 0] = 0.99999997, 2.9999999993, 104.0
    label = load_label(write(tmp_path / "label.nii", volume, np.eye(4)))
    assert label.array.dtype == np.uint8
    assert label.array[:, 0, 0].tolist() == [1, 3, 104]
    assert label.array.sum() == 108


@pytest.mark.parametrize(
    "values, message",
    [
        ([0, 1, 0.4], "label value 0.4 is not a whole number"),
        ([0, 1.002, 1], "label value 1.002 is not a whole number"),
        ([0, -1, 1], "label values -1..1, expected whole numbers in 0..65535"),
        ([0, 70000, 1], "label values 0..70000, expected whole numbers in 0..65535"),
    ],
)
def test_values_that_cannot_be_labels_are_refused(tmp_path, values, message):
    dtype = np.float32 if any(v % 1 for v in values) else np.int32
    volume = np.zeros(SHAPE_XYZ, dtype)
    volume[0, 0] = values
    path = write(tmp_path / "label.nii", volume, np.eye(4))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_label(path)


@pytest.mark.parametrize("shape", [(4, 5, 3, 1), (4, 5, 3, 1, 1), (4, 5, 1, 1), (4, 5)])
def test_missing_and_trailing_axes(tmp_path, shape):
    volume = random_volume(shape=shape)
    path = write(tmp_path / "scan.nii", volume, AFFINES["anisotropic"])
    scan = load_nifti(path)
    volume = volume.reshape((*shape, 1)[:3])
    np.testing.assert_array_equal(scan.array, volume.transpose(2, 1, 0))
    assert scan.file_shape == volume.shape
    labels = random_volume(0, 3, np.uint8, scan.array.shape)
    save_label(tmp_path / "label.nii", labels, scan)
    label = nib.load(tmp_path / "label.nii")
    assert label.shape == (shape if len(shape) == 2 else volume.shape)  # a 2-D file takes a 2-D mask
    np.testing.assert_array_equal(label.affine, nib.load(path).affine)
    np.testing.assert_array_equal(np.asarray(label.dataobj), labels.transpose(2, 1, 0).reshape(label.shape))
    np.testing.assert_array_equal(load_label(tmp_path / "label.nii").array, labels)


# ---- FreeSurfer's files ----


def write_freesurfer(path, stored, affine):
    nib.save(nib.MGHImage(stored, affine.astype(np.float32)), path)
    return path


@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_freesurfer_reads_like_the_same_scan_in_nifti(tmp_path, suffix, dtype):
    """LIA, as FreeSurfer's own volumes; and oblique, in voxels of different sizes."""
    low = 0 if dtype == np.uint8 else -1000
    volume = random_volume(low, 250, dtype, (6, 5, 7))
    for number, (orientation, affine) in enumerate([("LIA", np.eye(4)), ("PIR", AFFINES["oblique"])]):
        stored, file_affine = stored_as(volume, affine, orientation)
        file = write_freesurfer(tmp_path / f"{number}{suffix}", stored, file_affine)
        scan = load_nifti(file)
        twin = load_nifti(write(tmp_path / f"{number}.nii.gz", stored, file_affine))
        np.testing.assert_array_equal(scan.array, volume.transpose(2, 1, 0))
        assert scan.array.dtype == dtype and scan.array.dtype.isnative
        assert scan.orientation == orientation and scan.file_shape == twin.file_shape
        np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
        assert same_grid(scan, twin, 1e-3) and scan.voxel_mm3 == pytest.approx(twin.voxel_mm3, rel=1e-5)
        check_lazy_reading(open_nifti(file), scan)


def test_the_mask_of_a_freesurfer_scan_is_a_nifti_on_its_grid(tmp_path):
    stored, affine = stored_as(random_volume(), AFFINES["oblique"], "LIA")
    scan = open_nifti(write_freesurfer(tmp_path / "orig.mgz", stored, affine))
    labels = random_volume(0, 55, np.uint8, SHAPE_XYZ[::-1])
    save_label(tmp_path / "mask.nii.gz", labels, scan)
    written = nib.load(tmp_path / "mask.nii.gz")
    assert type(written) is nib.Nifti1Image and written.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(written.affine) == ("L", "I", "A") and written.header["sform_code"] > 0
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    assert written.header.get_xyzt_units()[0] == "mm"
    read_back = load_label(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_back.array, labels)
    assert same_grid(read_back, scan)


def test_freesurfer_labels_above_255(tmp_path):
    """aparc+aseg numbers the cortex from 1001 on."""
    stored = np.zeros(SHAPE_XYZ, np.int32)
    stored[1, 2, 0], stored[3, 4, 2] = 18, 12175
    label = load_label(write_freesurfer(tmp_path / "aparc.mgz", stored, np.eye(4)))
    assert label.array.dtype == np.uint16
    assert (label.array[0, 2, 1], label.array[2, 4, 3]) == (18, 12175) and (label.array > 0).sum() == 2


# ---- files that are refused ----


def write_truncated(path):
    write(path, random_volume(shape=(30, 30, 30)), np.eye(4))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_rgb(path):
    rgb = np.zeros(SHAPE_XYZ, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), path)


def write_patched(path, offset, value):
    patch(write(path, random_volume(), np.eye(4)), offset, value)


def write_nan_affine(path):
    patch(write(path, random_volume(), np.eye(4), qform=0), SROW_OFFSET, np.float32(np.nan))


def write_slope_without_intercept(path):
    write_patched(path, SLOPE_OFFSET, np.array([2, np.nan], np.float32))


def write_flat_affine(path):
    affine = np.eye(4)
    affine[:3, 2] = affine[:3, 1]
    write(path, random_volume(), affine, qform=0)


def write_nearly_flat_affine(path):
    affine = np.eye(4)
    affine[:3, :3] = rotation(33, 0, 1) @ np.diag([1, 1, 2.0])
    affine[:3, 2] = 1.3 * affine[:3, 0] + 1e-7  # an axis along another one, but for rounding
    write(path, random_volume(), affine, qform=0)


def write_plain_named_gz(path, order):
    write(path.with_suffix(""), random_volume(), np.eye(4), order=order).rename(path)


def write_mgh(path, *, compressed):
    """FreeSurfer's file with an ending that does not tell whether it is compressed."""
    honest = path.with_suffix(".mgz" if compressed else ".mgh")
    nib.save(nib.MGHImage(random_volume(), np.eye(4)), honest)
    honest.rename(path)


def write_truncated_mgh(path):
    nib.save(nib.MGHImage(random_volume(shape=(30, 40, 50)), np.eye(4)), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


REFUSED = {
    "4-D": ("a.nii", lambda p: write(p, random_volume(shape=(4, 5, 3, 2)), np.eye(4)),
            r"4-D with shape \(4, 5, 3, 2\); each file must hold one 3-D scan"),
    "RGB": ("a.nii", write_rgb, "an RGB picture stored as NIfTI"),
    "complex": ("a.nii", lambda p: write(p, random_volume(dtype=np.complex64), np.eye(4)),
                r"complex values \(complex64\); export the magnitude image"),
    "no voxels": ("a.nii", lambda p: write(p, np.zeros((4, 0, 3), np.int16), np.eye(4)),
                  r"has no voxels \(shape \(4, 0, 3\)\)"),
    "0 bytes": ("a.nii", lambda p: p.write_bytes(b""), "an empty file"),
    "0 bytes .gz": ("a.nii.gz", lambda p: p.write_bytes(b""), "an empty file"),
    "truncated gzip": ("a.nii.gz", write_truncated, "truncated or damaged .*; fetch it again"),
    "truncated plain": ("a.nii", write_truncated, "truncated or damaged .*; fetch it again"),
    "Git-LFS pointer": ("a.nii.gz", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"),
                        "a Git-LFS pointer, not the scan; run 'git lfs pull'"),
    "plain named .gz": ("a.nii.gz", lambda p: write_plain_named_gz(p, "<"),
                        "named .gz but not compressed; rename it to .nii"),
    "big-endian plain named .GZ": ("a.NII.GZ", lambda p: write_plain_named_gz(p, ">"),
                                   "named .gz but not compressed; rename it to .nii"),
    "gzip named .nii": ("a.nii", lambda p: p.write_bytes(gzip.compress(bytes(400))),
                        "compressed but not named .gz; rename it to .nii.gz"),
    "text named .nii": ("a.nii", lambda p: p.write_text("404: Not Found"), "not a readable NIfTI file"),
    "text named .nii.gz": ("a.nii.gz", lambda p: p.write_text("404: Not Found"), "not a readable NIfTI file"),
    "gzipped text": ("a.nii.gz", lambda p: p.write_bytes(gzip.compress(b"x" * 999)),
                     "not a readable NIfTI file"),
    "other format": ("a.img", lambda p: nib.save(nib.AnalyzeImage(random_volume(), np.eye(4)), p),
                     r"an \.hdr/\.img pair \(Analyze or NIfTI\), which is not read; convert it to \.nii\.gz"),
    "4-D mgz": ("a.mgz", lambda p: nib.save(nib.MGHImage(random_volume(shape=(4, 5, 3, 2)), np.eye(4)), p),
                r"4-D with shape \(4, 5, 3, 2\); each file must hold one 3-D scan"),
    "plain named .mgz": ("a.mgz", lambda p: write_mgh(p, compressed=False),
                         "named .mgz but not compressed; rename it to .mgh"),
    "compressed .mgh": ("a.mgh", lambda p: write_mgh(p, compressed=True),
                        "compressed but named .mgh; rename it to .mgz"),
    "text in .mgz": ("a.mgz", lambda p: p.write_bytes(gzip.compress(b"404: Not Found")),
                     "not a readable NIfTI file"),
    "text in .mgh": ("a.mgh", lambda p: p.write_bytes(b"x" * 999), "not a readable NIfTI file"),
    "truncated mgz": ("a.mgz", lambda p: write_truncated_mgh(p), "not a readable NIfTI file"),
    "truncated mgh": ("a.mgh", lambda p: write_truncated_mgh(p),
                      "truncated or damaged .*; fetch it again"),
    "unknown data type": ("a.nii", lambda p: write_patched(p, DATATYPE_OFFSET, np.int16(1234)),
                          "not a readable NIfTI file .*1234"),
    "slope without intercept": ("a.nii", write_slope_without_intercept, "not a readable NIfTI file"),
    "only NaN": ("a.nii", lambda p: write(p, np.full(SHAPE_XYZ, np.nan, np.float32), np.eye(4)),
                 "holds no finite value"),
    "flat affine": ("a.nii", write_flat_affine, "its affine is not usable"),
    "nearly flat affine": ("a.nii", write_nearly_flat_affine, "its affine is not usable"),
    "NaN affine": ("a.nii", write_nan_affine, "its affine is not usable"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_file_that_is_not_a_scan_is_refused_by_name_and_reason(tmp_path, case):
    name, make, message = REFUSED[case]
    path = tmp_path / name
    make(path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}") as error:
        load_nifti(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", [c for c in REFUSED if "truncated" not in c and c != "only NaN"])
def test_file_that_is_not_a_scan_is_refused_on_opening(tmp_path, case):
    name, make, message = REFUSED[case]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}: {message}"):
        open_nifti(tmp_path / name)


@pytest.mark.parametrize("load", [load_nifti, load_label, open_nifti])
def test_missing_file(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="nowhere.nii.gz: no such file"):
        load(tmp_path / "nowhere.nii.gz")


@pytest.mark.parametrize(
    "path, is_one, name",
    [
        ("a/scan_001.nii.gz", True, "scan_001"),
        ("scan.v2.NII", True, "scan.v2"),
        ("._scan_001.nii.gz", False, "._scan_001"),
        ("scan.nii.png", False, "scan.nii"),
        ("scan.gz", False, "scan"),
        ("mri/orig.mgz", True, "orig"),
        ("aparc.a2009s+aseg.MGZ", True, "aparc.a2009s+aseg"),
        ("T1.mgh", True, "T1"),
    ],
)
def test_names(path, is_one, name):
    assert is_nifti(path) is is_one
    assert case_name(path) == name


# ---- real files ----

UNREADABLE = {
    "4d_int16_scl_slope.nii": r"4-D with shape \(17, 21, 3, 20\)",
    "4d_oblique_int16.nii.gz": r"4-D with shape \(128, 96, 24, 2\)",
    "nifti2_4d_int16.nii.gz": r"4-D with shape \(32, 20, 12, 2\)",
    "complex64.nii.gz": "complex values",
    "rgb24_single_slice.nii.gz": "an RGB picture",
    "git_lfs_pointer.nii.gz": "a Git-LFS pointer",
    "plain_nifti_named_gz.nii.gz": "named .gz but not compressed",
    "truncated_gzip.nii.gz": "truncated or damaged",
}
# name: (shape x y z, spacing x y z, orientation, dtype after loading), from ../shared/data/README.md
READABLE = {
    "oblique_ct_head.nii.gz": ((175, 248, 58), (0.81, 0.81, 2.4), "RAS", "uint8"),
    "oblique_flair_stroke.nii.gz": ((124, 160, 140), (1, 1, 1), "RAS", "uint8"),
    "oblique_flair_stroke_drawing.nii.gz": ((124, 160, 140), (1, 1, 1), "RAS", "uint8"),
    "sheared_affine_ct_uint8_slope.nii.gz": ((306, 422, 54), (0.48, 0.48, 2.37), "RAS", "float32"),
    "big_endian_int16.nii": ((33, 41, 25), (2, 2, 2), "LAS", "int16"),
    "big_endian_float32_nan_3slices.nii": ((17, 21, 3), (4, 4, 8), "LAS", "float32"),
    "big_endian_uint8_sform_only.nii.gz": ((91, 109, 91), (2, 2, 2), "RAS", "uint8"),
    "mask_int32_slope_just_below_one.nii.gz": ((240, 240, 155), (1, 1, 1), "LPS", "float32"),
    "label_float64_for_amos_0001.nii.gz": ((122, 101, 112), (3, 3, 3), "RAS", "float32"),
    "label_flipped_grid_for_amos_0004.nii.gz": ((512, 512, 20), (0.98, 0.98, 2), "LAS", "uint8"),
    "single_slice_uint16_pir.nii.gz": ((192, 192, 1), (1.15, 1.15, 1), "PIR", "uint16"),
    "same_brain_RAS.nii.gz": ((64, 79, 67), (2.39, 2.39, 2.37), "RAS", "float32"),
    "same_brain_LPI.nii.gz": ((64, 79, 67), (2.39, 2.39, 2.37), "LPI", "float32"),
    "same_brain_AIL.nii.gz": ((79, 67, 64), (2.39, 2.37, 2.39), "AIL", "float32"),
    "same_brain_PSR.nii.gz": ((79, 67, 64), (2.39, 2.37, 2.39), "PSR", "float32"),
    "same_brain_SPL.nii.gz": ((67, 79, 64), (2.37, 2.39, 2.39), "SPL", "float32"),
}


@needs_data
def test_every_real_file_is_listed_here():
    assert {p.name for p in (DATA / "odd_headers").iterdir()} == UNREADABLE.keys() | READABLE.keys()


@needs_data
@pytest.mark.parametrize("name", READABLE)
def test_real_file_loads_and_takes_a_label(tmp_path, name):
    path = DATA / "odd_headers" / name
    shape, spacing_xyz, orientation, dtype = READABLE[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scan = load_nifti(path)
    messages = [str(w.message).split(": ")[1] for w in caught]
    expected = ["153 NaN or infinite voxels set to 409.3"] if "nan" in name else []
    # A quaternion cannot hold a shear, so this file's two forms cannot agree.
    expected += ["sform and qform 33.4 mm apart; the sform is used"] if "sheared" in name else []
    assert messages == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_lazy_reading(open_nifti(path), scan)
    assert scan.file_shape == shape and scan.orientation == orientation and scan.array.dtype == dtype
    stored_spacing = np.linalg.norm(scan.file_affine[:3, :3], axis=0)
    np.testing.assert_allclose(stored_spacing, spacing_xyz, atol=0.0051)
    values = np.asarray(nib.load(path).dataobj)
    values = np.where(np.isfinite(values), values, np.nanmin(values)).astype(np.float32)
    got, _ = stored_as(np.asarray(scan.array, np.float32).transpose(2, 1, 0), np.eye(4), orientation)
    np.testing.assert_allclose(got, values, rtol=1e-6, atol=1e-4)

    z, y, x = np.indices(scan.array.shape, dtype=np.uint16, sparse=True)
    labels = ((7 * z + 3 * y + x) % 5).astype(np.uint8)  # no symmetry
    save_label(tmp_path / "label.nii", labels, scan)
    check_label_lies_on(tmp_path / "label.nii", path, labels)
    assert same_grid(load_label(tmp_path / "label.nii"), scan, 0.0)


@needs_data
@pytest.mark.parametrize("name", UNREADABLE)
def test_real_file_that_is_not_a_scan_says_why(name):
    with pytest.raises(ValueError, match=f"{re.escape(name)}: {UNREADABLE[name]}"):
        load_nifti(DATA / "odd_headers" / name)


@needs_data
@pytest.mark.parametrize("orientation", ["LPI", "AIL", "PSR", "SPL"])
def test_one_brain_in_five_orientations_is_one_array(orientation):
    reference = load_nifti(DATA / "odd_headers" / "same_brain_RAS.nii.gz")
    scan = load_nifti(DATA / "odd_headers" / f"same_brain_{orientation}.nii.gz")
    np.testing.assert_array_equal(scan.array, reference.array)
    np.testing.assert_allclose(scan.affine, reference.affine, atol=1e-4)
    assert same_grid(scan, reference)


@needs_data
def test_label_stored_in_other_axes_than_its_image_lies_right_after_loading():
    """LAS label, LPS image, one grid in space: overlaying the files is wrong, overlaying the arrays right."""
    image = load_nifti(DATA / "abdomen_ct/imagesTr/amos_0004.nii.gz")
    flipped = load_label(DATA / "odd_headers/label_flipped_grid_for_amos_0004.nii.gz")
    turned = load_label(DATA / "abdomen_ct/all_structures/amos_0004_totalsegmentator_v2_117.nii.gz")
    assert (flipped.orientation, image.orientation, turned.orientation) == ("LAS", "LPS", "LPS")
    assert same_grid(flipped, image)  # compares the arrays in memory, where both are RAS+
    np.testing.assert_array_equal(flipped.array, turned.array)
    raw = [np.asarray(nib.load(scan.path).dataobj) for scan in (flipped, turned)]
    assert (raw[0] != raw[1]).mean() > 0.1


@needs_data
def test_real_labels_that_are_not_stored_as_whole_numbers():
    brain = load_label(DATA / "odd_headers/mask_int32_slope_just_below_one.nii.gz")
    assert brain.array.dtype == np.uint8 and set(np.unique(brain.array)) == {0, 1}
    values = np.asarray(nib.load(brain.path).dataobj)
    assert not values.astype(int).any() and brain.array.sum() == (values > 0.5).sum() == 1487565
    tumour = load_label(DATA / "brain_tumor_mr/labelsTr/BRATS_001.nii.gz")
    assert same_grid(brain, tumour) and brain.array[tumour.array > 0].mean() > 0.99
    organs = load_label(DATA / "odd_headers/label_float64_for_amos_0001.nii.gz")
    assert organs.array.dtype == np.uint8 and organs.array.max() == 104 and len(np.unique(organs.array)) == 60
    assert same_grid(organs, load_nifti(DATA / "abdomen_ct/imagesTr/amos_0001.nii.gz"))


@needs_data
def test_real_label_with_qform_only_keeps_it(tmp_path):
    path = DATA / "abdomen_ct/label_only/amos_0013_label.nii.gz"
    label = load_label(path)
    assert label.header["sform_code"] == 0 and label.orientation == "LAS"
    assert np.bincount(label.array.ravel(), minlength=16)[[1, 6, 15]].tolist() == [94546, 373508, 26730]
    save_label(tmp_path / "label.nii", label.array, label)
    check_label_lies_on(tmp_path / "label.nii", path, label.array)


# ---- channels of 4-D files ----


@pytest.mark.parametrize("name", ["four.nii", "four.nii.gz"])
@pytest.mark.parametrize("orientation", ["RAS", "PIL"])
def test_each_channel_of_a_4d_file(tmp_path, name, orientation, monkeypatch):
    monkeypatch.setattr("common.scan_files.CHUNK_BYTES", 1)
    volumes = [random_volume() + 10 * channel for channel in range(3)]
    stored = [stored_as(volume, AFFINES["oblique"], orientation) for volume in volumes]
    path = write(tmp_path / name, np.stack([array for array, _ in stored], axis=-1), stored[0][1])
    for channel, volume in enumerate(volumes):
        scan = load_nifti(path, channel)
        np.testing.assert_array_equal(scan.array, volume.transpose(2, 1, 0))
        check_lazy_reading(open_nifti(path, channel), scan)
        assert scan.file_shape == stored[0][0].shape
    for channel in (3, -1):
        with pytest.raises(ValueError, match=rf"{name}: no channel {channel} in a file of shape"):
            open_nifti(path, channel)
    with pytest.raises(ValueError, match="4-D with shape"):
        open_nifti(path)


def test_a_mask_of_one_channel_is_3d(tmp_path):
    path = write(tmp_path / "four.nii", np.stack(2 * [random_volume()], axis=-1), AFFINES["anisotropic"])
    scan = load_nifti(path, 1)
    save_label(tmp_path / "mask.nii.gz", (scan.array > 0).astype(np.uint8), scan)
    back = load_label(tmp_path / "mask.nii.gz")
    assert same_grid(back, scan) and np.array_equal(back.array > 0, scan.array > 0)


def test_a_3d_file_has_the_channel_0_only(tmp_path):
    path = write(tmp_path / "scan.nii", random_volume(), AFFINES["oblique"])
    np.testing.assert_array_equal(load_nifti(path, 0).array, load_nifti(path).array)
    with pytest.raises(ValueError, match="no channel 1"):
        load_nifti(path, 1)
    five = write(tmp_path / "five.nii", random_volume()[..., None, None].repeat(2, 4), AFFINES["oblique"])
    with pytest.raises(ValueError, match="no channel 0 in a file of shape"):
        load_nifti(five, 0)


@needs_data
@pytest.mark.parametrize(
    "name", ["4d_int16_scl_slope.nii", "4d_oblique_int16.nii.gz", "nifti2_4d_int16.nii.gz"]
)
def test_channels_of_real_files(name):
    image = nib.load(DATA / "odd_headers" / name)
    last = image.shape[3] - 1
    scan = load_nifti(DATA / "odd_headers" / name, last)
    expected = nib.as_closest_canonical(image).get_fdata()[..., last].transpose(2, 1, 0)
    np.testing.assert_allclose(scan.array, expected, rtol=1e-6)
