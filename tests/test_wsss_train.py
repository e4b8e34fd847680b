"""wsss_medical/dist_train.py: phases, labels of pixels, what a run writes, stop and resume, two processes."""

import csv
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

from common.checkpoints import load_checkpoint
from common.config import parse_args
from common.optimizers import encoder_and_head_groups
from common.wetr import Output
from wsss_medical import dist_train, medical_utils, training
from wsss_medical.flags import RECIPES, resolve_flags
from wsss_medical.model import get_model

TIMES = ("seconds", "data_wait", "peak_mib")
# Six updates, two of each phase, validated after three and six.
TINY = [
    "--backbone",
    "tiny",
    "--crop_size",
    "64",
    "--batch_size",
    "2",
    "--max_iters",
    "6",
    "--cam_iters",
    "2",
]
TINY += ["--aff_iters", "4", "--eval_iters", "3", "--scales", "1.0", "--val_slices", "4", "--lr", "1e-3"]
TINY += ["--amp", "off", "--workers", "0", "--no-evaluate", "--device", "cpu", "--ema_decay", "0.9"]


@pytest.fixture(scope="module")
def slices(tmp_path_factory) -> Path:
    """Six patients with six slices of 64 x 64: noise, and a bright square in the middle slices."""
    root = tmp_path_factory.mktemp("wsss") / "slices"
    for folder in ("imageSlice", "maskSlice"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for patient in range(6):
        for z in range(6):
            image = rng.integers(20, 80, (64, 64)).astype(np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            if z in (2, 3, 4):
                mask[20:44, 12 + 2 * patient : 40] = 1
            image[mask > 0] += 150
            name = f"X_{patient:03d}_{z:03d}_{int(mask.any())}.npy"
            np.save(root / "imageSlice" / name, image)
            np.save(root / "maskSlice" / name, mask)
    return root


@pytest.fixture(autouse=True)
def no_maps(monkeypatch) -> None:
    """They take most of the time; tests/test_wsss_predict.py has them."""
    monkeypatch.setattr(dist_train, "write_maps", lambda *_: None)
    monkeypatch.setattr(training, "draw_curves", lambda *_: None)


def start(slices: Path, work_dir: Path, *flags: object) -> Path:
    dist_train.main(["--data_path", str(slices), "--work_dir", str(work_dir), *TINY, *map(str, flags)])
    return work_dir


def last_of(run: Path) -> dict:
    return load_checkpoint(run / "weights" / "last.pt")


def rows_of(run: Path) -> list[dict]:
    with (run / "metrics.csv").open(encoding="utf8") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def unbroken(slices, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist_train, "write_maps", lambda *_: None)
        return start(slices, tmp_path_factory.mktemp("unbroken") / "run")


def assert_same_run(a: Path, b: Path) -> None:
    first, second = last_of(a), last_of(b)
    for key in ("model", "optimizer", "ema"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    assert torch.equal(first["rng"]["torch"], second["rng"]["torch"])
    assert rows_of(a) == rows_of(b)
    best = [load_checkpoint(run / "checkpoints" / "best.pth")["model"] for run in (a, b)]
    torch.testing.assert_close(*best, rtol=0, atol=0)


def flag_values(*words: str):
    args = parse_args(dist_train.build_parser(), ["--dataset", "X", *words])
    resolve_flags(args)
    return args


# ---- flags ----


def test_a_recipe_sets_what_is_not_given():
    args = flag_values("--recipe", "afa", "--negative_weight", "0.5", "--max_iters", "2500")
    assert args.negative_weight == 0.5 and args.seg_weight == args.affinity_weight == 0.1 and not args.ema
    assert args.max_iters == 3000 and args.aff_iters == 1500  # whole rounds of --eval_iters; half of it
    assert len({frozenset(recipe) for recipe in RECIPES.values()}) == 1, "each sets the same flags"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--crop_size", "100"], "--crop_size 100: use a multiple of 32, such as 96 or 128"),
        (["--crop_size", "16"], "such as 32 or 48|such as 32 or 32"),
        (["--low", "0.6", "--high", "0.5"], "--low 0.6 lies above --high 0.5"),
        (["--cam_stages", "3"], "stage 4 has to be among them"),
        (["--dynamic_threshold"], "are for --pixel_labels cam only"),
        (["--zero_is_background"], "are for --pixel_labels cam only"),
        (["--checkpoint", "best.pth"], "--checkpoint is for --generate_only"),
        (["--max_iters", "1000", "--cam_iters", "1000"], "the segmentation would never be trained"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message):
    with pytest.raises(ValueError, match=message):
        flag_values(*flags)


def test_without_flags_it_says_what_is_missing():
    with pytest.raises(SystemExit, match="no data: --data_path takes the folder that .*preprocess.py wrote"):
        dist_train.main([])


# ---- losses and labels of a batch ----


def test_heads_that_learn_faster_and_norms_that_do_not_learn():
    network = get_model({"backbone": "tiny", "num_classes": 2, "pooling": "gmp"})
    groups = encoder_and_head_groups(network, 0.01, pretrained=False)
    assert [group.get("lr_scale", 1) for group in groups] == [1, 1, 1]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.01]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    encoder, heads = encoder_and_head_groups(network, 0.01, pretrained=True)
    assert heads["lr_scale"] == 10 and "lr_scale" not in encoder
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen and all("norm" in name and name.startswith("encoder.") for name in frozen)
    assert any(p is network.classifier.weight for p in heads["params"])
    assert not any(p is network.classifier.weight for p in encoder["params"])


def test_the_losses_of_both_phases_by_hand():
    """Logits of 0: cross-entropies are log 2, affinities are one half."""
    zeros = torch.zeros(2, 1)
    output = Output(
        cls=zeros,
        seg=torch.zeros(2, 2, 16, 16),
        attn_pred=torch.full((2, 16, 16), 0.5),
        attentions=[],
        tokens=torch.zeros(2, 8, 4, 4),
        aux_cls=None,
        aux_cam=None,
        cam=torch.ones(2, 1, 4, 4),
    )
    classes = torch.tensor([[1.0], [0.0]])
    args = flag_values("--recipe", "afa", "--negative_weight", "0.25")
    first = training.all_losses(output, classes, None, args)
    assert {name: loss.item() for name, loss in first.items()} == pytest.approx(
        {"class": math.log(2), "seg": 0.0, "negative": 0.25}
    )
    seg = torch.zeros(2, 64, 64, dtype=torch.long)
    seg[0, :32] = 1
    target = torch.zeros(2, 16, 16, dtype=torch.uint8)
    target[:, :8] = 1
    second = training.all_losses(output, classes, training.PixelLabels(seg, target), args)
    assert second["seg"].item() == pytest.approx(0.1 * math.log(2))
    share = 0.5 * 256 / 257  # 128 pairs of each kind in each slice, and one more in the denominator
    assert second["affinity"].item() == pytest.approx(0.1 * share)


# ---- what a run writes ----


def test_what_a_run_leaves_behind(unbroken):
    names = {path.name for path in (unbroken / "checkpoints").iterdir()}
    assert names == {"best.pth", "last.pth", "wetr_iter_3.pth", "wetr_iter_6.pth"}
    assert (unbroken / "tb_logger").is_dir()
    rows = rows_of(unbroken)
    assert [row["iteration"] for row in rows] == ["3", "6"]
    assert float(rows[0]["loss_affinity"]) > 0, "the second phase began after two updates"
    assert [row["updates"] for row in rows] == ["3", "6"]
    best = load_checkpoint(unbroken / "checkpoints" / "best.pth")
    final = load_checkpoint(unbroken / "checkpoints" / "wetr_iter_6.pth")
    assert last_of(unbroken)["position"]["best_epoch"] == 1, "before the last phase no validation counts"
    torch.testing.assert_close(best["model"], final["model"], rtol=0, atol=0)
    torch.testing.assert_close(best["model"], last_of(unbroken)["ema"]["average"], rtol=0, atol=0)
    assert set(best["preprocessing"]["threshold"]) == {"seg", "cam", "affinity"}
    config = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert config["aff_iters"] == 4 and config["recipe"] == "ours"
    split = best["split"]
    patients = [{name.rsplit("_", 2)[0] for name in split[part]} for part in ("train", "val", "test")]
    assert [len(part) for part in patients] == [4, 1, 1] and not patients[0] & patients[1]


def test_counts_and_pictures_of_the_labels(slices, tmp_path):
    """n+ and n-: means over the batches of a round, of two slices of 64 x 64 each. Pictures for TensorBoard:
    both slices, each with its map, its labels and what the segmentation says."""
    run = start(slices, tmp_path / "run", "--pixel_labels", "masks", "--scale_range", "1", "1")
    for row in rows_of(run):
        positive, negative = (float(row[f"pixels_{name}"]) for name in ("positive", "negative"))
        assert positive > 0 and positive + negative == pytest.approx(2 * 64 * 64), "no pixel is unknown"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run / "tb_logger"))
    found.Reload()
    pictures = found.Images("labels")
    assert [picture.step for picture in pictures] == [0, 1]
    assert {(picture.height, picture.width) for picture in pictures} == {(128, 256)}
    assert found.Scalars("pixels_positive")[1].value == pytest.approx(positive, rel=1e-5)


def test_the_log_of_a_run_by_the_clock_says_what_an_iteration_is():
    scores = {"iteration": 150, "updates": 7, "val_f1": 0.5, "val_accuracy": 0.75, "val_dice_seg": 0.25}
    args = flag_values("--max_iters", "300", "--eval_iters", "100", "--cam_iters", "100")
    plain = "F1 0.500, accuracy 0.750, Dice of seg 0.250"
    assert training.scores_text(scores, args) == f"iteration 150  {plain}"
    args.time_budget = 60.0
    clock = "iteration 150 of 300 by the clock (50% of the time, 7 updates)"
    assert training.scores_text(scores, args) == f"{clock}  {plain}"


def test_labels_of_pixels_begin_with_their_phases(slices, tmp_path, monkeypatch):
    """Two updates without, two with labels drawn to edges, two with labels spread by the affinity."""
    made, spread = [], []
    make, propagate = training.make_labels, training.propagated_label

    def counted(*args):
        made.append(args[-1])
        return make(*args)

    monkeypatch.setattr(training, "make_labels", counted)
    monkeypatch.setattr(
        training, "propagated_label", lambda *a, **k: spread.append(made[-1]) or propagate(*a, **k)
    )
    start(slices, tmp_path / "run", "--recipe", "afa")
    assert made == [2, 3, 4, 5] and spread == [4, 5]


def test_a_plain_classifier_makes_no_labels(slices, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_labels", lambda *_: pytest.fail("not needed"))
    run = start(slices, tmp_path / "run", "--recipe", "cam")
    assert {row["loss_affinity"] for row in rows_of(run)} == {"nan"}


def test_accumulated_batches_are_one_update(slices, tmp_path):
    run = start(slices, tmp_path / "run", "--accumulate", "2", "--max_iters", "3", "--eval_iters", "3")
    assert last_of(run)["position"]["num_batches"] == 6
    assert [row["iteration"] for row in rows_of(run)] == ["3"]


def test_a_time_budget_keeps_the_shares_of_the_phases(slices, tmp_path, monkeypatch):
    """By a clock on which each update takes 10 s: of 60 s a third each."""

    class Clock:
        now = 0.0

    clock, made, make = Clock(), [], training.make_labels
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    step = dist_train.optimizer_step

    def ten_seconds(*args):
        step(*args)
        clock.now += 10

    def counted(*args):
        made.append(args[-1])
        return make(*args)

    monkeypatch.setattr(dist_train, "optimizer_step", ten_seconds)
    monkeypatch.setattr(training, "make_labels", counted)
    start(
        slices,
        tmp_path / "run",
        "--recipe",
        "afa",
        "--time_budget",
        "60s",
        "--max_iters",
        "300",
        "--cam_iters",
        "100",
        "--aff_iters",
        "200",
        "--eval_iters",
        "3",
    )
    assert made == [100, 150, 200, 250]
    assert [(row["iteration"], row["updates"]) for row in rows_of(tmp_path / "run")] == [
        ("150", "3"),
        ("300", "6"),
    ]


# ---- stop and resume ----


@pytest.mark.parametrize("update", [1, 3, 5])
def test_stopped_and_resumed_equals_unbroken(update, slices, unbroken, tmp_path, monkeypatch):
    calls, step = [], dist_train.optimizer_step

    def counted(*args):
        calls.append(1)
        if len(calls) == update:
            signal.raise_signal(signal.SIGTERM)
        step(*args)

    monkeypatch.setattr(dist_train, "optimizer_step", counted)
    with pytest.raises(SystemExit) as stopped:
        start(slices, tmp_path / "run")
    assert stopped.value.code == 130
    monkeypatch.setattr(dist_train, "optimizer_step", step)
    assert last_of(tmp_path / "run")["position"]["batch"] == (update if update <= 3 else update - 3)
    dist_train.main(["--resume", str(tmp_path / "run")])
    assert_same_run(unbroken, tmp_path / "run")


@pytest.mark.parametrize("patient", [2, 6])
def test_a_run_stops_at_the_next_patient_while_labels_are_made(
    patient, slices, unbroken, tmp_path, monkeypatch, capsys
):
    """Four patients are labelled before the first round, four again before the second, from the maps too."""
    calls, label_pixels = [], training.label_pixels

    def counted(*args, **options):
        calls.append(1)
        label_pixels(*args, **options)
        if len(calls) == patient:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "label_pixels", counted)
    with pytest.raises(SystemExit) as stopped:
        start(slices, tmp_path / "run")
    assert stopped.value.code == 130 and len(calls) == patient
    assert f"stopped in epoch {patient // 4}; go on with: " in capsys.readouterr().out
    dist_train.main(["--resume", str(tmp_path / "run")])
    assert len(calls) == patient + (8 if patient == 2 else 4), "it began with the first patient"
    assert_same_run(unbroken, tmp_path / "run")


def test_a_bare_resume_takes_the_newest_run_of_the_work_dir(slices, tmp_path):
    start(slices, tmp_path / "run", "--max_iters", "3")
    start(slices, tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 1 and len(rows_of(tmp_path / "run_2")) == 2
    start(slices, tmp_path / "run", "--max_iters", "9", "--aff_iters", "4", "--resume")
    assert len(rows_of(tmp_path / "run_2")) == 3


def test_config_yaml_repeats_the_run(unbroken, tmp_path):
    dist_train.main(["--config", str(unbroken / "config.yaml"), "--work_dir", str(tmp_path / "run")])
    assert_same_run(unbroken, tmp_path / "run")


def test_what_cannot_be_resumed(slices, unbroken):
    for flags in (
        ["--backbone", "b0"],
        ["--pooling", "gap"],
        ["--crop_size", "96"],
        ["--recipe", "cam"],
        ["--pixel_labels", "cam"],
        ["--eval_iters", "2"],
    ):
        with pytest.raises(SystemExit, match="a run goes on as it began"):
            dist_train.main(["--resume", str(unbroken), *flags])


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken(slices, unbroken, tmp_path):
    log = tmp_path / "output.txt"
    command = [sys.executable, ROOT / "wsss_medical" / "dist_train.py", "--data_path", slices]
    command += ["--work_dir", tmp_path / "run", *TINY, "--workers", "1"]
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, cwd=tmp_path)
    deadline = time.monotonic() + 600
    while "epoch   0" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.kill()
    assert process.wait(600) == -signal.SIGKILL
    dist_train.main(["--resume", str(tmp_path / "run"), "--workers", "0"])
    assert_same_run(unbroken, tmp_path / "run")


# ---- several processes ----

TWO = """
import hashlib, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from common import distributed
from wsss_medical import dist_train
dist_train.write_maps = lambda *_: None
dist_train.training.draw_curves = lambda *_: None
finish = dist_train.finish
def finished(run, *rest):
    weights = run.parts["model"].state_dict().values()
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()
    digests = distributed.gather(digest)
    run.log(f"same weights everywhere: {len(set(digests)) == 1}")
    finish(run, *rest)
dist_train.finish = finished
step = dist_train.optimizer_step
def first_step(network, *rest):
    if not Path("gradient.pt").exists() and distributed.is_main():
        torch.save({k: p.grad for k, p in network.named_parameters()}, "gradient.pt")
    step(network, *rest)
dist_train.optimizer_step = first_step
sys.exit(dist_train.main())
"""


def torchrun(*words: object) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    return list(map(str, [*command, *words]))


@pytest.mark.slow
def test_two_processes(slices, tmp_path):
    """One gradient, that of a process with twice the batch, and the same weights in both at the end.

    In the phase of the labels of slices, whose loss is a mean; those of pixels are ratios over a batch.
    """
    (tmp_path / "start.py").write_text(TWO)
    flags = ["--data_path", slices, *TINY, "--recipe", "cam", "--drop_path", "0"]
    two = torchrun(tmp_path / "start.py", ROOT, *flags, "--work_dir", tmp_path / "two", "--backend", "gloo")
    done = subprocess.run(two, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch   1") == 1 and "same weights everywhere: True" in done.stdout
    (tmp_path / "alone").mkdir()
    one = [sys.executable, tmp_path / "start.py", ROOT, *flags, "--batch_size", "4", "--work_dir", "run"]
    alone = subprocess.run(list(map(str, one)), capture_output=True, text=True, cwd=tmp_path / "alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    both = torch.load(tmp_path / "gradient.pt"), torch.load(tmp_path / "alone" / "gradient.pt")
    assert both[0]["classifier.weight"].abs().max() > 1e-3
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_it_goes_on(slices, unbroken, tmp_path):
    """torchrun names the one that died and ends the other; the last round is saved."""
    flags = ["--data_path", slices, *TINY, "--work_dir", tmp_path / "run"]
    command = torchrun(ROOT / "wsss_medical" / "dist_train.py", *flags)
    log = tmp_path / "output.txt"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--max_iters", "300"], stdout=file, stderr=file, cwd=tmp_path)
    deadline = time.monotonic() + 600
    while "epoch   0" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(120) != 0
    assert "Signal 9 (SIGKILL) received" in log.read_text()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0 and "resumed at epoch" in done.stdout, done.stdout + done.stderr


# ---- names of the original ----


def test_remaining_time(monkeypatch):
    monkeypatch.setattr(medical_utils.time, "time", lambda: 1000.0 + 3661.9)
    assert medical_utils.cal_eta(1000.0, 100, 300) == ("1:01:01", "2:02:02")
    assert medical_utils.cal_eta(1000.0, 0, 300) == ("1:01:01", "unknown")


def test_a_logger_that_writes_each_line_once(tmp_path):
    for _ in range(2):
        medical_utils.setup_logger(str(tmp_path / "train.log"))
    logging.info("a line")
    assert (tmp_path / "train.log").read_text().count("a line") == 1
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)  # closes the file


def test_device_and_seed():
    assert medical_utils.get_device(0, force_cpu=True) == torch.device("cpu")
    numbers = []
    for _ in range(2):
        medical_utils.setup_seed(1)
        numbers.append((torch.rand(1).item(), np.random.rand()))  # noqa: NPY002
    torch.use_deterministic_algorithms(False)
    assert numbers[0] == numbers[1]
