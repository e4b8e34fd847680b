"""Files that appear whole or not at all, and JSON notes whose content is checked when they are read."""

import contextlib
import hashlib
import json
import math
import numbers
import os
import secrets
import shutil
import tempfile
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.faults import first_line

if TYPE_CHECKING:
    import numpy as np

JSON_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
JSON_NAMES |= {bool: "true or false", type(None): "null", tuple: "a list"}

# ---- writing ----


def refuse_pipe(path: str | Path) -> None:
    """ValueError for a pipe, a device or a folder: to read it could take for ever, replacing it does harm."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: a folder, pipe or device, not a file")


@contextlib.contextmanager
def replacing(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Write a file in one step: a reader, or an interruption, never meets half of it.

    with replacing(folder / "curves.png") as partial:
        figure.savefig(partial)

    Whatever is raised inside passes through unchanged. What was written until then is removed, and an earlier
    file of that name stays as it was.

    Args:
        path: the final name; its folder must exist.
        sync: wait until the content is on the disk, so that it also survives a power failure. For checkpoints
            and other files that took long to make; it costs milliseconds for each file.

    Yields:
        The path to write to: in the same folder, hidden, used by no other process, with the same ending,
        because many libraries choose the format by it. A process that is killed while it writes leaves this
        file behind.

    Raises:
        ValueError: something that is no file has that name.
        FileNotFoundError: nothing was written to it.
        OSError: it cannot be renamed, or with `sync` the disk is full.
    """
    path = Path(path)
    refuse_pipe(path)
    partial = path.with_name(f".partial_{secrets.token_hex(4)}_{path.name[-50:]}")  # names end at 255 bytes
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def link_file(link: Path, target: str) -> None:
    """Give a file a second name: `link` points to `target`, counted from the folder of `link` on.

    Where the system allows no links it is a copy, of what is there now.
    """
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(target)
    except OSError:  # Windows, unless the user has the right to make links
        if (link.parent / target).is_file():
            shutil.copyfile(link.parent / target, link)


def make_folder(path: str | Path, flag: str = "--out") -> Path:
    """Make a folder, and those above it, unless it is there.

    Raises:
        OSError: it cannot be made or written to; names the flag.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        why = f"nothing can be written there ({error.strerror})"
        raise OSError(f"{flag} {path}: {why}; choose a folder you may write to") from error
    return path


RAW_FOLDERS = ("imagesTr", "labelsTr", "rawdata", "derivatives")


def refuse_raw_data(out: Path) -> None:
    """ValueError if a folder holds somebody's scans.

    A conversion writes, replaces and removes files of common names, such as dataset.json, which that data set
    may have itself.
    """
    if found := [name for name in RAW_FOLDERS if (out / name).is_dir()]:
        raise ValueError(
            f"--out {out}: holds scans ({found[0]}/), which stay as they are; name another folder"
        )


def public_folder(parent: Path | None, prefix: str = "partial_") -> Path:
    """A new folder in `parent` (None: in that for temporary files) for a cache that others may use.

    `tempfile` alone shuts everybody else out, which stays so when the folder gets its name.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    return folder


def write_json(path: str | Path, content: Any) -> None:
    """Plain values to a JSON file in UTF-8, written in one step."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


# ---- reading ----


def visible_files(folder: Path, out: Path, recursive: bool) -> Iterator[tuple[Path, bool]]:
    """(file, whether it lies in `out`, a folder of results) of a folder, in no order, but no hidden ones and
    none in hidden folders.

    Args:
        recursive: also of its subfolders.
    """
    results = None
    if folder.resolve() in out.resolve().parents:
        results = out.resolve().relative_to(folder.resolve())
    for path in folder.rglob("*") if recursive else folder.iterdir():
        inside = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if not is_hidden and path.is_file():
            yield path, results in inside.parents


def read_json(path: str | Path, expected: type | Mapping[str, Any] = dict, *, advice: str = "") -> Any:
    """Content of a JSON file, after checking that it is what the caller expects.

    Args:
        expected: dict or list; or {key: type} of keys that an object must have, e.g. {"cases": list}. A key
            that may be missing has None among its types, e.g. {"window_hu": list | None}.
        advice: what to do about a file that is not as expected, for the error message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not valid JSON in UTF-8, another type, or a key that is missing or has another type; with
            what was found.
    """
    path = Path(path)
    ending = f"; {advice}" if advice else ""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file{ending}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark in front
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}){ending}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: brackets within brackets, too deep to be read{ending}") from error
    if isinstance(expected, type):
        if not isinstance(content, expected):
            raise ValueError(f"{path}: expected {JSON_NAMES[expected]}, found {_shown(content)}{ending}")
    else:
        check_keys(content, expected, str(path), advice=advice)
    return content


def check_keys(content: Any, expected: Mapping[str, Any], where: str, *, advice: str = "") -> None:
    """Refuse an object of a JSON file that lacks a key, or in which a key has another type.

    Args:
        content: what should be a dict.
        expected, advice: as for `read_json`.
        where: names the file, and the place in it, in the error message.

    Raises:
        ValueError: with the key and what was found.
    """
    ending = f"; {advice}" if advice else ""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, found {_shown(content)}{ending}")
    for key, types in expected.items():
        value = content.get(key)
        if isinstance(value, types):
            continue
        wished = [t for t in getattr(types, "__args__", (types,)) if t is not type(None)]
        names = [JSON_NAMES.get(t, t.__name__) for t in wished]
        wanted = " or ".join(dict.fromkeys(names))
        if key not in content:
            raise ValueError(f'{where}: "{key}" is missing, expected {wanted}{ending}')
        raise ValueError(f'{where}: "{key}" should be {wanted}, found {_shown(value)}{ending}')


def check_numbers(values: Any, count: int, what: str, *, above: float | None = None) -> list[float]:
    """The numbers of a list in a note, as float; none of them NaN or infinite.

    Args:
        count: how many there must be.
        what: names file and key in the error message.
        above: what each of them must exceed, such as 0 for sizes.

    Raises:
        ValueError: no such list.
    """
    is_list = isinstance(values, list | tuple) and len(values) == count
    is_right = is_list and all(map(_is_finite, values))
    if not is_right or (above is not None and min(values) <= above):
        limit = "" if above is None else f" above {above:g}"
        raise ValueError(f"{what}: expected {count} number(s){limit}, found {str(values)[:60]}")
    return [float(v) for v in values]


def check_sizes(values: Any, count: int, what: str) -> None:
    """ValueError unless a list in a note holds `count` whole numbers above 0, such as a patch in voxels."""
    if any(number % 1 for number in check_numbers(values, count, what, above=0)):
        raise ValueError(f"{what}: expected {count} whole number(s), found {str(values)[:60]}")


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # also a number of numpy
    return is_number and math.isfinite(value)


def check_names(values: Any, what: str) -> list[str]:
    """A list of names in a note, as it is; ValueError, with `what` in front, if it is none."""
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{what}: expected a list of names, found {str(values)[:60]}")
    return values


# What numpy raises where a .npy file, or a member of a .npz file, is damaged; MemoryError also by a header
# that announces more than there is.
NPY_ERRORS = (ValueError, EOFError, OverflowError, MemoryError, RecursionError, tokenize.TokenError)


def open_npy(path: str | Path) -> "np.ndarray":
    """The array in a .npy file, mapped into memory to be read, after its header was compared with its length.

    Raises:
        OSError: no such file, or no permission.
        ValueError: no array of plain numbers, an empty one, or a truncated or otherwise damaged file.
    """
    import numpy as np

    refuse_pipe(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_ERRORS as error:
        detail = first_line(error)
        raise ValueError(f"{path}: not a .npy file of plain numbers ({detail})") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path}: not a .npy file of plain numbers (it is an archive, .npz)")
    return array


def check_room(folder: Path, need_bytes: int, what: str) -> None:
    """OSError if a disk has not that much room: writing to a memory map on a full one ends the process."""
    if need_bytes > (free := shutil.disk_usage(folder).free):
        raise OSError(
            f"{folder}: {what} takes {need_bytes >> 20} MiB there, {free >> 20} are free; make room"
        )


def read_mapped(array: "np.ndarray", index: int) -> "np.ndarray":
    """A copy of `array[index]` of an array of `open_npy`, or of one in memory.

    Raises:
        ValueError: the file was cut off after it was opened. To read beyond its end would end the process.
    """
    import numpy as np

    if isinstance(array, np.memmap):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile; what is mapped stays
            if os.path.getsize(array.filename) < array.offset + array.nbytes:
                raise ValueError(f"{array.filename}: was cut off while it was in use; start again")
    return np.array(array[index])


def printable(text: str) -> str:
    """A text in which what a file name holds that is not UTF-8 is spelled out, as \\udce9; else as it is.

    Without it such a name can neither be written to a file nor drawn.
    """
    return text.encode("utf8", "backslashreplace").decode("utf8")


def listed(items: Sequence, most: int = 8, separator: str = ", ") -> str:
    """The first items of a list as a text: 1, 2, 3 and 40 more."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(map(str, items[:most])) + more


def file_sha1(path: str | Path) -> str:
    """SHA-1 of a file, as `sha1sum` prints it."""
    return hashlib.sha1(Path(path).read_bytes()).hexdigest()


def _shown(value: Any) -> str:
    """Type and beginning of a value of a JSON file."""
    text = json.dumps(value, default=str)  # of a checkpoint it may hold tensors
    if len(text) > 60:
        text = f"{text[:57]}..."
    return f"{JSON_NAMES.get(type(value), type(value).__name__)} ({text})"
