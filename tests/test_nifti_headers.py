"""common/nifti.py on headers as careless writers leave them: each is read right or refused in a sentence."""

import gzip
import re
import warnings

import nibabel as nib
import numpy as np
import pytest

from common import nifti_checks, nifti_forms
from common.nifti import load_label, load_nifti, open_nifti, same_grid, save_label

AFFINE = np.array([[1, 0, 0, -5], [0, 1.5, 0, 7], [0, 0, 2, 9], [0, 0, 0, 1]], float)
SHAPE = (6, 5, 4)  # x y z
VOLUME = np.arange(120, dtype=np.int16).reshape(SHAPE)


def write(path, *, sform=1, qform=1, kind=nib.Nifti1Image, volume=VOLUME, **fields):
    """A file by nibabel whose header fields are then overwritten; a list sets one element each."""
    image = kind(volume, AFFINE)
    image.set_sform(AFFINE, sform)
    image.set_qform(AFFINE, qform)
    image.header.set_xyzt_units("mm")
    plain = path.with_name("plain.nii")
    nib.save(image, plain)
    content = bytearray(plain.read_bytes())
    plain.unlink()
    for name, value in fields.items():
        dtype, offset = kind.header_class.template_dtype.fields[name][:2]
        data = np.asarray(value, dtype.base).tobytes()
        content[offset : offset + len(data)] = data
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))
    return path


def read_with_warnings(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scan = load_nifti(path)
    return scan, [str(w.message).removeprefix(f"{path}: ") for w in caught]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_an_unknown_unit_is_taken_as_mm_and_told(tmp_path, name, kind):
    scan, told = read_with_warnings(write(tmp_path / name, kind=kind, xyzt_units=7))
    assert scan.spacing_mm == (2, 1.5, 1)
    assert told == ["its header names a unit of length that does not exist (code 7); taken as mm"]
    save_label(tmp_path / "mask.nii", np.ones(scan.shape, np.uint8), scan)
    with pytest.warns(UserWarning, match="taken as mm"):
        assert same_grid(load_label(tmp_path / "mask.nii"), scan)


REFUSED = {
    "offset 0": ({"vox_offset": 0}, "voxels begin at byte 0, but they cannot begin before byte 352"),
    "offset in the header": ({"vox_offset": 100}, "begin at byte 100, but they cannot begin before byte 352"),
    "infinite offset": ({"vox_offset": np.inf}, "begin at byte inf"),
    "no offset": ({"vox_offset": np.nan}, "begin at byte nan"),
    "far offset": ({"vox_offset": 1e30}, r"begin at byte 1e\+30"),
    "offset behind the end": ({"vox_offset": 1e6}, r"truncated .* \(592 bytes cannot hold the 4 x 5 x 6"),
    "negative dimension": ({"dim": [3, 6, -5, 4]}, r"its header gives \[6, -5, 4\] voxels \(x y z\)"),
    "eight dimensions": ({"dim": 8}, "its header is damaged .not 1 to 7 dimensions"),
    "large dimension": ({"dim": [3, 600, 5, 4]}, "592 bytes cannot hold the 4 x 5 x 600 voxels"),
    "tiny voxels": ({"srow_x": 1e-30, "qform_code": 0}, "affine is not usable .voxels of 1e-30 x 1.5 x 2 mm"),
    "huge voxels": ({"srow_x": 1e6, "qform_code": 0}, r"affine is not usable .voxels of 1e\+06 x 1.5 x 2 mm"),
    "metres": ({"xyzt_units": 1}, "voxels of 1000 x 1500 x 2000 mm with its unit of 1000 mm, 8e.03 mm along"),
    "micrometres": ({"xyzt_units": 3}, "voxels of 0.001 x 0.0015 x 0.002 mm with its unit of 0.001 mm"),
    "far away": ({"srow_x": [1, 0, 0, 1e30], "qform_code": 0}, r"not usable \(1e\+30 mm away from"),
    "no voxel size": ({"sform_code": 0, "pixdim": [1, 1, 0, 2]}, r"voxels of 1 x 0 x 2 mm \(x y z\) in its "
                      "header, and no sform"),
    "both forms of zeros": ({"srow_x": [0, 0, 0, 0], "quatern_b": np.nan}, "not usable .an axis of length"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_headers_are_refused_in_a_sentence(tmp_path, case):
    fields, message = REFUSED[case]
    path = write(tmp_path / "a.nii", volume=np.repeat(VOLUME, 1, 0), **fields)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}") as error:
        load_nifti(path)
    assert "\n" not in str(error.value)


def test_dimensions_beyond_any_file_take_no_memory(tmp_path, monkeypatch):
    """2^31 x 5 x 4 voxels of 2 bytes are 86 GB: neither the plain nor the packed file can hold them."""
    monkeypatch.setattr(nifti_forms, "LONGEST_MM", np.inf)
    for name in ("a.nii", "a.nii.gz"):
        path = write(tmp_path / name, kind=nib.Nifti2Image, dim=[3, 2**31 - 1, 5, 4])
        with pytest.raises(ValueError, match=r"bytes cannot hold the 4 x 5 x 2.147e\+09 voxels"):
            load_nifti(path)
        with pytest.raises(ValueError, match="bytes cannot hold"):
            open_nifti(path).read_reduced((4, 4, 4))


def test_what_does_not_fit_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii")
    monkeypatch.setattr(nifti_checks, "ALWAYS_FREE", 0)
    monkeypatch.setattr("common.hardware.cores_and_ram_gib", lambda: (1, 1.0, 200 / 2**30))  # 200 bytes free
    with pytest.raises(ValueError, match="a.nii: reading 4 x 5 x 6 voxels takes 0.0 GiB of memory, but"):
        load_nifti(path)
    assert open_nifti(path).read_box((0, 0, 0), (1, 1, 3)).tolist() == [[[0, 20, 40]]]


def test_both_codes_0_say_that_the_orientation_is_a_guess(tmp_path):
    scan, told = read_with_warnings(write(tmp_path / "a.nii", sform=0, qform=0))
    assert scan.orientation == "LAS" and scan.spacing_mm == (2, 1.5, 1)
    assert told == [
        "neither sform nor qform is set, so its orientation is a guess (LAS); left and right may be exchanged"
    ]


@pytest.mark.parametrize(
    ("fields", "bad", "reason"),
    [
        ({"srow_x": [0] * 4, "srow_y": [0] * 4, "srow_z": [0] * 4}, "sform", "an axis of length zero"),
        ({"srow_z": [0, 0, np.nan, 0]}, "sform", "not finite"),
        ({"srow_x": [1, 0, 1, 0], "srow_z": [0, 0, 0, 0]}, "sform", "flat"),
        (
            {"srow_z": [0, 0, 1e-30, 9]},
            "sform",
            "voxels of 1 x 1.5 x 1e-30 mm, 7.5 mm along the longest side",
        ),
        ({"quatern_b": 1.5}, "qform", "not finite"),
        ({"qoffset_x": np.inf}, "qform", "not finite"),
        (
            {"pixdim": [1, 1e6, 1.5, 2]},
            "qform",
            "voxels of 1e+06 x 1.5 x 2 mm, 6e+06 mm along the longest side",
        ),
    ],
)
def test_of_two_forms_the_usable_one_counts(tmp_path, fields, bad, reason):
    scan, told = read_with_warnings(write(tmp_path / "a.nii", **fields))
    np.testing.assert_allclose(scan.affine, AFFINE)
    used = "qform" if bad == "sform" else "sform"
    assert told == [f"its {bad} is not usable ({reason}); the {used} is used"]


def test_a_qform_that_is_nearly_a_rotation_does_not_spoil_the_sform(tmp_path):
    scan, told = read_with_warnings(write(tmp_path / "a.nii", quatern_b=0.001))  # turns by 0.1 degrees
    np.testing.assert_allclose(scan.affine, AFFINE)
    assert told == []


def test_a_quaternion_slightly_above_1_is_read_and_a_longer_one_refused(tmp_path):
    """nibabel itself refuses any whose square is above 1 + 4e-7, as other writers round it."""
    for kind in (nib.Nifti1Image, nib.Nifti2Image):  # turned by half about x
        turned, _ = read_with_warnings(write(tmp_path / "a.nii", kind=kind, sform=0, quatern_b=1.0))
        np.testing.assert_allclose(np.abs(np.diag(turned.affine)), [1, 1.5, 2, 1])
        scan, told = read_with_warnings(write(tmp_path / "a.nii", kind=kind, sform=0, quatern_b=1.0004))
        np.testing.assert_allclose(scan.affine, turned.affine, atol=1e-12)
        assert told == []
    with pytest.raises(ValueError, match=r"a.nii: its qform is no rotation .its quaternion has length 1\.2,"):
        load_nifti(write(tmp_path / "a.nii", sform=0, quatern_b=1.2))
    with pytest.raises(ValueError, match="has length nan, at most 1"):
        load_nifti(write(tmp_path / "a.nii", sform=0, quatern_b=np.nan))


def test_nibabel_says_nothing_of_its_own(tmp_path, caplog):
    """It would log that it sets this code to 0."""
    scan, told = read_with_warnings(write(tmp_path / "a.nii", qform_code=77))
    np.testing.assert_allclose(scan.affine, AFFINE)
    assert told == [] and caplog.text == ""


def test_another_voxel_size_in_the_qform_says_what_it_does_to_volumes(tmp_path):
    scan, told = read_with_warnings(write(tmp_path / "a.nii", pixdim=[1, 1, 1.5, 3]))
    assert scan.voxel_mm3 == pytest.approx(3)
    assert told == [
        "sform and qform 3 mm apart; the sform is used. Its voxels are 1 x 1.5 x 2 mm (x y z); with the "
        "other 1 x 1.5 x 3 mm, volumes in mL would be off: 150 mL instead of 100"
    ]


def test_another_voxel_size_beside_a_lone_sform_is_told_too(tmp_path):
    _, told = read_with_warnings(write(tmp_path / "a.nii", qform=0, pixdim=[1, 0.5, 1.5, 2]))
    assert len(told) == 1 and "pixdim) disagree; the sform is used" in told[0] and "50 mL instead" in told[0]
    assert read_with_warnings(write(tmp_path / "b.nii", qform=0))[1] == []


@pytest.mark.parametrize("qform", [0, 1])
def test_a_2d_file_takes_a_2d_mask(tmp_path, qform):
    """x and y only; its third voxel size is 0, as some writers leave it."""
    volume, sides = VOLUME[:, :, 0], [1, 1, 1.5, 0]
    path = write(tmp_path / "a.nii", volume=volume, qform=qform, pixdim=sides, srow_z=[0, 0, 0, 9])
    scan, _ = read_with_warnings(path)
    assert scan.shape == (1, 5, 6) and scan.spacing_mm == (1, 1.5, 1)
    labels = (scan.array > 50).astype(np.uint8)
    save_label(tmp_path / "mask.nii", labels, scan)
    written = nib.load(tmp_path / "mask.nii")
    assert written.shape == (6, 5)
    np.testing.assert_array_equal(np.asarray(written.dataobj), VOLUME[:, :, 0] > 50)
    assert same_grid(load_label(tmp_path / "mask.nii"), scan)


# ---- the end of the file ----


@pytest.mark.parametrize("place", ["checksum", "length", "cut"])
def test_a_gzip_stream_is_read_to_its_end_where_the_checksum_stands(tmp_path, place):
    volume = np.random.default_rng(0).integers(0, 999, (16, 15, 14)).astype(np.int16)
    path = write(tmp_path / "a.nii.gz", volume=volume)
    content = bytearray(path.read_bytes())
    content[{"checksum": -8, "length": -4, "cut": -1}[place]] ^= 1
    path.write_bytes(content[:-5] if place == "cut" else content)
    with pytest.raises(ValueError, match=r"a.nii.gz: truncated or damaged .*; fetch it again"):
        load_nifti(path)
    with pytest.raises(ValueError, match="truncated or damaged"):
        open_nifti(path).read_reduced((2, 2, 2))
    assert open_nifti(path).read_box((0, 0, 0), (2, 3, 4)).shape == (2, 3, 4)  # of the beginning


def test_a_flipped_bit_of_a_stored_block_is_found_by_the_checksum(tmp_path):
    """Without compression a flipped bit changes a voxel and nothing else."""
    path = write(tmp_path / "a.nii", volume=np.zeros((16, 15, 14), np.int16))
    content = bytearray(gzip.compress(path.read_bytes(), compresslevel=0))
    content[-20] ^= 1
    (tmp_path / "b.nii.gz").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_nifti(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_voxels_behind_the_last_one_are_told(tmp_path, name):
    scan, told = read_with_warnings(write(tmp_path / name, dim=[3, 6, 5, 3]))
    assert scan.shape == (3, 5, 6)
    assert told == ["60 bytes follow behind the last voxel; are the dimensions in its header too small?"]


# ---- FreeSurfer's headers ----

MGH_DIMS, MGH_GOOD_RAS, MGH_DELTA = 4, 28, 30  # bytes


def write_mgh(path, offset, value):
    """A file of FreeSurfer of which some bytes of the header are overwritten; it is big-endian."""
    nib.save(nib.MGHImage(VOLUME, AFFINE.astype(np.float32)), path)
    content = bytearray(path.read_bytes())
    data = np.asarray(value).astype(np.asarray(value).dtype.newbyteorder(">")).tobytes()
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (MGH_DIMS, np.int32([6, -5, 4, 1]), r"its header gives \[6, -5, 4, 1\] voxels"),
        (MGH_DIMS, np.int32([0, 5, 4, 1]), r"its header gives \[0, 5, 4, 1\] voxels"),
        (MGH_DIMS, np.int32([2**31 - 1, 5, 4, 1]), r"bytes cannot hold the 4 x 5 x 2.147e\+09 voxels"),
        (MGH_DIMS, np.int32([40000, 5, 4, 1]), "bytes cannot hold the 4 x 5 x 4e.04 voxels"),
        (MGH_DELTA, np.float32([0, 1, 1]), "not a readable NIfTI file .Could not decompose affine"),
        (MGH_DELTA, np.float32([np.nan, 1, 1]), "not a readable NIfTI file .Could not decompose affine"),
        (MGH_DELTA, np.float32([1e6, 1, 1]), r"its affine is not usable \(voxels of 1e\+06 x 1 x 1 mm"),
    ],
)
def test_impossible_headers_of_freesurfer_are_refused_in_a_sentence(tmp_path, offset, value, message):
    path = write_mgh(tmp_path / "a.mgh", offset, value)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}") as error:
        load_nifti(path)
    assert "\n" not in str(error.value)


def test_a_freesurfer_file_without_a_place_in_space_is_a_guess(tmp_path):
    scan, told = read_with_warnings(write_mgh(tmp_path / "a.mgh", MGH_GOOD_RAS, np.int16(0)))
    assert sorted(scan.shape) == [4, 5, 6] and scan.spacing_mm == (1, 1, 1)
    assert [t for t in told if "unclosed" not in t] == [
        "its header tells no place in space, so its orientation and voxels of 1 mm are a guess"
    ]


def test_a_link_that_leads_nowhere_is_called_so(tmp_path):
    (tmp_path / "scan.nii.gz").symlink_to("../annex/objects/scan")
    with pytest.raises(FileNotFoundError, match=r"scan.nii.gz: a link that leads nowhere; fetch"):
        open_nifti(tmp_path / "scan.nii.gz")
