"""Predicting or scoring many scans: find them, take each in turn, keep what is finished, tell what failed."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from common import distributed
from common.conversion import failure_reason
from common.dicom_headers import DICOM_ENDINGS
from common.files import visible_files
from common.foreign import foreign_files, why_foreign
from common.mask_files import CONVERTED, NO_MASKS
from common.nifti import case_name
from common.splits import natural_key
from common.tables import append_row, read_table, write_table

Item = TypeVar("Item", bound=Hashable)  # a path or a name


def find_sources(
    source: str | Path,
    suffixes: tuple[str, ...],
    *,
    out: Path,
    own_names: tuple[str, ...],
    recursive: bool,
    what: str,
) -> list[Path]:
    """The file that --source names, or the files of that folder in natural order.

    Hidden files and folders are skipped, and so are results of earlier runs: files whose name, without its
    suffix, ends in one of `own_names`, and everything in the folder `out` where it lies within the source.

    Args:
        suffixes: in lower case; which files to take, e.g. (".nii", ".nii.gz").
        recursive: look into subfolders as well.
        what: what is looked for, for the error message, e.g. "NIfTI scan".

    Raises:
        FileNotFoundError: no such file or folder, or nothing to take in it.
        ValueError: a file in a format that is known and not read.
    """
    source = Path(source)
    if source.is_file():
        if not source.name.lower().endswith(suffixes) and (reason := why_foreign(source)):
            raise ValueError(f"--source {reason}")
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"--source {source}: no such file or folder")
    found, foreign, left_out = [], [], 0
    for path, is_in_out in visible_files(source, out, recursive):
        if not path.name.lower().endswith(suffixes):
            if not is_in_out and not path.name.lower().endswith(DICOM_ENDINGS):
                foreign.append(path)
            continue
        inside = path.relative_to(source)
        is_result = case_name(path).lower().endswith(own_names) or NO_MASKS.intersection(inside.parts[:-1])
        if is_result or is_in_out:
            left_out += 1
        else:
            found.append(path)
    if not found:
        hint = ""
        if left_out:
            hint += f"; {left_out} file(s) are left out as results ({', '.join(own_names)} or in {out})"
        if not recursive:
            hint += "; --recursive also looks into subfolders"
        hint += f"; files that end in {', '.join(suffixes)} are read"
        if others := foreign_files(foreign):
            hint += f". There are {others}"
        raise FileNotFoundError(f"--source {source}: no {what} in it{hint}")
    if (others := foreign_files(foreign)) and distributed.is_main():
        tqdm.write(f"left out: {others}")
    return sorted(found, key=lambda path: natural_key(str(path)))


def result_folders(
    names: Mapping[Path, str], source: str | Path, out: Path, *, mirrored: bool = False
) -> dict[Path, Path]:
    """{scan: folder of its results}: `out`; of scans below `source` that are called alike, as case1/ct.nii.gz
    and case2/ct.nii.gz, the like subfolders of `out`.

    Args:
        names: {scan: its name}.
        mirrored: results of all scans in subfolders of `source` lie in like subfolders.
    """
    count = Counter(names.values())
    return {
        path: out / path.parent.relative_to(source)
        if (mirrored or count[name] > 1) and path.parent != out / CONVERTED  # of DICOM files, in `out` itself
        else out
        for path, name in names.items()
    }


def name_clashes(results: Mapping[Path, Path]) -> dict[Path, str]:
    """Sources whose result would overwrite that of an earlier source, with the reason for each.

    Args:
        results: {source: path of its result without suffix}, of all processes, so that each of them comes to
            the same answer.
    """
    clashes: dict[Path, str] = {}
    first: dict[Path, Path] = {}
    for source, result in results.items():
        earlier = first.setdefault(result, source)
        if earlier != source:
            clashes[source] = f"its result would have the name of that of {earlier}; rename one of the two"
    return clashes


def each(
    function: Callable[[Item], dict], items: Sequence[Item], *, unit: str, table: Path | None = None
) -> tuple[list[dict], dict[Item, str]]:
    """Call `function` for each item, shared over the processes; whatever one raises is its own failure only.

    Args:
        function: returns the item's row of the table.
        items: the same in every process.
        unit: what an item is, for the progress bar, e.g. "scan".
        table: CSV file of the rows. It begins anew and gets each row as soon as the item is finished, so that
            a process that is killed leaves the rows of what it has finished. Of several processes the first
            writes this file and the others <name>.process1.csv and so on, until all rows are put together.
            Lists and dicts in a row are left out of it. One of an earlier run stays beside it as
            <name>.earlier1.csv and so on, with a line that says so.

    Returns:
        (rows in the order of `items`, {failed item: reason}), the same in every process.

    Raises:
        KeyboardInterrupt: Ctrl-C; on rank 0 its text tells how many items are finished and what failed.
    """
    rows: dict[Item, dict] = {}
    failed: dict[Item, str] = {}
    own_table = _begin_tables(table) if table else None
    share = distributed.my_share(list(items))
    no_bar = True if len(share) < 2 or not distributed.is_main() else None  # None: only on a terminal
    try:
        for item in tqdm(share, f"{unit}s", unit=unit, leave=False, disable=no_bar):
            try:
                row = function(item)
                if own_table:
                    append_row(own_table, _plain(row))
                rows[item] = row
            except Exception as error:
                failed[item] = failure_reason(error)
            if item in failed:  # what it held on the card must not starve the next one
                torch.cuda.empty_cache()
        shares = distributed.gather((rows, failed))
    except KeyboardInterrupt:
        if not distributed.is_main():
            raise
        tables = _tables(table) if table else []
        count = sum(map(_num_rows, tables)) if tables else len(rows)
        where = f"; their results are in {', '.join(map(str, tables))}" if tables else ""
        lines = [f"\nstopped by the user after {count} of {len(items)} {unit}(s){where}"]
        raise KeyboardInterrupt("\n".join([*lines, *failed_lines(failed)])) from None
    for other_rows, other_failed in shares:
        rows |= other_rows
        failed |= other_failed
    ordered = [rows[item] for item in items if item in rows]
    if table:
        if distributed.is_main() and ordered:
            write_table(table, [_plain(row) for row in ordered])
        distributed.barrier()  # until then each process keeps its own
        if not distributed.is_main():
            own_table.unlink(missing_ok=True)
    return ordered, {item: failed[item] for item in items if item in failed}


def failed_lines(failed: Mapping[Item, str]) -> list[str]:
    """One line for each item that failed, with its name and the reason."""
    lines = []
    for item, reason in failed.items():
        is_named = reason.startswith(str(item))
        lines.append(f"failed: {reason}" if is_named else f"failed: {item}: {reason}")
    return lines


def exit_code(failed: Mapping[Item, str]) -> int:
    """1 on rank 0 if anything failed, else 0.

    The other processes end with 0: as soon as one ends with 1, torchrun ends the rest, and what rank 0
    printed last would be lost.
    """
    return 1 if failed and distributed.is_main() else 0


def _begin_tables(table: Path) -> Path:
    """Give the tables of an earlier run another name; the table that this process writes to."""
    if distributed.is_main():
        number = 1
        for path in _tables(table):
            while (earlier := table.with_name(f"{table.stem}.earlier{number}{table.suffix}")).exists():
                number += 1
            path.rename(earlier)
            tqdm.write(f"{path.name} of an earlier run is now {earlier}")
    distributed.barrier()
    rank = distributed.rank()
    return table if rank == 0 else table.with_name(f"{table.stem}.process{rank}{table.suffix}")


def _tables(table: Path) -> list[Path]:
    """The tables of all processes that exist."""
    others = sorted(table.parent.glob(f"{table.stem}.process*{table.suffix}"))
    return [path for path in (table, *others) if path.is_file()]


def _num_rows(table: Path) -> int:
    return len(read_table(table)[1])


def _plain(row: dict) -> dict:
    """What of a row stands in a table; NaN as an empty cell, as `write_table` has it."""
    cells = {}
    for key, value in row.items():
        if isinstance(value, float) and math.isnan(value):
            cells[key] = ""
        elif not isinstance(value, (list, dict)):
            cells[key] = value
    return cells
