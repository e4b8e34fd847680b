"""common/files.py: files are whole or as before, whatever goes wrong; JSON notes are checked when read."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common import files
from common.files import check_keys, file_sha1, read_json, replacing, write_json


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_that_cannot_be_written_to_names_the_flag(tmp_path):
    assert files.make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x")):
        with pytest.raises(OSError, match=f"--out {path}: nothing can be written there .*; choose a folder"):
            files.make_folder(path)


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "scan.nii.gz"
    with replacing(path) as partial:
        assert partial.parent == tmp_path and partial.name.startswith(".") and not partial.exists()
        assert partial.name.endswith("scan.nii.gz"), "libraries choose the format by the ending"
        partial.write_bytes(b"voxels")
        assert not path.exists()
    assert path.read_bytes() == b"voxels" and names(tmp_path) == ["scan.nii.gz"]


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_whatever_is_raised_passes_through_and_the_earlier_file_survives(tmp_path, error):
    path = tmp_path / "notes.txt"
    path.write_text("earlier")
    with pytest.raises(type(error)) as raised, replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert raised.value is error
    assert path.read_text() == "earlier" and names(tmp_path) == ["notes.txt"]


def test_a_rename_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    path.write_text("earlier")

    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(PermissionError), replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "earlier" and names(tmp_path) == ["notes.txt"]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.txt"):
        pass


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the one that is complete last"
    assert names(tmp_path) == ["a.txt"]


def test_the_longest_name_that_a_file_may_have(tmp_path):
    path = tmp_path / (251 * "n" + ".txt")
    with replacing(path) as partial:
        partial.write_text("x")
    assert names(tmp_path) == [path.name]


def test_sync_waits_for_the_disk(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_size))
    for sync in (False, True):
        with replacing(tmp_path / "a.txt", sync=sync) as partial:
            partial.write_bytes(b"12345")
        assert not calls or calls == [5], "the whole content is there when it is asked for"
    assert len(calls) == 1


def test_a_killed_writer_leaves_the_earlier_file(tmp_path):
    (tmp_path / "a.txt").write_text("earlier")
    code = (
        "import sys, time; from common.files import replacing\n"
        "with replacing(sys.argv[1]) as partial:\n"
        "    partial.write_text('half'); print('written', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "a.txt").read_text() == "earlier"
    write_json(tmp_path / "a.txt", [1])  # and the next writer is not disturbed
    assert read_json(tmp_path / "a.txt", list) == [1]


def test_json_comes_back(tmp_path):
    content = {"name": "Müller", "cases": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert "Müller" in json.loads((tmp_path / "a.json").read_text(encoding="utf8"))["name"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"path": tmp_path})
    assert read_json(tmp_path / "a.json") == content and names(tmp_path) == ["a.json"]


def test_json_with_the_mark_of_some_editors(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"train": []}')
    assert read_json(tmp_path / "a.json", {"train": list}) == {"train": []}


EXPECTED = {"cases": list, "spacing_mm": list | None, "count": int | float, "name": str | None}


@pytest.mark.parametrize(
    "content",
    [
        {"cases": [], "count": 1},
        {"cases": [1], "count": 2.5, "spacing_mm": None, "name": "x", "other": {}},
    ],
)
def test_expected_keys(tmp_path, content):
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", EXPECTED) == content


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON (Expecting property name"),
        ("", "not valid JSON (Expecting value"),
        ("\ufffe\x00", "not valid JSON"),
        ("[1, 2]", "expected an object, found a list ([1, 2])"),
        ("null", "expected an object, found null (null)"),
        ('{"cases": []}', '"count" is missing, expected a number'),
        ('{"count": 1}', '"cases" is missing, expected a list'),
        ('{"count": 1, "cases": {"a": 1}}', '"cases" should be a list, found an object ({"a": 1})'),
        ('{"count": "1", "cases": []}', '"count" should be a number, found a text ("1")'),
        ('{"count": 1, "cases": [], "name": 5}', '"name" should be a text, found a number (5)'),
        (json.dumps({"cases": "x" * 500}), '"cases" should be a list, found a text ("xxxxx'),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(tmp_path, text, message):
    path = tmp_path / "notes.json"
    path.write_text(text, encoding="utf8")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_json(path, EXPECTED, advice="convert the data again")
    assert str(error.value).startswith(f"{path}: ") and str(error.value).endswith("; convert the data again")
    assert len(str(error.value)) < 250 + len(str(path))


def test_not_utf8_and_no_file(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"b\.json: no such file; run preprocess\.py"):
        read_json(tmp_path / "b.json", advice="run preprocess.py")


def test_a_list_where_one_is_expected(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="expected a list, found an object"):
        read_json(tmp_path / "a.json", list)


def test_keys_of_a_part_of_a_file():
    check_keys({"kept": [1]}, {"kept": list}, "volumes.json: volume lung_001")
    with pytest.raises(
        ValueError, match='volumes.json: volume lung_001: "kept" is missing, expected a list$'
    ):
        check_keys({}, {"kept": list}, "volumes.json: volume lung_001")
    with pytest.raises(ValueError, match="lung_001: expected an object, found a number"):
        check_keys(3, {"kept": list}, "lung_001")


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "splits.json")
    with pytest.raises(ValueError, match="splits.json: a folder, pipe or device, not a file"):
        write_json(tmp_path / "splits.json", {})
    assert (tmp_path / "splits.json").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_every_writer_goes_through_it():
    """A file that is written under a temporary name by hand is one more place for the same faults."""
    by_hand = []
    for folder in ("common", "lung_tumor", "verse_spine"):
        for path in (ROOT / folder).glob("*.py"):
            if re.search(r"os\.replace\(|\.partial_", path.read_text(encoding="utf8")):
                by_hand.append(f"{folder}/{path.name}")
    # The cache of slices and the phantoms rename whole folders, DICOM conversion what dcm2niix has written.
    assert set(by_hand) <= {
        "common/files.py",
        "common/checkpoints.py",
        "common/dicom_conversion.py",
        "common/phantoms.py",
        "lung_tumor/dataset.py",
        "lung_tumor/phantoms.py",
        "verse_spine/phantoms.py",
    }


def test_sha1_of_a_published_example(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix A.1
    assert file_sha1(tmp_path / "abc") == "a9993e364706816aba3e25717850c26c9cd0d89d"
