"""verse_spine/dataset.py: the folder of cases, and the box of a case's vertebrae."""

import json

import numpy as np
import pytest

from common.hdf5 import CaseFile, write_case
from verse_spine.dataset import VerSe, spine_box


def make_case(path, boxes) -> CaseFile:
    """40 x 60 x 50 voxels of 3 x 1 x 0.5 mm; boxes are rows of (label, start z y x, stop z y x)."""
    attributes = {"spacing_mm": (3.0, 1.0, 0.5), "boxes": np.array(boxes, np.int64).reshape(-1, 7)}
    write_case(path, np.zeros((40, 60, 50), np.int16), attributes=attributes)
    return CaseFile(path)


def test_spine_box_by_hand(tmp_path):
    """The box of both vertebrae; a margin in millimetres is another number of voxels along each axis."""
    case = make_case(tmp_path / "a.h5", [(20, 10, 20, 15, 18, 40, 30), (21, 20, 22, 17, 26, 44, 28)])
    start, stop = spine_box(case)
    assert start.tolist() == [10, 20, 15] and stop.tolist() == [26, 44, 30]
    start, stop = spine_box(case, 6.0)  # 2, 6 and 12 voxels
    assert start.tolist() == [8, 14, 3] and stop.tolist() == [28, 50, 42]
    start, stop = spine_box(case, (3.0, 1.0, 100.0))
    assert start.tolist() == [9, 19, 0] and stop.tolist() == [27, 45, 50]


def test_no_vertebra_has_no_box(tmp_path):
    assert spine_box(make_case(tmp_path / "a.h5", [])) is None


def test_the_hu_range_of_a_data_set_is_two_numbers(tmp_path):
    (tmp_path / "cases").mkdir()
    make_case(tmp_path / "cases" / "a.h5", [])
    entry = {"name": "a", "subject": "a", "part": "training", "edition": 19}
    notes = {"spacing_mm": [3, 1, 0.5], "cases": [entry], "hu_range": 5}
    (tmp_path / "preprocessing.json").write_text(json.dumps(notes))
    with pytest.raises(ValueError, match='preprocessing.json: "hu_range": expected 2 number'):
        VerSe(tmp_path)
