"""common/slices.py: .npy files of every kind as pictures; square pixels for whole scans."""

import numpy as np
import pytest

from common import nifti_checks
from common.nifti import write_nifti
from common.slices import read_npy_mask, read_scan, robust_read_npy, to_display, to_pixel_mm

GREY = np.arange(20, dtype=np.uint8).reshape(4, 5)


def read(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found = robust_read_npy(tmp_path / "a.npy")
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    return found


@pytest.mark.parametrize("array", [GREY, GREY[..., None], GREY[None], np.asfortranarray(GREY)])
def test_grey_slices_of_8_bit_are_taken_as_they_are(tmp_path, array):
    assert all(np.array_equal(read(tmp_path, array)[..., k], GREY) for k in range(3))


def test_colours_come_first_or_last(tmp_path):
    colours = np.stack([GREY, GREY + 50, GREY + 100], axis=-1)
    np.testing.assert_array_equal(read(tmp_path, colours), colours)
    np.testing.assert_array_equal(read(tmp_path, np.moveaxis(colours, -1, 0)), colours)


def test_floats_of_0_to_1_are_not_black(tmp_path):
    """0.5 is 127.5, which rounds to the even 128; NaN and infinity become 0."""
    for dtype in (np.float32, np.float64, np.float16):
        array = np.array([[0, 0.5, 1], [np.nan, np.inf, 0.25]], dtype)
        assert read(tmp_path, array)[..., 1].tolist() == [[0, 128, 255], [0, 0, 64]]
    assert read(tmp_path, np.eye(2, 3, dtype=bool))[..., 0].tolist() == [[255, 0, 0], [0, 255, 0]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int64, np.float32, ">i2"])
def test_other_values_are_spread_by_their_percentiles(tmp_path, dtype):
    """0.5 % of 1..1001 lies at 6, 99.5 % at 996; 501 is in the middle. 0 stays 0, where there is nothing."""
    array = np.zeros((11, 92), dtype)
    array.flat[:1001] = np.arange(1, 1002)
    found = read(tmp_path, array)[..., 0]
    assert found.flat[0] == found.flat[5] == 1 and found.flat[995] == 255 and not found.flat[1001:].any()
    assert abs(int(found.flat[500]) - 127.5) <= 0.5


def test_16_bit_does_not_wrap(tmp_path):
    found = read(tmp_path, np.array([[256, 512, 1024, 4096]], np.uint16))
    assert (np.diff(found[0, :, 0].astype(int)) > 0).all()


def test_what_is_no_slice_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="a.npy: not a .npy file of plain numbers .*Python objects"):
        robust_read_npy(path)
    for content in (b"", b"\x93NUMPY no header", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.npy: not a .npy file of plain numbers"):
            robust_read_npy(path)
    for array in (
        np.zeros(5),
        np.zeros((2, 4, 5)),
        np.zeros((4, 5), complex),
        np.zeros((0, 5)),
        GREY.astype(str),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=r"a.npy: .* of shape .*; a slice is \(h, w\)"):
            robust_read_npy(path)


def npy(header: bytes, length: int = 24) -> bytes:
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + b"\n" * length


@pytest.mark.parametrize(
    "content",
    [
        npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 6)}", 23),  # truncated
        npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000, 1000000)}"),  # 800 GB
        npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1" + b"0" * 30 + b",)}"),
        npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 6"),
        npy(b"(" * 9000),
        npy(b"-" * 9000 + b"1"),
        npy(b"1" + b"+1" * 4000),
    ],
    ids=lambda content: content[10:30].decode(),
)
def test_damaged_npy_files_end_in_a_sentence(tmp_path, content):
    path = tmp_path / "a.npy"
    path.write_bytes(npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 6)}"))
    assert robust_read_npy(path)[..., 0].tolist() == [[10] * 6] * 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.npy: not a .npy file of plain numbers") as caught:
        robust_read_npy(path)
    assert "\n" not in str(caught.value)


def test_an_archive_is_no_slice(tmp_path):
    np.savez(tmp_path / "a.npz", a=GREY)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="a.npy: not a .npy file of plain numbers .*archive"):
        robust_read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("top", [1, 255, True, 1.0])
def test_masks_of_one_structure(tmp_path, top):
    np.save(tmp_path / "a.npy", np.array([[0, top, 0]]))
    found = read_npy_mask(tmp_path / "a.npy", (1, 3))
    assert found.tolist() == [[0, 1, 0]] and found.dtype == np.uint8
    with pytest.raises(ValueError, match=r"a.npy: mask \(1, 3\) and slice \(3, 1\) differ in shape"):
        read_npy_mask(tmp_path / "a.npy", (3, 1))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([[0, 1, 255]], "mask values 0, 1, 255; expected 0 and 1, or 0 and 255"),
        ([[0, 1, 2]], "mask values 0, 1, 2; expected"),
        ([[0, 1, np.nan]], "mask values 0, 1, nan; expected"),
        ([0, 1], r"a mask is \(h, w\)"),
    ],
)
def test_masks_of_several_structures_are_refused(tmp_path, values, problem):
    np.save(tmp_path / "a.npy", np.array(values))
    with pytest.raises(ValueError, match="a.npy: .*" + problem):
        read_npy_mask(tmp_path / "a.npy")


def test_square_pixels_keep_the_field_of_view():
    """6 x 4 pixels of 1 x 2 mm are 6 x 8 mm: 3 x 4 pixels of 2 mm, each the mean of two rows."""
    slices = np.arange(24, dtype=np.uint8).reshape(1, 6, 4) * np.uint8(2)
    found = to_pixel_mm(slices, (5.0, 1.0, 2.0), 2.0)
    assert found[0, :, 0].tolist() == [4, 20, 36] and found.shape == (1, 3, 4)
    colours = to_pixel_mm(np.repeat(slices[..., None], 3, axis=-1), (5.0, 1.0, 2.0), 2.0)
    np.testing.assert_array_equal(colours[..., 2], found)
    mask = to_pixel_mm((slices > 20).astype(np.uint8), (5.0, 1.0, 2.0), 0.5, is_mask=True)
    assert mask.shape == (1, 12, 16) and set(np.unique(mask)) == {0, 1}
    assert to_pixel_mm(slices, (5.0, 1.0, 2.0), None) is slices


def test_turning_is_its_own_inverse():
    volume = np.arange(24).reshape(2, 3, 4)
    assert to_display(volume)[0, 0, 0] == volume[0, 2, 3]
    np.testing.assert_array_equal(to_display(to_display(volume)), volume)


def test_channels_on_another_grid_are_refused_in_words(tmp_path):
    for name, y_mm in (("a", 0), ("b", 0.5)):
        write_nifti(tmp_path / f"{name}.nii", np.zeros((3, 4, 5)), (2, 1, 1), origin_mm=(0, y_mm, 0))
    words = r"a.nii \(corners up to 0.5 mm apart, spacing 2 x 1 x 1 and 2 x 1 x 1 mm \(z y x\)\)$"
    with pytest.raises(ValueError, match="b.nii: lies on another grid than .*" + words):
        read_scan([(tmp_path / "a.nii", None), (tmp_path / "b.nii", None)])


def test_more_pixels_than_memory_holds_are_refused(tmp_path, monkeypatch):
    """4 x 100 x 100 pixels of 1 mm, which are twice in memory for a moment: 80 kB."""

    def read_with(free_bytes):
        machine = (1, 1.0, free_bytes / 2**30)
        monkeypatch.setattr("common.hardware.cores_and_ram_gib", lambda: machine)
        return read_scan([(tmp_path / "a.nii", None)], pixel_mm=1.0)[0]

    write_nifti(tmp_path / "a.nii", np.zeros((4, 2, 2), np.int16), (1, 50, 50))
    monkeypatch.setattr(nifti_checks, "ALWAYS_FREE", 0)
    assert read_with(80_000).shape == (4, 100, 100)
    with pytest.raises(ValueError, match="slices with pixels of 1 mm takes .*; .* or use larger pixels"):
        read_with(79_999)
