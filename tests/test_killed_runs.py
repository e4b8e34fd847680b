"""A train script that is killed at ten random moments, and resumed each time, ends as one that never was.

pytest -m hostile tests/test_killed_runs.py
"""

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import TINY_AMYGDALA
from hostile_entries import TRAIN
from hostile_runs import converted, train_flags
from torch.optim.optimizer import register_optimizer_step_post_hook

KILLS = 10
TIMES = ("seconds", "data_wait", "peak_mib")  # columns of metrics.csv that no two runs share


def kill_at(moment: str, count: float) -> None:
    """End this process with SIGKILL at the n-th update, rename or sync, or after so many seconds."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    left = count

    def one_more(*_) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            kill()

    def before(function):
        def counted(*args, **kwargs):
            one_more()
            return function(*args, **kwargs)

        return counted

    if moment == "seconds":
        threading.Timer(count, kill).start()
    elif moment == "update":
        register_optimizer_step_post_hook(one_more)
    elif moment == "rename":
        os.replace = before(os.replace)
    elif moment == "sync":
        os.fsync = before(os.fsync)


def run_child(script: str, flags: list[str], moment: str, count: float) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    kill_at(moment, count)
    main = importlib.import_module(script.replace("/", ".")).main
    os._exit(main(flags) or 0)  # without the clean-up of pytest, whose child this is


def run(script: str, flags: list, moment: str = "never", count: float = 0) -> int:
    """Exit code of the script in a process of its own: -9 if it was killed."""
    importlib.import_module(script.replace("/", "."))  # once, for all children
    arguments = (script, [str(flag) for flag in flags], moment, count)
    process = multiprocessing.get_context("fork").Process(target=run_child, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def checkpoint_of(out: Path) -> Path | None:
    return next(iter(out.glob("**/weights/last.pt")), None)


def same(a, b, where: str = "last.pt") -> None:
    """Equal bit for bit, tensors and plain values alike."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            if key not in TIMES and not str(key).startswith(("elapsed", "path", "data_wait")):
                same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (left, right) in enumerate(zip(a, b, strict=True)):
            same(left, right, f"{where} {number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), where
    else:
        assert a == b or (a != a and b != b), where


PARTS = ("position", "model", "optimizer", "ema", "rng", "scaler")  # of a checkpoint


@pytest.fixture
def flags_of(request):
    """script -> function from the folder of runs to its flags, for a run of some twenty updates."""

    def flags(script: str, out: Path) -> list:
        if script == "amygdala/train":  # with a localiser, which is trained before
            data = request.getfixturevalue("amygdala_h5")
            tiny = [*TINY_AMYGDALA, "--fold", "0", "--epochs", "5", "--no-evaluate"]
            return ["--data_path", data, "--out", out, "--model_name", "run", *tiny]
        words = train_flags(script, converted(TRAIN[script]), out)
        if script == "wsss_medical/dist_train":
            longer = {"--max_iters": 12, "--cam_iters": 4, "--aff_iters": 8, "--eval_iters": 2}
        else:
            longer = {"--epochs": 5}
        for flag, value in longer.items():
            words[words.index(flag) + 1] = value
        return words

    return flags


@pytest.mark.hostile
@pytest.mark.parametrize("script", TRAIN)
def test_killed_ten_times(script, tmp_path, flags_of, monkeypatch):
    monkeypatch.setattr("amygdala.localiser.GRID", (32, 32, 32))
    rng = random.Random(f"0 {script}")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert run(script, flags_of(script, unbroken)) == 0
    expected, moments = torch.load(checkpoint_of(unbroken), weights_only=True), []
    finished = 0
    while len(moments) < KILLS or not finished:
        moment = rng.choice(["update", "rename", "sync", "seconds"]) if len(moments) < KILLS else "never"
        count = rng.uniform(0.05, 3) if moment == "seconds" else rng.randint(1, 8)
        last = checkpoint_of(broken)
        if last is None:  # it was killed before its first epoch was done
            shutil.rmtree(broken, ignore_errors=True)
        flags = ["--resume", last.parents[1]] if last else flags_of(script, broken)
        code = run(script, flags, moment, count)
        if code == -signal.SIGKILL:
            moments.append((moment, count))
            print(f"{script}: killed at {moment} {count:.3g}", flush=True)
            continue
        assert code == 0, (script, moments, moment, count)
        found = torch.load(checkpoint_of(broken), weights_only=True)
        for part in PARTS:
            same(expected.get(part), found.get(part), f"{part} after {moments}:")
        finished += 1
        shutil.rmtree(broken)
