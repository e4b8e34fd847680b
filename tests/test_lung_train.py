"""Training, stopping, resuming, several processes and cross-validation of lung_tumor."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, run_script

from common import runs
from common.checkpoints import load_checkpoint
from common.memory import training_peak_mib
from common.slices import write_png
from lung_tumor import train
from lung_tumor.model import get_loss, get_model
from lung_tumor.slices import read_mask

TIMES = {"seconds", "data_wait", "peak_mib"}


def start(data: Path, out: Path, *flags: object) -> None:
    train.main(["--data_path", str(data), "--out", str(out), "--model_name", "run", *TINY, *map(str, flags)])


def rows_of(run: Path) -> list[dict]:
    with (run / "metrics.csv").open(encoding="utf8") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def six_epochs(phantom_slices, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    start(phantom_slices, out, "--epochs", 6)
    return out / "run"


def test_writes_everything_it_promises(trained_run):
    expected = "config.yaml log.txt metrics.csv training_curves.png val_predictions.png "
    expected += "weights/last.pt weights/best.pt "
    expected += (
        "evaluation/summary.csv evaluation/per_volume.csv evaluation/sweep.csv evaluation/evaluation.png"
    )
    for name in expected.split():
        assert (trained_run / name).stat().st_size > 0, name
    log = (trained_run / "log.txt").read_text()
    for word in (
        "commit: ",
        "torch ",
        "device: ",
        "precision: fp32 (--amp off)",
        "parameters",
        "MiB",
        "next: python",
    ):
        assert word in log
    assert [r["epoch"] for r in rows_of(trained_run)] == ["0", "1"]


def test_learns(six_epochs):
    """The slow test of the demo asks for a score; in six epochs of 48 pixels only the loss falls surely."""
    losses = [float(row["train_loss"]) for row in rows_of(six_epochs)]
    assert losses[-1] < 0.95 * losses[0] and losses == sorted(losses, reverse=True)


def test_all_folds_score_every_volume_once(phantom_slices, tmp_path):
    start(phantom_slices, tmp_path, "--epochs", 1, "--folds", 3, "--fold", "all")
    with (tmp_path / "run_all_folds" / "per_volume.csv").open() as file:
        volumes = [row["volume"] for row in csv.DictReader(file)]
    assert sorted(volumes) == [f"lung_{i:03d}" for i in range(1, 7)]
    splits = [load_checkpoint(tmp_path / f"run_fold{k}" / "weights/best.pt")["split"] for k in range(3)]
    for split in splits:
        assert not set(split["train"]) & set(split["test"]) and not set(split["val"]) & set(split["test"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "UNet", "--no-bilinear", "--loss", "focal_tversky", "--schedule", "warmup_cosine"],
        [
            "--deep_supervision",
            "--loss",
            "dice",
            "--empty_weight",
            "0.5",
            "--ema",
            "--schedule",
            "reduce_on_plateau",
        ],
        ["--norm", "group", "--loss", "ce", "--checkpointing", "--no-augment", "--grad_clip", "0"],
        ["--loss", "balanced_ce", "--amp", "bf16", "--schedule", "constant"],
    ],
)
def test_every_option_trains_and_resumes(flags, phantom_slices, tmp_path):
    start(phantom_slices, tmp_path, "--epochs", 1, *flags)
    start(phantom_slices, tmp_path, "--epochs", 2, "--resume")
    rows = rows_of(tmp_path / "run")
    assert [r["epoch"] for r in rows] == ["0", "1"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["loss"] == flags[flags.index("--loss") + 1]


def test_loss_without_the_dice_of_empty_slices():
    """A slice without tumour then costs its cross-entropy only; one with tumour costs the same as before."""
    logits = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(2, 8, 8, dtype=torch.int64)
    target[1, 2:5, 2:5] = 1
    whole, partial, cross_entropy = (
        get_loss("dice_bce"),
        get_loss("dice_bce", empty_weight=0),
        get_loss("balanced_ce"),
    )
    assert partial(logits[:1], target[:1]) == cross_entropy(logits[:1], target[:1])
    assert partial(logits[1:], target[1:]) == whole(logits[1:], target[1:])
    assert get_loss("dice", empty_weight=0)(logits[:1], target[:1]) == 0


def test_ema_is_what_is_kept(phantom_slices, tmp_path):
    start(phantom_slices, tmp_path, "--epochs", 1, "--ema")
    weights = tmp_path / "run" / "weights"
    last, best = load_checkpoint(weights / "last.pt"), load_checkpoint(weights / "best.pt")
    torch.testing.assert_close(best["model"], last["ema"]["average"], rtol=0, atol=0)
    assert not torch.equal(best["model"]["outc.conv.weight"], last["model"]["outc.conv.weight"])


def test_defaults_fit_a_4_gb_card():
    """Predicted peak of a training step with the default flags, fp32 as on Pascal, below 3.5 GiB."""
    config = vars(train.build_parser().parse_args([]))
    shape = (config["batch_size"], 1, config["image_size"], config["image_size"])
    peak_mib = training_peak_mib(lambda: get_model(config), get_loss(config["loss"]), shape)
    kept = training_peak_mib(
        lambda: get_model({**config, "checkpointing": False}), get_loss("dice_bce"), shape
    )
    assert 1000 < peak_mib < 3.5 * 1024 < kept + 100, "and checkpointing is why"


def test_vram_fits_batch_and_checkpointing_but_never_the_image(phantom_slices, tmp_path, monkeypatch):
    config = vars(train.build_parser().parse_args([]))
    config |= {"image_size": 48, "base_features": 8, "batch_size": 4, "checkpointing": False}

    def needs_mib(batch: int, checkpointing: bool) -> float:
        shape, now = (batch, 1, 48, 48), config | {"checkpointing": checkpointing}
        return training_peak_mib(lambda: get_model(now), get_loss("dice_bce"), shape)

    one_step_less, taken = needs_mib(4, True), needs_mib(2, False)
    assert taken < one_step_less
    limited = []
    monkeypatch.setattr("common.memory.limit_cuda_memory", lambda vram_gib, device: limited.append(vram_gib))
    vram_gib = (600 + (one_step_less + taken) / 2) / 1024
    start(phantom_slices, tmp_path, "--epochs", 1, "--vram", vram_gib)
    assert limited == [vram_gib]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["batch_size"], written["accumulate"], written["checkpointing"]) == (2, 4, False)
    assert written["image_size"] == 48
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "patch 48x48, batch 2 x 4, no checkpointing, fp32  <- taken" in log
    assert f"a step will take {taken:.0f} MiB" in log and "effective batch 8" in log


# ---- bad input ----


def refused(match: str, data: Path, out: Path, *flags: object) -> None:
    with pytest.raises(SystemExit, match=match):
        start(data, out, *flags)


def copy_of(data: Path, tmp_path: Path) -> Path:
    target = tmp_path / "data"
    shutil.copytree(data, target, ignore=shutil.ignore_patterns("cache"))
    return target


def test_missing_and_empty_folders(tmp_path):
    refused("no folder images/.*preprocess.py.*demo", tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "labels").mkdir()
    refused("are empty; run lung_tumor/preprocess.py", tmp_path / "empty", tmp_path)


def test_no_tumour_in_a_part(phantom_slices, tmp_path):
    data = copy_of(phantom_slices, tmp_path)
    for label in (data / "labels").iterdir():
        write_png(label, np.zeros_like(read_mask(label)[0]))
    refused("no tumour pixel in the .* slices of the part 'train'", data, tmp_path)


def test_masks_with_jpeg_noise_are_understood_and_reported(phantom_slices, tmp_path, capsys):
    data = copy_of(phantom_slices, tmp_path)
    label = next(p for p in sorted((data / "labels").iterdir()) if read_mask(p)[0].any())
    noisy = np.where(read_mask(label)[0], 200, 12).astype(np.uint8)
    write_png(label, noisy)
    start(data, tmp_path, "--epochs", 1)
    assert (
        "warning: 1 masks hold grey values besides 0 and 255; above 127 is tumour" in capsys.readouterr().out
    )


def test_split_with_a_patient_on_both_sides(phantom_slices, tmp_path):
    data = copy_of(phantom_slices, tmp_path)
    path = data / "splits.json"
    path.write_text(
        path.read_text().replace('"val": [', '"val": ["lung_001", "lung_002", "lung_003", "lung_004", ')
    )
    refused("patient lung_00. stands in train .* and in val", data, tmp_path)


@pytest.mark.parametrize(
    "flags", [["--model", "UNet"], ["--base_features", "16"], ["--no-bilinear"], ["--norm", "group"]]
)
def test_resume_into_another_architecture(flags, trained_run):
    with pytest.raises(SystemExit, match="a run goes on as it began"):
        train.main(["--resume", str(trained_run), *flags])


def test_fold_flags_belong_together(phantom_slices, tmp_path):
    refused("belong together", phantom_slices, tmp_path, "--folds", 5)
    refused("--folds 2: choose 3 to 6", phantom_slices, tmp_path, "--folds", 2, "--fold", 0)
    refused("--fold 3: with 3 folds choose 0 to 2", phantom_slices, tmp_path, "--folds", 3, "--fold", 3)


def test_a_fold_that_was_not_begun_is_begun(tmp_path):
    flags = ["--resume", "--out", str(tmp_path), "--model_name", "run"]
    args, checkpoint, folder = runs.resume(train.build_parser(), flags, same=[], may_be_missing=True)
    assert checkpoint is folder is None and args.model_name == "run"
    with pytest.raises(FileNotFoundError, match="no run called run"):
        runs.resume(train.build_parser(), flags, same=[])


def test_no_permission_to_write(phantom_slices, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        "cannot be created .*choose a folder you may write to", phantom_slices, tmp_path / "file" / "runs"
    )


def test_unknown_flag_and_yaml_key_name_the_nearest(tmp_path):
    (tmp_path / "bad.yaml").write_text("batchsize: 4\n")
    done = run_script("lung_tumor/train.py", "--config", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "unknown key 'batchsize'; did you mean batch_size?" in done.stderr
    with pytest.raises(SystemExit):
        train.main(["--epoch", "4"])
