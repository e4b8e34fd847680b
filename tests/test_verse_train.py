"""Training of both stages of verse_spine: items, steps of every network, stopping, resuming, odd cases."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_HEATMAP, TINY_SEGMENTATION, TINY_VERSE
from torch.utils.data import DataLoader

from common.checkpoints import load_checkpoint
from common.config import resolved_config
from common.hardware import Precision
from common.hdf5 import CaseFile, write_case
from common.losses import dice_ce_loss
from common.patches import draw_patch, histogram
from common.runs import seed_everything
from verse_spine import boxes, train_heatmap, train_segmentation
from verse_spine.dataset import STRATA, UNIFORM, HeatmapDataset, PatchDataset, SmallScan, VerSe, spine_box
from verse_spine.heatmap import LOSSES, TARGETS, heatmap_loss
from verse_spine.labels import map_labels, num_outputs
from verse_spine.networks import MODELS, get_model, load_trained
from verse_spine.training import get_augmentation, get_optimizer, set_up

TIMES = {"seconds", "data_wait", "peak_mib"}
STAGES = {"heatmap": (train_heatmap, TINY_HEATMAP), "segmentation": (train_segmentation, TINY_SEGMENTATION)}
both_stages = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, verse_runs) -> None:
    """They take most of the time; `verse_runs` has them."""
    for script, name in ((train_heatmap, "save_preview"), (train_segmentation, "save_case_preview")):
        monkeypatch.setattr(script, "save_curves", lambda *_: None)
        monkeypatch.setattr(script, name, lambda *_: None)


def start(stage: str, data, out, *flags: object, name: str = "run") -> Path:
    """Run a train script in this process; returns its run folder."""
    script, tiny = STAGES[stage]
    script.main(["--data_path", str(data), "--out", str(out), "--model_name", name, *tiny, *map(str, flags)])
    return Path(out) / name


def refused(match: str, stage: str, data, out, *flags: object) -> None:
    with pytest.raises(SystemExit, match=match):
        start(stage, data, out, *flags)


def rows_of(run: Path) -> list[dict]:
    with (run / "metrics.csv").open(encoding="utf8") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text(encoding="utf8")


def last_of(run: Path) -> dict:
    return load_checkpoint(run / "weights" / "last.pt")


def assert_moved_alike(first: dict, second: dict) -> None:
    """From the same start to the same place, up to the rounding of sums in another order."""
    seed_everything(first["config"]["seed"])
    start = torch.cat([p.flatten() for p in get_model(first["config"], 1).parameters()])
    one, two = (torch.cat([p.flatten() for p in s["model"].values()]) - start for s in (first, second))
    assert (one - two).norm() < 0.02 * one.norm() > 0


def without(data: Path, tmp_path: Path, *parts: str) -> Path:
    """A copy of the data set without the cases of these parts."""
    target = tmp_path / "data"
    shutil.copytree(data, target, ignore=shutil.ignore_patterns("small_grids"))
    notes = json.loads((target / "preprocessing.json").read_text())
    notes["cases"] = [e for e in notes["cases"] if e["part"] not in parts]
    (target / "preprocessing.json").write_text(json.dumps(notes))
    return target


# ---- data ----


def test_missing_folder_names_the_command(tmp_path, verse_h5):
    for stage in STAGES:
        refused(
            "nowhere: no preprocessed cases here.*: python verse_spine/preprocess.py .* --out .*nowhere",
            stage, tmp_path / "nowhere", tmp_path,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
    (tmp_path / "cases").mkdir()
    shutil.copy(verse_h5 / "preprocessing.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no preprocessed cases here"):
        VerSe(tmp_path)


def test_splits_json_wins_and_is_checked(verse_h5, tmp_path):
    data = without(verse_h5, tmp_path)
    names = sorted(VerSe(data).cases)
    split = {"train": names[:2], "val": names[2:3], "test": names[3:]}
    (data / "splits.json").write_text(json.dumps(split))
    assert VerSe(data).split == split
    (data / "splits.json").write_text(json.dumps(split | {"test": [*names[3:], "sub-verse999"]}))
    with pytest.raises(ValueError, match="names sub-verse999, which .* does not hold"):
        VerSe(data)
    (data / "splits.json").write_text(json.dumps({"train": names[:2], "val": names[1:2], "test": []}))
    with pytest.raises(ValueError, match="stands in train .* and in val"):
        VerSe(data)


def test_no_training_case(verse_h5, tmp_path):
    data = without(verse_h5, tmp_path, "training")
    for stage in STAGES:
        refused("data: no training case", stage, data, tmp_path)


def test_the_margin_of_the_spine_box_is_in_millimetres(tmp_path):
    """Voxels of 3 x 0.5 x 2 mm, by hand: 30, 20, 20 mm are 10, 40 and 10 voxels."""
    boxes = np.array([[20, 30, 90, 24, 35, 150, 30], [21, 40, 100, 26, 44, 120, 36]])
    attributes = {"spacing_mm": (3.0, 0.5, 2.0), "boxes": boxes}
    write_case(tmp_path / "case.h5", np.zeros((80, 240, 60), np.int16), attributes=attributes)
    start, stop = spine_box(CaseFile(tmp_path / "case.h5"), (30.0, 20.0, 20.0))
    assert start.tolist() == [20, 50, 14] and stop.tolist() == [54, 190, 46]


def test_spine_box_holds_every_vertebra(verse_h5):
    verse = VerSe(verse_h5)
    for case in verse.cases.values():
        inside = np.zeros(case.shape, bool)
        inside[tuple(slice(a, b) for a, b in zip(*spine_box(case), strict=True))] = True
        label = case.label[...] > 0
        assert (inside | ~label).all()
        assert all(label.any(axis=tuple({0, 1, 2} - {k})).sum() <= n for k, n in
                   enumerate(np.subtract(*spine_box(case)[::-1])))  # fmt: skip
        wide = spine_box(case, (10, 5, 1e6))
        assert wide[0][2] == 0 and wide[1][2] == case.shape[2], "inside the scan"
        assert wide[0][0] == max(spine_box(case)[0][0] - round(10 / case.spacing_mm[0]), 0)


@pytest.mark.parametrize("labels", ["binary", "region3", "levels26"])
def test_patches_are_slices_of_the_volume(labels, verse_h5, monkeypatch):
    verse, places = VerSe(verse_h5), []

    def remembered(*args, **options):
        places.append(draw_patch(*args, **options))
        return places[-1]

    monkeypatch.setattr("verse_spine.dataset.draw_patch", remembered)
    names, size = verse.split["train"], (20, 12, 40)  # wider than the scans: their edge is repeated
    items = PatchDataset(verse, names, size, labels)
    for seed in range(40):
        image, label, kept_seed, stratum = items[seed, seed]
        start, drawn = places[-1]
        case = verse.cases[names[seed % len(names)]]
        block = tuple(slice(s + n, s + 2 * n) for s, n in zip(start, size, strict=True))
        around = [(n, n) for n in size]
        assert np.array_equal(image[0], np.pad(case.image[...], around, mode="edge")[block])
        assert np.array_equal(label, map_labels(np.pad(case.label[...], around, mode="edge")[block], labels))
        assert image.shape == (1, *size) and image.dtype == torch.int16 and label.dtype == torch.uint8
        assert kept_seed == seed and stratum == drawn in STRATA
    assert len({place for place, _ in places}) > 30


def test_strata_come_in_their_shares(verse_h5):
    verse = VerSe(verse_h5)
    items = PatchDataset(verse, verse.split["train"], (12, 12, 12), "binary", length=1000)
    assert len(items) == 1000 and sum(STRATA.values()) == pytest.approx(1)
    drawn = histogram(items[index, 7 * index][3] for index in range(600))
    for name, share in STRATA.items():
        assert drawn[name] == pytest.approx(share, abs=4 * math.sqrt(share / 600)), name
    uniform = PatchDataset(verse, verse.split["train"], (12, 12, 12), "binary", strata=UNIFORM)
    assert {uniform[index, index][3] for index in range(20)} == {"uniform"}
    vertebra = np.mean([bool(items[k, k][1].any()) for k in range(200) if items[k, k][3] == "class"])
    assert vertebra == 1, "a patch of the stratum class holds a vertebra"


def test_items_depend_on_index_and_seed_alone(verse_h5):
    verse = VerSe(verse_h5)
    items = PatchDataset(verse, verse.split["train"], (16, 16, 16), "binary", length=8)
    pairs = [(index, 100 + index) for index in range(8)]
    alone = [items[pair] for pair in pairs]
    np.random.default_rng(0)
    loader = DataLoader(items, batch_size=4, sampler=pairs, num_workers=2)
    batches = list(loader)
    image = torch.cat([batch[0] for batch in batches])
    assert torch.equal(image, torch.stack([item[0] for item in alone]))
    assert [s for batch in batches for s in batch[3]] == [item[3] for item in alone]
    assert not torch.equal(items[0, 1][0], items[0, 2][0])


def test_small_grids_are_kept_and_renewed(verse_h5, tmp_path, monkeypatch):
    case = next(iter(VerSe(verse_h5).cases.values()))
    path = tmp_path / "case.h5"
    shutil.copy(case.path, path)
    first = SmallScan(CaseFile(path), (32, 16, 16), tmp_path / "kept")
    assert first.occupancy.max() > 0.5 and first.occupancy.min() >= 0 and first.image.min() >= -1024
    other_shape = SmallScan(CaseFile(path), (16, 8, 16), tmp_path / "kept")
    assert other_shape.image.shape == (16, 8, 16), "grids of several shapes lie side by side"
    monkeypatch.setattr("verse_spine.dataset.to_small_grid", lambda *a, **k: pytest.fail("made again"))
    again = SmallScan(CaseFile(path), (32, 16, 16), tmp_path / "kept")
    assert np.array_equal(first.image, again.image) and np.array_equal(first.occupancy, again.occupancy)
    monkeypatch.undo()
    (kept,) = (tmp_path / "kept").glob("*32x16x16*")
    other = list(VerSe(verse_h5).cases.values())[1]
    shutil.copy(other.path, path)
    os.utime(path, ns=(kept.stat().st_mtime_ns + 10**9,) * 2)
    renewed = SmallScan(CaseFile(path), (32, 16, 16), tmp_path / "kept")
    assert not np.array_equal(first.image, renewed.image)
    shutil.copy(case.path, path)
    os.utime(path, ns=(1, 1))  # a copy that keeps an old time
    assert np.array_equal(SmallScan(CaseFile(path), (32, 16, 16), tmp_path / "kept").image, first.image)


def test_small_grids_are_rounded(tmp_path):
    """A quarter of the voxels at 3 HU, the others at 0: 0.75 HU after halving, which is 1."""
    image = np.zeros((16, 8, 16), np.int16)
    image[1::2, :, 1::2] = 3
    attributes = {"spacing_mm": (1.0, 1.0, 1.0), "boxes": np.zeros((0, 7), np.int64)}
    write_case(tmp_path / "case.h5", image, np.zeros(image.shape, np.uint8), attributes=attributes)
    small = SmallScan(CaseFile(tmp_path / "case.h5"), (8, 4, 8), tmp_path / "kept")
    assert (small.image == 1).all() and not small.occupancy.any()


@pytest.mark.parametrize("target", TARGETS)
def test_heatmap_items(target, verse_h5):
    verse = VerSe(verse_h5)
    items = HeatmapDataset(verse, verse.split["train"], (32, 16, 16), target)
    assert len(items) == 4
    image, heat, seed = items[1, 5]
    assert image.shape == heat.shape == (1, 32, 16, 16) and seed == 5
    assert image.dtype == torch.int16 and heat.dtype == torch.float32
    assert 0 <= heat.min() and 0.5 < heat.max() <= 1
    inside = torch.from_numpy(items.scans[1].occupancy)[None] > 0.5
    assert heat[inside].mean() > heat[~inside].mean() + 0.2, "hot where the vertebrae are"


def test_truncate_cuts_one_end_in_image_and_target():
    rows = torch.arange(10, dtype=torch.int16).view(1, 1, 10, 1, 1)
    image, target = rows.expand(40, 1, 10, 2, 2).clone(), torch.ones(40, 1, 10, 2, 2)
    again, seeds = (image.clone(), target.clone()), list(range(40))
    train_heatmap.truncate(image, target, seeds, 0.5)
    cut = (target == 0)[:, 0, :, 0, 0]
    assert torch.equal((target == 0).all(3).all(3)[:, 0], cut) and 8 < cut.any(1).sum() < 32
    for item, gone in zip(image, cut, strict=True):
        first, last = np.flatnonzero(~gone.numpy())[[0, -1]]
        expected = torch.arange(10, dtype=torch.int16).clamp(int(first), int(last))  # the new edge repeated
        assert torch.equal(item, expected.view(1, 10, 1, 1).expand(1, 10, 2, 2))
    assert cut.sum(1).max() <= 5 and not (cut[:, 0] & cut[:, -1]).any()
    assert cut[:, 0].any() and cut[:, -1].any(), "top and bottom"
    train_heatmap.truncate(*again, seeds, 0.5)
    assert torch.equal(again[0], image), "by the seed alone"
    train_heatmap.truncate(*again, seeds, 0.0)


def test_spines_are_flipped_left_and_right_only():
    words = ["--data_path", "x", "--model_name", "y", "--flip", "0.4"]
    args = train_heatmap.build_parser().parse_args(words)
    assert get_augmentation(args).flip_probability == (0, 0, 0.4), "z, y, x"


# ---- every network in both tasks ----

SLOW = ("SegFormer3D", "SwinUNetR", "AttentionUNet", "AttentionUNet3D", "ContextResUNet")


@pytest.mark.parametrize("task", ["heatmap", "binary", "levels26"])
@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in MODELS]
)
def test_every_network_trains_a_step_with_batches_of_1_2_4(model, task):
    torch.manual_seed(0)
    outputs = num_outputs("levels26") if task == "levels26" else 1
    config = {"model": model, "feature_size": 12, "init_filters": 8, "checkpointing": None}
    network = get_model(config, outputs).train()
    optimizer = get_optimizer("prodigy", network.parameters(), 1.0, 0.0)
    # These halve the sides five times and norm what is left, which must not be one voxel.
    shape = (32, 32, 64) if model in ("SwinUNetR", "AttentionUNet3D") else (16, 32, 16)
    for batch_size in (1, 2, 4):
        image = torch.randn(batch_size, 1, *shape)
        logits = network(image)
        assert logits.shape == (batch_size, outputs, *shape)
        if task == "heatmap":
            loss = heatmap_loss("weighted_mse", logits, torch.rand(batch_size, 1, *shape))
        else:
            loss = dice_ce_loss(logits, torch.randint(0, max(outputs, 2), (batch_size, *shape)))
        loss.backward()
        assert math.isfinite(loss.item())
        for name, parameter in network.named_parameters():  # torch's DDP refuses unused ones
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.isfinite().all() for p in network.parameters())
        moved = sum(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
        assert moved > 0.5 * len(before)


# ---- whole runs ----


def test_runs_write_everything_they_promise(verse_runs):
    files = (
        "config.yaml log.txt metrics.csv training_curves.png previews/epoch_000.png previews/epoch_001.png "
    )
    files += "weights/last.pt weights/best.pt evaluation/"
    for stage, more in (("heatmap", ("boxes.csv",)), ("segmentation", ("cases.csv", "summary.md"))):
        run = verse_runs[stage]
        for name in [*files.split()[:-1], *(f"evaluation/{name}" for name in more)]:
            assert (run / name).stat().st_size > 0, name
        for word in ("commit: ", "torch ", "device: ", "precision: fp32", "1,978,745 parameters",
                     "MiB of tensors", "Prodigy finds its step size", "4 training, 1", "next: "):  # fmt: skip
            assert word in log_of(run), word
        rows = rows_of(run)
        assert [row["epoch"] for row in rows] == ["0", "1"]
        assert all(math.isfinite(float(row["train_loss"])) for row in rows)
        best = load_checkpoint(run / "weights" / "best.pt")
        assert best["stage"] == stage and best["num_outputs"] == 1 and "optimizer" not in best
        assert best["preprocessing"]["spacing_mm"] == [5, 5, 5] and len(best["split"]["train"]) == 4
    row = rows_of(verse_runs["heatmap"])[-1]
    assert {"val_loss", "mae", "rmse", "r2", "box_iou", "box_recall", "lowest_recall"} <= row.keys()
    assert "class" in log_of(verse_runs["segmentation"]), "the strata drawn"


@both_stages
def test_config_yaml_leaves_nothing_open(stage, verse_runs):
    config = yaml.safe_load((verse_runs[stage] / "config.yaml").read_text())
    assert config["checkpointing"] is False and config["amp"] == "off"


@both_stages
def test_the_seeds_command(stage, verse_h5, tmp_path, monkeypatch):
    """Unchanged but for the data, the machine and (in steps) the length of an epoch."""
    command = f"--data_path {verse_h5} --model_name spine --epochs 1 --batch_size 1 --lr 1.0 "
    command += (
        "--input_shape 16 16 32 --model UNet --early_stopping 30 --dataset_edition 19 --use_wandb False"
    )
    script, _ = STAGES[stage]
    args = script.build_parser().parse_args(command.split())
    assert args.use_wandb is False and args.patch_size == [16, 16, 32] and args.dataset_edition == 19
    defaults = script.build_parser().parse_args(["--data_path", "x", "--model_name", "y"])
    expected = dict(epochs=200, batch_size=1, lr=1.0, model="UNet", early_stopping=30, dataset_edition=19)
    assert {key: getattr(defaults, key) for key in expected} == expected and not defaults.use_wandb
    for model in ("AttentionUNet3D", "SegFormer3D", "SwinUNetR", "UNet"):
        script.build_parser().parse_args([*command.split(), "--model", model])
    monkeypatch.chdir(tmp_path)
    short = ["--patches", "2"] if stage == "segmentation" else []
    script.main([*command.split(), *short, "--workers", "0", "--device", "cpu"])
    run = tmp_path / "runs" / "verse_spine" / "spine"
    assert len(rows_of(run)) == 1 and (run / "evaluation").is_dir()


@pytest.mark.parametrize("labels", ["region3", "levels26"])
def test_labels_train_validate_and_evaluate(labels, verse_h5, tmp_path):
    run = start("segmentation", verse_h5, tmp_path, "--labels", labels, "--epochs", 1, "--batch_size", 4)
    best = load_checkpoint(run / "weights" / "best.pt")
    assert best["num_outputs"] == {"region3": 4, "levels26": 27}[labels]
    assert 0 <= float(rows_of(run)[0]["val_dice"]) <= 1
    with (run / "evaluation" / "cases.csv").open() as file:
        (row,) = csv.DictReader(file)
    if labels == "levels26":
        assert int(row["targets"]) > 3 and 0 <= float(row["rate"]) <= 1
        assert "Identification rate" in (run / "evaluation" / "summary.md").read_text()
    else:
        assert "targets" not in row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_heatmap_losses_have_gradients(loss, target, verse_h5):
    verse = VerSe(verse_h5)
    items = HeatmapDataset(verse, verse.split["val"], (32, 16, 16), target)
    logits = torch.zeros(1, 1, 32, 16, 16, requires_grad=True)
    value = heatmap_loss(loss, logits, items[0, 0][1][None])
    value.backward()
    assert value > 0 and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_other_options_train(verse_h5, tmp_path):
    start("heatmap", verse_h5, tmp_path, "--epochs", 1, "--no-evaluate", "--target", "gaussian", "--loss",
          "adaptive_wing", "--optimizer", "adamw", "--truncate", "1", name="a")  # fmt: skip
    log, row = log_of(tmp_path / "a"), rows_of(tmp_path / "a")[0]
    assert "--lr 1.0 belongs to Prodigy: adamw takes 0.001" in log and float(row["lr"]) <= 1e-3
    assert "Prodigy finds" not in log
    start("segmentation", verse_h5, tmp_path, "--epochs", 1, "--no-evaluate", "--sampling",
          "uniform", "--intensity", "patch", "--optimizer", "sgd", "--lr", "0.05", name="b")  # fmt: skip
    log, row = log_of(tmp_path / "b"), rows_of(tmp_path / "b")[0]
    assert "uniform 100 %" in log and "belongs to Prodigy" not in log and 0.02 < float(row["lr"]) <= 0.05


def test_validation_only_every_few_epochs_and_at_the_end(verse_h5, tmp_path):
    run = start("segmentation", verse_h5, tmp_path, "--epochs", 3, "--val_every", 2, "--no-evaluate")
    scores = [float(row["val_dice"]) for row in rows_of(run)]
    assert [math.isnan(score) for score in scores] == [True, False, False]
    assert last_of(run)["position"]["best"] == pytest.approx(max(scores[1:]), rel=1e-5)


def test_two_steps_accumulated_equal_one_of_twice_the_batch(verse_h5, tmp_path):
    flags = ("--epochs", 1, "--optimizer", "sgd", "--lr", 0.01, "--no-augment", "--no-evaluate")
    flags += ("--input_shape", 32, 32, 32, "--grad_clip", 0)  # clipped, a factor would not show
    start("heatmap", verse_h5, tmp_path, *flags, "--batch_size", 2, name="batch")
    start("heatmap", verse_h5, tmp_path, *flags, "--batch_size", 1, "--accumulate", 2, name="accumulated")
    assert_moved_alike(*(last_of(tmp_path / n) for n in ("batch", "accumulated")))
    assert "2 batches in an epoch, effective batch 2" in log_of(tmp_path / "batch")
    assert "4 batches in an epoch, effective batch 2" in log_of(tmp_path / "accumulated")


@pytest.mark.slow
def test_vram_takes_a_smaller_plan_and_logs_it(verse_h5, tmp_path):
    flags = ("--input_shape", 64, 48, 48, "--batch_size", 2, "--patches", 2, "--epochs", 1, "--no-evaluate")
    parser, peaks = train_segmentation.build_parser(), []
    for batch_size in (2, 1):
        words = ["--data_path", "x", "--model_name", "y", "--amp", "off", *map(str, flags), "--batch_size"]
        args = parser.parse_args([*words, str(batch_size)])
        setup = set_up(args, resolved_config(args), 1, dice_ce_loss, torch.device("cpu"), None)[1]
        peaks.append(setup.peak_mib)
    vram = round((600 + sum(peaks) / 2) / 1024, 4)
    run = start("segmentation", verse_h5, tmp_path, *flags, "--vram", vram)
    log, config = log_of(run), yaml.safe_load((run / "config.yaml").read_text())
    assert f"plan for --vram {vram:g} (" in log and log.count("<- taken") == 1
    asked = (config["patch_size"], config["batch_size"], config["checkpointing"])
    assert asked != ([64, 48, 48], 2, False) and config["batch_size"] * config["accumulate"] == 2
    taken = next(line for line in log.splitlines() if "<- taken" in line)
    assert (
        "x".join(map(str, config["patch_size"])) in taken and float(taken.split("MiB")[0].split()[-1]) <= 76
    )
    assert load_checkpoint(run / "weights" / "best.pt")["config"]["patch_size"] == config["patch_size"]
    refused(
        "--vram 0.6: even patch .* choose a smaller network", "heatmap", verse_h5, tmp_path, "--vram", 0.6
    )


@both_stages
def test_no_validation_and_no_test_scans(stage, verse_h5, tmp_path, monkeypatch):
    """The last weights are kept, even where the score on a training scan became worse."""
    data, losses, dices = (
        without(verse_h5, tmp_path, "validation", "test"),
        iter((1.0, 2.0)),
        iter((0.5, 0.4)),
    )
    original = train_heatmap.validate_heatmaps
    worse = lambda *args: original(*args) | {"val_loss": next(losses, 3.0)}  # noqa: E731
    monkeypatch.setattr(train_heatmap, "validate_heatmaps", worse)
    monkeypatch.setattr(train_segmentation, "mean_dice", lambda rows: next(dices, 0.3))
    run = start(stage, data, tmp_path, "--epochs", 2)
    assert "there is no validation scan: the training scan" in log_of(run)
    best = load_checkpoint(run / "weights" / "best.pt")
    torch.testing.assert_close(best["model"], last_of(run)["model"], rtol=0, atol=0)
    assert last_of(run)["position"]["best_epoch"] == 1 and not (run / "evaluation").exists()
    assert "no validation scan" not in log_of(start(stage, verse_h5, tmp_path, "--epochs", 1, name="other"))


def test_validation_that_gives_no_dice(verse_h5, tmp_path, monkeypatch):
    """Every validation scan damaged: the run ends with what it has."""
    from verse_spine import evaluate

    original = evaluate.evaluate_cases

    def failing(model, verse, names, **options):
        return (
            ([], dict.fromkeys(names, "damaged")) if "surfaces" in options else original(model, verse, names)
        )

    monkeypatch.setattr(train_segmentation, "evaluate_cases", failing)
    run = start("segmentation", verse_h5, tmp_path, "--epochs", 1)
    assert "could not be validated: damaged" in log_of(run) and "there is no best.pt" in log_of(run)
    assert (run / "evaluation" / "summary.md").is_file()


def test_patch_larger_than_every_scan(verse_h5, tmp_path):
    largest = max(case.shape[0] for case in VerSe(verse_h5).cases.values())
    shape = (16 * math.ceil((largest + 1) / 16), 32, 32)
    run = start("segmentation", verse_h5, tmp_path, "--input_shape", *shape, "--patches", 2, "--epochs", 1)
    assert (run / "evaluation" / "summary.md").is_file()


def test_wrong_input_is_refused(verse_h5, verse_runs, tmp_path):
    for stage, key, flags in (
        ("heatmap", "model", ("--model", "UNetFull")),
        ("heatmap", "target", ("--target", "mask")),
        ("segmentation", "labels", ("--labels", "region3")),
        ("segmentation", "patch_size", ("--input_shape", 48, 32, 32)),
    ):
        script, _ = STAGES[stage]
        with pytest.raises(SystemExit, match=f"--resume: its {key} is .*a run goes on as it began"):
            script.main([*base(verse_h5), "--resume", str(verse_runs[stage]), *map(str, flags)])
    with pytest.raises(SystemExit, match="the split of .* is not the one that this run began with"):
        data = without(verse_h5, tmp_path, "test")
        train_heatmap.main([*base(data), "--resume", str(verse_runs["heatmap"]), "--epochs", "3"])
    with pytest.raises(SystemExit):
        train_heatmap.main(["--data_path", str(verse_h5)])


def base(data: Path) -> list[str]:
    return ["--data_path", str(data), "--model_name", "run"]


@pytest.mark.slow
def test_learns(verse_h5, tmp_path):
    run = start("heatmap", verse_h5, tmp_path, "--epochs", 12, "--no-augment", "--no-evaluate")
    losses = [float(row["train_loss"]) for row in rows_of(run)]
    assert losses[-1] < 0.8 * losses[0] and sum(b < a for a, b in pairwise(losses)) > 6


@pytest.mark.slow
def test_scripts_run_from_another_folder(verse_h5, tmp_path):
    for stage, script in (("heatmap", "train_heatmap.py"), ("segmentation", "train_segmentation.py")):
        flags = [*base(verse_h5), *STAGES[stage][1], *TINY_VERSE, "--epochs", "1", "--out", "runs"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "verse_spine" / script), *flags, "--model_name", stage],
            cwd=tmp_path, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "runs" / stage / "weights" / "best.pt").is_file()


def test_one_damaged_case_does_not_end_the_evaluation_of_boxes(verse_h5, verse_runs, tmp_path, monkeypatch):
    verse, weights = VerSe(verse_h5), verse_runs["heatmap"] / "weights" / "best.pt"
    model = load_trained(weights, torch.device("cpu"), Precision("fp32", None, False, ""), "heatmap")
    names = [*verse.split["train"], *verse.split["val"]]
    original = boxes.make_target

    def broken(kind, grid, *rest):
        if grid.scan_shape == tuple(verse.cases[names[1]].shape):
            raise KeyError("centroid of T12")
        return original(kind, grid, *rest)

    monkeypatch.setattr(boxes, "make_target", broken)
    rows, failed = boxes.evaluate_boxes(model, verse, names, tmp_path / "evaluation" / "boxes.csv")
    assert [row["case"] for row in rows] + list(failed) == [names[0], *names[2:], names[1]]
    assert "KeyError" in failed[names[1]]
    with (tmp_path / "evaluation" / "boxes.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == [names[0], *names[2:]]
