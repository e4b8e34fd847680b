"""common/check_cases.py: each fault of a case by a file that has it, and what is printed of a data set."""

import csv

import numpy as np
import pytest

from common.check_cases import check_case, note_duplicates, report
from common.nifti import load_label, write_nifti

NAMES = {1: "right ear", 2: "left ear", 3: "nose", 4: "beard"}
SIDES = ((1, 2), (1, 3))


def add(folder, name, labels=None, *, scale=1, **where):
    """A scan with fat and tissue and its labels, ears at their sides; paths of both."""
    image = np.random.default_rng(len(name)).integers(-120, 80, (8, 20, 20)).astype(np.int16) * np.int16(
        scale
    )
    if labels is None:
        labels = np.zeros(image.shape, np.uint8)
        labels[3:6, 5:9, 15:18], labels[3:6, 5:9, 2:5], labels[2:4, 12:16, 9:11] = 1, 2, 3
    paths = folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz"
    write_nifti(paths[0], image, (3, 2, 2))
    write_nifti(paths[1], labels, (3, 2, 2), **where)
    return paths


def check(image, label, **flags):
    given = {"labelled": tuple(NAMES), "right_and_left": SIDES, "is_ct": True}
    return check_case(image, label, NAMES, **(given | flags))


def labels_of(paths):
    return load_label(paths[1]).array.copy()


def test_a_good_case(tmp_path):
    checked = check(*add(tmp_path, "a", orientation="LPS"))
    assert checked.problems == checked.remarks == [] and checked.present == [1, 2, 3]
    assert (
        checked.row["shape_z"] == 8 and checked.row["spacing_y_mm"] == 2 and checked.row["labels"] == "1 2 3"
    )
    assert set(checked.hashes) == {"scan", "label"}


def test_missing_files_unless_they_are_not_needed(tmp_path):
    image, label = add(tmp_path, "a")
    assert check(None, label).problems == [f"{label}: a label without a scan of that name"]
    assert check(image, None).problems == [f"{image}: a scan without a label of that name"]
    assert check(image, None, needs=("scan",)).problems == check(None, label, needs=("label",)).problems == []
    assert check(image, None).labelled == () and check(None, label).labelled == (1, 2, 3, 4)
    label.write_bytes(b"")
    assert "empty file" in check(image, label).problems[0], "the scan is looked at all the same"
    assert check(image, label).row["shape_z"] == 8
    image.write_bytes(b"")
    assert len(check(image, label).problems) == 2 and check(image, label).row["shape_z"] is None


def test_grids_and_numbers(tmp_path):
    assert "another grid" in check(*add(tmp_path, "a", origin_mm=(9, 0, 0))).problems[0]
    paths = add(tmp_path, "b")
    labels = labels_of(paths)
    labels[0, 0, :3] = 9
    (problem,) = check(*add(tmp_path, "b", labels)).problems
    assert "label value(s) 9; expected 1 to 4. Is it a label of another data set?" in problem
    (problem,) = check(*add(tmp_path, "c"), labelled=(1, 2)).problems
    assert "holds 3 (nose), which --labelled or dataset.json does not name as labelled" in problem


def test_sides_in_space(tmp_path):
    labels = labels_of(add(tmp_path, "a"))
    (problem,) = check(*add(tmp_path, "b", labels[:, :, ::-1])).problems
    assert problem.startswith(
        "on the wrong side: right ear left of left ear, right ear left of nose: the file is"
    )
    moved = np.where(labels == 3, 0, labels)
    moved[3:6, 5:9, 18:20] = 3
    (problem,) = check(*add(tmp_path, "c", moved)).problems
    assert problem == "on the wrong side: right ear left of nose: two labels are exchanged"
    moved[3:6, 5:9, 18:20], moved[3:6, 5:9, 0:2] = 0, 3
    assert check(*add(tmp_path, "d", moved)).problems == [], "no pair says where nose and left ear lie"


def test_remarks(tmp_path):
    paths = add(tmp_path, "a")
    labels = labels_of(paths)
    labels[0, 0, 0], labels[0, 10, 10:12], labels[7, 19, 19] = 3, 3, 4
    remarks = check(*add(tmp_path, "b", labels)).remarks
    assert remarks == ["nose: 2 speck(s) of up to 2 voxel(s)", "beard: 1 voxel(s) in all"]
    assert (
        check(*add(tmp_path, "b", labels), speck_voxels=2).remarks[0]
        == "nose: 1 speck(s) of up to 1 voxel(s)"
    )
    assert check(*add(tmp_path, "b", labels), speck_voxels=0).remarks == []
    paths = add(tmp_path, "c", scale=0)
    assert (
        check(*paths).remarks == ["all values are 0; the scan is empty"]
        and not check(*paths, is_ct=False).remarks
    )


def test_duplicates_of_content(tmp_path):
    a, b, c = (check(*add(tmp_path, name)) for name in ("a", "bb", "c"))
    note_duplicates({"first": a, "second": b, "third": c})
    assert a.problems == [] and b.problems == ["its label is the same as that of first"]
    assert c.problems == [f"its {kind} is the same as that of first" for kind in ("scan", "label")]
    empty = [check(*add(tmp_path, name, np.zeros((8, 20, 20), np.uint8))) for name in ("dddd", "eeeee")]
    note_duplicates({"4": empty[0], "5": empty[1]})
    assert empty[1].problems == [], "empty label maps may be equal"


def test_report_counts_and_writes(tmp_path, capsys):
    a, b = check(*add(tmp_path, "a")), check(*add(tmp_path, "bb"), labelled=(1, 2, 3))
    assert report({"a": a, "bb": b}, ["data set: odd"], NAMES, tmp_path / "out") == 2
    printed = capsys.readouterr().out
    for words in (
        "  z: 3, 3, 3\n  y: 2, 2, 2\n",
        "slice thickness (the largest of the three): 3, 3, 3",
        "   1 right ear: 2 of 2\n",
        "   4 beard: 0 of 1\n",
        "0 remark(s)\n2 problem(s):\n  data set: odd\n  bb: its label is the same as that of a\n",
    ):
        assert words in printed
    with (tmp_path / "out/check.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["problems"] for row in rows] == ["", "its label is the same as that of a"]
    assert report({}, [], NAMES, None) == 0


def test_a_table_begins_with_a_case_that_cannot_be_read(tmp_path):
    broken, good = add(tmp_path, "a"), add(tmp_path, "bb")
    for path in broken:
        path.write_bytes(b"")
    assert report({"a": check(*broken), "bb": check(*good)}, [], NAMES, tmp_path) == 2
    assert len((tmp_path / "check.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("missing", [1, 2])
def test_one_side_alone_tells_nothing(missing, tmp_path):
    labels = labels_of(add(tmp_path, "a"))[:, :, ::-1]
    labels = np.where(labels == missing, 0, np.where(labels == 3, 4, labels))  # a beard has no sides
    assert check(*add(tmp_path, "b", labels)).problems == []
