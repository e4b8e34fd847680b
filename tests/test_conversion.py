"""Converting case by case: failures, processes, what a kill or Ctrl-C does, stamps."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from common import conversion
from common.conversion import (
    convert_cases,
    convert_data_set,
    each_case,
    failure_reason,
    file_stamp,
    finish_notes,
    finished_entries,
    print_failed,
    write_notes,
)
from common.hdf5 import write_case


class NeedsTwo(Exception):
    """Cannot be unpickled: its arguments are not those of its constructor."""

    def __init__(self, a, b) -> None:
        super().__init__(f"{a} and {b}")


ERRORS = {
    2: (ValueError("case 2: no mask; draw one"), "case 2: no mask; draw one"),
    3: (
        OSError(errno.ENOSPC, "No space left on device"),
        "No space left on device; make room where results ",
    ),
    4: (MemoryError("Unable to allocate 2 TiB"), "out of memory; close other programs"),
    5: (KeyError("affine"), "KeyError: 'affine' (test_conversion.py, line "),
    6: (OverflowError("int too large"), "OverflowError: int too large (test_conversion.py, line "),
    7: (RuntimeError("one\ntwo"), "RuntimeError: one (test_conversion.py, line "),
    8: (TypeError("not a number"), "TypeError: not a number (test_conversion.py, line "),
    9: (NeedsTwo("x", "y"), "NeedsTwo: x and y (test_conversion.py, line "),
    10: (MemoryError(), "out of memory; close other programs"),
    11: (ValueError(), "ValueError:  (test_conversion.py, line "),
}


def convert(case: int, factor: int) -> int:
    if case in ERRORS:
        raise ERRORS[case][0]
    return case * factor


def die(case: int) -> int:
    if case in (1, 4):
        os.kill(os.getpid(), signal.SIGKILL)
    return case


def note_start(case: int, folder: str) -> int:
    Path(folder, str(case)).touch()
    time.sleep(0.05)  # the main process has time to react before the next one begins
    return case


def note_start_and_wait(case: int, folder: str) -> int:
    """As `note_start`, but all but the first case go on only when Ctrl-C has come."""
    Path(folder, str(case)).touch()
    while case and not Path(folder, "interrupted").exists():
        time.sleep(0.01)
    return case


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_case_costs_the_others_nothing(workers):
    cases = [1, *ERRORS, 12]
    found = {
        case: (result, reason) for case, result, reason in convert_cases(convert, cases, 10, workers=workers)
    }
    assert list(found) == cases or workers == 2
    assert found.pop(1) == (10, "") and found.pop(12) == (120, "")
    for case, (_, expected) in ERRORS.items():
        result, reason = found[case]
        assert result is None and reason.startswith(expected), reason


def test_out_of_gpu_memory_is_told():
    reason = failure_reason(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    assert reason == (
        "out of GPU memory; --device cpu needs none, a smaller --batch_size less, and --vram fits a "
        "training run to a card (CUDA out of memory. Tried to allocate 2 GiB.)"
    )


def test_alone_it_keeps_the_order_and_yields_as_it_goes():
    results = convert_cases(convert, [30, 1], 2, workers=0)
    assert next(results) == (30, 60, "") and next(results) == (1, 2, "")
    assert list(convert_cases(convert, [], 2, workers=4)) == []


def test_without_shared_memory_one_process_does_it(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, "ProcessPoolExecutor", full)
    assert list(convert_cases(convert, [30, 1], 2, workers=2)) == [(30, 60, ""), (1, 2, "")]
    assert capsys.readouterr().out == (
        "warning: no shared memory for 2 processes (No space left on device); one process converts all "
        "cases\n"
    )


def test_ctrl_c_in_a_case_ends_the_conversion():
    def interrupt(case):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(convert_cases(interrupt, [1, 2], workers=0))


def test_a_case_whose_process_is_killed_costs_the_others_nothing():
    found = {case: (result, reason) for case, result, reason in convert_cases(die, list(range(6)), workers=2)}
    assert {case: found[case] for case in (0, 2, 3, 5)} == {case: (case, "") for case in (0, 2, 3, 5)}
    for case in (1, 4):
        assert found[case][0] is None and "most likely for lack of memory; close other" in found[case][1]


def test_cases_that_wait_are_not_begun_after_an_interruption(tmp_path):
    """Those in work, and those handed to the workers already, are: at most 2 + 3 beside the first one."""
    results = convert_cases(note_start, list(range(40)), str(tmp_path), workers=2)
    with pytest.raises(KeyboardInterrupt):
        for _ in results:
            raise KeyboardInterrupt
    results.close()
    assert 1 <= len(list(tmp_path.iterdir())) < 20


def test_what_workers_finish_after_ctrl_c_is_kept(tmp_path, monkeypatch):
    """Else a case lies converted on the disk and no note tells of it."""

    def interrupted(futures):
        yield next(iter(as_completed(futures)))
        while len(list(tmp_path.iterdir())) < 2:  # until another case is in work
            time.sleep(0.01)
        (tmp_path / "interrupted").touch()
        raise KeyboardInterrupt  # as while it waits for the next one

    monkeypatch.setattr("common.conversion.as_completed", interrupted)
    told = []
    with pytest.raises(KeyboardInterrupt):
        for case, _, reason in convert_cases(note_start_and_wait, range(40), str(tmp_path), workers=2):
            told.append(case)
            assert not reason
    begun = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert sorted(told) == sorted(begun) and 1 < len(told) < 40


THREADS = """
import torch
from common.conversion import convert_cases

def compute(case):
    return torch.ones(2_000_000).add(case).sum().item()

if __name__ == "__main__":
    torch.set_num_threads(4)
    assert compute(1) == 4e6  # the threads of this process are started
    print([result for _, result, _ in convert_cases(compute, [2, 2, 2], workers=2)])
"""


def test_workers_do_not_wait_for_the_threads_of_their_parent(tmp_path):
    """They are forked without them: a parallel computation in a worker would never end."""
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, timeout=90
    )
    assert found.stdout.strip() == "[6000000.0, 6000000.0, 6000000.0]", found.stderr


WAIT = """
import os, time
from common.conversion import convert_cases

def wait(case):
    os.write(1, b"%d " % os.getpid())
    time.sleep(60)

if __name__ == "__main__":
    list(convert_cases(wait, [1, 2, 3, 4], workers=2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(number, tmp_path):
    """Whoever kills the conversion must not have to look for its workers."""
    (tmp_path / "wait.py").write_text(WAIT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "wait.py")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    workers = b""
    while workers.count(b" ") < 2:
        workers += os.read(process.stdout.fileno(), 100)
    process.send_signal(number)
    try:
        process.communicate(timeout=50)  # the pipe ends when no process holds it any more
    except subprocess.TimeoutExpired:
        for worker in workers.split():
            os.kill(int(worker), signal.SIGKILL)
        pytest.fail("its workers go on")


def test_ctrl_c_is_left_to_the_main_process(tmp_path):
    """The signal reaches all processes of a terminal; the cases in work are finished."""
    cases = list(convert_cases(interrupt_self, [1, 2, 3], workers=2))
    assert sorted(cases) == [(1, 1, ""), (2, 2, ""), (3, 3, "")]


def interrupt_self(case: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return case


def test_stamp_tells_changed_files(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one"), b.write_text("two")
    before = file_stamp([a, b])
    assert file_stamp([a, b]) == before == json.loads(json.dumps(before)), "survives JSON"
    os.utime(b, ns=(1, 1))
    assert file_stamp([a, b]) != before and file_stamp([a]) == before[:1], "same size, another time"
    status = a.stat()
    a.write_text("longer")
    os.utime(a, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_stamp([a]) == [[str(a), 6, before[0][2]]], "same time, another size"
    (tmp_path / "link").symlink_to("nothing.here")  # as git-annex leaves files that were not fetched
    assert file_stamp([tmp_path / "link", a]) == [[str(tmp_path / "link"), None, None], *file_stamp([a])]


# ---- notes of a converted data set ----


@pytest.mark.parametrize("workers", [0, 2])
def test_each_case_keeps_the_order_of_the_cases(workers):
    results, failed = each_case(convert, [12, 3, 1, 2], 10, workers=workers, doing="testing")
    assert list(results.items()) == [(12, 120), (1, 10)]
    assert list(failed) == [3, 2] and failed[2] == "case 2: no mask; draw one"


@pytest.fixture
def converted(tmp_path):
    """Cases a2 and a10, converted and noted; (folder, stamps, settings)."""
    (tmp_path / "cases").mkdir()
    stamps = {"a10": [["a10.nii", 5, 1]], "a2": [["a2.nii", 6, 2]]}
    settings = {name: {"spacing_mm": [2.0, 1.5, 1.5]} for name in stamps}
    entries = {}
    for name in stamps:
        write_case(tmp_path / f"cases/{name}.h5", np.zeros((3, 4, 5), np.int16), attributes={})
        entries[name] = {"name": name, "stamp": stamps[name], "settings": settings[name]}
    write_notes(tmp_path, entries, {"spacing_mm": [2.0, 1.5, 1.5]})
    return tmp_path, stamps, settings


def test_notes_are_in_natural_order(converted):
    notes = json.loads((converted[0] / "preprocessing.json").read_text())
    assert [entry["name"] for entry in notes["cases"]] == ["a2", "a10"]
    assert notes["spacing_mm"] == [2.0, 1.5, 1.5]


def test_what_is_finished_holds_until_files_or_settings_change(converted, tmp_path, capsys):
    out, stamps, settings = converted
    assert list(finished_entries(out, stamps, settings)) == ["a10", "a2"]
    assert capsys.readouterr().out == "2 of 2 cases are converted already\n"
    more = stamps | {"b": [["b.nii", 1, 1]]}
    assert list(finished_entries(out, more, settings | {"b": {}})) == ["a10", "a2"]
    assert capsys.readouterr().out == "2 of 3 cases are converted already\n", "b is new, not changed"
    assert list(finished_entries(out, stamps | {"a2": [["a2.nii", 6, 3]]}, settings)) == ["a10"]
    assert "1 case(s) were not finished, or made with other settings" in capsys.readouterr().out
    assert list(finished_entries(out, stamps, settings | {"a10": {"spacing_mm": [1, 1, 1]}})) == ["a2"]
    path = out / "cases/a2.h5"
    path.write_bytes(path.read_bytes()[:-200])
    assert list(finished_entries(out, stamps, settings)) == ["a10"]
    path.unlink()
    capsys.readouterr()
    assert list(finished_entries(out, stamps, settings)) == ["a10"]
    assert "not finished" not in capsys.readouterr().out
    assert finished_entries(tmp_path / "none", stamps, settings) == {}


def write_two(number: int, out, ending: str) -> dict:
    """A case of two files."""
    files = [f"parts/n{number}{part}.{ending}" for part in "ab"]
    for name in files:
        (out / name).touch()
    return {"name": f"n{number}", "files": files}


def test_cases_of_several_files(tmp_path, capsys):
    """A case is done while all of its files are there; files that no case has any more are removed."""
    out, cases = tmp_path / "out", {"n1": 1, "n2": 2}

    def convert_all(ending: str, names=("n1", "n2")) -> list[str]:
        chosen = {name: cases[name] for name in names}
        given = {"files": dict.fromkeys(chosen, ()), "settings": dict.fromkeys(chosen, {"ending": ending})}
        given |= {"about_all": {}, "workers": 0, "folders": ["parts"]}
        convert_data_set(write_two, chosen, out, ending, **given)
        return sorted(path.name for path in (out / "parts").iterdir())

    assert convert_all("x") == ["n1a.x", "n1b.x", "n2a.x", "n2b.x"]
    (out / "parts" / "n2b.x").unlink()
    capsys.readouterr()
    assert len(convert_all("x")) == 4
    text = capsys.readouterr().out
    assert "1 of 2 cases are converted already" in text and "1 case(s) were not finished" in text
    assert convert_all("y") == ["n1a.y", "n1b.y", "n2a.y", "n2b.y"]
    assert convert_all("y", ["n2"]) == ["n2a.y", "n2b.y"]
    notes = json.loads((out / "preprocessing.json").read_text())
    assert list(notes) == ["cases"]
    (tmp_path / "mine").touch()
    (out / "preprocessing.json").write_text(json.dumps(notes | {"outdated": ["../mine", "parts/n2a.y"]}))
    assert convert_all("y") == ["n1a.y", "n1b.y", "n2a.y", "n2b.y"] and (tmp_path / "mine").exists()


def test_the_last_notes(converted):
    out, stamps, _ = converted
    entry = {"name": "a2", "voxels": 60, "organs": {"1": 3.5, "6": 1.0}}
    finish_notes(out, [entry], {"spacing_mm": [1]}, ["name", "voxels"], {"number": "organs"})
    assert (out / "cases.csv").read_text().split() == ["name,voxels,number", "a2,60,2"]
    assert json.loads((out / "preprocessing.json").read_text()) == {"spacing_mm": [1], "cases": [entry]}
    finish_notes(out, [], {}, ["name"], {})
    assert not (out / "cases.csv").exists() and not (out / "preprocessing.json").exists()


def write_number(number: int, out) -> dict:
    """A case whose file holds its number; 3 cannot be converted."""
    if number == 3:
        raise ValueError("three")
    write_case(out / f"cases/n{number}.h5", np.full((2, 3, 4), number, np.int16), attributes={})
    return {"name": f"n{number}", "number": number}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_is_converted_once_and_noted(workers, tmp_path, capsys):
    out, cases = tmp_path / "out", {f"n{number}": number for number in (10, 3, 2)}
    files = {name: (tmp_path / name, None) for name in cases}
    for path, _ in files.values():
        path.write_text("scan")

    def convert_all(spacing_mm: float):
        settings = dict.fromkeys(cases, {"spacing_mm": spacing_mm})
        about_all = {"of_all": 1}
        given = {"files": files, "settings": settings, "about_all": about_all, "workers": workers}
        return convert_data_set(write_number, cases, out, **given)

    entries, failed = convert_all(1)
    assert [entry["number"] for entry in entries] == [2, 10] and failed == {"n3": "three"}
    assert entries[0]["settings"] == {"spacing_mm": 1} and entries[0]["stamp"] == file_stamp(
        [tmp_path / "n2"]
    )
    assert json.loads((out / "preprocessing.json").read_text()) == {"of_all": 1, "cases": entries}

    def times() -> list[int]:
        return [(out / f"cases/n{number}.h5").stat().st_mtime_ns for number in (2, 10)]

    before = times()
    assert convert_all(1) == (entries, failed) and times() == before
    assert "2 of 3 cases are converted already" in capsys.readouterr().out
    (tmp_path / "n2").write_text("another scan")
    convert_all(1)
    after = times()
    assert after[0] > before[0] and after[1] == before[1]
    entries, _ = convert_all(2)
    assert times()[1] > before[1] and {entry["settings"]["spacing_mm"] for entry in entries} == {2}


def test_failures_are_counted_and_named(capsys):
    print_failed({})
    print_failed({"a": "no mask", "b": "no scan"}, "set aside")
    assert capsys.readouterr().out == "2 case(s) set aside:\n  a: no mask\n  b: no scan\n"
