"""common/training.py, and what it promises of every train script: the contract, one test for all of them."""

import csv
import io
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, TINY_AMOS, TINY_AMYGDALA, TINY_HEATMAP, TINY_SEGMENTATION
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from amos_lha import train as train_amos
from amygdala import train as train_amygdala
from common import distributed, hardware, runs, trackers, training
from common.checkpoints import load_checkpoint
from common.distributed import make_loader
from common.ema import WeightAverage
from common.training import Run, optimizer_step
from lung_tumor import train as train_lung
from verse_spine import train_heatmap, train_segmentation

CPU = torch.device("cpu")
TIMES = {"seconds", "data_wait", "peak_mib"}

# ---- Run and optimizer_step alone ----


def new_run(folder: Path, **options) -> Run:
    settings = {
        "num_batches": 12,
        "accumulate": 5,
        "epochs": 2,
        "flags": {},
        "parts": {},
        "notes": {},
    } | options
    parts = {"model": nn.Linear(1, 1)} | settings.pop("parts")
    return Run(folder, {"lr": 0.1}, device=CPU, parts=parts, **settings)


class Ones(Dataset):
    """Items that are 1."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: tuple[int, int]) -> float:
        return 1.0


def train_epoch(run: Run, count: int = 12, score: float = 0.5) -> list[tuple[int, float]]:
    """One epoch; (batches, twenty-fourths of the run that are done before it) of each update."""
    updates, batches = [], run.batches(make_loader(Ones(count), 1, seed=0, workers=0, device=CPU))
    while size := run.next_update():
        updates.append((size, round(24 * run.progress, 6)))
        for _ in range(size):
            run.count(next(batches).sum())
    run.end_epoch({"lr": 0.1}, score, run.parts["model"].state_dict())
    return updates


def test_the_last_update_of_an_epoch_has_what_is_left(tmp_path):
    with new_run(tmp_path) as run:
        seen = []
        while run.next_epoch():
            seen.append(train_epoch(run))
    assert seen[0] == [(5, 0), (5, 5), (2, 10)], "progress moves with every update"
    assert seen[1] == [(5, 12), (5, 17), (2, 22)]
    assert [row["train_loss"] for row in run.history] == [1.0, 1.0]


def test_the_loss_is_read_once_an_update(tmp_path, monkeypatch):
    readings = []
    for name in ("item", "tolist", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, original=original: readings.append(1) or original(self)
        )
    losses = torch.tensor([0.5, 1.5, 4.0, 2.0])
    with new_run(tmp_path, num_batches=4, accumulate=4) as run:
        run.next_epoch()
        assert run.next_update() == 4
        for loss in losses:
            run.count(loss)
    assert len(readings) == 1 and run.loss_sum == 8.0 and run.batch == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_batch(value, tmp_path):
    with new_run(tmp_path, num_batches=3, accumulate=3) as run:
        run.next_epoch()
        run.next_update()
        run.count(torch.tensor(1.0))
        run.count(torch.tensor(value))
        with pytest.raises(ValueError, match=f"became {value} in epoch 0, batch 2. Try --amp off"):
            run.count(torch.tensor(1.0))


def test_patience_counts_from_the_best_epoch(tmp_path):
    scores = iter([0.1, 0.4, 0.4, 0.3, math.nan, 0.9])
    with new_run(tmp_path, epochs=100, patience=3, num_batches=1) as run:
        while run.next_epoch():
            train_epoch(run, 1, next(scores))
    assert run.epoch == 5 and run.best == 0.4 and run.best_epoch == 1, "an equal score is not better"
    assert "no better validation score for 3 epochs" in (tmp_path / "log.txt").read_text()


def test_patience_waits_for_a_first_score(tmp_path):
    with new_run(tmp_path, epochs=6, patience=2, num_batches=1) as run:
        while run.next_epoch():
            train_epoch(run, 1, math.nan)
    assert run.epoch == 6 and run.best_epoch == -1 and not run.best_weights.exists()


class Clock:
    """Stands in for time.perf_counter: moves only when it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(training.time, "perf_counter", lambda: self.now)


def test_time_budget(tmp_path, monkeypatch):
    """10 s an update and 15 s a validation: 60 s are over in the second epoch, in which there is time for one
    more update before the validation."""
    clock, progress, last = Clock(monkeypatch), [], []
    with new_run(tmp_path, num_batches=3, accumulate=1, epochs=1, time_budget_s=60) as run:
        while run.next_epoch():
            while run.next_update():
                progress.append(run.progress)
                run.count(torch.tensor(1.0))
                clock.now += 10
            last.append(run.is_last_epoch)
            clock.now += 15
            run.end_epoch({"lr": 0.1}, 1.0, {})
    assert progress == [0, 10 / 60, 20 / 60, 45 / 60]
    assert last == [False, True] and run.elapsed_s == 70
    assert [row["seconds"] for row in run.history] == [45, 25]
    assert [row["train_loss"] for row in run.history] == [1, 1], "the mean over the batches that were done"


def test_a_time_budget_trains_at_least_one_update(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with new_run(tmp_path, num_batches=3, accumulate=1, time_budget_s=1) as run:
        assert run.next_epoch()
        clock.now += 5
        assert run.next_update() == 1
        run.count(torch.tensor(1.0))
        assert run.next_update() == 0


def test_a_time_budget_counts_through_a_stop_but_not_the_pause(tmp_path, monkeypatch):
    clock, settings = Clock(monkeypatch), dict(num_batches=3, accumulate=1, time_budget_s=60)
    with pytest.raises(SystemExit), new_run(tmp_path, **settings) as run:
        run.next_epoch()
        run.next_update()
        run.count(torch.tensor(1.0))
        clock.now += 25
        signal.raise_signal(signal.SIGTERM)
        run.next_update()
    clock.now += 10_000
    with new_run(tmp_path, **settings, resumed=load_checkpoint(tmp_path / "weights" / "last.pt")) as run:
        assert run.elapsed_s == 25 and run.progress == 25 / 60
        assert run.next_epoch() and run.next_update() == 1
        run.count(torch.tensor(1.0))
        clock.now += 15
        assert run.next_update() == 1 and run.elapsed_s == 40


def test_only_a_time_budget_asks_the_other_processes_for_the_time(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(distributed, "from_main", lambda value: asked.append(value) or value)
    with new_run(tmp_path / "a") as run:
        run.next_epoch()
        train_epoch(run)
    assert asked == [0.5], "only the score, once an epoch"
    with new_run(tmp_path / "b", time_budget_s=1e6) as run:
        run.next_epoch()
        train_epoch(run)
    assert len(asked) > 3


def test_a_stop_before_the_first_update_can_be_resumed(tmp_path):
    with pytest.raises(SystemExit) as stopped, new_run(tmp_path) as run:
        run.next_epoch()
        signal.raise_signal(signal.SIGTERM)
        run.next_update()
    assert stopped.value.code == 130
    with new_run(tmp_path, resumed=load_checkpoint(tmp_path / "weights" / "last.pt")) as run:
        assert (run.epoch, run.batch) == (0, 0) and run.next_epoch()


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    with pytest.raises(SystemExit), new_run(tmp_path) as run:
        run.next_epoch()
        train_epoch(run, score=0.7)
        run.next_epoch()
        run.next_update()
        for _ in range(5):
            run.count(torch.tensor(3.0))
        run.counts = {"seen": 5}
        signal.raise_signal(signal.SIGINT)
        run.next_update()
    expected = torch.rand(3)
    state = load_checkpoint(tmp_path / "weights" / "last.pt")
    torch.manual_seed(99)
    with new_run(tmp_path, resumed=state) as run:
        assert torch.equal(torch.rand(3), expected), "the random generators go on, too"
        assert (run.epoch, run.batch, run.loss_sum, run.counts) == (1, 5, 15.0, {"seen": 5})
        assert (run.best, run.best_epoch, len(run.history)) == (0.7, 0, 1)
        assert run.next_epoch() and train_epoch(run) == [(5, 17), (2, 22)]
    assert run.history[1]["train_loss"] == (15 + 7) / 12 and run.counts == {}
    with pytest.raises(ValueError, match="stopped in an epoch of 12 batches, now there are 6; give --batch_"):
        new_run(tmp_path, num_batches=6, resumed=state)


def test_a_finished_run_that_goes_on_says_that_its_learning_rate_jumps(tmp_path, capsys):
    with new_run(tmp_path) as run:
        while run.next_epoch():
            train_epoch(run)
    state = load_checkpoint(tmp_path / "weights" / "last.pt")
    capsys.readouterr()
    new_run(tmp_path, resumed=state)
    new_run(tmp_path, resumed=state, epochs=1)
    assert "jumps up again" in capsys.readouterr().out.split("resumed at")[-1]
    new_run(tmp_path, resumed=state | {"epochs": 5}, epochs=5)
    assert "jumps up again" not in capsys.readouterr().out


def test_optimizer_step_sets_the_rate_clips_and_averages():
    """SGD on w = (3, 4) with gradient (30, 40), clipped to norm 5: (3, 4) - 0.1 * (3, 4)."""
    network = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[3.0, 4.0]]))
    average = WeightAverage(network, 0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=99.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    network.weight.grad = torch.tensor([[30.0, 40.0]])
    optimizer_step(network, optimizer, scaler, 0.1, grad_clip=5.0, average=average)
    torch.testing.assert_close(network.weight.data, torch.tensor([[2.7, 3.6]]))
    # The first decay is min(0.5, 2 / 11).
    torch.testing.assert_close(
        average.average["weight"], torch.tensor([[3 * 2 + 2.7 * 9, 4 * 2 + 3.6 * 9]]) / 11
    )
    assert network.weight.grad is None
    network.weight.grad = torch.tensor([[30.0, 40.0]])
    optimizer_step(network, optimizer, scaler, 0.01)
    torch.testing.assert_close(network.weight.data, torch.tensor([[2.4, 3.2]]), msg="not clipped")


def test_every_group_of_parameters_gets_the_rate():
    network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD([{"params": part.parameters()} for part in network], lr=99.0)
    optimizer_step(network, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_group_may_learn_faster():
    network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    groups = [{"params": network[0].parameters()}, {"params": network[1].parameters(), "lr_scale": 10}]
    optimizer = torch.optim.AdamW(groups, lr=99.0)
    again = torch.optim.AdamW(groups)
    again.load_state_dict(optimizer.state_dict())  # as a resumed run does
    for each in (optimizer, again):
        optimizer_step(network, each, torch.amp.GradScaler("cpu", enabled=False), 0.25)
        assert [group["lr"] for group in each.param_groups] == [0.25, 2.5]


def test_gradients_are_unscaled_before_they_are_clipped():
    """fp16 multiplies the loss by a large number; the limit is for the gradient itself."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=99.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(3 * network.weight.sum()).backward()
    assert network.weight.grad.item() == 3 * 1024
    optimizer_step(network, optimizer, scaler, 0.1, grad_clip=5.0)
    assert network.weight.item() == pytest.approx(1 - 0.1 * 3)


def test_the_command_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verse_spine/train_heatmap.py", "--epochs", "3"])
    run = new_run(tmp_path / "my run")
    last = shlex.quote(str(run.last))
    assert run.resume_command == f"python verse_spine/train_heatmap.py --resume {last}"
    monkeypatch.setattr(training.distributed, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run = new_run(tmp_path / "b", resume_words=["train.py", "--fold", "all", "--resume"])
    assert run.resume_command == "torchrun --nproc_per_node 2 train.py --fold all --resume"


def test_wandb_gets_every_epoch_and_ends_with_the_run(tmp_path, monkeypatch):
    class Wandb:
        rows, finished = [], 0

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            Wandb.finished += 1

    monkeypatch.setattr(trackers, "open_wandb", lambda project, name, config: Wandb())
    with new_run(tmp_path, wandb_project="lung_tumor", num_batches=1) as run:
        while run.next_epoch():
            train_epoch(run, 1)
    assert [row["epoch"] for row in Wandb.rows] == [0, 1] and Wandb.finished == 1


def test_tensorboard_gets_every_epoch_once_also_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "curves"
    with new_run(tmp_path / "run", tensorboard=folder, num_batches=1, epochs=2) as run:
        while run.next_epoch():
            train_epoch(run, 1)
    resumed = load_checkpoint(run.last)
    with new_run(tmp_path / "run", tensorboard=folder, num_batches=1, epochs=3, resumed=resumed) as run:
        while run.next_epoch():
            train_epoch(run, 1)
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    assert [event.step for event in found.Scalars("train_loss")] == [0, 1, 2]
    expected = [row["train_loss"] for row in run.history]
    assert [event.value for event in found.Scalars("train_loss")] == pytest.approx(expected)


def test_without_tensorboard_a_line_says_what_to_install_and_no_picture_is_made(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # import then raises ImportError
    with new_run(tmp_path, tensorboard=tmp_path / "curves") as run:
        run.trackers.add_images("labels", (pytest.fail("made in vain") for _ in range(1)), 0)
    assert "pip install tensorboard" in capsys.readouterr().out


def test_images_for_tensorboard_are_a_grid_and_failing_ones_cost_nothing_else(tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with new_run(tmp_path / "run", tensorboard=tmp_path / "curves") as run:
        run.trackers.add_images("none", [], 0)
        run.trackers.add_images("odd", [[np.zeros((4, 5, 3), np.uint8)], [np.zeros((4, 6, 3), np.uint8)]], 0)
        run.trackers.add_images("grid", ([np.full((4, 5, 3), k, np.uint8)] * 3 for k in (10, 200)), 7)
    assert "warning: odd for TensorBoard is left out" in capsys.readouterr().out
    found = accumulator.EventAccumulator(str(tmp_path / "curves"))
    found.Reload()
    assert found.Tags()["images"] == ["grid"]
    (event,) = found.Images("grid")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 7 and picture.shape == (8, 15, 3)
    assert picture[3, 14].tolist() == [10] * 3 and picture[4, 0].tolist() == [200] * 3


# ---- the contract of every train script ----


@dataclass(frozen=True)
class Script:
    """A train script and what its tests need.

    Attributes:
        data: fixture of its data.
        tiny: flags of a run of seconds.
        other_network: flags that resuming must refuse.
        poison: makes the loss of the script NaN, with the monkeypatch that it is given.
        other_model: a value of --model that resuming must refuse.
        run: folder of a run called "run", within that of all runs.
    """

    module: ModuleType
    data: str
    tiny: list[str]
    other_network: list[str]
    poison: Callable
    other_model: str = "AttentionUNet"
    run: str = "run"

    @property
    def path(self) -> str:
        return str(Path(self.module.__file__).relative_to(ROOT))


def _nan(logits, target, *_, **__):
    return (logits[0] if isinstance(logits, list) else logits).mean() * math.nan


SCRIPTS = {
    "lung": Script(
        train_lung,
        "phantom_slices",
        [*TINY, "--accumulate", "8"],
        ["--base_features", "16"],
        lambda patch: patch.setattr(train_lung, "get_loss", lambda *_, **__: _nan),
        other_model="UNet",
    ),
    "heatmap": Script(
        train_heatmap,
        "verse_h5",
        [*TINY_HEATMAP, "--batch_size", "1", "--accumulate", "3"],
        ["--model", "UNetFull"],
        lambda patch: patch.setattr(train_heatmap, "heatmap_loss", lambda _, *both: _nan(*both)),
    ),
    "segmentation": Script(
        train_segmentation,
        "verse_h5",
        [*TINY_SEGMENTATION, "--batch_size", "1", "--accumulate", "3"],
        ["--labels", "region3"],
        lambda patch: patch.setattr(train_segmentation, "dice_ce_loss", _nan),
    ),
    "amos": Script(
        train_amos,
        "amos_h5",
        [*TINY_AMOS, "--accumulate", "3", "--ema_decay", "0.9", "--schedule", "cosine_annealing"],
        ["--heads", "shared"],
        lambda patch: patch.setattr(train_amos, "segmentation_loss", _nan),
        other_model="UNet",
    ),
    "amygdala": Script(
        train_amygdala,
        "amygdala_h5",
        [*TINY_AMYGDALA, "--fold", "0", "--accumulate", "3", "--schedule", "cosine_annealing"],
        ["--base_chan", "8"],
        lambda patch: patch.setattr(train_amygdala, "segmentation_loss", _nan),
        other_model="attention_unet",
        run="Amygdala/run/fold_0",
    ),
}
EPOCHS = 3


@pytest.fixture(params=SCRIPTS)
def script(request) -> Script:
    return SCRIPTS[request.param]


@pytest.fixture
def data(script, request) -> Path:
    return request.getfixturevalue(script.data)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    """They and the evaluation take most of the time; tests of each task have both."""
    monkeypatch.setattr("amygdala.localiser.GRID", (32, 32, 32))
    for module in (script.module for script in SCRIPTS.values()):
        for name in ("save_curves", "save_val_predictions", "save_preview", "save_case_preview"):
            monkeypatch.setattr(module, name, lambda *_, **__: None, raising=False)
        monkeypatch.setattr(module, "score_best", lambda *_, **__: ([], {}))


def start(script: Script, data: Path, out: Path, *flags: object) -> Path:
    """A run in this process; returns its folder."""
    words = [
        "--data_path",
        data,
        "--out",
        out,
        "--model_name",
        "run",
        "--epochs",
        EPOCHS,
        *script.tiny,
        *flags,
    ]
    script.module.main(list(map(str, words)))
    return out / script.run


@pytest.fixture(scope="session")
def unbroken_runs(tmp_path_factory) -> dict[str, Path]:
    return {}


@pytest.fixture
def unbroken(script, data, unbroken_runs, tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped, one for each script."""
    if script.path not in unbroken_runs:
        unbroken_runs[script.path] = start(script, data, tmp_path_factory.mktemp("unbroken"))
    return unbroken_runs[script.path]


def last_of(run: Path) -> dict:
    return load_checkpoint(run / "weights" / "last.pt")


def rows_of(run: Path) -> list[dict]:
    with (run / "metrics.csv").open(encoding="utf8") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text(encoding="utf8")


def assert_same_run(a: Path, b: Path) -> None:
    """Equal to the bit: weights, optimiser, random states, position, best weights, all logged numbers but
    times."""
    first, second = last_of(a), last_of(b)
    for key in ("model", "optimizer", "scaler"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    assert torch.equal(first["rng"]["torch"], second["rng"]["torch"])
    assert first["rng"]["python"] == second["rng"]["python"]
    for key in ("epoch", "batch", "loss_sum", "best", "best_epoch"):
        assert first["position"][key] == second["position"][key], key
    assert rows_of(a) == rows_of(b)
    best = [load_checkpoint(run / "weights" / "best.pt")["model"] for run in (a, b)]
    torch.testing.assert_close(*best, rtol=0, atol=0)


def stop_at(script: Script, monkeypatch, update: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal just before the given optimiser update, counted from 1."""
    calls, step = [], script.module.optimizer_step

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == update:
            signal.raise_signal(number)
        step(*args, **options)

    monkeypatch.setattr(script.module, "optimizer_step", counted)


def test_epochs_end_with_a_short_update(script, unbroken):
    """Else the tests below would not see what is wrong with it."""
    config = yaml.safe_load((unbroken / "config.yaml").read_text())
    num_batches = last_of(unbroken)["position"]["num_batches"]
    assert num_batches > config["accumulate"] and num_batches % config["accumulate"] > 0


def test_config_yaml_repeats_the_run(script, unbroken, tmp_path):
    script.module.main(["--config", str(unbroken / "config.yaml"), "--out", str(tmp_path)])
    assert_same_run(unbroken, tmp_path / script.run)


@pytest.mark.parametrize("update", [3, 4])
def test_stopped_and_resumed_equals_unbroken(update, script, data, unbroken, tmp_path, monkeypatch):
    """Stopped by a signal between the updates of the second epoch, and after the last one of it."""
    stop_at(script, monkeypatch, update)
    with pytest.raises(SystemExit) as stopped:
        start(script, data, tmp_path)
    assert stopped.value.code == 130
    monkeypatch.undo()
    run, position = tmp_path / script.run, last_of(tmp_path / script.run)["position"]
    assert position["epoch"] == 1 and 0 < position["batch"] <= position["num_batches"]
    assert (position["batch"] == position["num_batches"]) == (update == 4)
    command = f"--resume {run / 'weights' / 'last.pt'}"
    assert log_of(run).rstrip().endswith(command) and len(rows_of(run)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(script.module, "score_best", lambda *_, **__: ([], {}))
        script.module.main(command.split())  # what a run needs is in its checkpoint
    assert f"resumed at epoch 1, batch {position['batch']}" in log_of(run)
    assert_same_run(unbroken, run)


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken(script, data, unbroken, tmp_path):
    """kill -9 costs at most the epoch under way; another number of workers does not matter."""
    log = tmp_path / "output.txt"
    command = [
        sys.executable,
        ROOT / script.path,
        "--data_path",
        data,
        "--out",
        tmp_path,
        "--model_name",
        "run",
    ]
    command += ["--epochs", EPOCHS, *script.tiny, "--workers", "1"]
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, cwd=tmp_path)
    deadline = time.monotonic() + 600
    while "epoch   1" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.kill()
    assert process.wait(600) == -signal.SIGKILL
    script.module.main(["--resume", str(tmp_path / script.run), "--workers", "0"])
    assert_same_run(unbroken, tmp_path / script.run)


def test_the_last_update_is_divided_by_its_own_size(script, data, tmp_path):
    """An epoch of fewer batches than --accumulate is one update of exactly these."""
    count = last_of(start(script, data, tmp_path / "a", "--epochs", 1))["position"]["num_batches"]
    exact = start(script, data, tmp_path / "b", "--epochs", 1, "--accumulate", count)
    more = start(script, data, tmp_path / "c", "--epochs", 1, "--accumulate", 50 * count)
    first, second = last_of(exact), last_of(more)
    for key in ("model", "optimizer"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_the_learning_rate_changes_with_every_update(script, data, tmp_path, monkeypatch):
    """Half a cosine over all updates, each by the share of batches before it."""
    rates, step = [], script.module.optimizer_step

    def watched(network, optimizer, scaler, lr, *rest):
        rates.append(lr)
        step(network, optimizer, scaler, lr, *rest)
        assert {group["lr"] for group in optimizer.param_groups} == {lr}

    monkeypatch.setattr(script.module, "optimizer_step", watched)
    position = last_of(start(script, data, tmp_path))["position"]
    args = script.module.build_parser().parse_args(["--data_path", "x", "--model_name", "y", *script.tiny])
    lowest = getattr(args, "min_lr", getattr(script.module, "LEAST_LR", 0.0))
    count = position["num_batches"]
    shares = [
        (epoch + k / count) / EPOCHS for epoch in range(EPOCHS) for k in range(0, count, args.accumulate)
    ]
    expected = [lowest + (args.lr - lowest) * (1 + math.cos(math.pi * share)) / 2 for share in shares]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert [row["lr"] for row in position["history"]] == rates[
        len(rates) // EPOCHS - 1 :: len(rates) // EPOCHS
    ]


def test_training_and_validation_modes(script, data, tmp_path, monkeypatch):
    """Gradients and batch statistics in training only."""
    seen, wrap = [], distributed.wrap

    def watched(network, device):
        network.register_forward_pre_hook(
            lambda module, _: seen.append((module.training, torch.is_grad_enabled()))
        )
        return wrap(network, device)

    monkeypatch.setattr(distributed, "wrap", watched)
    # A moving average would be validated in a network of its own.
    no_average = ["--no-ema"] if script.module in (train_amos, train_amygdala) else []
    start(script, data, tmp_path, "--epochs", 2, *no_average)
    assert set(seen) == {(True, True), (False, False)}
    assert seen[0] == (True, True) and seen[-1] == (False, False)


def test_time_budget_instead_of_epochs(script, data, tmp_path, monkeypatch):
    """By a clock on which each update takes 10 s and all else nothing: 9 updates in 85 s."""
    clock, rates, step = Clock(monkeypatch), [], script.module.optimizer_step

    def ten_seconds(network, optimizer, scaler, lr, *rest):
        rates.append(lr)
        step(network, optimizer, scaler, lr, *rest)
        clock.now += 10

    monkeypatch.setattr(script.module, "optimizer_step", ten_seconds)
    start(script, data, tmp_path, "--epochs", 1, "--time_budget", "85s")
    assert len(rates) == 9
    assert [rate / rates[0] for rate in rates] == pytest.approx(
        [(1 + math.cos(math.pi * 10 * k / 85)) / 2 for k in range(9)], abs=1e-3
    )


def test_early_stopping(script, data, tmp_path, monkeypatch):
    """Nothing is learnt, so the best epoch is the first; patience counts through a stop."""
    still = ["--lr", "1e-30", "--early_stopping", 2, "--no-augment"]
    if script.module is train_amygdala:  # it has AdamW only
        monkeypatch.setattr(train_amygdala, "LEAST_LR", 0.0)
    else:
        still += ["--min_lr", 0] if script.module is train_lung else ["--optimizer", "sgd"]
    run = start(script, data, tmp_path, *still, "--epochs", 1)
    script.module.main(["--resume", str(run), "--epochs", "50"])
    position = last_of(run)["position"]
    # BatchNorm's statistics still move, so a later epoch may be better by chance.
    assert position["epoch"] == position["best_epoch"] + 3 < 50
    assert "no better validation score for 2 epochs" in log_of(run)


def test_a_loss_that_is_not_finite_stops_the_run(script, data, tmp_path, monkeypatch):
    script.poison(monkeypatch)
    with pytest.raises(SystemExit, match="the loss became nan in epoch 0, batch 1. Try --amp off"):
        start(script, data, tmp_path)
    assert not (tmp_path / script.run / "weights" / "last.pt").exists()


def test_disk_full_keeps_the_earlier_checkpoint(script, unbroken, tmp_path, monkeypatch):
    run = shutil.copytree(unbroken, tmp_path / "run")
    before = (run / "weights" / "last.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match="checkpoint could not be written .No space left.*untouched"):
            script.module.main(["--resume", str(run), "--epochs", str(EPOCHS + 1)])
    assert (run / "weights" / "last.pt").read_bytes() == before
    script.module.main(["--resume", str(run), "--epochs", str(EPOCHS + 1)])
    assert len(rows_of(run)) == EPOCHS + 1


def test_what_cannot_be_resumed(script, unbroken, tmp_path):
    for flags in (
        script.other_network,
        ["--model", script.other_model],
    ):
        with pytest.raises(SystemExit, match="--resume: its .* is .*a run goes on as it began"):
            script.module.main(["--resume", str(unbroken), *flags])
    with pytest.raises(SystemExit, match="holds weights only; resume from the last.pt"):
        script.module.main(["--resume", str(unbroken / "weights" / "best.pt")])
    with pytest.raises(SystemExit, match="--resume: no run called other"):
        script.module.main(
            ["--resume", "--model_name", "other", "--out", str(tmp_path), "--data_path", str(tmp_path)]
        )
    with pytest.raises(SystemExit, match="none.pt: no such checkpoint"):
        script.module.main(["--resume", str(tmp_path / "none.pt")])


def test_a_resumed_run_keeps_its_flags_whatever_a_yaml_file_says(script, unbroken, tmp_path, capsys):
    """Only the command line changes them; lines say what is new, and what would be by the file."""
    run = shutil.copytree(unbroken, tmp_path / "run")
    seed, workers = (last_of(run)["config"][key] for key in ("seed", "workers"))
    (tmp_path / "new.yaml").write_text(f"seed: {seed + 1}\nworkers: {workers + 2}\nuse_wandb: false\n")
    flags = ["--resume", str(run), "--config", str(tmp_path / "new.yaml"), "--workers", str(workers + 1)]
    parser = script.module.build_parser()
    args, _, _ = runs.resume(parser, flags, same=[], stage=last_of(run).get("stage"))
    assert (args.seed, args.workers) == (seed, workers + 1)
    assert capsys.readouterr().out.splitlines() == [
        f"--resume: --seed stays {seed}; to make it {seed + 1}, as in --config, use the flag",
        f"--resume: --workers is {workers + 1} from here on, so far it was {workers}",
    ]
    runs.resume(parser, flags[:4], same=["seed"], stage=last_of(run).get("stage"))
    told = capsys.readouterr().out
    assert f"--seed stays {seed}; {seed + 1}, as in --config, needs a new run" in told, "the flag is refused"
    runs.resume(parser, ["--resume", str(run)], same=[], stage=last_of(run).get("stage"))
    assert not capsys.readouterr().out


def test_resuming_the_run_of_another_script(unbroken, script):
    for other in SCRIPTS.values():
        if other is not script:
            with pytest.raises(SystemExit, match="is a run of another script|unknown key"):
                other.module.main(["--resume", str(unbroken)])


def test_a_run_of_an_earlier_version_is_refused_in_one_line(script, unbroken, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    state = last_of(run)
    torch.save({key: value for key, value in state.items() if key != "flags"}, run / "weights" / "last.pt")
    with pytest.raises(
        SystemExit, match="last.pt: written by an earlier version of this project; start the run"
    ):
        script.module.main(["--resume", str(run)])


def test_resuming_on_another_split(script, unbroken, tmp_path, monkeypatch):
    run = shutil.copytree(unbroken, tmp_path / "run")
    state = last_of(run)
    state["split"] = {part: names[1:] for part, names in state["split"].items()}
    torch.save(state, run / "weights" / "last.pt")
    with pytest.raises(SystemExit, match="the split of .* is not the one that this run began with"):
        script.module.main(["--resume", str(run), "--epochs", "9"])


def test_the_command_of_a_run_goes_on_with_it_although_vram_made_the_patch_smaller(verse_h5, tmp_path):
    """Typed again with --resume, it asks for the patch that did not fit."""
    script = SCRIPTS["segmentation"]
    flags = ["--input_shape", 64, 64, 64, "--batch_size", 1, "--vram", 0.641]
    run = start(script, verse_h5, tmp_path, *flags, "--epochs", 1)
    patch_size = yaml.safe_load((run / "config.yaml").read_text())["patch_size"]
    assert max(patch_size) < 64
    start(script, verse_h5, tmp_path, *flags, "--epochs", 2, "--resume")
    assert yaml.safe_load((run / "config.yaml").read_text())["patch_size"] == patch_size
    assert len(rows_of(run)) == 2
    with pytest.raises(SystemExit, match="--resume: its patch_size is .*, not .32, 32, 32."):
        start(script, verse_h5, tmp_path, *flags, "--input_shape", 32, 32, 32, "--resume")


def test_a_yaml_file_cannot_ask_to_resume(script, data, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("resume: last\n")
    with pytest.raises(SystemExit):
        start(script, data, tmp_path, "--config", tmp_path / "run.yaml")
    assert "unknown key 'resume'" in capsys.readouterr().err


def test_the_folds_of_a_cross_validation_share_their_precision(phantom_slices, tmp_path, monkeypatch):
    """The first decides by timing; a second cross-validation does not overwrite the report of the first."""
    asked, reports = [], []

    def choose(amp, device, trial):
        asked.append(amp)
        return hardware.choose_precision("bf16" if amp == "auto" else amp, device)

    monkeypatch.setattr("common.memory.choose_precision", choose)
    monkeypatch.setattr(train_lung, "write_report", lambda rows, out, *_: reports.append(out.name))
    script = SCRIPTS["lung"]
    for _ in range(2):
        start(script, phantom_slices, tmp_path, "--epochs", 1, "--folds", 3, "--fold", "all", "--amp", "auto")
    assert asked == ["auto", "bf16", "bf16"] * 2
    assert reports == ["run_all_folds", "run_all_folds_2"]


def test_a_batch_larger_than_the_training_set(script, data, tmp_path):
    with pytest.raises(SystemExit, match="a batch of 4000 is larger than the training set of .*--batch_size"):
        start(script, data, tmp_path, "--batch_size", 4000, "--vram", 1e6)
    assert not (tmp_path / script.run).exists(), "nothing half-made is left"


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import {module} as script
for name in ("save_curves", "save_val_predictions", "save_preview", "save_case_preview"):
    setattr(script, name, lambda *_: None)
script.main()
"""


@pytest.mark.parametrize(
    "name",
    ["heatmap", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lung", "segmentation", "amygdala"))],
)
def test_two_processes(name, request, tmp_path):
    """Together they take the steps of one process with twice the batch; rank 0 alone writes and prints."""
    script = SCRIPTS[name]
    data = request.getfixturevalue(script.data)
    flags = ["--data_path", data, "--model_name", "run", *script.tiny, "--epochs", 2, "--no-augment"]
    flags += ["--grad_clip", 0, "--accumulate", 2]
    if script.module is train_lung:  # GroupNorm, or the processes would normalise by half a batch each
        flags += ["--norm", "group", "--lr", "1e-3"]
    elif script.module is not train_amygdala:
        flags += ["--input_shape", 32, 32, 32, "--optimizer", "sgd", "--lr", 0.01]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    starter = tmp_path / "start.py"
    module = script.path.removesuffix(".py").replace("/", ".")
    starter.write_text(TWO_PROCESSES.format(module=module))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    each = 2 if script.module is train_amygdala else 1  # there it is the batch of both together
    command += [starter, ROOT, *flags, "--batch_size", each, "--out", tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch   1") == 1, "only rank 0 prints"
    made = [p.name for p in (tmp_path / "two" / script.run).parent.iterdir() if p.is_dir()]
    assert made == [Path(script.run).name], "only rank 0 makes the folder"
    script.module.main([*map(str, flags), "--batch_size", "2", "--out", str(tmp_path / "one")])
    one, two = (last_of(tmp_path / n / script.run) for n in ("one", "two"))
    losses = [[row["train_loss"] for row in state["position"]["history"]] for state in (one, two)]
    if name == "heatmap":  # its loss is a mean over items; Dice is a ratio over the batch of a process
        assert losses[0][0] == pytest.approx(losses[1][0], rel=0.5)
        moved = torch.cat([(one["model"][k] - two["model"][k]).flatten().float() for k in one["model"]])
        size = torch.cat([v.flatten().float() for v in one["model"].values()])
        assert moved.norm() < 1e-3 * size.norm()
    else:
        assert losses[0] == pytest.approx(losses[1], rel=0.2)
