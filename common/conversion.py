"""Every case of a data set once, in several processes; a case that fails costs the others nothing.

A converted data set is a folder with <name>.h5 for each case in `cases`, notes of them all in
preprocessing.json, and cases.csv for the reader.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import faults
from common.files import check_keys, make_folder, read_json, refuse_raw_data, write_json
from common.hdf5 import CaseFile
from common.messages import show_warnings_plainly, warn
from common.splits import natural_key
from common.tables import write_table

NOTES = "preprocessing.json"


def convert_cases(
    convert: Callable[..., Any], cases: Sequence, *arguments: Any, workers: int
) -> Iterator[tuple[Any, Any, str]]:
    """Yield (case, `convert(case, *arguments)`, "") or (case, None, reason) in the order of completion.

    Whatever a case raises is the failure of this case only. If its process is ended from outside, most likely
    by a system that is short of memory, the cases without a result are converted again one after the other.
    Ctrl-C ends after the cases in work; if this process is killed, its workers end with it.

    Args:
        convert: a function of a module, because it is pickled when `workers` > 1; never returns None.
        workers: number of processes; 0 or 1 converts all cases in this process.
    """
    pool = _start_pool(min(workers, len(cases)))
    if pool is None:
        for case in cases:
            yield case, *_attempt(convert, case, *arguments)
        return
    unfinished = []
    with pool:
        futures = {pool.submit(_attempt, convert, case, *arguments): case for case in cases}
        untold = set(futures)
        try:
            for future in as_completed(futures):
                untold.remove(future)
                try:
                    yield futures[future], *future.result()
                except BrokenProcessPool:
                    unfinished.append(futures[future])
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # waits for the cases in work, whose results count
            for future in untold:
                if not future.cancelled() and future.exception() is None:
                    yield futures[future], *future.result()
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for all cases
    for case in unfinished:
        with ProcessPoolExecutor(1, initializer=_start_worker) as pool:
            try:
                yield case, *pool.submit(_attempt, convert, case, *arguments).result()
            except BrokenProcessPool:
                reason = "its process was ended from outside, most likely for lack of memory"
                yield case, None, f"{reason}; close other programs or use a machine with more memory"


def each_case(
    function: Callable[..., Any], cases: Sequence, *arguments: Any, workers: int, doing: str
) -> tuple[dict[Any, Any], dict[Any, str]]:
    """`convert_cases` to the end, with a progress bar on a terminal.

    Args:
        cases: hashable, each of them once.
        doing: what is done, for the bar, such as "reading".

    Returns:
        ({case: result}, {failed case: reason}), both in the order of `cases`.
    """
    results, failed = {}, {}
    every = convert_cases(function, cases, *arguments, workers=workers)
    for case, result, reason in tqdm(every, doing, len(cases), unit="case", disable=None):
        if result is None:
            failed[case] = reason
        else:
            results[case] = result
    ordered = {case: results[case] for case in cases if case in results}
    return ordered, {case: failed[case] for case in cases if case in failed}


def failure_reason(error: Exception) -> str:
    """One failed case in words: the message of an error that was written for the user, the type of any other.

    ValueError and OSError of this project say what is wrong and what to do. Of other errors the type and the
    line of code are named as well, since their message alone (of KeyError: the key) tells little.
    """
    text = str(error)
    if reason := faults.sentence(error):
        return reason
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {faults.first_line(text)}{place}"


def file_stamp(paths: Sequence[Path]) -> list[list]:
    """[path, size in bytes, time of change in ns] of each file: tells whether it is still the one converted.

    Both size and time count: a mask that was corrected often keeps its size. Those of a link that leads
    nowhere are None, so that reading it fails, and costs its case alone.
    """
    stamps = []
    for path in paths:
        try:
            found = path.stat()
            stamps.append([str(path), found.st_size, found.st_mtime_ns])
        except OSError:
            stamps.append([str(path), None, None])
    return stamps


# ---- what is noted of a converted data set ----


def finished_entries(
    out: Path,
    stamps: Mapping[str, list],
    settings: Mapping[str, dict],
    noted: Mapping[str, Any] | None = None,
) -> dict[str, dict]:
    """{name: entry} of an earlier, perhaps interrupted conversion that still hold; tells how many they are.

    An entry holds if it has the settings and the stamp of now, what was written of it is there, and what was
    noted of it is `noted`.

    Args:
        stamps: {name: `file_stamp` of its files} of every case that is to be converted.
        settings: {name: what decides how the case comes out}, plain values.
        noted: {key: type} of an entry, as `expected` of `check_keys`.
    """
    known = {entry["name"]: entry for entry in _earlier_notes(out)["cases"]}
    done, num_changed = {}, 0
    for name, stamp in stamps.items():
        entry = known.get(name)
        is_same = entry and entry.get("settings") == settings[name] and entry.get("stamp") == stamp
        if is_same and _whole(out, entry, noted or {}):
            done[name] = entry
        else:
            num_changed += "files" in (entry or {}) or (out / "cases" / f"{name}.h5").is_file()
    if done:
        print(f"{len(done)} of {len(stamps)} cases are converted already")
    if num_changed:
        why = "were not finished, or made with other settings or from other files"
        print(f"{num_changed} case(s) {why}, and are converted again")
    return done


def _earlier_notes(out: Path) -> dict[str, list]:
    """Under "cases" and "outdated" what an earlier conversion noted of its cases, and of files to be removed.

    What is damaged in it is left out, since it can be made again.
    """
    found: dict = {}
    if (out / NOTES).is_file():
        try:
            found = read_json(out / NOTES, {"cases": list, "outdated": list | None})
        except ValueError as error:
            warn(f"{error}; all cases are converted again")
    cases = [entry for entry in found.get("cases", []) if isinstance(entry, dict)]
    return {
        "cases": [
            entry for entry in cases if isinstance(entry.get("name"), str) and _are_texts(entry.get("files"))
        ],
        "outdated": found.get("outdated", []) if _are_texts(found.get("outdated")) else [],
    }


def _are_texts(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _whole(out: Path, entry: dict, noted: Mapping[str, Any]) -> bool:
    try:
        check_keys(entry, noted, entry["name"])
    except ValueError:
        return False
    if "files" in entry:
        return all((out / name).is_file() for name in entry["files"])
    try:
        CaseFile(out / "cases" / f"{entry['name']}.h5").shape  # noqa: B018  opens it
    except (ValueError, OSError):
        return False
    return True


def convert_data_set(
    convert: Callable[..., dict],
    cases: Mapping[str, Any],
    out: Path,
    *arguments: Any,
    files: Mapping[str, Sequence[Path | None]],
    settings: Mapping[str, dict],
    about_all: dict,
    workers: int,
    folders: Sequence[str] = ("cases",),
    noted: Mapping[str, Any] | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Convert what is not done yet with these settings from these files, with a progress bar on a terminal.

    The notes are written after each case, so that an interrupted conversion can go on where it stopped;
    `finish_notes` comes last.

    Args:
        convert: a function of a module; convert(case, out, *arguments) writes <out>/cases/<name>.h5 and
            returns what is to be noted of the case, with its "name". Where it writes other files it notes
            them as "files", relative to `out`; those of earlier conversions that no case has any more are
            removed in the end.
        cases: {name: case} of all that the data set is to hold.
        files: {name: the files that the case is made from}; None for one that it does not have.
        settings: {name: what decides how the case comes out}, plain values.
        about_all: see `write_notes`.
        folders: made in `out` before the first case.
        noted: {key: type} of what `convert` returns; an earlier entry without it is made anew.

    Returns:
        entries of all cases that are converted, with "stamp" and "settings", by natural order of their
        names; {failed case: reason}.
    """
    refuse_raw_data(out)
    for folder in folders:
        make_folder(out / folder)
    stamps = {name: file_stamp([path for path in paths if path]) for name, paths in files.items()}
    done, earlier = finished_entries(out, stamps, settings, noted), _earlier_notes(out)
    outdated = {name for entry in earlier["cases"] for name in entry.get("files", [])}
    outdated |= set(earlier["outdated"])  # what an interrupted run had still to remove
    in_work = about_all | {"outdated": sorted(outdated)} if outdated else about_all
    todo = {case: name for name, case in cases.items() if name not in done}
    failed: dict[str, str] = {}
    results = convert_cases(convert, list(todo), out, *arguments, workers=workers)
    for case, entry, reason in tqdm(results, "converting", len(todo), unit="case", disable=None):
        if entry is None:
            failed[todo[case]] = reason
        else:
            name = todo[case]
            done[name] = entry | {"stamp": stamps[name], "settings": settings[name]}
            write_notes(out, done, in_work)
    if outdated:
        for name in outdated - {name for entry in done.values() for name in entry["files"]}:
            if (out / name).resolve().is_relative_to(out.resolve()):  # whoever wrote these notes
                (out / name).unlink(missing_ok=True)
        write_notes(out, done, about_all)
    return ordered_entries(done), failed


def write_notes(out: Path, entries: Mapping[str, dict], about_all: dict) -> None:
    """<out>/preprocessing.json: `about_all` and, under "cases", the entries in natural order of names."""
    write_json(out / NOTES, {**about_all, "cases": ordered_entries(entries)})


def ordered_entries(entries: Mapping[str, dict]) -> list[dict]:
    """The entries by natural order of their names: case 9 before case 10."""
    return [entries[name] for name in sorted(entries, key=natural_key)]


def finish_notes(
    out: Path, entries: Sequence[dict], about_all: dict, columns: Sequence[str], counted: Mapping[str, str]
) -> None:
    """The last notes of a conversion: preprocessing.json, and cases.csv with a row for each entry.

    Without any entry both are removed, since what an earlier conversion noted does not hold any more.

    Args:
        columns: keys of the entries that become columns.
        counted: {further column: key of an entry whose elements it counts}.
    """
    if not entries:
        (out / NOTES).unlink(missing_ok=True)
        (out / "cases.csv").unlink(missing_ok=True)
        return
    write_notes(out, {entry["name"]: entry for entry in entries}, about_all)
    rows = []
    for entry in entries:
        counts = {column: len(entry[key]) for column, key in counted.items()}
        rows.append({column: entry[column] for column in columns} | counts)
    write_table(out / "cases.csv", rows)


def print_failed(reasons: Mapping[str, str], what: str = "could not be converted") -> None:
    """A line that counts the cases, then one for each with its reason; nothing where there are none."""
    if reasons:
        print(f"{len(reasons)} case(s) {what}:")
        for name, reason in reasons.items():
            print(f"  {name}: {reason}")


# ---- workers ----


def _start_pool(workers: int) -> ProcessPoolExecutor | None:
    """So many processes; None if one is enough, or if the system has no room for their queues."""
    if workers < 2:
        return None
    try:
        return ProcessPoolExecutor(workers, initializer=_start_worker)
    except OSError as error:  # /dev/shm is full, or there is none
        warn(f"no shared memory for {workers} processes ({error.strerror}); one process converts all cases")
        return None


def _attempt(convert: Callable[..., Any], case: Any, *arguments: Any) -> tuple[Any, str]:
    """(result, "") or (None, reason); in the worker, because not every exception can be pickled."""
    try:
        return convert(case, *arguments), ""
    except Exception as error:
        return None, failure_reason(error)


def _start_worker() -> None:
    """Leave Ctrl-C, which reaches all processes, to the main one; do not outlive it; compute in one thread.

    A forked process has no threads but thinks that its parent's are there, and would wait for them for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    show_warnings_plainly()  # a process that was not forked does not know it yet
    if torch := sys.modules.get("torch"):  # else no case needs it
        torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this the workers of a process that was killed wait for ever for their next case."""
    multiprocessing.parent_process().join()
    os._exit(1)
