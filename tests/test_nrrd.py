"""NRRD scans, on files made with pynrrd and a real one: places in space, values, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from common.nifti import case_name, is_nifti, load_label, load_nifti, open_nifti, same_grid, save_label
from common.nrrd import TYPES

nrrd = pytest.importorskip("nrrd")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "brain_tumor_mr" / "thick_slice_t1gd"

STORED = np.arange(24, dtype=np.int16).reshape(4, 3, 2)  # x y z in the file's axes
LPS = {
    "space": "left-posterior-superior",
    "space directions": np.diag([0.5, 2.0, 3.0]),
    "space origin": [10.0, 20.0, 30.0],
}


def write(path, array=STORED, header=LPS, **options):
    nrrd.write(str(path), array, header, **options)
    return path


def write_by_hand(path, **fields):
    """A file of which some lines of the header are others, whatever pynrrd would say to them."""
    header = {"type": "short", "dimension": "3", "space": "LPS", "sizes": "4 3 2", "endian": "little"}
    header |= {"encoding": "raw", "space directions": "(1,0,0) (0,1,0) (0,0,1)", "space origin": "(0,0,0)"}
    lines = ["NRRD0004", *(f"{key}: {value}" for key, value in (header | fields).items()), "\n"]
    path.write_bytes("\n".join(lines).encode() + STORED.tobytes("F"))
    return path


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_axes_and_origin_by_hand(tmp_path, encoding):
    """x grows to the left and y to the back, so both are turned: the last voxel comes first."""
    scan = load_nifti(write(tmp_path / "lgemri.nrrd", header=LPS | {"encoding": encoding}))
    assert scan.shape == (2, 3, 4) and scan.spacing_mm == (3.0, 2.0, 0.5) and scan.orientation == "LPS"
    assert scan.array.dtype == np.int16
    for z, y, x in np.ndindex(2, 3, 4):
        assert scan.array[z, y, x] == STORED[3 - x, 2 - y, z]
    # LPS (10 + 3 * 0.5, 20 + 2 * 2, 30) is RAS (-11.5, -24, 30).
    np.testing.assert_allclose(scan.affine[:3, 3], [-11.5, -24, 30])
    np.testing.assert_allclose(scan.affine[:3, :3], np.diag([0.5, 2, 3]))
    box = open_nifti(tmp_path / "lgemri.nrrd").read_box((1, 0, 2), (2, 2, 4))
    np.testing.assert_array_equal(box, scan.array[1:2, 0:2, 2:4])


@pytest.mark.parametrize("space, signs", [("RAS", (1, 1, 1)), ("left-anterior-superior", (-1, 1, 1))])
def test_other_spaces(tmp_path, space, signs):
    scan = load_nifti(write(tmp_path / "a.nrrd", header=LPS | {"space": space}))
    turned = STORED[:: signs[0]].transpose(2, 1, 0)
    np.testing.assert_array_equal(scan.array, turned)
    assert scan.affine[0, 3] == (10 if signs[0] == 1 else -11.5) and scan.affine[1, 3] == 20


def test_axes_in_another_order(tmp_path):
    """Sagittal slices: the file's first axis runs to the back, its second up, its third to the left."""
    header = LPS | {"space directions": np.array([[0, 1.0, 0], [0, 0, 2.0], [4.0, 0, 0]])}
    scan = load_nifti(write(tmp_path / "a.nrrd", header=header))
    assert scan.shape == (3, 4, 2) and scan.spacing_mm == (2.0, 1.0, 4.0)
    for z, y, x in np.ndindex(scan.shape):
        assert scan.array[z, y, x] == STORED[3 - y, z, 1 - x]


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("order", ["<", ">"])
def test_types_and_byte_orders(tmp_path, kind, order):
    array = STORED.astype(np.dtype(kind).newbyteorder(order))
    scan = load_nifti(write(tmp_path / "a.nrrd", array=array))
    np.testing.assert_array_equal(scan.array, STORED[::-1, ::-1].transpose(2, 1, 0))


def test_several_names_of_a_type(tmp_path):
    for name in ("short", "signed short int", "int16_t"):
        path = write_by_hand(tmp_path / "a.nrrd", type=name)
        assert load_nifti(path).array[0, 2, 3] == STORED[0, 0, 0]


def test_a_mask_is_written_as_nifti_on_the_grid_of_the_scan(tmp_path):
    directions = np.array([[0.6, 0.3, 0.1], [-0.4, 1.1, 0], [0.2, 0, 2.5]])  # oblique and sheared
    scan = open_nifti(write(tmp_path / "scan.nrrd", header=LPS | {"space directions": directions}))
    labels = (np.arange(24) % 3).reshape(scan.shape)
    save_label(tmp_path / "mask.nii.gz", labels, scan)
    back = load_label(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(back.array, labels)
    assert same_grid(back, scan) and case_name(scan.path) == "scan" and is_nifti(scan.path)


def test_means_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("common.scan_files.CHUNK_BYTES", 1)  # a plane at a time
    path = write(tmp_path / "scan.nrrd")
    means = open_nifti(path).read_reduced((2, 3, 2))
    np.testing.assert_allclose(means, load_nifti(path).array.reshape(1, 2, 1, 3, 2, 2).mean((1, 3, 5)))


def test_what_is_refused_says_why(tmp_path):
    four = {"space directions": np.array([[np.nan] * 3, *np.diag([1.0, 1, 1])]), "space": "LPS"}
    four |= {"kinds": ["vector", "domain", "domain", "domain"]}
    with pytest.raises(ValueError, match="4d.nrrd: cannot be read .4-D.*save it as one 3-D"):
        open_nifti(write(tmp_path / "4d.nrrd", array=STORED[None], header=four))
    with pytest.raises(ValueError, match="text.nrrd: cannot be read .voxels stored as text"):
        open_nifti(write(tmp_path / "text.nrrd", header=LPS | {"encoding": "text"}))
    with pytest.raises(ValueError, match="its voxels lie in another file"):
        write(tmp_path / "apart.nhdr")
        open_nifti((tmp_path / "apart.nhdr").rename(tmp_path / "apart.nrrd"))
    with pytest.raises(ValueError, match="no space directions"):
        open_nifti(write(tmp_path / "nowhere.nrrd", header={}))
    for key, value, words in (
        ("sizes", "-4 3 2", r"sizes \(-4, 3, 2\)"),
        ("sizes", "0 3 2", r"sizes \(0, 3, 2\)"),
        ("sizes", "40000 3 2", r"sizes \(40000, 3, 2\)"),
        ("sizes", "4 3", "3-D"),
        ("space directions", "(0,0,0) (0,1,0) (0,0,1)", "no space directions of all axes"),
        ("space directions", "(nan,0,0) (0,1,0) (0,0,1)", "no space directions of all axes"),
        ("space directions", "none (0,1,0) (0,0,1)", "no space directions of all axes"),
        ("space origin", "(0,0)", r"space origin \[0. 0.\]"),
        ("space units", '"m" "m" "m"', "space units m m m"),
        ("endian", "middle", "byte order middle"),
    ):
        with pytest.raises(ValueError, match=f"^{tmp_path / 'odd.nrrd'}: cannot be read .{words}.; save it"):
            open_nifti(write_by_hand(tmp_path / "odd.nrrd", **{key: value}))
    with pytest.raises(ValueError, match="odd.nrrd: its affine is not usable .not finite"):
        open_nifti(write_by_hand(tmp_path / "odd.nrrd", **{"space origin": "(nan,0,0)"}))
    with pytest.raises(ValueError, match="bytes cannot hold the 9000 x 9000 x 9000 voxels"):
        load_nifti(write_by_hand(tmp_path / "odd.nrrd", sizes="9000 9000 9000"))
    with pytest.raises(ValueError, match="space scanner-xyz"):
        open_nifti(write(tmp_path / "space.nrrd", header=LPS | {"space": "scanner-xyz"}))
    (tmp_path / "no.nrrd").write_text("no header at all")
    with pytest.raises(ValueError, match="no.nrrd: not a readable NRRD file"):
        open_nifti(tmp_path / "no.nrrd")
    (tmp_path / "short.nrrd").write_text("NRRD0004\ntype: short\n\n")
    with pytest.raises(ValueError, match="short.nrrd: not a readable NRRD file .KeyError: 'dimension'"):
        open_nifti(tmp_path / "short.nrrd")
    content = write(tmp_path / "cut.nrrd", header=LPS | {"encoding": "raw"}).read_bytes()
    (tmp_path / "cut.nrrd").write_bytes(content[:-2])
    with pytest.raises(ValueError, match="cut.nrrd: truncated or damaged"):
        load_nifti(tmp_path / "cut.nrrd")


@pytest.mark.parametrize("place", [slice(0, -12), slice(0, -4), slice(-6, -5), slice(-30, -29)])
def test_a_damaged_gzip_stream_is_refused_in_one_sentence(tmp_path, place):
    """Cut in the voxels or in the checksum behind them; a byte changed in the checksum or the voxels."""
    path = write(tmp_path / "a.nrrd", header=LPS | {"encoding": "gzip"})
    content = bytearray(path.read_bytes())
    if place.start == 0:
        content = content[place]
    else:
        content[place] = bytes([content[place][0] ^ 1])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S+/a.nrrd: truncated or damaged .*; fetch it again$"):
        load_nifti(path)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_voxels_behind_the_last_one_are_told(tmp_path, encoding):
    """A file of eight slices whose header speaks of two: six slices of 24 bytes are left over."""
    path = write(tmp_path / "a.nrrd", np.tile(STORED, 4), LPS | {"encoding": encoding})
    path.write_bytes(path.read_bytes().replace(b"sizes: 4 3 8", b"sizes: 4 3 2"))
    with pytest.warns(UserWarning, match="144 bytes follow behind the last voxel"):
        assert load_nifti(path).shape == (2, 3, 4)


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("name", ["brain2_image", "brain2_label"])
def test_a_real_file_equals_its_copy_in_nifti(name):
    ours, copy = load_nifti(DATA / f"{name}.nrrd"), load_nifti(DATA / f"{name}.nii.gz")
    np.testing.assert_array_equal(ours.array, copy.array)
    assert same_grid(ours, copy) and ours.orientation == copy.orientation
