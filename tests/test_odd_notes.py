"""Notes, tables and caches as strangers write them: read right, or refused with file and key."""

import json
import math
import os
import re

import numpy as np
import pytest

from common.archives import check_zip
from common.config import make_parser, parse_args
from common.conversion import finished_entries
from common.decathlon import label_names, labelled_numbers, read_dataset_json
from common.files import check_numbers, check_sizes, open_npy, read_json
from common.hdf5 import CaseFile, write_case
from common.hu import check_window
from common.phantoms import already_written
from common.preprocessed import read_cases
from common.splits import patients_of, read_splits
from lung_tumor.download import unpack_tar
from lung_tumor.kaggle import load_ground_truth
from verse_spine.dataset import SmallScan


def test_brackets_within_brackets(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="splits.json: brackets within brackets"):
        read_json(path)


# ---- splits ----


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"train": [1, 2]}, '"train": expected a list of names'),
        ({"train": [["a"]]}, '"train": expected a list of names'),
        ({"train": ["a"], "patients": {"a": ["b"]}}, '"patients"'),
        ({"train": "ab"}, '"train" should be a list'),
    ],
)
def test_splits_of_wrong_types(tmp_path, content, problem):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(problem)):
        read_splits(path)


def test_a_patient_pattern_that_is_no_pattern():
    with pytest.raises(ValueError, match=r"--patient_pattern '\(': .*unterminated"):
        patients_of(["a_1"], "(")


# ---- YAML ----


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nsize: [*b, *b]\n", r"alias \*a"),
        ("<<: [*a, *a]\n", r"alias \*a"),
        ("size: " + "[" * 100_000, "too deep"),
        ("size: " + "{a: " * 30_000, "too deep"),
        ("\n".join(" " * k + "a:" for k in range(500)), "too deep"),
        ("size: [[1], [2]]\n", "size holds a list within a list"),
        ("config: [1]\n", "config names a file"),
    ],
)
def test_flag_files_that_would_fill_the_memory(tmp_path, capsys, text, problem):
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    parser = make_parser("doc")
    parser.add_argument("--size", type=int, nargs="+")
    with pytest.raises(SystemExit):
        parse_args(parser, ["--config", str(path)])
    line = capsys.readouterr().err
    assert re.search(problem, line) and "flags.yaml" in line and line.count("\n") == 1


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(SystemExit):
        parse_args(make_parser("doc"), ["--config", str(tmp_path / "pipe.yaml")])
    assert "pipe.yaml: a folder, pipe or device" in capsys.readouterr().err
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (
        open_npy,
        check_zip,
        lambda path: unpack_tar(path, tmp_path / "out"),
        lambda path: load_ground_truth(path, (1, 1, 1)),
    ):
        with pytest.raises(ValueError, match="pipe: a folder, pipe or device"):
            read(pipe)
    assert sorted(tmp_path.iterdir()) == [pipe, tmp_path / "pipe.yaml"]


@pytest.mark.parametrize("values", [[1, 2], [1, 2, 0], [1, 2, -3], [1, 2, math.nan], [1, 2, "3"], 7, None])
def test_sizes_that_are_none(values):
    for check in (
        lambda v: check_numbers(v, 3, "x.json: size", above=0),
        lambda v: check_sizes(v, 3, "x.json: size"),
    ):
        with pytest.raises(ValueError, match=r"x.json: size: expected 3 number\(s\) above 0, found"):
            check(values)


def test_sizes_are_whole_numbers():
    check_sizes([1, 2.0, 3], 3, "x")
    assert check_numbers([-1, 0.5], 2, "x") == [-1.0, 0.5]
    with pytest.raises(ValueError, match=r"x: expected 2 whole number\(s\), found \[1.5, 2\]"):
        check_sizes([1.5, 2], 2, "x")


# ---- preprocessed folders ----


@pytest.fixture
def preprocessed(tmp_path):
    """A folder of two cases, and how to change its notes."""
    notes = {"spacing_mm": [1, 1, 1], "cases": [{"name": name, "subject": name} for name in ("a", "b")]}
    (tmp_path / "cases").mkdir()
    for name in ("a", "b"):
        volume = np.zeros((4, 4, 4), np.int16)
        write_case(tmp_path / "cases" / f"{name}.h5", volume, attributes={"voxels": {"1": 2}})
    (tmp_path / "preprocessing.json").write_text(json.dumps(notes))
    return tmp_path, notes


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spacing_mm": [1, 1]}, '"spacing_mm": expected 3 number'),
        ({"spacing_mm": [1, math.nan, 1]}, '"spacing_mm": expected 3 number'),
        ({"spacing_mm": [1, 0, 1]}, '"spacing_mm": expected 3 number(s) above 0'),
        ({"cases": [1]}, '"cases", entry 0: expected an object, found a number'),
        ({"cases": [{"subject": "a"}]}, '"cases", entry 0: "name" is missing'),
        ({"cases": [{"name": "a", "subject": 3}]}, '"cases", entry 0: "subject" should be a text'),
    ],
)
def test_notes_of_a_preprocessed_folder(preprocessed, change, problem):
    folder, notes = preprocessed
    (folder / "preprocessing.json").write_text(json.dumps(notes | change))
    with pytest.raises(ValueError, match="preprocessing.json: .*" + re.escape(problem)):
        read_cases(folder, "task", "raw", {"subject": str}, {"voxels": dict})


def test_damaged_cases_are_told_before_the_training(preprocessed):
    folder, _ = preprocessed
    assert set(read_cases(folder, "task", "raw", {"subject": str}, {"voxels": dict})[2]) == {"a", "b"}
    with pytest.raises(ValueError, match='a.h5: attributes: "voxels" should be a list, found an object'):
        read_cases(folder, "task", "raw", {"subject": str}, {"voxels": list})
    path = folder / "cases" / "b.h5"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="b.h5: truncated"):
        read_cases(folder, "task", "raw", {"subject": str}, {"voxels": dict})


@pytest.mark.parametrize(
    "entries", [[1], [{"name": 3}], [{"name": "a"}], [{"name": "a", "settings": 1}], [{"name": ["a"]}]]
)
def test_odd_notes_of_an_earlier_conversion_are_converted_again(preprocessed, capsys, entries):
    folder, _ = preprocessed
    (folder / "preprocessing.json").write_text(json.dumps({"cases": entries}))
    assert finished_entries(folder, {"a": [["x", 1, 2]]}, {"a": {"spacing": 1}}) == {}
    assert "converted again" in capsys.readouterr().out


def test_damaged_notes_of_an_earlier_conversion_are_converted_again(preprocessed):
    folder, _ = preprocessed
    (folder / "preprocessing.json").write_text("{")
    assert finished_entries(folder, {"a": [["x", 1, 2]]}, {"a": {}}) == {}


# ---- caches ----


def test_damaged_small_grids_are_made_again(tmp_path):
    image = np.arange(8**3).reshape(8, 8, 8).astype(np.int16)
    attributes = {"spacing_mm": (4, 4, 4), "boxes": np.array([[1, 2, 2, 2, 5, 5, 5]])}
    write_case(tmp_path / "a.h5", image, (image > 300).astype(np.uint8), attributes=attributes)

    def read() -> np.ndarray:
        return SmallScan(CaseFile(tmp_path / "a.h5"), (4, 4, 4), tmp_path / "grids").image

    whole = read()
    (file,) = (tmp_path / "grids").iterdir()
    content = file.read_bytes()
    for damaged in (b"", b"PK", content[: len(content) // 2], content[:-200], bytes(len(content))):
        file.write_bytes(damaged)
        assert np.array_equal(read(), whole)
        assert len(file.read_bytes()) == len(content)
    stored = dict(np.load(file))
    for change in ({"image": stored["image"][:2]}, {"image": np.array([object()])}, {"stamp": "now"}):
        np.savez(file, **stored | change)
        assert np.array_equal(read(), whole)


# ---- dataset.json, and flags that are NaN ----


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"labels": ["background", "liver"]}, '"labels" should be an object'),
        ({"modality": "CT"}, '"modality" should be an object'),
        ({"labelled": 3}, '"labelled" should be an object or a list'),
        ([], "expected an object, found a list"),
    ],
)
def test_dataset_json_of_wrong_types(tmp_path, content, problem):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="dataset.json: " + problem):
        read_dataset_json(tmp_path)


@pytest.mark.parametrize("numbers", [[[1]], [{}], ["1"], [True], {"a": [1]}])
def test_labelled_of_wrong_types(numbers):
    with pytest.raises(ValueError, match="expected numbers of labels from 1 to 2"):
        labelled_numbers("b", {"labelled": numbers}, None, [1, 2], "dataset.json")


def test_label_names_with_signs_that_only_look_like_digits():
    assert label_names({"labels": {"\u00b2": "square", "1": "liver", "aorta": 2, "both": [1, 2]}}) == {
        1: "liver",
        2: "aorta",
    }


@pytest.mark.parametrize("window", [(math.nan, 1), (1, 1), (2, 1), (-math.inf, 1)])
def test_windows_that_are_none(window):
    with pytest.raises(ValueError, match="--window"):
        check_window(window, "--window")


def test_a_damaged_index_of_phantoms(tmp_path):
    (tmp_path / "phantoms.json").write_text("{")
    with pytest.raises(FileExistsError, match="holds something else"):
        already_written(tmp_path, "phantoms.json", {"a": 1})
    (tmp_path / "phantoms.json").write_text('{"a": 1}')
    assert already_written(tmp_path, "phantoms.json", {"a": 1})
