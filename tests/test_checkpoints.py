"""common/checkpoints.py: checkpoints survive accidents and carry no code; random states; trained networks."""

import errno
import os
import pickle
import random
import signal
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoints, distributed, runs


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def test_checkpoint_round_trip(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": {"lr": 5e-5, "patch": [96, 64, 64], "fold": None, "ema": False, "name": "ä"},
        "label_map": {0: "background", 26: "T13", "spacing_mm": (1.0, 2.5)},
        "history": [{"epoch": 0, "dice": float("inf")}, {"epoch": 2**70, "dice": -0.0}],
        "tensors": [
            torch.arange(3),
            torch.tensor(True),
            torch.zeros(0, 3),
            torch.ones(2, dtype=torch.float16),
        ],
        "shape": torch.zeros(2, 3).shape,
        "parameter": nn.Parameter(torch.ones(2)),
        "ema": None,
    }
    checkpoints.save_checkpoint(tmp_path / "last.pt", state)
    loaded = checkpoints.load_checkpoint(str(tmp_path / "last.pt"))
    assert_same(loaded, state)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    "value, where",
    [
        (
            {"position": {"best": np.float64(0.5)}},
            r"checkpoint\['model'\]\['position'\]\['best'\] is a float64",
        ),
        ([{"dice": 1.0}, {"dice": np.float32(1)}], r"checkpoint\['model'\]\[1\]\['dice'\] is a float32"),
        ((1, np.int64(3)), r"checkpoint\['model'\]\[1\] is a int64"),
        (
            {np.int64(3): "L3"},  # as from np.unique
            r"the key .*3.* of checkpoint\['model'\] is a int64",
        ),
        (np.zeros(2), r"checkpoint\['model'\] is a ndarray"),
        (Path("a"), r"checkpoint\['model'\] is a .*Path"),
        ({1, 2}, r"checkpoint\['model'\] is a set"),
        (defaultdict(int, a=1), r"checkpoint\['model'\] is a defaultdict"),
        (nn.Linear(1, 1), r"checkpoint\['model'\] is a Linear"),
        (np.str_("a"), r"checkpoint\['model'\] is a str_"),
    ],
)
def test_save_checkpoint_refuses_what_could_not_be_read_back(tmp_path, value, where):
    with pytest.raises(TypeError, match=where + "; checkpoints hold tensors and plain values only"):
        checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": value, "config": {}})
    assert not list(tmp_path.iterdir())


def test_ordered_dict_and_counter(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "a.pt", {"model": OrderedDict(b=1, a=2), "config": {}})
    assert_same(checkpoints.load_checkpoint(tmp_path / "a.pt")["model"], OrderedDict(b=1, a=2))
    with pytest.raises(TypeError, match="Counter"):
        checkpoints.save_checkpoint(tmp_path / "a.pt", {"model": Counter("ab"), "config": {}})


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "ran")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_load_checkpoint_never_runs_code_from_the_file(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "best.pt"
    content = {"model": Evil(trace), "config": {}}
    for protocol in (0, 2, 5):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(ValueError, match=f"{path}: refused"):
            checkpoints.load_checkpoint(path)
    for new_format in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        with pytest.raises(ValueError, match=f"{path}: refused"):
            checkpoints.load_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.read_text() == "ran"  # so the file was a danger


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_load_checkpoint_refuses_objects_and_programs(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"model": defaultdict(int), "config": {}}, tmp_path / "foreign.pt")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    for name in ("module.pt", "foreign.pt", "script.pt"):
        with pytest.raises(
            ValueError, match=f"{name}: refused, because it holds more than tensors and plain"
        ):
            checkpoints.load_checkpoint(tmp_path / name)


def test_load_checkpoint_of_a_damaged_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, {"model": {"w": torch.full((1000,), 7.0)}, "config": {}})
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=f"{path}: refused, because it is truncated, damaged or not a check"
        ):
            checkpoints.load_checkpoint(path)
    weights = whole.find(torch.full((4,), 7.0).numpy().tobytes())
    path.write_bytes(whole[: weights + 4] + b"\x01" + whole[weights + 5 :])  # torch would not notice
    with pytest.raises(ValueError, match=f"{path}: not a readable checkpoint .*data/0 in it is damaged"):
        checkpoints.load_checkpoint(path)


def test_load_checkpoint_of_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt: no such checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoints.load_checkpoint(tmp_path)
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        ValueError, match="text.pt: refused, because it is truncated, damaged or not a checkpoint"
    ):
        checkpoints.load_checkpoint(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "report.zip", "w") as archive:
        archive.writestr("a/report.txt", "no tensors")
    with pytest.raises(ValueError, match="report.zip: not a readable checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "report.zip")
    for content in ({"model": {}}, {"config": {}}, [1, 2], torch.zeros(2)):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt: holds no 'model' and 'config'"):
            checkpoints.load_checkpoint(tmp_path / "other.pt")


# ---- accidents while saving ----


def state_of(num_values):
    return {"model": {"w": torch.full((num_values,), 3.0)}, "config": {}}


def assert_refused_and_old_kept(path, reason):
    """Saving raises `reason`; the checkpoint before stays as it is and nothing else is left behind."""
    old = path.read_bytes()
    for num_values in (10, 100_000):  # torch writes small files at once, large ones in parts
        with pytest.raises(OSError, match=reason) as info:
            checkpoints.save_checkpoint(path, state_of(num_values))
        for part in (f"{path}: checkpoint could not be written", "earlier last.pt is untouched", "--resume"):
            assert part in str(info.value)
        assert path.read_bytes() == old
        assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


@pytest.fixture
def last(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "last.pt", state_of(5))
    return tmp_path / "last.pt"


def test_disk_full_at_the_end(last, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    assert_refused_and_old_kept(last, "No space left on device")


def test_rename_fails(last, monkeypatch):
    def no_rename(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", no_rename)
    assert_refused_and_old_kept(last, "Permission denied")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("num_values", [10, 100_000])
def test_disk_full_of_a_real_device(last, num_values, monkeypatch):
    monkeypatch.setattr("common.files.secrets.token_hex", lambda size: "0")
    old, partial = last.read_bytes(), last.with_name(".partial_0_last.pt")
    monkeypatch.setattr(Path, "glob", lambda *_: [])  # else it would be removed as a left-over
    partial.symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"could not be written \(No space left on device\); the earlier last.pt"
    ):
        checkpoints.save_checkpoint(last, state_of(num_values))
    assert last.read_bytes() == old and not partial.is_symlink()


def test_file_size_limit_of_the_system(last):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert_refused_and_old_kept(last, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_handler)
    checkpoints.save_checkpoint(last, state_of(7))
    assert len(checkpoints.load_checkpoint(last)["model"]["w"]) == 7


def test_no_permission(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "none", Path("/proc"), Path("/proc/self")):
        with pytest.raises(OSError, match="checkpoint could not be written") as info:
            checkpoints.save_checkpoint(folder / "last.pt", state_of(5))
        assert f"{folder}/last.pt" in str(info.value) and "nothing was written" in str(info.value)


def test_what_a_killed_save_left_is_removed(last):
    last.with_name(".partial_0a1b_last.pt").write_bytes(b"half")
    checkpoints.save_checkpoint(last, state_of(9))
    assert len(checkpoints.load_checkpoint(last)["model"]["w"]) == 9
    assert [p.name for p in last.parent.iterdir()] == ["last.pt"]


# ---- random states ----


def draws():
    """Numbers from every generator, normals included: these keep a spare value beside the state."""
    return (
        [random.random(), random.gauss(0, 1)],
        np.random.rand(3).tolist() + np.random.standard_normal(3).tolist(),  # noqa: NPY002
        torch.rand(3).tolist() + torch.randn(3).tolist(),
    )


def test_rng_state_continues_exactly_also_through_a_checkpoint(tmp_path):
    runs.seed_everything(1)
    draws()
    state = checkpoints.rng_state()
    expected = draws(), draws()
    checkpoints.set_rng_state(state)
    assert (draws(), draws()) == expected
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": {}, "config": {}, "rng": state})
    runs.seed_everything(2)
    checkpoints.set_rng_state(checkpoints.load_checkpoint(tmp_path / "last.pt")["rng"])
    assert (draws(), draws()) == expected


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": {}})
    assert not list(tmp_path.iterdir())


# ---- trained networks ----


def linear_of(checkpoint: dict) -> nn.Module:
    if checkpoint["config"]["model"] != "Linear":
        raise ValueError("not weights of this task")
    return nn.Linear(2, 1, bias=False)


@pytest.mark.parametrize(
    "averaged", [None, {"average": {"weight": torch.full((1, 2), 5.0)}, "num_updates": 3}]
)
def test_load_trained_takes_averaged_weights_where_there_are_any(averaged, tmp_path):
    checkpoints.save_checkpoint(
        tmp_path / "best.pt",
        {
            "model": {"weight": torch.full((1, 2), 3.0)},
            "ema": averaged,
            "config": {"model": "Linear"},
            "preprocessing": {"spacing_mm": [1.0, 2.0, 3.0]},
            "split": {"train": ["a"]},
        },
    )
    trained = checkpoints.load_trained(tmp_path / "best.pt", torch.device("cpu"), None, linear_of)
    expected = 5.0 if averaged else 3.0
    assert trained.network.weight.tolist() == [[expected, expected]]
    assert not trained.network.training
    assert trained.preprocessing == {"spacing_mm": [1.0, 2.0, 3.0]}
    assert trained.split == {"train": ["a"], "val": [], "test": []}


def test_load_trained_names_the_file_of_another_task(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "best.pt", {"model": {}, "config": {"model": "Conv"}})
    with pytest.raises(ValueError, match=r"best\.pt: not weights of this task"):
        checkpoints.load_trained(tmp_path / "best.pt", torch.device("cpu"), None, linear_of)
