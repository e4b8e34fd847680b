import os
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest

from lung_tumor.kaggle import (
    KaggleCase,
    extract_image,
    find_task,
    is_kaggle_folder,
    list_kaggle_cases,
    load_ground_truth,
)

SHAPE = (6, 5, 4)


@pytest.fixture
def evalseg():
    """A stand-in for the package that wrote the pickles; it exists only while a test writes one."""
    package, module = types.ModuleType("evalseg"), types.ModuleType("evalseg.io.segment_array")
    for name in ("SegmentArray", "SingleSegment"):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))
    sys.modules.update(
        {"evalseg": package, "evalseg.io": types.ModuleType("evalseg.io"), module.__name__: module}
    )
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "evalseg"]:
        del sys.modules[name]


def make_segment(evalseg, roi, data, **more):
    segment = evalseg.SingleSegment()
    segment.__dict__.update(roi=roi, data=data, shape=SHAPE, dtype=data.dtype, fill_value=0, **more)
    return segment


def make_label(evalseg, segments, shape=SHAPE, **more):
    label = evalseg.SegmentArray()
    label.__dict__.update(
        shape=shape, segments=segments, dtype=np.uint8, voxelsize=np.array([1.0, 1.0, 2.5]), **more
    )
    return label


def write(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def make_task(folder, cases=("1", "2", "10"), labels=None):
    (folder / "GroundTruth").mkdir(parents=True)
    (folder / "Predictions").mkdir()
    with zipfile.ZipFile(folder / "CT.zip", "w", zipfile.ZIP_BZIP2) as archive:
        for case in cases:
            archive.writestr(f"{case}.nii", f"scan {case}" * 50)
        archive.writestr(".keepkaggle", "")
        archive.writestr("__MACOSX/._1.nii", "resource fork")
        archive.writestr("._2.nii", "resource fork")
    for case in cases if labels is None else labels:
        write(folder / "GroundTruth" / f"{case}.pkl", {"shape": SHAPE, "segments": []})
    (folder / "GroundTruth" / "._1.pkl").write_bytes(b"resource fork")
    return folder


# ---- folders and cases ----


def test_finds_the_task_at_any_level_and_in_any_case(tmp_path):
    lung = make_task(tmp_path / "unzipped" / "Task006_Lung")
    make_task(tmp_path / "unzipped" / "Task001_LiverTumor")
    for folder in (tmp_path, tmp_path / "unzipped", lung):
        assert is_kaggle_folder(folder)
        assert find_task(folder, "task006_LUNG") == lung
        assert find_task(folder, "lung") == lung
    assert not is_kaggle_folder(tmp_path / "unzipped" / "Task006_Lung" / "GroundTruth")
    assert not is_kaggle_folder(tmp_path / "absent")


def test_a_wrong_or_ambiguous_task_lists_what_is_there(tmp_path):
    make_task(tmp_path / "Task006_Lung")
    make_task(tmp_path / "Task001_LiverTumor")
    with pytest.raises(ValueError, match=r"no task matches 'colon'.*Task001_LiverTumor.*Task006_Lung"):
        find_task(tmp_path, "colon")
    with pytest.raises(ValueError, match="several tasks match 'task0'.*Task001_LiverTumor.*Task006_Lung"):
        find_task(tmp_path, "task0")
    with pytest.raises(ValueError, match="no task matches 'lung'.*Task001_LiverTumor"):
        find_task(tmp_path / "Task001_LiverTumor", "lung")
    make_task(tmp_path / "Task006_Lung_old")
    assert find_task(tmp_path, "Task006_Lung").name == "Task006_Lung"  # the whole name wins
    with pytest.raises(ValueError, match=r"no folder with CT\.zip"):
        find_task(tmp_path / "Task006_Lung" / "GroundTruth", "lung")


def test_lists_cases_in_natural_order_without_resource_files(tmp_path):
    task = make_task(tmp_path / "Task006_Lung")
    assert list_kaggle_cases(task) == [
        KaggleCase(case, f"{case}.nii", task / "GroundTruth" / f"{case}.pkl") for case in ("1", "2", "10")
    ]


def test_incomplete_cases_are_named_at_most_ten(tmp_path):
    task = make_task(tmp_path / "a", cases=("1", "2", "3"), labels=("2", "3", "7"))
    with pytest.raises(ValueError, match=r"2 cases.*1 \(image without label\), 7 \(label without image\)\."):
        list_kaggle_cases(task)
    many = make_task(tmp_path / "b", cases=[str(n) for n in range(30)], labels=())
    with pytest.raises(
        ValueError, match=r"30 cases.*0 \(image.*, 9 \(image without label\), \.\.\."
    ) as caught:
        list_kaggle_cases(many)
    assert str(caught.value).count("image without label") == 10
    with pytest.raises(ValueError, match=r"no image in CT\.zip"):
        list_kaggle_cases(make_task(tmp_path / "c", cases=()))


def test_two_images_of_one_case_are_refused(tmp_path):
    task = make_task(tmp_path / "Task006_Lung")
    with zipfile.ZipFile(task / "CT.zip", "a") as archive:
        archive.writestr("more/2.nii.gz", "")
    with pytest.raises(ValueError, match=r"2 \(two images\)"):
        list_kaggle_cases(task)


def test_extracts_exactly_one_image(tmp_path):
    task = make_task(tmp_path / "Task006_Lung")
    path = extract_image(task, list_kaggle_cases(task)[1], tmp_path / "out")
    assert path == tmp_path / "out" / "2.nii"
    assert path.read_text() == "scan 2" * 50
    assert os.listdir(tmp_path / "out") == ["2.nii"]


@pytest.mark.parametrize(
    "member", ["../1.nii", "a/../../1.nii", "/tmp/1.nii", "C:/1.nii", "..\\1.nii", "\\1.nii", "1.nii\n.nii"]
)
def test_members_that_lead_outside_are_refused(tmp_path, member):
    task = make_task(tmp_path / "Task006_Lung")
    with zipfile.ZipFile(task / "CT.zip", "a") as archive:
        archive.writestr(zipfile.ZipInfo(member), "evil")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"CT\.zip.*outside of its folder"):
        extract_image(task, KaggleCase("1", member, task / "GroundTruth" / "1.pkl"), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_archives_leave_nothing_behind(tmp_path):
    task = make_task(tmp_path / "Task006_Lung")
    case = list_kaggle_cases(task)[0]
    with pytest.raises(ValueError, match=r"CT\.zip: cannot unpack 9\.nii.*download the archive again"):
        extract_image(task, KaggleCase("9", "9.nii", case.label_path), tmp_path / "out")
    whole = (task / "CT.zip").read_bytes()
    start = whole.index(b"BZh")
    (task / "CT.zip").write_bytes(whole[: start + 12] + bytes(9) + whole[start + 21 :])
    with pytest.raises(ValueError, match=r"CT\.zip: cannot unpack 1\.nii.*download the archive again"):
        extract_image(task, case, tmp_path / "out")
    (task / "CT.zip").write_bytes(whole[:100])
    for read in (lambda: extract_image(task, case, tmp_path / "out"), lambda: list_kaggle_cases(task)):
        with pytest.raises(ValueError, match=r"CT\.zip: not a complete zip archive.*download it again"):
            read()
    assert os.listdir(tmp_path / "out") == []


def test_encrypted_member_is_a_clear_error(tmp_path):
    task = make_task(tmp_path / "Task006_Lung", cases=("1",))
    packed = bytearray((task / "CT.zip").read_bytes())
    packed[6] |= 1  # the flag bit in the local and in the central header
    packed[packed.index(b"PK\x01\x02") + 8] |= 1
    (task / "CT.zip").write_bytes(packed)
    with pytest.raises(ValueError, match=r"cannot unpack 1\.nii .*encrypted"):
        extract_image(task, list_kaggle_cases(task)[0], tmp_path / "out")


# ---- labels ----


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["uint8", "bool", "int16", ">i4", "int64", "float32", "float64"])
def test_round_trip_of_objects(tmp_path, evalseg, protocol, dtype):
    expected = np.zeros(SHAPE, np.uint8)
    expected[1:4, 2:5, 0:2] = np.arange(18).reshape(3, 3, 2) % 5 % 2
    expected[5, 0, 3] = 1
    dense = expected.astype(dtype)
    parts = [np.s_[1:4, 2:5, 0:2], np.s_[np.int64(5) : np.int64(6), 0:1, 3:4]]
    segments = [make_segment(evalseg, roi, dense[roi]) for roi in parts]
    segments[0].data = np.asfortranarray(segments[0].data)
    segments[1].fill_value = np.uint8(0)
    path = write(tmp_path / "1.pkl", make_label(evalseg, segments, roi=np.s_[1:6, 0:5, 0:4]), protocol)
    assert b"evalseg" in path.read_bytes()
    for name in [name for name in sys.modules if name.startswith("evalseg")]:
        del sys.modules[name]
    mask = load_ground_truth(path, SHAPE)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, expected)
    assert not any(name.startswith("evalseg") for name in sys.modules)


def test_old_numpy_module_names(tmp_path):
    """numpy 1 wrote numpy.core, numpy 2 writes numpy._core; both must be read."""
    data = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    content = {
        "shape": tuple(np.int64(n) for n in SHAPE),
        "segments": [{"roi": np.s_[0:2, 0:2, 0:2], "data": data}],
    }
    new = pickle.dumps(content, protocol=0).replace(b"numpy.core", b"numpy._core")
    for name, text in (("new", new), ("old", new.replace(b"numpy._core", b"numpy.core"))):
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(text)
        assert np.array_equal(load_ground_truth(path, SHAPE)[:2, :2, :2], data)


def test_dict_and_list_of_segments_and_maximum(tmp_path):
    def box(value):
        return np.full((2, 2, 2), value, np.uint8)

    segments = [
        {"roi": np.s_[0:2, 0:2, 0:2], "data": box(3)},
        {"roi": np.s_[1:3, :2, None:2:1], "data": box(2)},
    ]
    expected = np.zeros(SHAPE, np.uint8)
    expected[1:3, 0:2, 0:2] = 2
    expected[0:2, 0:2, 0:2] = 3
    for content in ({"shape": list(SHAPE), "segments": segments}, segments, tuple(segments)):
        assert np.array_equal(load_ground_truth(write(tmp_path / "1.pkl", content), SHAPE), expected)
    for empty in ({"shape": SHAPE, "segments": []}, []):
        mask = load_ground_truth(write(tmp_path / "1.pkl", empty), SHAPE)
        assert mask.shape == SHAPE and not mask.any()
    nothing = {"roi": np.s_[0:0, 0:0, 0:0], "data": np.zeros((0, 0, 0), bool)}
    assert not load_ground_truth(write(tmp_path / "1.pkl", [nothing]), SHAPE).any()


def test_reverse_shape_is_transposed(tmp_path, evalseg):
    data = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    path = write(tmp_path / "1.pkl", make_label(evalseg, [make_segment(evalseg, np.s_[0:4, 0:3, 0:2], data)]))
    reversed_shape = SHAPE[::-1]
    mask = load_ground_truth(path, reversed_shape)
    assert mask.shape == reversed_shape and mask.flags.c_contiguous
    assert np.array_equal(mask, load_ground_truth(path, SHAPE).transpose(2, 1, 0))
    assert mask[1, 2, 3] == data[3, 2, 1]


ROI = np.s_[0:2, 0:2, 0:2]
ONES = np.ones((2, 2, 2), np.uint8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"shape": (6, 4, 5), "segments": []}, r"\(6, 4, 5\) is neither the scan's \(6, 5, 4\)"),
        ({"shape": "654", "segments": []}, "str where numbers belong"),
        ({"shape": SHAPE}, "segments"),
        ({"shape": SHAPE, "segments": [5]}, "int where an object with attributes belongs"),
        ([{"roi": np.s_[5:7, 0:2, 0:2], "data": ONES}], "roi 5:7:None does not lie on an axis of 6 voxels"),
        ([{"roi": np.s_[-2:0, 0:2, 0:2], "data": ONES}], "roi -2:0:None"),
        ([{"roi": np.s_[0:2:-1, 0:2, 0:2], "data": ONES}], "roi 0:2:-1"),
        ([{"roi": (0, 0, 0), "data": ONES}], "int in a roi where a slice belongs"),
        ([{"roi": np.s_[0:2, 0:2], "data": ONES}], "shorter|longer"),
        ([{"roi": np.s_[0:3, 0:2, 0:2], "data": ONES}], r"data of shape \(2, 2, 2\), expected \(3, 2, 2\)"),
        ([{"roi": ROI, "data": ONES * np.nan}], "other than whole numbers"),
        ([{"roi": ROI, "data": ONES * np.inf}], "other than whole numbers"),
        ([{"roi": ROI, "data": ONES * 0.5}], "other than whole numbers"),
        ([{"roi": ROI, "data": ONES.astype(int) * 256}], r"other than whole numbers in 0\.\.255"),
        ([{"roi": ROI, "data": ONES.astype(int) * -1}], r"other than whole numbers in 0\.\.255"),
        ([{"roi": ROI, "data": ONES.astype(object)}], "type '|O8' where plain numbers belong"),
        ([{"roi": ROI, "data": ONES.astype("U1")}], "where plain numbers belong"),
        ([{"roi": ROI, "data": ONES.astype("datetime64[s]")}], "where plain numbers belong"),
        ([{"roi": ROI, "data": np.zeros((2, 2, 2), [("a", "O")])}], "where plain numbers belong"),
        ([{"roi": ROI, "data": [[[1]]]}], "list where numbers belong"),
        ([{"roi": ROI, "data": ONES, "fill_value": 1}], "fills its outside"),
        ([{"roi": ROI}], "data"),
        ("a text", "str where an object with attributes belongs"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_contents_that_do_not_fit_are_refused(tmp_path, content, reason, protocol):
    path = write(tmp_path / "case7.pkl", content, protocol)
    with pytest.raises(ValueError, match=rf"case7\.pkl: not a usable label \(.*({reason})"):
        load_ground_truth(path, SHAPE)


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "1.pkl", [{"roi": ROI, "data": ONES}]).read_bytes()
    for content in (b"", b"no pickle", whole[:-30], whole[: len(whole) // 2]):
        (tmp_path / "1.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"1\.pkl: not a usable label.*download it again"):
            load_ground_truth(tmp_path / "1.pkl", SHAPE)
    with pytest.raises(FileNotFoundError):
        load_ground_truth(tmp_path / "absent.pkl", SHAPE)


# ---- hostile pickles ----


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def trap(tmp_path):
    """A file that exists only if code from a pickle ran."""
    return tmp_path / "ran"


def refuse(path, name):
    with pytest.raises(ValueError, match=rf"{path.name}.*{name}.*could run code, so it was not opened"):
        load_ground_truth(path, SHAPE)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_are_refused_and_do_not_run(tmp_path, trap, protocol):
    for function, args, name in (
        (os.system, (f"touch {trap}",), r"(posix|nt)\.system"),
        (eval, (f"open({str(trap)!r}, 'w')",), r"\.eval"),
        (exec, (f"open({str(trap)!r}, 'w')",), r"\.exec"),
        (open, (str(trap), "w"), r"io\.open|_io\.open"),
        (getattr, ("", "join"), r"\.getattr"),
        (subprocess.call, (["touch", str(trap)],), r"(subprocess|commands)\.call"),
        (np.load, (str(trap),), r"numpy.*load"),
        (np.fromfile, (str(trap),), r"numpy.*fromfile"),
        (np.save, (str(trap), 1), r"numpy.*save"),
    ):
        for content in (Call(function, *args), [{"roi": ROI, "data": Call(function, *args)}]):
            refuse(write(tmp_path / "evil.pkl", content, protocol), name)
    assert not trap.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_class_of_evalseg_that_reduces_to_a_call_is_refused(tmp_path, trap, evalseg, protocol):
    evalseg.SingleSegment.__reduce__ = lambda self: (os.system, (f"touch {trap}",))
    label = make_label(evalseg, [make_segment(evalseg, ROI, ONES)])
    refuse(write(tmp_path / "evil.pkl", label, protocol), r"\.system")
    assert not trap.exists()


def test_a_function_of_evalseg_is_recorded_but_not_called(tmp_path, trap):
    """Even with the real package imported, a name below evalseg is never looked up."""
    package = types.ModuleType("evalseg")
    package.run = lambda: trap.touch()
    package.run.__module__, package.run.__qualname__ = "evalseg", "run"
    sys.modules["evalseg"] = package
    try:
        path = write(tmp_path / "evil.pkl", Call(package.run))
        with pytest.raises(ValueError, match=r"evil\.pkl: not a usable label"):
            load_ground_truth(path, SHAPE)
    finally:
        del sys.modules["evalseg"]
    assert not trap.exists()


def global_4(module, name):
    """The opcodes by which protocol 4 names module.name; the name may hold dots."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("evalseg", "os.system"),
        ("evalseg.io", "dataset.os.system"),
        ("evalseg", "SegmentArray.__init__.__globals__"),
        ("evalseg", "SegmentArray.__class__.__subclasses__"),
        ("evalseg.io\nos", "system"),
        ("evalseg..os", "system"),
        ("evalsegment", "system"),
        ("not.evalseg", "system"),
        ("numpy", "ndarray.__class__.__subclasses__"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("numpy.core.multiarray._reconstruct\nos", "system"),
        ("numpy.coreXmultiarray", "_reconstruct"),
        ("numpy", "uint8\n"),
        ("builtins", "slice.__class__"),
        ("_codecs", "lookup"),
        ("copyreg", "__newobj__"),
        ("lung_tumor.kaggle", "_Unpickler"),
    ],
)
def test_dotted_and_look_alike_names_are_refused(tmp_path, trap, module, name):
    path = tmp_path / "evil.pkl"
    command = f"touch {trap}".encode()
    path.write_bytes(
        b"\x80\x04" + global_4(module, name) + b"\x8c" + bytes([len(command)]) + command + b"\x85R."
    )
    refuse(path, "")
    assert not trap.exists()


def test_state_cannot_be_put_on_the_reader_itself(tmp_path):
    """BUILD on a class instead of an instance would change the reader for the next file."""
    good = write(tmp_path / "good.pkl", [{"roi": ROI, "data": ONES}])
    for module, name in (
        ("evalseg", "A"),
        ("builtins", "slice"),
        ("numpy", "ndarray"),
        ("_codecs", "encode"),
    ):
        for state in (b"}\x8c\x04args\x8c\x01xs", b"N}\x8c\x04name\x8c\x01xs\x86"):
            (tmp_path / "evil.pkl").write_bytes(b"\x80\x04" + global_4(module, name) + state + b"b.")
            with pytest.raises(ValueError, match=r"evil\.pkl"):
                load_ground_truth(tmp_path / "evil.pkl", SHAPE)
    assert load_ground_truth(good, SHAPE).sum() == 8


def test_forged_dtypes_do_not_reach_numpy(tmp_path):
    """A state like ('O,', ...) would build a dtype of objects over bytes from the file."""

    class Forged(Call):
        def __reduce__(self):
            return np.dtype, ("u1", False, True), (3, "O,", None, None, None, -1, -1, 0)

    class Array:
        def __reduce__(self):
            make, args, _ = ONES.__reduce__()
            return make, args, (1, (2, 2, 2), Forged(None), False, bytes(72))

    # dtype.__setstate__ is only called on reading, so writing this is harmless.
    with pytest.raises(ValueError, match="where plain numbers belong"):
        load_ground_truth(write(tmp_path / "evil.pkl", [{"roi": ROI, "data": Array()}]), SHAPE)


def test_huge_shapes_allocate_nothing(tmp_path):
    with pytest.raises(ValueError, match="is neither the scan's"):
        load_ground_truth(write(tmp_path / "1.pkl", {"shape": (10**6,) * 3, "segments": []}), SHAPE)
