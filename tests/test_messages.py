"""common/messages.py: warnings look alike, whoever gives them."""

import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

from common.messages import show_warnings_plainly, warn


@pytest.fixture(autouse=True)
def as_before():
    with warnings.catch_warnings():
        yield


def test_own_warnings_and_those_of_python_look_alike(capsys):
    show_warnings_plainly()
    warn("case 7: its mask is empty")
    warnings.warn("case 8:\n  its unit is unknown", stacklevel=1)
    assert capsys.readouterr() == (
        "warning: case 7: its mask is empty\n",
        "warning: case 8: its unit is unknown\n",
    )


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, RuntimeWarning, ResourceWarning])
def test_what_is_meant_for_who_writes_programs_is_left_out(category, capsys):
    show_warnings_plainly()
    warnings.warn("mean of empty slice", category, stacklevel=1)
    warnings.warn("This DataLoader will create 4 worker processes in total.", stacklevel=1)
    assert capsys.readouterr() == ("", "")


def test_python_started_with_w_shows_them(capsys, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["always"])
    show_warnings_plainly()
    warnings.warn("mean of empty slice", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: mean of empty slice\n"


SCRIPT = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
from common.config import run_script

def main():
    warnings.warn("its unit is unknown")
    raise MemoryError("Unable to allocate 9 TiB")

run_script(main)
"""


def test_a_script_shows_neither_lines_of_code_nor_a_traceback(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py", ROOT], capture_output=True, text=True)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "warning: its unit is unknown"
    assert second.startswith("error: out of memory; ") and second.endswith("(Unable to allocate 9 TiB)")
