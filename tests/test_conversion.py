"""Converting case by case: failures, processes, whole files, stamps."""

import errno
import json
import os
import signal

import pytest

from common.conversion import convert_cases, file_stamp, write_json


def convert(case: int, factor: int) -> int:
    if case == 2:
        raise ValueError("case 2: no mask; draw one")
    if case == 3:
        raise OSError(errno.ENOSPC, "No space left on device")
    if case == 4:
        raise MemoryError("Unable to allocate 2 TiB")
    return case * factor


def die(case: int) -> int:
    if case == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return case


def broken(case: int) -> int:
    raise TypeError("a bug, not a bad case")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_case_costs_the_others_nothing(workers):
    found = {
        case: (result, reason)
        for case, result, reason in convert_cases(convert, [1, 2, 3, 4, 5], 10, workers=workers)
    }
    assert found[1] == (10, "") and found[5] == (50, "")
    assert found[2] == (None, "case 2: no mask; draw one")
    assert found[3][0] is None and "No space left" in found[3][1]
    assert found[4] == (None, "Unable to allocate 2 TiB")


def test_alone_it_keeps_the_order_and_yields_as_it_goes():
    results = convert_cases(convert, [5, 1], 2, workers=0)
    assert next(results) == (5, 10, "") and next(results) == (1, 2, "")
    assert list(convert_cases(convert, [], 2, workers=4)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_bugs_are_not_taken_for_bad_cases(workers):
    with pytest.raises(TypeError, match="a bug"):
        list(convert_cases(broken, [1, 2], workers=workers))


def test_a_process_ended_from_outside_is_reported():
    reasons = {case: reason for case, _, reason in convert_cases(die, [1, 2, 3], workers=2)}
    assert "lack of memory: --workers 0" in reasons[1] and len(reasons) == 3


def test_json_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    write_json(path, {"a": [1, 2]})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.conversion.os.replace", full)
    with pytest.raises(OSError):
        write_json(path, {"a": [3]})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    write_json(path, {"a": [3]})
    assert json.loads(path.read_text()) == {"a": [3]} and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_stamp_tells_changed_files(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one"), b.write_text("two")
    before = file_stamp([a, b])
    assert file_stamp([a, b]) == before == json.loads(json.dumps(before)), "survives JSON"
    os.utime(b, ns=(1, 1))
    assert file_stamp([a, b]) != before and file_stamp([a]) == before[:1]
    a.write_text("longer")
    assert file_stamp([a])[0][1] == 6
