"""Tables: CSV files, read and written so that a spreadsheet shows what they hold and computes nothing."""

import csv
import math
import numbers
from pathlib import Path
from typing import Any

from common.files import printable, replacing

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # beginnings of a cell that a spreadsheet computes


def read_table(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """(names of the columns, rows) of a table: comma-separated, or by tabs if its name ends in .tsv.

    Blanks around names and cells count for nothing; a cell that a row lacks is "". What `csv_cell` has quoted
    comes back as it was.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a table in UTF-8, or a row with more cells than there are columns.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            columns = [name.strip() for name in next(reader, [])]
            for cells in reader:
                if len(cells) > len(columns):
                    raise ValueError(
                        f"line {reader.line_num} has {len(cells)} cells, but there are {len(columns)} columns"
                    )
                texts = [_unquoted(cell.strip()) for cell in cells]
                if any(texts):
                    rows.append(dict.fromkeys(columns, "") | dict(zip(columns, texts, strict=False)))
    except (ValueError, csv.Error) as error:  # ValueError: also of bytes that are not UTF-8
        raise ValueError(f"{path}: not a readable table ({error}); save it as CSV in UTF-8") from error
    return columns, rows


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Rows of equal keys to CSV in one step; see `csv_cell` for how values are written."""
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: csv_cell(value) for key, value in row.items()})


def append_row(path: str | Path, row: dict) -> None:
    """Add one line to a CSV file whose columns are those of its first row.

    Later rows may lack a column, which stays empty there; what has no column is left out.
    """
    path = Path(path)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a+", newline="", encoding="utf8") as file:
        file.seek(0)
        columns = list(row) if is_new else next(csv.reader(file))
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else csv_cell(v) for k, v in row.items()})


def csv_cell(value: Any) -> Any:
    """A value as it stands in a table: floats with six significant digits, NaN as an empty cell.

    A text that a spreadsheet would take for a formula gets a ' in front; numbers stay numbers. Else texts are
    as `printable` makes them.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):  # of numpy, too
        return "" if math.isnan(value) else f"{value:.6g}"
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) and not _is_number(text) else text


def _unquoted(text: str) -> str:
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
