"""common/runs.py: run folders, log, seeds, stopping and going on."""

import csv
import io
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common import distributed, runs, trackers
from common.tables import append_row

ROOT = Path(__file__).resolve().parents[1]


# ---- folder, configuration, log ----


def test_new_run_dir_counts_up(tmp_path):
    root = tmp_path / "deep" / "runs"
    names = [runs.new_run_dir(root, "lung").name for _ in range(3)]
    assert names == ["lung", "lung_2", "lung_3"]
    assert all((root / name).is_dir() for name in names)
    assert [runs.new_run_dir(root, "lung_fold1").name for _ in range(2)] == ["lung_fold1", "lung_fold1_2"]


def test_new_run_dir_overwrites_nothing(tmp_path):
    (tmp_path / "lung").write_text("a file")
    assert runs.new_run_dir(tmp_path, "lung").name == "lung_2"
    assert (tmp_path / "lung").read_text() == "a file"


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a b", "a\n", "a*", "a\\b", "a:b"]
)
def test_new_run_dir_refuses_names_that_are_no_folder(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name of a run; use letters, digits") as info:
        runs.new_run_dir(tmp_path, name)
    assert repr(name) in str(info.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "lung_tumor-ds512+x.1", "größe"])
def test_new_run_dir_accepts_names(tmp_path, name):
    assert runs.new_run_dir(tmp_path, name) == tmp_path / name


def test_new_run_dir_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "unmounted").symlink_to(tmp_path / "away")  # was an endless loop
    for root in (tmp_path / "file", tmp_path / "file" / "runs", tmp_path / "unmounted", "/proc/runs"):
        with pytest.raises(
            OSError, match=r"cannot be created \(.+\); choose a folder you may write to"
        ) as info:
            runs.new_run_dir(root, "lung")
        assert f"{root}/lung" in str(info.value)


def make_run(root, name, modified):
    path = root / name / "weights" / "last.pt"
    path.parent.mkdir(parents=True)
    path.write_text(name)
    (root / name / "log.txt").write_text("")
    os.utime(path, (modified, modified))
    return path


def test_results_of_weights_go_to_their_run(tmp_path):
    for folder, expected in (("weights", "run"), ("checkpoints", "run"), ("mine", "run/mine")):
        assert runs.run_dir_of(tmp_path / "run" / folder / "best.pt") == tmp_path / expected


def test_find_checkpoint_takes_a_file_or_a_run_folder(tmp_path):
    path = make_run(tmp_path, "lung", 100)
    assert runs.find_checkpoint(str(path), "elsewhere", "other") == path
    assert runs.find_checkpoint(str(tmp_path / "lung"), "elsewhere", "other") == path
    for resume in (tmp_path / "none.pt", tmp_path, tmp_path / "lung" / "weights"):
        with pytest.raises(FileNotFoundError, match=f"--resume {resume}: no such checkpoint"):
            runs.find_checkpoint(str(resume), tmp_path, "lung")


def test_a_checkpoint_outside_of_a_run_folder_is_not_resumed(tmp_path):
    """Resuming writes config.yaml and metrics.csv two folders up: not into a stranger's."""
    (tmp_path / "downloads").mkdir()
    for path in (tmp_path / "downloads" / "last.pt", tmp_path / "weights" / "last.pt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        with pytest.raises(ValueError, match="does not lie in the folder of a run"):
            runs.find_checkpoint(str(path), tmp_path, "lung")


def test_find_checkpoint_last_is_the_newest_of_that_name(tmp_path):
    first, second = make_run(tmp_path, "lung", 200), make_run(tmp_path, "lung_2", 100)
    for other in ("lung2", "lung_fold1", "lung_fold1_2", "lung_", "lung_2_2", "alung"):
        make_run(tmp_path, other, 900)
    (tmp_path / "lung_3").mkdir()  # stopped before its first checkpoint
    assert runs.find_checkpoint("last", tmp_path, "lung") == first
    os.utime(second, (300, 300))
    assert runs.find_checkpoint("last", tmp_path, "lung") == second
    tenth = make_run(tmp_path, "lung_10", 400)
    assert runs.find_checkpoint("last", tmp_path, "lung") == tenth


def test_an_older_run_does_not_stand_in_for_one_that_ended_before_its_first_checkpoint(tmp_path):
    make_run(tmp_path, "lung", 100)
    (tmp_path / "lung_2").mkdir()
    (tmp_path / "lung_2" / "log.txt").write_text("")
    with pytest.raises(
        FileNotFoundError, match=r"lung_2, ended before its first checkpoint; .*--resume .*/lung$"
    ):
        runs.find_checkpoint("last", tmp_path, "lung")
    os.utime(tmp_path / "lung_2" / "log.txt", (50, 50))
    assert runs.find_checkpoint("last", tmp_path, "lung").parents[1].name == "lung"


@pytest.mark.parametrize(
    "words",
    [
        "train.py --fold all",
        "train.py --resume --fold all",
        "train.py --fold all --resume last",
        "train.py --resume=last --fold all",
    ],
)
def test_the_command_that_resumes_has_one_resume(words):
    assert runs.with_resume(words.split()) == ["train.py", "--fold", "all", "--resume"]
    assert runs.with_resume(["train.py", "--model_name", "last"])[-2:] == ["last", "--resume"]


@pytest.mark.parametrize("name", ["lung", "l.ng", "lung*", "/lung", ""])
def test_find_checkpoint_without_a_run(tmp_path, name):
    make_run(tmp_path, "lung_fold2", 100)
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="--resume: no run called .* under") as info:
            runs.find_checkpoint("last", root, name)
        assert name in str(info.value) and str(root) in str(info.value)


def test_find_checkpoint_finds_what_new_run_dir_made(tmp_path):
    for number in range(3):
        run_dir = runs.new_run_dir(tmp_path, "lung_fold1")
        (run_dir / "weights").mkdir()
        (run_dir / "weights" / "last.pt").write_text("")
        (run_dir / "log.txt").write_text("")
        os.utime(run_dir / "log.txt", (number, number))
        os.utime(run_dir / "weights" / "last.pt", (number, number))
        assert runs.find_checkpoint("last", tmp_path, "lung_fold1").parents[1] == run_dir


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    run = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_git_state_clean_and_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    (tmp_path / "runs.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert runs.git_state() == f"{commit} (clean)"
    (tmp_path / "runs.py").write_text("2")
    assert runs.git_state() == f"{commit} (dirty: files differ from it)"
    git(tmp_path, "checkout", "-q", "runs.py")
    (tmp_path / "new.py").write_text("")
    assert runs.git_state() == f"{commit} (dirty: files differ from it)"


def test_git_state_without_repository_commit_or_git(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.git_state() == "unknown (not a git checkout)"
    git(tmp_path, "init", "-q")
    assert runs.git_state() == "unknown (not a git checkout)"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.git_state() == "unknown (not a git checkout)"


def read_csv(path):
    with open(path, newline="", encoding="utf8") as file:
        return list(csv.reader(file))


def test_start_log_writes_command_commit_and_versions_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lung_tumor/train.py", "--epochs", "3"])
    monkeypatch.setattr(runs, "git_state", lambda: "abc123 (clean)")
    log = runs.start_log(tmp_path / "run", {"lr": 1e-3, "fold": None}, [])
    log("epoch 0 ß")
    lines = (tmp_path / "run" / "log.txt").read_text(encoding="utf8").splitlines()
    assert [line[20:] for line in lines[:2]] == [
        f"command: {Path(sys.executable).name} lung_tumor/train.py --epochs 3",
        "commit: abc123 (clean)",
    ]
    assert all(v in lines[2] for v in (f"torch {torch.__version__}", f"numpy {np.__version__}", "python 3."))
    assert lines[3].endswith(" epoch 0 ß") and len(lines) == 4
    assert capsys.readouterr().out.splitlines()[-1] == "epoch 0 ß"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == {"lr": 1e-3, "fold": None}
    assert (tmp_path / "run" / "weights").is_dir()
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_start_log_rewrites_metrics_from_the_history_of_a_resumed_run(tmp_path):
    history = [{"epoch": 0, "loss": 0.5}, {"epoch": 1, "loss": 0.25}]
    runs.start_log(tmp_path, {"lr": 1.0}, [])("first run")
    for row in [*history, {"epoch": 2, "loss": 9.0}]:  # epoch 2 ended after the last checkpoint
        append_row(tmp_path / "metrics.csv", row)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("3,0.")  # killed while it wrote
    runs.start_log(tmp_path, {"lr": 2.0}, history)("second run")
    append_row(tmp_path / "metrics.csv", {"epoch": 2, "loss": 0.125})
    assert read_csv(tmp_path / "metrics.csv") == [
        ["epoch", "loss"],
        ["0", "0.5"],
        ["1", "0.25"],
        ["2", "0.125"],
    ]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("commit: ") == 2 and log.index("first run") < log.index("second run")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": 2.0}


def test_only_rank_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    runs.start_log(tmp_path, {}, [{"epoch": 0}])("hello")
    assert trackers.open_wandb("project", "name", {}) is None
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_open_wandb_without_wandb_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import then raises ImportError
    with pytest.raises(SystemExit, match="--use_wandb needs the wandb package: pip install wandb"):
        trackers.open_wandb("project", "name", {})


# ---- seeds ----


def draws():
    """Numbers from every generator, normals included: these keep a spare value beside the state."""
    return (
        [random.random(), random.gauss(0, 1)],
        np.random.rand(3).tolist() + np.random.standard_normal(3).tolist(),  # noqa: NPY002
        torch.rand(3).tolist() + torch.randn(3).tolist(),
    )


def test_seed_everything_repeats_all_generators():
    runs.seed_everything(5)
    first = draws()
    assert draws() != first
    runs.seed_everything(5)
    assert draws() == first
    runs.seed_everything(6)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
    runs.seed_everything(2**32 + 5)  # NumPy takes 32 bits
    runs.seed_everything(-1)


# ---- stopping ----


def test_signals_set_the_flag_and_a_second_interrupt_stops(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        with runs.StopRequest() as stop:
            assert not stop.requested
            signal.raise_signal(number)
            assert stop.requested
            signal.raise_signal(signal.SIGTERM)  # a scheduler may repeat itself
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        assert f"{number.name}: finishing this step, then saving" in capfd.readouterr().out


def test_handlers_are_restored_after_an_exception():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), runs.StopRequest():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_signal_in_the_middle_of_a_print(monkeypatch):
    class Interrupted(io.RawIOBase):
        signals = [signal.SIGTERM]  # for the first write only

        def writable(self):
            return True

        def write(self, data):
            if self.signals:
                signal.raise_signal(self.signals.pop())
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Interrupted())))
    with runs.StopRequest() as stop:
        print("epoch 3", flush=True)  # was RuntimeError: reentrant call
        assert stop.requested


def test_stop_request_outside_the_main_thread_leaves_signals_alone():
    before, flags = signal.getsignal(signal.SIGINT), []

    def work():
        with runs.StopRequest() as stop:
            flags.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert flags == [False] and signal.getsignal(signal.SIGINT) is before


DYING_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from common import distributed, runs
from common.tables import append_row

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, key):
        return key[0]

if __name__ == "__main__":
    loader = distributed.make_loader(Items(), 2, seed=0, workers=2, device=torch.device("cpu"))
    with runs.StopRequest():
        for batch in loader:
            raise ZeroDivisionError("the loss became nan")
"""


def test_workers_that_ignore_signals_end_when_the_main_process_dies(tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING_SCRIPT)
    # Returns when the workers, too, have closed the pipes; without _end_children it would hang for ever.
    done = subprocess.run(
        [sys.executable, script, ROOT], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: the loss became nan")


def test_a_run_goes_on_with_the_same_voxels_however_they_are_written():
    """A checkpoint gives tuples, a JSON file lists."""
    checkpoint = {"preprocessing": {"spacing_mm": (1.0, 2.0, 3.0)}, "split": {"train": ["a"]}}
    rest = (["spacing_mm"], "data/h5")
    runs.require_same_data(checkpoint, {"train": ["a"]}, {"spacing_mm": [1.0, 2.0, 3.0]}, *rest)
    runs.require_same_data(None, {}, {}, *rest)
    with pytest.raises(ValueError, match=r"began with spacing_mm \(1.0, 2.0, 3.0\), data/h5 now has \[1.0"):
        runs.require_same_data(checkpoint, {"train": ["a"]}, {"spacing_mm": [1.0, 2.0, 2.0]}, *rest)
    with pytest.raises(ValueError, match="the split of data/h5 is not the one"):
        runs.require_same_data(checkpoint, {"train": ["b"]}, {"spacing_mm": [1.0, 2.0, 3.0]}, *rest)
