"""common/tables.py: CSV files as other programs and strangers write them, and as spreadsheets read ours."""

import csv
import math

import numpy as np
import pytest

from common.sites import read_subjects
from common.tables import append_row, csv_cell, read_table, write_table

NAN = float("nan")


def read_csv(path):
    with open(path, newline="", encoding="utf8") as file:
        return list(csv.reader(file))


def test_write_table(tmp_path):
    path = tmp_path / "table.csv"
    rows = [
        {"case": "lung, 001", "dice": 0.123456789, "voxels": 12_345_678, "hd95_mm": NAN},
        {"case": "lung_é", "dice": np.float32("nan"), "voxels": np.int64(3), "hd95_mm": np.float32(1 / 3)},
        {"case": "c", "dice": np.float64("nan"), "voxels": 0, "hd95_mm": 1e-12},
    ]
    write_table(path, rows)
    assert path.read_text(encoding="utf8") == (
        'case,dice,voxels,hd95_mm\n"lung, 001",0.123457,12345678,\nlung_é,,3,0.333333\nc,,0,1e-12\n'
    )
    with path.open(newline="", encoding="utf8") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["lung, 001", "lung_é", "c"]


def test_write_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="table.csv: no rows to write"):
        write_table(tmp_path / "table.csv", [])
    assert not (tmp_path / "table.csv").exists()


def test_write_table_with_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="extra"):
        write_table(tmp_path / "table.csv", [{"a": 1}, {"a": 2, "extra": 3}])


def test_append_row_writes_its_header_once(tmp_path):
    path = tmp_path / "metrics.csv"
    append_row(path, {"epoch": 0, "loss": 1 / 3, "note": "a, b"})
    append_row(path, {"epoch": 1, "loss": float("nan"), "note": "ä"})
    append_row(path, {"epoch": 2, "loss": 5e-5, "note": None})
    assert read_csv(path) == [
        ["epoch", "loss", "note"],
        ["0", "0.333333", "a, b"],
        ["1", "nan", "ä"],
        ["2", "5e-05", ""],
    ]


def test_append_row_keeps_to_the_columns_of_the_first_row(tmp_path):
    path = tmp_path / "metrics.csv"
    path.touch()  # empty: still gets its header
    append_row(path, {"epoch": 0, "loss": 0.5})
    append_row(path, {"loss": 0.25, "added_later": 7, "epoch": 1})
    append_row(path, {"loss": 0.125})
    assert read_csv(path) == [["epoch", "loss"], ["0", "0.5"], ["1", "0.25"], ["", "0.125"]]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+case", "'+case"),
        ("-case", "'-case"),
        ("\tx", "'\tx"),
        ("-1.5", "-1.5"),
        ("+3e5", "+3e5"),
        ("case-1", "case-1"),
        ("", ""),
        (-1.5, "-1.5"),
        (-3, -3),
        (np.float32(-0.25), "-0.25"),
        (math.nan, ""),
        (True, True),
        (None, None),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_cells_that_a_spreadsheet_would_compute_are_quoted_and_numbers_are_not(value, cell):
    assert csv_cell(value) == cell


def test_quoted_cells_come_back_as_they_were(tmp_path):
    write_table(tmp_path / "a.csv", [{"case": "=1+1", "dice": -0.5}, {"case": "'=x", "dice": 1.0}])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["case,dice", "'=1+1,-0.5", "'=x,1"]
    append_row(tmp_path / "b.csv", {"case": "@x", "loss": -2.0})
    assert (tmp_path / "b.csv").read_text().splitlines() == ["case,loss", "'@x,-2"]
    assert read_table(tmp_path / "a.csv") == (
        ["case", "dice"],
        [{"case": "=1+1", "dice": "-0.5"}, {"case": "=x", "dice": "1"}],
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"name,subject\n" + b"a" * 200_000 + b",b\n", "field larger"),
        (b"name,subject\ncaf\xe9,b\n", "utf-8"),
        (b"name,subject\na,b,c\n", "line 2 has 3 cells, but there are 2 columns"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, content, problem):
    path = tmp_path / "people.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"people.csv: not a readable table.*{problem}"):
        read_subjects(path)


def test_a_row_that_is_too_short_has_empty_cells(tmp_path):
    path = tmp_path / "people.tsv"
    path.write_text("name\tsubject\tsite\na\tb\n\n")
    assert read_subjects(path) == {"a": ("b", "unknown")}
