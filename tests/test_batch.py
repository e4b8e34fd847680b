"""common/batch.py: what is found, what clashes; no failure, Ctrl-C or kill costs what is finished."""

import csv
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ERRORS, ROOT
from test_distributed import torchrun

from common import batch, distributed
from common.config import run_script

SUFFIXES = (".nii.gz", ".nii", ".png")


def rows_of(table) -> list[dict]:
    with Path(table).open(encoding="utf8") as file:
        return list(csv.DictReader(file))


# ---- sources ----


@pytest.fixture
def folder(tmp_path):
    """Scans and pictures with other things between them."""
    names = "b10.nii b9.NII.GZ a.PNG a_mask.nii.gz c_overlay.png notes.txt .hidden.png ._b9.nii sub/b9.nii"
    names += " sub/b9_mask.png .cache/x.png out/a.png out/deep/z.nii"
    for name in names.split():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "in" / "folder.nii").mkdir()
    return tmp_path / "in"


def found(source, out, recursive=False) -> list[str]:
    sources = batch.find_sources(
        source,
        SUFFIXES,
        out=out,
        own_names=("_mask", "_overlay"),
        recursive=recursive,
        what="scan",
    )
    return [str(path.relative_to(source)) for path in sources]


def test_files_of_a_folder_in_natural_order(folder, tmp_path):
    assert found(folder, tmp_path / "elsewhere") == ["a.PNG", "b9.NII.GZ", "b10.nii"]


def test_subfolders_without_the_results_inside(folder):
    first = ["a.PNG", "b9.NII.GZ", "b10.nii"]
    assert found(folder, folder / "out", recursive=True) == [*first, "sub/b9.nii"]
    inside = ["out/a.png", "out/deep/z.nii", "sub/b9.nii"]
    assert found(folder, folder / "other", recursive=True) == [*first, *inside]


def test_results_in_the_source_itself_or_above_hide_nothing(folder, monkeypatch):
    everything = found(folder, folder / "other", recursive=True)
    assert found(folder, folder, recursive=True) == everything
    assert found(folder, folder.parent, recursive=True) == everything
    monkeypatch.chdir(folder.parent)
    assert found(Path("in"), folder / "out", recursive=True) == [p for p in everything if "out" not in p]


def test_a_single_file_is_taken_as_it_is(folder):
    for name in ("a_mask.nii.gz", "notes.txt"):
        (path,) = batch.find_sources(
            folder / name, SUFFIXES, out=folder, own_names=("_mask",), recursive=False, what="scan"
        )
        assert path == folder / name


def test_nothing_to_take_is_explained(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--source .*none: no such file or folder"):
        found(tmp_path / "none", tmp_path)
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match="no scan in it; --recursive also looks into subfolders; files "
    ):
        found(tmp_path / "empty", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="no scan in it; files that end in .nii.gz, .nii, .png are read$"
    ):
        found(tmp_path / "empty", tmp_path, recursive=True)
    (tmp_path / "empty" / "x_mask.nii").touch()
    with pytest.raises(FileNotFoundError, match=r"; 1 file\(s\) are left out as results \(_mask, _overlay"):
        found(tmp_path / "empty", tmp_path)


def test_name_clashes():
    sources = [Path("in") / name for name in ("a.png", "b.png", "a.jpg", "sub/a.png", "a.nii")]
    results = {path: Path("out") / path.relative_to("in").with_suffix("") for path in sources}
    clashes = batch.name_clashes(results)
    assert list(clashes) == [Path("in/a.jpg"), Path("in/a.nii")]
    assert all("would have the name of that of in/a.png; rename one" in reason for reason in clashes.values())


# ---- each ----


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(r, n): from now on this process believes to be number r of n, and hears of no other."""

    def pretend(rank, world_size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)

    return pretend


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_case_raises_is_its_own_failure(error, tmp_path):
    def function(item):
        if item == "bad":
            raise error.with_traceback(None)
        return {"case": item, "dice": 0.5}

    rows, failed = batch.each(function, ["a", "bad", "c"], unit="scan", table=tmp_path / "t.csv")
    assert [row["case"] for row in rows] == ["a", "c"] == [row["case"] for row in rows_of(tmp_path / "t.csv")]
    assert list(failed) == ["bad"]
    if not isinstance(error, (ValueError, OSError, MemoryError, torch.OutOfMemoryError)):
        assert failed["bad"].startswith(type(error).__name__) and "(test_batch.py, line " in failed["bad"]
    assert batch.failed_lines(failed) == [f"failed: bad: {failed['bad']}"]


def test_a_reason_that_begins_with_the_file_is_not_named_twice():
    failed = {Path("in/a.nii"): "in/a.nii: truncated", Path("in/b.nii"): "see in/b.nii.gz"}
    assert batch.failed_lines(failed) == ["failed: in/a.nii: truncated", "failed: in/b.nii: see in/b.nii.gz"]


def test_the_exit_code_is_that_of_the_first_process(as_rank):
    assert batch.exit_code({}) == 0 and batch.exit_code({"a": "truncated"}) == 1
    as_rank(1, 2)
    assert batch.exit_code({"a": "truncated"}) == 0


def test_nothing_to_do():
    assert batch.each(lambda item: {}, [], unit="scan") == ([], {})


def test_the_table_grows_case_by_case(tmp_path):
    table, seen = tmp_path / "t.csv", []
    table.write_text("case\nof an earlier run\n")
    (tmp_path / "t.process1.csv").write_text("case\nof an earlier run\n")

    def function(item):
        seen.append([row["case"] for row in rows_of(table)] if table.is_file() else [])
        return {"case": item, "nan": float("nan"), "classes": [{"a": 1}], "notes": {}, "value": 1 / 3}

    rows, _ = batch.each(function, ["x", "y", "z"], unit="scan", table=table)
    assert seen == [[], ["x"], ["x", "y"]], "an earlier table is not added to"
    assert rows[0]["classes"] == [{"a": 1}]
    assert table.read_text().splitlines() == ["case,nan,value", "x,,0.333333", "y,,0.333333", "z,,0.333333"]


def test_tables_of_earlier_runs_stay_beside_it(tmp_path, capfd):
    table = tmp_path / "t.csv"
    (tmp_path / "t.process1.csv").write_text("case\nof a run that was killed\n")
    for name in ("a", "b", "c"):
        batch.each(lambda item: {"case": item}, [name], unit="scan", table=table)
    names = ["t.csv", "t.earlier1.csv", "t.earlier2.csv", "t.earlier3.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    found = [rows_of(tmp_path / name)[0]["case"] for name in names]
    assert found == ["c", "of a run that was killed", "a", "b"]
    assert f"t.csv of an earlier run is now {tmp_path / 't.earlier3.csv'}" in "".join(capfd.readouterr())


def test_a_table_that_cannot_be_written_is_the_failure_of_its_case(tmp_path, monkeypatch):
    def full(path, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch, "append_row", full)
    rows, failed = batch.each(lambda item: {"case": item}, ["a", "b"], unit="scan", table=tmp_path / "t.csv")
    assert not rows and list(failed) == ["a", "b"] and not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_is_finished_and_says_how_much(tmp_path, capsys):
    def function(item):
        if item == "b":
            raise ValueError("no mask")
        if item == "d":
            raise KeyboardInterrupt
        return {"case": item}

    with pytest.raises(SystemExit) as ended:
        run_script(lambda: batch.each(function, list("abcde"), unit="scan", table=tmp_path / "t.csv"))
    assert ended.value.code == 130
    assert [row["case"] for row in rows_of(tmp_path / "t.csv")] == ["a", "c"]
    assert capsys.readouterr().err.strip().splitlines() == [
        f"stopped by the user after 2 of 5 scan(s); their results are in {tmp_path / 't.csv'}",
        "failed: b: no mask",
    ]
    with pytest.raises(KeyboardInterrupt, match=r"^\nstopped by the user after 2 of 3 scan\(s\)$"):
        batch.each(function, list("acd"), unit="scan")


def test_ctrl_c_while_waiting_for_the_other_processes_tells_what_is_there(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    def function(item):
        if item == "b":
            raise ValueError("no mask")
        return {"case": item}

    monkeypatch.setattr(distributed, "gather", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"after 2 of 3 scan\(s\); .*\nfailed: b: no mask$"):
        batch.each(function, list("abc"), unit="scan", table=tmp_path / "t.csv")


def test_nan_is_an_empty_cell_before_and_after_the_end(tmp_path):
    seen = []

    def function(item):
        seen.append((tmp_path / "t.csv").read_text() if item else "")
        return {"case": item, "dice": math.nan}

    batch.each(function, [0, 1], unit="scan", table=tmp_path / "t.csv")
    assert seen[1].splitlines() == ["case,dice", "0,"]
    assert (tmp_path / "t.csv").read_text().splitlines() == ["case,dice", "0,", "1,"]


KILL = """
import os, signal, sys
from pathlib import Path
from common import batch

def function(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"case": item, "dice": 0.5}

batch.each(function, [1, 2, 3, 4], unit="scan", table=Path(sys.argv[1]))
"""


def test_a_kill_leaves_the_rows_of_what_is_finished(tmp_path):
    command = [sys.executable, "-c", KILL, str(tmp_path / "t.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert rows_of(tmp_path / "t.csv") == [{"case": "1", "dice": "0.5"}, {"case": "2", "dice": "0.5"}]


# ---- several processes ----


def test_each_process_has_a_table_of_its_own_until_the_end(tmp_path, as_rank, capsys):
    table = tmp_path / "t.csv"

    def function(item):
        if item >= 4:
            raise KeyboardInterrupt
        return {"case": item}

    for rank in (0, 1):  # the first one begins: it removes what an earlier run left
        as_rank(rank, 2)
        with pytest.raises(KeyboardInterrupt):
            batch.each(function, list(range(6)), unit="scan", table=table)
    assert [row["case"] for row in rows_of(table)] == ["0", "2"]
    assert [row["case"] for row in rows_of(tmp_path / "t.process1.csv")] == ["1", "3"]
    capsys.readouterr()
    as_rank(0, 2)
    (tmp_path / "t.csv").unlink()
    with pytest.raises(KeyboardInterrupt):
        batch.each(lambda item: function(item + 2), list(range(6)), unit="scan", table=table)
    assert rows_of(table) == [{"case": "2"}] and not (tmp_path / "t.process1.csv").exists()


def test_all_processes_report_in_the_order_of_the_items(monkeypatch, as_rank):
    """This one has a and c; the other one scored d, and could not read b."""
    as_rank(0, 2)
    other = {"d": {"case": "d"}}, {"b": "truncated"}
    monkeypatch.setattr(distributed, "gather", lambda own: [own, other])

    def function(item):
        if item == "c":
            raise ValueError("no mask")
        return {"case": item}

    rows, failed = batch.each(function, list("abcd"), unit="scan")
    assert rows == [{"case": "a"}, {"case": "d"}]
    assert list(failed.items()) == [("b", "truncated"), ("c", "no mask")]


def test_the_count_after_ctrl_c_is_that_of_all_processes(tmp_path, as_rank):
    def function(item):
        if item == 2:
            raise KeyboardInterrupt
        (tmp_path / "t.process1.csv").write_text("case\n1\n3\n")  # of the other one
        return {"case": item}

    as_rank(0, 2)
    with pytest.raises(KeyboardInterrupt, match=r"stopped by the user after 3 of 6 scan\(s\)"):
        batch.each(function, list(range(6)), unit="scan", table=tmp_path / "t.csv")


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from test_batch import in_each_process
in_each_process(sys.argv[1])
"""


def in_each_process(folder) -> None:
    """What torchrun starts twice: seven files, of which one is bad and one has the name of another."""
    folder = Path(folder)
    with distributed.session():
        sources = batch.find_sources(
            folder / "in", SUFFIXES, out=folder, own_names=(), recursive=False, what="scan"
        )
        clashes = batch.name_clashes({path: folder / path.stem for path in sources})

        def function(path: Path) -> dict:
            if path.stem == "c":
                raise KeyError("affine")
            return {"file": path.name, "rank": distributed.rank()}

        todo = [path for path in sources if path not in clashes]
        rows, failed = batch.each(function, todo, unit="file", table=folder / "t.csv")
        seen = {
            "rows": rows,
            "failed": [path.name for path in failed],
            "clashes": [path.name for path in clashes],
        }
        everyone = distributed.gather(seen)
        if distributed.is_main():
            (folder / "facts.json").write_text(json.dumps(everyone))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_under_torchrun(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.nii", "b.png", "c.png", "d.png", "e.png", "f.png"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "script.py").write_text(SCRIPT.format(paths=[str(ROOT), str(ROOT / "tests")]))
    done = torchrun(tmp_path / "script.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "facts.json").read_text())
    assert first == second, "all processes know the same"
    assert first["clashes"] == ["a.png"] and first["failed"] == ["c.png"]
    names = ["a.nii", "b.png", "d.png", "e.png", "f.png"]
    assert [row["file"] for row in first["rows"]] == names
    assert {row["rank"] for row in first["rows"]} == {0, 1}
    assert [row["file"] for row in rows_of(tmp_path / "t.csv")] == names
    assert not list(tmp_path.glob("t.process*"))
