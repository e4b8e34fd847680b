"""amygdala/train.py: losses, localiser, flags, folds and what a cross-validation leaves behind."""

import csv
import json
import math
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_AMYGDALA, read_cross_validation

from amygdala import localiser, train, training
from amygdala.dataset import Cohort
from amygdala.flags import CONFIGS, choose
from amygdala.head import add_surroundings
from amygdala.losses import adaptive_dice_loss, boundary_weights, segmentation_loss
from amygdala.model import MODELS, load_trained
from amygdala.structures import DATASETS
from common.checkpoints import load_checkpoint
from common.compare import compare, read_results
from common.config import parse_args
from common.hardware import Precision

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")
GRID = (32, 32, 32)  # of the localiser, for heads of 48 x 48 x 64 mm
SCORES = {"dice": 0.5, "hd95_mm": 1.0, "asd_mm": 1.0, "target_mm3": 1000.0, "pred_mm3": 900.0}
QUICK = [*TINY_AMYGDALA, "--epochs", "1", "--accumulate", "4"]  # one update


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    monkeypatch.setattr(localiser, "GRID", GRID)


# ---- losses ----


def hard(classes: list[int], num_classes: int = 2) -> torch.Tensor:
    """Logits (1, K, 1, 1, n) of a network that is sure."""
    return 200.0 * torch.nn.functional.one_hot(torch.tensor(classes), num_classes).T.view(
        1, -1, 1, 1, len(classes)
    )


def row(classes: list[int]) -> torch.Tensor:
    return torch.tensor(classes).view(1, 1, 1, -1)


def test_adaptive_dice_of_a_network_that_knows_nothing():
    """Volumes of 8^3 without a structure: 1 - 1/3 / (1/3 + 0.8 * 2/3) of the background, 1 of the others."""
    loss = adaptive_dice_loss(torch.zeros(2, 3, 8, 8, 8), torch.zeros(2, 8, 8, 8, dtype=torch.long))
    assert loss.item() == pytest.approx(0.8718, abs=1e-4)
    assert loss.item() == pytest.approx((1 - 1 / 2.6 + 2) / 3, abs=1e-5)


def test_the_error_that_prevails_costs_more():
    """By hand: one right voxel; two false alarms, or one of each kind."""
    assert adaptive_dice_loss(hard([1, 1, 1, 0]), row([1, 0, 0, 0])).item() == pytest.approx(
        1 - 1 / 2.6, abs=1e-4
    )
    assert adaptive_dice_loss(hard([1, 1, 0, 0]), row([1, 0, 1, 0])).item() == pytest.approx(0.5, abs=1e-4)
    assert adaptive_dice_loss(hard([1, 0]), row([1, 0])).item() == pytest.approx(0, abs=1e-4)


def test_a_class_that_is_absent_gives_finite_gradients():
    logits = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    adaptive_dice_loss(logits, torch.zeros(1, 4, 4, 4, dtype=torch.long)).backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_weights_near_a_boundary_by_hand():
    """Steps of voxels from the boundary between the third and the fourth: 2 1 0 0 1 2 3 4 5."""
    weights = boundary_weights(row([0, 0, 0, 1, 1, 1, 1, 1, 1]), 2.0)[0, 0, 0]
    expected = [1 + 2 * math.exp(-(d**2) / 4.5) if d < 5 else 1.0 for d in (2, 1, 0, 0, 1, 2, 3, 4, 5)]
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[2] == 3.0 and expected[1] == pytest.approx(2.6015, abs=1e-4)
    diagonal = torch.zeros(1, 3, 3, 3, dtype=torch.long)
    diagonal[0, 0, 0, 0] = 1
    assert boundary_weights(diagonal, 1.0)[0, 1, 1, 1] == 2.0, "a diagonal neighbour is one"


def test_the_background_counts_half_and_outputs_are_averaged():
    """Cross-entropies a of the background voxel and b of the structure's: (a / 2 + b) / 1.5."""
    logits = torch.tensor([[0.3, -1.0], [0.1, 0.7]]).view(1, 2, 1, 1, 2)
    target = row([0, 1])
    a, b = (-logits[0, :, 0, 0, k].log_softmax(0)[k].item() for k in (0, 1))
    total = segmentation_loss(logits, target).item()
    assert total - adaptive_dice_loss(logits, target).item() == pytest.approx((a / 2 + b) / 1.5, abs=1e-6)
    assert segmentation_loss([logits, 3 * logits], target).item() == pytest.approx(
        (total + segmentation_loss(3 * logits, target).item()) / 2
    )
    assert segmentation_loss(logits, target, loss="dice") != segmentation_loss(logits, target)
    # All voxels lie on the boundary, where all weights are alike.
    assert segmentation_loss(logits, target, boundary=3.0).item() == pytest.approx(total, abs=1e-6)


def test_voxels_at_a_boundary_count_more_in_the_cross_entropy():
    logits, target = (
        torch.randn(1, 2, 1, 1, 7, generator=torch.Generator().manual_seed(0)),
        row([0] * 6 + [1]),
    )
    entropies = [-logits[0, :, 0, 0, k].log_softmax(0)[int(k == 6)].item() for k in range(7)]
    near = [1 + 3 * math.exp(-(d**2) / 4.5) if d < 5 else 1.0 for d in (5, 4, 3, 2, 1, 0, 0)]
    weights = [(0.5 if k < 6 else 1.0) * near[k] for k in range(7)]
    expected = sum(w * e for w, e in zip(weights, entropies, strict=True)) / sum(weights)
    loss = segmentation_loss(logits, target, boundary=3.0) - adaptive_dice_loss(logits, target)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


# ---- localiser ----


def test_blobs_around_the_middles():
    label = torch.zeros(2, 9, 10, 12, dtype=torch.uint8)
    label[0, 2, 3, 4], label[0, 5, 5, 5], label[0, 5, 5, 7] = 1, 2, 2
    label[1, 0, 0, 0] = 1
    maps, complete = localiser.target_maps(label)
    assert complete.tolist() == [True, False]
    assert maps.sum((2, 3, 4))[0].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert np.unravel_index(int(maps[0, 0].argmax()), maps.shape[2:]) == (2, 3, 4)
    assert np.unravel_index(int(maps[0, 1].argmax()), maps.shape[2:]) == (5, 5, 6)
    # One voxel of 4 mm away, of a blob of 6 mm.
    assert (maps[0, 0, 3, 3, 4] / maps[0, 0, 2, 3, 4]).item() == pytest.approx(math.exp(-0.5 * (4 / 6) ** 2))
    scores = torch.zeros(2, 2, 9, 10, 12)
    assert localiser.localiser_loss(scores, maps, complete).item() == pytest.approx(math.log(9 * 10 * 12))
    scores[1] = torch.randn(2, 9, 10, 12)
    assert localiser.localiser_loss(scores, maps, complete).item() == pytest.approx(math.log(9 * 10 * 12))
    assert localiser.localiser_loss(scores, maps, torch.tensor([False, False])).item() == 0


class Peaks(torch.nn.Module):
    """Scores of two structures with peaks at given places of the coarse image, whatever it shows.

    Args:
        peaks: of each structure [(place, height), ...].
    """

    def __init__(self, *peaks) -> None:
        super().__init__()
        self.peaks = peaks

    def forward(self, image):
        grid = torch.meshgrid(*(torch.arange(n) for n in image.shape[2:]), indexing="ij")
        maps = []
        for peaks in self.peaks:
            squares = [sum((g - p) ** 2 for g, p in zip(grid, place, strict=True)) for place, _ in peaks]
            maps.append(torch.stack([h - s / 2 for s, (_, h) in zip(squares, peaks, strict=True)]).amax(0))
        return torch.stack(maps)[None]


def test_middles_in_voxels_of_the_scan():
    """Coarse voxels of 4 mm: 40, 25, 15 of them, fewer than the network needs along the last two axes."""
    image = np.random.default_rng(0).random((80, 100, 60), np.float32)
    left, right = (20.3, 12, 4), (30, 12, 11)
    found = localiser.find_middles(Peaks([(left, 0)], [(right, 0)]), image, (2, 1, 1), CPU)
    expected = [[20.8 * 2 - 0.5, 12.5 * 4 - 0.5, 4.5 * 4 - 0.5], [30.5 * 2 - 0.5, 49.5, 11.5 * 4 - 0.5]]
    np.testing.assert_allclose(found, expected, atol=0.1)
    # A map that is a little higher on the wrong side, as of a network that cannot tell the sides yet.
    unsure = Peaks([(left, 0), (right, -1)], [(left, 0.5), (right, 0)])
    np.testing.assert_allclose(localiser.find_middles(unsure, image, (2, 1, 1), CPU), expected, atol=0.1)
    narrow = image[..., :16]  # four coarse voxels
    found = localiser.find_middles(Peaks([((20, 12, 0), 0)], [((20, 12, 3), 0)]), narrow, (2, 1, 1), CPU)
    assert found.shape == (2, 3) and np.isfinite(found).all()


def test_boxes_by_hand():
    patch, mm = (8, 16, 16), (1, 1, 1)
    box = localiser.box_around((10.2, 20.2, 30.2), patch, mm, (40, 60, 60), (2, 1, 1))
    assert box == ((9, 13, 23), (13, 29, 39)), "8 mm are 4 voxels of 2 mm; the middle of 9 to 12 is 10.5"
    box = localiser.box_around((1, 58, 30.2), patch, mm, (40, 60, 60), (2, 1, 1))
    assert box == ((0, 44, 23), (4, 60, 39)), "moved into the scan"
    box = localiser.box_around((1, 58, 30.2), patch, mm, (3, 60, 12), (2, 1, 1))
    assert box == ((0, 44, 0), (3, 60, 12)), "no larger than the scan"


def test_a_trained_localiser_finds_both_in_a_head_that_it_has_not_seen(amygdala_h5):
    torch.manual_seed(0)
    cohort = Cohort(amygdala_h5)
    cases = [cohort.cases[f"head_{k}"] for k in range(5)]
    trained = localiser.train_localiser(cases, CPU, FP32, seed=0, updates=40)
    assert all(torch.is_tensor(value) for value in trained["state"].values()) and trained["seconds"] > 0
    case = cohort.cases["head_5"]
    network = localiser.load_localiser(trained, CPU)
    found = localiser.find_middles(network, case.image[...], case.spacing_mm, CPU)
    np.testing.assert_allclose(found, [(12, 11, 8), (12, 11, 23)], atol=4)


def test_surroundings_leave_the_brain_as_it_is():
    rng = np.random.default_rng(0)
    image = np.zeros((40, 40, 40), np.float32)
    image[10:30, 10:30, 10:30] = rng.uniform(100, 200, (20, 20, 20))
    brain = image > 0
    filled = add_surroundings(image, 4.0, np.random.default_rng(1))
    np.testing.assert_array_equal(filled[brain], image[brain])
    assert filled.dtype == np.float32 and (filled[~brain] >= 0).all() and filled[~brain].max() > 30
    np.testing.assert_array_equal(filled, add_surroundings(image, 4.0, np.random.default_rng(1)))
    assert (add_surroundings(image, 4.0, np.random.default_rng(2)) != filled).any()
    for whole in (image + 1, np.zeros_like(image)):
        np.testing.assert_array_equal(add_surroundings(whole, 4.0, rng), whole)


# ---- flags ----


def test_the_recipe_of_the_model_is_read_unless_a_file_is_given(tmp_path):
    chosen, words = choose(["--model", "vnet", "--dataset", "Hippocampus", "--lr", "1"])
    assert (chosen.model, chosen.dimension, chosen.dataset) == ("vnet", "3d", "Hippocampus")
    assert (
        words == ["--config", str(CONFIGS / "Hippocampus" / "vnet_3d.yaml"), *words[2:]] and words[-1] == "1"
    )
    file = tmp_path / "own.yaml"
    file.write_text("model: attention_unet\ndimension: 2d\n")
    chosen, words = choose(["--config", str(file)])
    assert (chosen.model, chosen.dimension) == ("attention_unet", "2d") and words == ["--config", str(file)]
    assert choose(["--config", str(file), "--model", "unet"])[0].model == "unet", "the command line wins"


@pytest.mark.parametrize("dataset", DATASETS)
def test_medformer_of_half_the_width_by_its_file_alone(dataset):
    words = ["--config", str(CONFIGS / dataset / "medformer_half_3d.yaml")]
    chosen, words = choose(words)
    args = parse_args(train.build_parser(chosen), words)
    assert (args.model, args.dataset, args.base_chan) == ("medformer", dataset, 16)
    assert args.unique_name == f"{dataset}_3d_medformer_half", "not the folder of the full width"


def test_what_cannot_be_chosen(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--model", "vnet", "--dimension", "2d"])
    assert "--model vnet --dimension 2d: in 2-D there are unet, attention_unet" in capsys.readouterr().err
    file = tmp_path / "own.yaml"
    file.write_text("model: unet\nchan_num: [1, 2]\n")
    with pytest.raises(SystemExit):
        train.main(["--config", str(file)])
    assert "own.yaml: unknown key 'chan_num'" in capsys.readouterr().err
    for flags, message in {
        ("--gpu", "0,1"): "--gpu 0,1: one number; .*torchrun --nproc_per_node 2",
        ("--fold", "last"): "--fold last: a number from 0 on, all or test",
        ("--resume", "--unique_name", "none", "--out", str(tmp_path)): "--resume: no run called none under",
        (
            "--data_path",
            str(tmp_path),
        ): "no preprocessed cases here.*amygdala/preprocess.py --dataset Amygdala",
    }.items():
        with pytest.raises(SystemExit, match=message):
            train.main([*QUICK, *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["own.yaml"], "nothing half-made is left"


def test_a_card_that_is_not_there_and_several_processes(monkeypatch, capsys):
    args = parse_args(train.build_parser(), ["--gpu", "1", "--data_root", "x"])
    training.resolve_flags(args)
    assert args.data_path == "x" and args.log_path == "log"
    if not torch.cuda.is_available():
        assert args.device == "auto" and "no graphics card" in capsys.readouterr().out
    monkeypatch.setattr(training, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="--gpu is for a single process"):
        training.resolve_flags(args)
    args.gpu, args.batch_size = None, 3
    with pytest.raises(ValueError, match="--batch_size 3 is that of all 2 processes"):
        training.resolve_flags(args)


FILES = sorted(CONFIGS.glob("*/*.yaml"))


def of_file(file: Path) -> Namespace:
    model, _, dimension = file.stem.replace("_half", "").replace("_small", "").rpartition("_")
    return Namespace(model=model, dimension=dimension, dataset=file.parent.name, resume=None)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_key_of_a_recipe_is_a_flag(file):
    chosen = of_file(file)
    args = parse_args(train.build_parser(chosen), ["--config", str(file)])
    own = yaml.safe_load(file.read_text())
    own.pop("config", None)  # the recipe that it builds upon
    for key, value in own.items():
        found = getattr(args, key)
        same = list(map(str, found)) == list(map(str, value)) if isinstance(value, list) else found == value
        assert same, f"{key}: {value} became {found}"


def test_every_model_has_a_recipe():
    names = {(file.parent.name, file.stem) for file in FILES}
    expected = {(dataset, f"{model}_{d}") for dataset in DATASETS for d in MODELS for model in MODELS[d]}
    assert expected <= names


# ---- runs ----


def args_of(*flags: str) -> Namespace:
    return parse_args(train.build_parser(), [*TINY_AMYGDALA, *flags])


def test_no_scan_is_left_out_of_an_epoch(amygdala_h5):
    data = Cohort(amygdala_h5)
    patches = training.get_patches(args_of("--patches", "2"), data, (8, 8, 8))
    assert {patches[k, 0]["case"] for k in range(len(patches))} == set(range(6))
    assert len(training.get_patches(args_of("--patches", "9"), data, (8, 8, 8))) == 9


def test_flips_exchange_the_labels_of_the_sides():
    assert training.get_augmentation(args_of()).swap_labels == ((1, 2),)
    assert training.get_augmentation(args_of()).flip_probability == (0, 0, 0.5)
    assert training.get_augmentation(args_of("--dataset", "Hippocampus")).swap_labels == ()


@pytest.fixture(scope="module")
def experiment(amygdala_h5, tmp_path_factory) -> Path:
    """Three folds, of which the second was stopped before its only update and went on with --resume."""
    out = tmp_path_factory.mktemp("cross_validation") / "exp"
    command = [*QUICK, "--data_path", str(amygdala_h5), "--out", str(out), "--unique_name", "cv"]
    calls, step = [], train.optimizer_step

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localiser, "GRID", GRID)
        patch.setattr("sys.argv", ["amygdala/train.py", *command])
        patch.setattr(train, "optimizer_step", stopped)
        with pytest.raises(SystemExit):
            train.main(command)
        assert not (out / "Amygdala" / "cv" / "fold_2").exists()
        assert train.main([*command, "--resume"]) == 0
    assert len(calls) == 3, "each fold was trained once"
    return out / "Amygdala" / "cv"


def test_what_a_cross_validation_leaves_behind(experiment, amygdala_h5):
    found = {path.name for path in experiment.iterdir()}
    of_folds = {
        f"fold_{k}{end}" for k in range(3) for end in ("", ".txt", "_best.pt", "_latest.pt", "_results.json")
    }
    of_all = {"config.yaml", "cross_validation.txt", "cross_validation.csv", "results.csv"}
    assert found == of_folds | of_all
    assert (experiment / "fold_1_best.pt").resolve() == (
        experiment / "fold_1" / "weights" / "best.pt"
    ).resolve()
    log = (experiment / "fold_1.txt").read_text()
    assert "go on with: python amygdala/train.py" in log and log.count("--unique_name cv --resume") >= 1
    assert "all folds are done" in (experiment / "fold_2.txt").read_text() and "all folds are done" not in log
    assert list((experiment.parents[2] / "log" / "Amygdala" / "cv" / "fold_2").glob("events*"))
    assert not list(experiment.glob("fold_*/test_cases.earlier*")), "--resume scored a finished fold again"
    config = yaml.safe_load((experiment / "config.yaml").read_text())
    assert config["fold"] == "all" and config["unique_name"] == "cv" and config["batch_size"] == 1


def test_every_head_was_tested_once_by_a_model_that_never_saw_it(experiment):
    tested = []
    for k in range(3):
        rows = json.loads((experiment / f"fold_{k}_results.json").read_text())["rows"]
        split = load_checkpoint(experiment / f"fold_{k}_best.pt")["split"]
        assert sorted({row["case"] for row in rows}) == sorted(split["test"])
        assert not set(split["test"]) & set(split["train"] + split["val"]) and split["val"]
        with (experiment / f"fold_{k}" / "test_cases.csv").open(newline="") as file:
            assert [row["case"] for row in csv.DictReader(file) if 0 <= int(row["voxels_outside"]) <= 250]
        tested += split["test"]
    assert sorted(tested) == [f"head_{k}" for k in range(6)]


def test_the_scores_of_the_folds(experiment):
    blocks = read_cross_validation(experiment / "cross_validation.txt")
    for k in range(3):
        rows = json.loads((experiment / f"fold_{k}_results.json").read_text())["rows"]
        means = [np.mean([row["dice"] for row in rows if row["class"] == label]) for label in (1, 2)]
        np.testing.assert_allclose(blocks["Dice"][k], means, atol=6e-5)
    text = (experiment / "cross_validation.txt").read_text()
    assert "unet 3d, Amygdala" in text and "select_on_test" not in text
    assert "| a |" in text and "| b |" in text, "sites"


def test_two_cross_validations_can_be_compared(experiment):
    """By common/compare.py, which takes the folders of two experiments."""
    rows = read_results(experiment)
    assert len(rows) == 12 and {row["patient"] for row in rows} == {f"head_{k}" for k in range(6)}
    (first, *_) = compare(rows, rows, ["dice"])
    assert (first["metric"], first["n"]) == ("dice", 6)


def test_weights_bring_their_localiser(experiment):
    best, latest = (load_checkpoint(experiment / f"fold_0_{name}.pt") for name in ("best", "latest"))
    for name, value in best["preprocessing"]["localiser"]["state"].items():
        assert torch.equal(value, latest["preprocessing"]["localiser"]["state"][name])
    other = load_checkpoint(experiment / "fold_1_best.pt")["preprocessing"]["localiser"]["state"]
    assert any(not torch.equal(value, other[name]) for name, value in localiser_state(best).items())
    model = load_trained(experiment / "fold_0_best.pt", CPU, FP32)
    start, stop = localiser.find_box(model, np.random.default_rng(0).random((40, 60, 50)), (2, 2, 2))
    assert [b - a for a, b in zip(start, stop, strict=True)] == [16, 16, 32]


@pytest.mark.parametrize("kept", [None, {}, {"state": {}}, {"state": {}, "seconds": "1"}, 7])
def test_a_run_is_not_resumed_without_its_localiser(kept):
    args = Namespace(dataset="Amygdala", time_budget=60.0)
    resumed = {"preprocessing": {"localiser": kept}}
    with pytest.raises(ValueError, match="--resume: the run's localiser: "):
        training.get_localiser(args, None, CPU, FP32, resumed)
    whole = {"state": {}, "seconds": 12.0}
    resumed["preprocessing"]["localiser"] = whole
    assert training.get_localiser(args, None, CPU, FP32, resumed) == (whole, 48.0)


def localiser_state(checkpoint: dict) -> dict:
    return checkpoint["preprocessing"]["localiser"]["state"]


def test_folders_of_a_name(experiment, tmp_path):
    args = args_of("--unique_name", "cv", "--out", str(experiment.parents[1]))
    assert training.experiment_folder(args, ["0"]).name == "cv_2"
    assert training.experiment_folder(args, ["7"]) == experiment, "a fold that is still missing"
    args.resume = "last"
    assert training.experiment_folder(args, ["0"]) == experiment
    newer = experiment.with_name("cv_2") / "fold_0"
    newer.mkdir(parents=True)
    (newer / "log.txt").touch()
    (experiment.with_name("cv_other") / "fold_0").mkdir(parents=True)
    (experiment.with_name("cv_other") / "fold_0" / "log.txt").touch()
    assert training.experiment_folder(args, ["0"]).name == "cv_2", "the one that was written to last"
    for name in ("cv_2", "cv_other"):
        shutil.rmtree(experiment.with_name(name))


def test_sites_left_out_and_epochs_chosen_by_the_test(amygdala_h5, tmp_path, capsys):
    flags = ["--data_path", str(amygdala_h5), "--out", str(tmp_path / "exp"), "--unique_name", "sites"]
    assert train.main([*QUICK, *flags, "--leave_site_out", "--select_on_test"]) == 0
    folder = tmp_path / "exp" / "Amygdala" / "sites"
    data = Cohort(amygdala_h5)
    for k, site in enumerate("ab"):
        split = load_checkpoint(folder / f"fold_{k}_best.pt")["split"]
        assert {data.sites[name] for name in split["test"]} == {site} and split["val"] == split["test"]
        assert {data.sites[name] for name in split["train"]} == {"ab"[1 - k]}
    text = (folder / "cross_validation.txt").read_text()
    warning = "epochs were chosen by the test scans (--select_on_test), so that these scores are too good"
    assert f"NOTE: {warning}" in text and "NOTE: each fold holds out a site: 0 = a, 1 = b" in text
    assert warning in (folder / "fold_0.txt").read_text()
    assert warning in (folder / "fold_0" / "evaluation" / "summary.md").read_text()
    assert len(read_cross_validation(folder / "cross_validation.txt")["Dice"]) == 2
    with pytest.raises(SystemExit, match="--fold test: .*h5 has no test part; convert again with labelled"):
        train.main([*QUICK, *flags, "--fold", "test"])
    with pytest.raises(SystemExit, match="--fold 2: with 2 sites choose 0 to 1"):
        train.main([*QUICK, *flags, "--leave_site_out", "--fold", "2"])


def noted(folder: Path, amygdala_h5, fold: str, case: str, *flags: str) -> Path | None:
    """`note_results` of a fold of two, with a single case."""
    args = args_of("--data_path", str(amygdala_h5), "--folds", "2", "--fold", fold, *flags)
    data = SimpleNamespace(sites={})
    rows = [{"case": case, "class": label, "name": "", "status": "ok", **SCORES} for label in (1, 2)]
    return training.note_results(folder, args, data, rows, training.fold_names(args))


def test_folds_that_were_not_trained_alike_are_named(amygdala_h5, tmp_path):
    assert noted(tmp_path, amygdala_h5, "0", "a", "--select_on_test") is None, "a fold is missing"
    path = noted(tmp_path, amygdala_h5, "1", "b")
    text = path.read_text()
    assert "NOTE: epochs were chosen by the test scans" in text
    assert "not trained alike: --select_on_test was True in fold 0, False in fold 1" in text
    noted(tmp_path, amygdala_h5, "0", "a", "--lr", "0.5", "--workers", "3")
    text = noted(tmp_path, amygdala_h5, "1", "b").read_text()
    assert text.count("alike") == 1 and "not trained alike: --lr was 0.5 in fold 0, 0.01 in fold 1" in text
    path = noted(tmp_path, amygdala_h5, "0", "a")
    assert "chosen by the test" not in path.read_text() and "alike" not in path.read_text()


def test_folds_of_another_division_are_not_summed_up(amygdala_h5, tmp_path):
    noted(tmp_path, amygdala_h5, "0", "a", "--split_seed", "7")
    assert noted(tmp_path, amygdala_h5, "1", "b") is None
    assert noted(tmp_path, amygdala_h5, "0", "a") == tmp_path / "cross_validation.txt"


def test_folds_of_ones_own_are_all_of_the_cross_validation(amygdala_h5, tmp_path):
    args = args_of("--data_path", str(tmp_path), "--folds", "5")
    (tmp_path / "folds.json").write_text(json.dumps([["a"], ["b"], ["c"]]))
    assert list(training.fold_names(args)) == ["0", "1", "2"]


def test_one_process_alone_writes_the_results(amygdala_h5, tmp_path, monkeypatch):
    """The others are not there then: whatever would talk to them waits for ever."""
    folds = {"0": "a", "1": "b"}
    for name in ("main_first", "on_main"):
        monkeypatch.setattr(training, name, lambda _: pytest.fail("talks to the other processes"))
    rows = [{"class": label, "name": "", "status": "ok", **SCORES} for label in (1, 2)]
    for k in folds:
        args = args_of("--leave_site_out", "--fold", k)
        data, of_case = SimpleNamespace(sites={}), [{"case": k, **row} for row in rows]
        path = training.note_results(tmp_path, args, data, of_case, folds)
    assert "NOTE: each fold holds out a site: 0 = a, 1 = b" in path.read_text()


def test_a_single_site_cannot_be_left_out(tmp_path, amygdala_h5):
    data = shutil.copytree(amygdala_h5, tmp_path / "h5")
    notes = json.loads((data / "preprocessing.json").read_text())
    for entry in notes["cases"]:
        entry["site"] = "unknown"
    (data / "preprocessing.json").write_text(json.dumps(notes))
    with pytest.raises(SystemExit, match="all cases are of one site, unknown; name sites .* --subjects"):
        train.main([*QUICK, "--data_path", str(data), "--out", str(tmp_path), "--leave_site_out"])


def test_the_published_test_part_and_slices(amygdala_h5, tmp_path):
    """--fold test, with the 2-D network."""
    data = shutil.copytree(amygdala_h5, tmp_path / "h5")
    notes = json.loads((data / "preprocessing.json").read_text())
    for entry in notes["cases"][4:]:
        entry["part"] = "test"
    (data / "preprocessing.json").write_text(json.dumps(notes))
    flags = ["--data_path", str(data), "--out", str(tmp_path / "exp"), "--dimension", "2d", "--fold", "test"]
    assert train.main([*QUICK, *flags]) == 0
    folder = tmp_path / "exp" / "Amygdala" / "Amygdala_2d_unet"
    split = load_checkpoint(folder / "fold_test_best.pt")["split"]
    assert split["test"] == ["head_4", "head_5"] and len(split["train"]) == 3 and len(split["val"]) == 1
    rows = json.loads((folder / "fold_test_results.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"head_4", "head_5"}
    assert not (folder / "cross_validation.txt").exists()
    # In a cross-validation these two take no part.
    assert "head_4" not in {name for part in Cohort(data, folds=2, fold=0).split.values() for name in part}


def test_without_validation_the_last_weights_count(amygdala_h5):
    args = args_of("--data_path", str(amygdala_h5), "--fold", "1", "--no-validation")
    training.resolve_flags(args)
    split = training.open_data(args).split
    assert split["val"] == [] and len(split["train"]) == 4 and len(split["test"]) == 2


def test_the_demo_is_a_recipe():
    words = yaml.safe_load((ROOT / "amygdala" / "demo.yaml").read_text())
    assert words["data_path"] == "demo"


@pytest.mark.parametrize("links", [True, False])
def test_weights_have_the_names_of_the_original_code_also_where_there_are_no_links(
    tmp_path, monkeypatch, links
):
    def refuse(*_):
        raise OSError("a required privilege is not held by the client")

    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    fold = tmp_path / "fold_1"
    training.link_weights(fold, "1")  # nothing is there yet
    (fold / "weights").mkdir(parents=True)
    (fold / "weights" / "best.pt").write_text("best")
    (fold / "log.txt").write_text("log")
    training.link_weights(fold, "1")
    assert (tmp_path / "fold_1_best.pt").read_text() == "best"
    assert (tmp_path / "fold_1.txt").read_text() == "log"
    assert (tmp_path / "fold_1_best.pt").is_symlink() is links
    assert not (tmp_path / "fold_1_latest.pt").exists()
