"""common/hdf5.py: what is read is what was written, in every worker, and damaged files say so."""

import errno
import math
import os
import pickle
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT
from torch.utils.data import DataLoader, Dataset

from common import hdf5
from common.hdf5 import CaseFile, write_case
from common.patches import location_index

SHAPE = (45, 70, 37)  # no multiple of the chunks
SPACING = {"spacing_mm": (2.0, 1.0, 0.5)}


def volume(seed: int = 0, shape=SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Noise as int16, and a label of two boxes."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[5:20, 10:30, 8:20] = 1
    label[20:24, 10:30, 8:20] = 7
    return rng.integers(-1024, 3072, shape).astype(np.int16), label


@pytest.fixture
def case_path(tmp_path):
    image, label = volume()
    index = location_index(label, image, hard_negative_above=3000)
    write_case(tmp_path / "case.h5", image, label, attributes=SPACING, index=index)
    return tmp_path / "case.h5"


# ---- what is read ----


def test_whole_volume_comes_back(tmp_path):
    image, label = volume()
    used = write_case(tmp_path / "a.h5", image, label, attributes=SPACING)
    assert used == "blosc2"
    case = CaseFile(tmp_path / "a.h5")
    assert case.image.dtype == np.int16 and case.label.dtype == np.uint8
    np.testing.assert_array_equal(case.image[:], image)
    np.testing.assert_array_equal(case.label[:], label)
    assert case.shape == SHAPE and case.has_label and case.spacing_mm == (2.0, 1.0, 0.5)
    assert case.image.chunks == (32, 32, 32) and case.index_names == ()
    case.close()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["compression"] == used and file.attrs["format_version"] == hdf5.FORMAT_VERSION


def test_300_random_patches_equal_the_slice(case_path):
    image, label = volume()
    case, rng, shape = CaseFile(case_path), np.random.default_rng(1), (17, 40, 33)
    last = np.subtract(SHAPE, shape)
    starts = [np.zeros(3, int), last, *rng.integers(0, last + 1, (298, 3))]
    for start in starts:
        box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        np.testing.assert_array_equal(case.read_image(start, shape), image[box])
        np.testing.assert_array_equal(case.read_label(start, shape), label[box])


def test_beyond_the_volume_the_edge_is_repeated(case_path):
    image, label = volume()
    wide, wide_label = np.pad(image, 200, mode="edge"), np.pad(label, 200, mode="edge")
    case, rng = CaseFile(case_path), np.random.default_rng(2)
    for _ in range(200):
        start, shape = rng.integers(-60, 90, 3), rng.integers(1, 80, 3)
        box = tuple(slice(s + 200, s + 200 + n) for s, n in zip(start, shape, strict=True))
        got = case.read_image(start, shape)
        assert got.dtype == np.int16 and got.flags.writeable
        np.testing.assert_array_equal(got, wide[box])
        np.testing.assert_array_equal(case.read_label(start, shape), wide_label[box])
    before = case.read_image((-10, 0, 0), (10, 5, 5))  # ends where the volume begins
    assert (before == image[0, :5, :5]).all()
    after = case.read_image((45, 0, 0), (3, 5, 5))  # begins where it ends
    assert (after == image[44, :5, :5]).all()


def test_a_cut_structure_goes_on_beyond_the_border(tmp_path):
    """By hand: three rows of a label that the upper border cuts, in a patch of seven."""
    image = np.array([10, 20, 30], np.int16).reshape(3, 1, 1)
    write_case(tmp_path / "a.h5", image, (image > 15).astype(np.uint8), attributes=SPACING)
    case = CaseFile(tmp_path / "a.h5")
    assert case.read_image((-2, 0, 0), (7, 1, 1)).ravel().tolist() == [10, 10, 10, 20, 30, 30, 30]
    assert case.read_label((-2, 0, 0), (7, 1, 1)).ravel().tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert case.read_image((1, -1, -2), (1, 2, 3)).tolist() == [[[20, 20, 20], [20, 20, 20]]]


def test_boxes_in_small_integers_do_not_wrap_around(case_path):
    """The places of an index are uint16, of which sums wrap around in long scans; uint8 here."""
    start, shape = np.array([40, 60, 30], np.uint8), np.array([220, 30, 30], np.uint8)
    np.testing.assert_array_equal(
        CaseFile(case_path).read_image(start, shape),
        np.pad(volume()[0], [(0, 230)] * 3, mode="edge")[40:260, 60:90, 30:60],
    )


@pytest.mark.parametrize("dtype", hdf5.IMAGE_DTYPES)
def test_channels_and_dtypes(tmp_path, dtype):
    image = np.random.default_rng(0).integers(0, 200, (3, 20, 40, 33)).astype(dtype)
    write_case(tmp_path / "a.h5", image, attributes=SPACING)
    case = CaseFile(tmp_path / "a.h5")
    assert case.shape == (20, 40, 33) and not case.has_label and case.image.shape == image.shape
    patch = case.read_image((5, -2, 0), (10, 8, 40))
    expected = np.pad(image, [(0, 0), *[(50, 50)] * 3], mode="edge")[:, 55:65, 48:56, 50:90]
    assert patch.dtype == dtype
    np.testing.assert_array_equal(patch, expected)
    with pytest.raises(ValueError, match="a.h5: has no label"):
        case.read_label((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("start, shape", [((0, 0), (1, 1, 1)), ((0, 0, 0), (1, 0, 1)), ((0, 0, 0), (4, 4))])
def test_boxes_that_are_none_are_refused(case_path, start, shape):
    with pytest.raises(ValueError, match="case.h5: box from"):
        CaseFile(case_path).read_image(start, shape)


def test_attributes_come_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    given = {
        "affine": rng.standard_normal((4, 4)) * 1e-3,
        "centroids": np.empty((0, 4)),
        "flags": np.array([True, False]),
        "float32": rng.standard_normal(3).astype(np.float32),
        "spacing_mm": (0.1 + 0.2, 1 / 3, 1.0),
        "number": 2**40,
        "tenth": 0.1,
        "infinite": math.inf,
        "yes": True,
        "nothing": None,
        "text": "sub-verse901 é\n",
        "empty": "",
        "looks like ours": 'json:{"a": 1}',
        "long": "x" * 200_000,
        "nested": {"crop": [[1, 2], [3, 4]], "name": None, "scale": 0.1},
        "numpy in a tuple": (np.int64(3), np.float32(0.5)),
        "numpy": np.float64(0.1),
    }
    write_case(tmp_path / "a.h5", *volume(), attributes=given)
    got = CaseFile(tmp_path / "a.h5").attributes
    assert set(got) == set(given)
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            assert got[name].dtype == value.dtype and got[name].shape == value.shape
            assert got[name].tobytes() == value.tobytes(), name
        else:
            expected = list(value) if isinstance(value, tuple) else value
            assert got[name] == expected, name
            assert type(got[name]) is (float if name == "numpy" else type(expected)), name


@pytest.mark.parametrize("value", [{"a": np.zeros(3)}, {1, 2}, np.array(["a"]), object()])
def test_attributes_that_cannot_be_stored_are_named(tmp_path, value):
    with pytest.raises(ValueError, match="a.h5: attribute 'odd'"):
        write_case(tmp_path / "a.h5", *volume(), attributes={"odd": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "image, label, message",
    [
        (np.zeros((4, 4, 4)), None, "image float64"),
        (np.zeros((4, 4), np.int16), None, r"image int16 \(4, 4\)"),
        (np.zeros((4, 0, 4), np.int16), None, "image int16"),
        (np.zeros((4, 4, 4), np.int16), np.zeros((4, 4, 4), np.int16), "label int16"),
        (np.zeros((4, 4, 4), np.int16), np.zeros((4, 4, 5), np.uint8), r"expected uint8 \(4, 4, 4\)"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, image, label, message):
    with pytest.raises(ValueError, match=message):
        write_case(tmp_path / "a.h5", image, label, attributes={})


def test_a_wrong_index_is_refused(tmp_path):
    for places in (np.array([[0, 0, 37]]), np.array([[-1, 0, 0]]), np.zeros((3, 2), int), np.zeros((3, 3))):
        with pytest.raises(ValueError, match="a.h5: index 'class_1'"):
            write_case(tmp_path / "a.h5", *volume(), attributes={}, index={"class_1": places})


def test_spacing_and_index_that_are_missing_are_named(tmp_path):
    write_case(tmp_path / "a.h5", *volume(), attributes={}, index={"class_1": np.array([[1, 2, 3]])})
    case = CaseFile(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="a.h5: has no attribute spacing_mm"):
        _ = case.spacing_mm
    with pytest.raises(ValueError, match="index has no 'class_2', only class_1"):
        case.locations("class_2")
    assert case.locations("class_1").tolist() == [[1, 2, 3]]


# ---- workers, open files ----


class Patches(Dataset):
    """Patch i of a case that the main process has read already."""

    def __init__(self, paths):
        self.cases = [CaseFile(p) for p in paths]

    def __len__(self):
        return 40

    def __getitem__(self, i):
        case = self.cases[i % len(self.cases)]
        start = (i, i - 5, 0)
        return os.getpid(), case.read_image(start, (20, 30, 40)), len(case.locations("class_1"))


# spawned workers import torch anew: slow
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_workers_read_right(tmp_path, method):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    paths, padded = [tmp_path / "a.h5", tmp_path / "b.h5"], []
    for seed, path in enumerate(paths):
        image, label = volume(seed)
        write_case(path, image, label, attributes=SPACING, index=location_index(label))
        padded.append(np.pad(image, 60, mode="edge"))
    dataset = Patches(paths)
    for case in dataset.cases:
        case.read_image((0, 0, 0), (40, 40, 30))  # open in the parent when the workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    pids, passes = set(), 2 if method == "fork" else 1
    for _ in range(passes):
        for i, (pid, patch, places) in enumerate(loader):
            expected = padded[i % 2][60 + i : 80 + i, 55 + i : 85 + i, 60:100]
            np.testing.assert_array_equal(np.asarray(patch), expected)
            np.testing.assert_array_equal(dataset[i][1], expected)  # the parent reads on meanwhile
            assert places == 15 * 20 * 12
            pids.add(pid)
    assert len(pids) == 2 * passes and os.getpid() not in pids


def test_nothing_is_opened_before_the_first_use(tmp_path):
    case = CaseFile(tmp_path / "no.h5")
    with pytest.raises(FileNotFoundError, match="no.h5: no such file"):
        _ = case.shape


def test_pickle_holds_only_the_path(case_path):
    case = CaseFile(case_path)
    before = case.read_image((0, 0, 0), (9, 9, 9))
    content = pickle.dumps(case)
    assert len(content) < 1000
    copy = pickle.loads(content)
    np.testing.assert_array_equal(copy.read_image((0, 0, 0), (9, 9, 9)), before)
    assert copy.path == case_path


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "MAX_OPEN_FILES", 3)
    opened, open_file, cases = [], hdf5.open_file, []
    monkeypatch.setattr(hdf5, "open_file", lambda path: opened.append(path.stem) or open_file(path))
    for i in range(6):
        image = np.full((4, 4, 4), i, np.int16)
        write_case(tmp_path / f"{i}.h5", image, attributes=SPACING, index={"class_1": np.full((1, 3), i % 4)})
        cases.append(CaseFile(tmp_path / f"{i}.h5"))
    first = cases[0].image  # a dataset in use survives that its case is closed
    for _ in range(2):
        for i, case in enumerate(cases):
            assert (case.read_image((0, 0, 0), (4, 4, 4)) == i).all()
            assert case.locations("class_1").tolist() == [[i % 4] * 3]
            assert cases[0].shape == (4, 4, 4)
            assert len(hdf5._open) <= 3
    assert opened == [*"012345", *"12345"]  # 0 was used all the time and never dropped
    assert (first[:] == 0).all()
    assert cases[5].locations("class_1") is cases[5].locations("class_1")
    del case, cases
    assert len(hdf5._open) == 0  # closed with the last reference


def test_close_and_read_the_new_file(case_path):
    case = CaseFile(case_path)
    assert case.shape == SHAPE and case.attributes["spacing_mm"] == [2.0, 1.0, 0.5]
    write_case(case_path, np.ones((5, 6, 7), np.int16), attributes={"spacing_mm": (3, 3, 3)})
    assert case.shape == SHAPE  # the old file, until it is closed
    case.close()
    case.close()
    assert case.shape == (5, 6, 7) and case.spacing_mm == (3.0, 3.0, 3.0)


# ---- files that cannot be read ----


@pytest.mark.parametrize("share", [0, 0.00003, 0.001, 0.02, 0.3, 0.7, 0.99, 0.99999])
def test_truncated_files_say_so(case_path, share):
    content = case_path.read_bytes()
    case_path.write_bytes(content[: int(share * len(content))])
    case = CaseFile(case_path)
    for access in (
        lambda: case.shape,
        lambda: case.read_image((0, 0, 0), (4, 4, 4)),
        lambda: case.attributes,
    ):
        with pytest.raises(ValueError, match="case.h5: .*(truncated|cut off).*run preprocessing again"):
            access()


def test_damaged_voxels_say_so(case_path):
    with h5py.File(case_path) as file:
        chunk = file["image"].id.get_chunk_info(0)
    content = bytearray(case_path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    case_path.write_bytes(content)
    with pytest.raises(ValueError, match="case.h5: damaged"):
        CaseFile(case_path).read_image((0, 0, 0), (30, 30, 30))


def test_a_flipped_bit_anywhere_is_read_or_refused(case_path):
    """What is not voxels lies at the beginning of the file."""
    content, rng, refused = case_path.read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(8, 6000, 150):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        case_path.write_bytes(changed)
        case = CaseFile(case_path)
        try:
            case.read_image((0, 0, 0), (4, 4, 4)), case.read_label((0, 0, 0), (4, 4, 4))
            _ = case.spacing_mm, [case.locations(name) for name in case.index_names]
        except ValueError as error:
            assert "case.h5" in str(error)
            refused += 1
        case.close()
    assert refused > 10


def test_a_label_beyond_the_known_ones_is_named(case_path):
    case = CaseFile(case_path)
    assert case.read_label((5, 10, 8), (20, 4, 4), 8).max() == 7
    with pytest.raises(ValueError, match="case.h5: label 7, at most 6 is known; run preprocessing again"):
        case.read_label((5, 10, 8), (20, 4, 4), 7)


def test_files_that_are_no_case_say_so(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"\x1f\x8b" + bytes(5000))
    with pytest.raises(ValueError, match="a.h5: not an HDF5 file"):
        _ = CaseFile(path).shape
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(ValueError, match="not a preprocessed case"):
        _ = CaseFile(path).shape
    with h5py.File(path, "w") as file:
        file.attrs["format_version"] = 1
    with pytest.raises(ValueError, match="not a preprocessed case"):
        _ = CaseFile(path).shape


def test_newer_format_is_refused(case_path):
    with h5py.File(case_path, "r+") as file:
        file.attrs["format_version"] = hdf5.FORMAT_VERSION + 1
    with pytest.raises(ValueError, match="case.h5: format 2, but this code reads up to 1"):
        _ = CaseFile(case_path).shape


def test_missing_filter_names_the_package(case_path, monkeypatch):
    available = h5py.h5z.filter_avail
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: code != 32026 and available(code))  # Blosc2
    with pytest.raises(ValueError, match="case.h5: compressed with blosc2.*pip install hdf5plugin"):
        CaseFile(case_path).read_image((0, 0, 0), (4, 4, 4))


def test_without_hdf5plugin(case_path, tmp_path):
    """A process that cannot import it writes and reads gzip, and names the package that it lacks."""
    code = f"""
import sys
sys.modules["hdf5plugin"] = None
import numpy as np
from common.hdf5 import CaseFile, write_case
image = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
assert write_case({str(tmp_path / "gzip.h5")!r}, image, attributes={{}}) == "gzip"
assert (CaseFile({str(tmp_path / "gzip.h5")!r}).read_image((0, 0, 0), (4, 5, 6)) == image).all()
try:
    CaseFile({str(case_path)!r}).shape
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "compressed with blosc2, which is not installed here; pip install hdf5plugin" in run.stdout
    np.testing.assert_array_equal(CaseFile(tmp_path / "gzip.h5").image[:].ravel(), np.arange(120))


def test_interpreter_with_open_files_ends_quietly(case_path):
    code = "from common.hdf5 import CaseFile\n"
    code += f"case = CaseFile({str(case_path)!r})\ndataset = case.image\nprint(case.shape)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{SHAPE}\n", "")


# ---- writing that fails ----

WRITE = """
import os, sys
import numpy as np
from common.hdf5 import write_case
image = np.random.default_rng(0).integers(0, 30000, (64, 64, 64)).astype(np.int16)
"""


def test_killed_while_writing_leaves_no_case(tmp_path):
    code = f"{WRITE}\nos.fsync = lambda n: (print('writing', flush=True), __import__('time').sleep(60))\n"
    code += "write_case(sys.argv[1], image, attributes={})"
    path = tmp_path / "a.h5"
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    (left_over,) = tmp_path.iterdir()
    assert left_over.name.startswith(".partial_")
    write_case(path, *volume(), attributes=SPACING)  # the next run is not disturbed
    np.testing.assert_array_equal(CaseFile(path).image[:], volume()[0])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_full_disk_is_an_error_and_keeps_the_old_file(case_path):
    """A limit of the file size stands for the full disk; HDF5's own writing ends in a crash there."""
    before = case_path.read_bytes()
    code = f"import resource\n{WRITE}\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    code += (
        "try:\n    write_case(sys.argv[1], image, attributes={})\nexcept OSError as e:\n    print(e.errno, e)"
    )
    run = subprocess.run([sys.executable, "-c", code, case_path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout.startswith(f"{errno.EFBIG} ")
    assert "case.h5: could not be written" in run.stdout and "nothing finished is lost" in run.stdout
    assert case_path.read_bytes() == before and [p.name for p in case_path.parent.iterdir()] == ["case.h5"]


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.h5: could not be written"):
        write_case(tmp_path / "no" / "a.h5", *volume(), attributes={})


# ---- files of strangers ----


def linked(file, name: str, kind: str, folder) -> None:
    """Put a link of a kind in the place of a part of a case."""
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    if kind == "external":
        file[name] = h5py.ExternalLink(str(folder / "secret.h5"), "/image")
    elif kind == "soft":
        file[name] = h5py.SoftLink("/nowhere")
    elif kind == "raw":
        secret = folder / "secret.bin"
        secret.write_bytes(bytes(1000))
        file.create_dataset(name, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource(str(folder / "secret.h5"), "image", shape)
        file.create_virtual_dataset(name, layout)
    else:
        file.create_group(name)


@pytest.mark.parametrize("name", ["image", "label", "index/class_1"])
@pytest.mark.parametrize("kind", ["external", "soft", "raw", "virtual", "group"])
def test_links_that_point_outside_are_refused(tmp_path, name, kind):
    volume = np.zeros((4, 4, 4), np.int16)
    for file in ("case.h5", "secret.h5"):
        index = {"class_1": np.zeros((1, 3), np.uint16)}
        write_case(tmp_path / file, volume, volume.astype(np.uint8), attributes={}, index=index)
    with h5py.File(tmp_path / "case.h5", "r+") as file:
        linked(file, name, kind, tmp_path)
    case = CaseFile(tmp_path / "case.h5")
    with pytest.raises(ValueError, match=rf"case.h5: .*{name.split('/')[-1]}.* is refused"):
        case.label[...]
        case.locations("class_1")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: f.pop("index"), "not a preprocessed case"),
        (lambda f: f.pop("attributes"), "not a preprocessed case"),
        (lambda f: f.attrs.update(format_version="one"), "not a preprocessed case"),
        (lambda f: replaced(f, "image", np.zeros((4, 4))), "image float64 (4, 4) is none of this project"),
        (
            lambda f: replaced(f, "label", np.zeros((4, 4, 5), np.uint8)),
            "label uint8 (4, 4, 5), expected uint8 (4",
        ),
        (lambda f: replaced(f, "index", np.zeros(3)), "index leads elsewhere or is no group"),
        (lambda f: replaced(f, "index/class_1", np.full((1, 3), 9)), "outside the volume"),
        (lambda f: replaced(f, "index/class_1", np.zeros((1, 3))), "expected integers (n, 3)"),
        (lambda f: f["attributes"].attrs.update(boxes="json:" + "[" * 50_000), "attributes cannot be read"),
        (lambda f: f["attributes"].attrs.update(spacing_mm=[1, np.nan, 1]), "spacing_mm: expected 3 number"),
        (lambda f: f["attributes"].attrs.pop("boxes"), "has no attribute boxes"),
    ],
)
def test_a_case_of_wrong_types_is_named(tmp_path, change, problem):
    volume = np.zeros((4, 4, 4), np.int16)
    attributes = {"spacing_mm": (1, 1, 1), "boxes": [1]}
    index = {"class_1": np.zeros((1, 3), np.uint16)}
    write_case(tmp_path / "a.h5", volume, volume.astype(np.uint8), attributes=attributes, index=index)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        change(file)
    case = CaseFile(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        case.locations("class_1")
        case.spacing_mm  # noqa: B018
        case.attributes["boxes"]
    assert str(caught.value).startswith(str(tmp_path / "a.h5"))


def replaced(group, name: str, value) -> None:
    del group[name]
    group[name] = value
