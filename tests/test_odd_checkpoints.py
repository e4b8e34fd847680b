"""Weights as strangers send them: compiled, of several cards, of another task, damaged."""

import re

import pytest
import torch
from torch import nn

import amos_lha.networks
import amygdala.model
import lung_tumor.model
import verse_spine.networks
import wsss_medical.model
from common import checkpoints, runs
from common.hardware import choose_precision
from common.training import Run

CPU = torch.device("cpu")
FP32 = choose_precision("off", CPU)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def checkpoint_of(network: nn.Module, **changes) -> dict:
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    return {"model": weights, "config": {}, "preprocessing": {}, "split": {}} | changes


def load(tmp_path, state: dict, make=lambda checkpoint: small()) -> checkpoints.TrainedModel:
    torch.save(state, tmp_path / "best.pt")
    return checkpoints.load_trained(tmp_path / "best.pt", CPU, FP32, make)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_weights_of_a_wrapped_network_load(tmp_path, prefix):
    network = small()
    state = checkpoint_of(network)
    state["model"] = {prefix + name: value for name, value in state["model"].items()}
    loaded = load(tmp_path, state).network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_a_network_with_a_part_called_module_keeps_its_names():
    network = nn.Module()
    network.module = nn.Linear(1, 1)
    checkpoints.load_weights(network, {"module.weight": torch.ones(1, 1), "module.bias": torch.ones(1)}, "x")
    assert network.module.weight.item() == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda s: s["model"].pop("0.weight"),
            "1 of its 7 names are missing, 0 are unknown (0.weight is missing)",
        ),
        (
            lambda s: s["model"].update(head=torch.ones(1)),
            "0 of its 7 names are missing, 1 are unknown (head is",
        ),
        (lambda s: s["model"].update({"0.bias": torch.ones(3)}), "0.bias has shape (3,), not (2,)"),
        (
            lambda s: s["model"].update({"0.bias": torch.tensor([1, torch.nan])}),
            "0.bias holds NaN or infinite",
        ),
        (lambda s: s["model"].update({"0.bias": 1}), "holds no weights"),
        (lambda s: s.update(model=[1]), '"model" should be an object'),
        (lambda s: s.update(config=None), '"config" should be an object, found null'),
        (
            lambda s: s["config"].update(checkpointing=torch.ones(2)),
            '"checkpointing" should be true or false or a text',
        ),
        (lambda s: s.pop("split"), '"split" is missing'),
        (lambda s: s.update(preprocessing=[1]), '"preprocessing" should be an object'),
        (lambda s: s.update(ema={"average": 1}), '"average" should be an object'),
        (lambda s: s.update(ema={"average": {"0.weight": torch.ones(1)}}), "6 of its 7 names are missing"),
    ],
)
def test_damaged_weights_end_in_a_sentence_with_the_file(tmp_path, change, problem):
    state = checkpoint_of(small())
    change(state)
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        load(tmp_path, state)
    assert str(tmp_path / "best.pt") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"bias": torch.ones(2, 2)}, {"weight": None}, {"more": torch.ones(1)}])
def test_a_network_gets_all_weights_or_none(change):
    network, weights = nn.Linear(3, 2), nn.Linear(3, 2).state_dict()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    changed = {name: value for name, value in (weights | change).items() if value is not None}
    with pytest.raises(ValueError, match="a.pt: the weights do not fit the network"):
        checkpoints.load_weights(network, changed, "a.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    checkpoints.load_weights(network, weights, "a.pt")
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("error", [KeyError("width"), TypeError("no number"), RuntimeError("size\nmore")])
def test_a_configuration_of_which_no_network_can_be_made(tmp_path, error):
    def make(checkpoint):
        raise error

    with pytest.raises(ValueError, match="best.pt: ") as caught:
        load(tmp_path, checkpoint_of(small()), make)
    assert "\n" not in str(caught.value)


# ---- of the tasks ----

SPACING = {"spacing_mm": [1.0, 1.0, 1.0]}


def lung(**changes):
    config = {
        "model": "UNet",
        "base_features": 4,
        "bilinear": True,
        "norm": "batch",
        "deep_supervision": False,
    }
    config |= {"checkpointing": False, "image_size": 32, "batch_size": 2}
    notes = {"window_hu": [-1000.0, 300.0], "pixel_mm": 1.0, "scale": 1.0, "data_path": "x"} | changes
    return checkpoint_of(lung_tumor.model.get_model(config), config=config, preprocessing=notes)


def spine(**changes):
    config = {"model": "SegResNet", "init_filters": 8, "checkpointing": False, "labels": "binary"}
    config |= {"patch_size": [32, 32, 32], "intensity": "hu"}
    state = checkpoint_of(
        verse_spine.networks.get_model(config), config=config, preprocessing=SPACING | changes
    )
    return state | {"stage": "segmentation", "num_outputs": 1}


def organs(**changes):
    config = {
        "model": "SegResNet",
        "checkpointing": False,
        "deep_supervision": False,
        "patch_size": [32, 32, 32],
    }
    notes = SPACING | {"modality": "ct", "labelled": [1], "scaling": [-1.0, 1.0, 0.0, 1.0]} | changes
    network = amos_lha.networks.get_model(config, (1, 1, 1))
    return checkpoint_of(network, config=config, preprocessing=notes) | {"stage": "amos_lha"}


def head(**changes):
    config = {"model": "unet", "dimension": "3d", "patch_size": [16, 16, 16], "base_chan": 4}
    notes = SPACING | {"dataset": "Hippocampus", "localiser": None} | changes
    network = amygdala.model.get_model(config)
    return checkpoint_of(network, config=config, preprocessing=notes) | {"stage": "amygdala"}


def atrium(**changes):
    config = {"backbone": "tiny", "pooling": "gmp", "scales": [1.0]}
    notes = {"dataset": "LASC", "channels": ["lge"], "pixel_mm": 1.25, "step": 1, "threshold": {"seg": 0.4}}
    split = {"split": {"train": ["a"], "val": ["b"], "test": []}}
    network = wsss_medical.model.get_model(config)
    state = checkpoint_of(network, config=config, preprocessing=notes | changes)
    return state | split | {"stage": "wsss_medical"}


def load_spine(path):
    return verse_spine.networks.load_trained(path, CPU, FP32, "segmentation")


TASKS = {
    "lung": (lung, lambda path: lung_tumor.model.load_trained(path, CPU, FP32)),
    "spine": (spine, load_spine),
    "organs": (organs, lambda path: amos_lha.networks.load_trained(path, CPU, FP32)),
    "head": (head, lambda path: amygdala.model.load_trained(path, CPU, FP32)),
    "atrium": (atrium, lambda path: wsss_medical.model.load_trained(path, CPU, FP32)),
}


@pytest.mark.parametrize("reader", TASKS)
@pytest.mark.parametrize("writer", TASKS)
def test_a_checkpoint_loads_in_its_own_task_only(tmp_path, writer, reader):
    torch.save(TASKS[writer][0](), tmp_path / "best.pt")
    if reader == writer:
        TASKS[reader][1](tmp_path / "best.pt")
        return
    with pytest.raises(ValueError, match="best.pt: not "):
        TASKS[reader][1](tmp_path / "best.pt")


@pytest.mark.parametrize(
    ("task", "change", "problem"),
    [
        ("lung", {"window_hu": [float("nan"), 300.0]}, "window_hu in it: expected 2 number(s)"),
        ("lung", {"window_hu": [300.0, -1000.0]}, "window_hu in it: window 300 to -1000"),
        ("lung", {"pixel_mm": "1"}, "pixel_mm in it: expected 1 number(s)"),
        ("lung", {"pixel_mm": 0.0}, "pixel_mm in it: expected 1 number(s) above 0"),
        ("lung", {"data_path": None}, '"data_path" should be a text'),
        ("spine", {"data_path": 7}, '"data_path" should be a text'),
        ("spine", {"spacing_mm": [1.0, 0.0, 1.0]}, "spacing_mm in it: expected 3 number(s) above 0"),
        ("organs", {"spacing_mm": [1.0, 1.0, -1.0]}, "spacing_mm in it: expected 3 number(s) above 0"),
        ("spine", {"spacing_mm": [1.0, 1.0]}, "spacing_mm in it: expected 3 number(s)"),
        ("spine", {"hu_range": [float("nan"), 1.0]}, "hu_range in it: expected 2 number(s)"),
        ("organs", {"scaling": [0.0, 1.0]}, "scaling in it: expected 4 number(s)"),
        ("organs", {"labelled": None}, '"labelled" should be a list'),
        ("head", {"dataset": "Amygdala"}, "its localiser: holds no weights"),
        ("head", {"dataset": "Liver"}, "its dataset is 'Liver'"),
        ("atrium", {"channels": [1]}, '"channels": expected a list of names'),
        ("atrium", {"pixel_mm": float("nan")}, '"pixel_mm": expected 1 number(s)'),
        ("atrium", {"pixel_mm": -1.25}, '"pixel_mm" is -1.25, a size above 0'),
        ("atrium", {"threshold": {"seg": "0.4"}}, "threshold in it: expected 1 number(s)"),
    ],
)
def test_notes_of_a_checkpoint_that_cannot_be_used(tmp_path, task, change, problem):
    torch.save(TASKS[task][0](**change), tmp_path / "best.pt")
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        TASKS[task][1](tmp_path / "best.pt")
    assert "best.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "key"), [("lung", "image_size"), ("lung", "batch_size"), ("head", "patch_size")]
)
@pytest.mark.parametrize("value", [None, 0, -8, 7.5, "16", "left out"])
def test_sizes_of_a_checkpoint_that_cannot_be_used(tmp_path, task, key, value):
    state = TASKS[task][0]()
    state["config"][key] = [value] * 3 if key == "patch_size" else value
    if value == "left out":
        del state["config"][key]
    torch.save(state, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=f"best.pt: .*{key}"):
        TASKS[task][1](tmp_path / "best.pt")


def test_a_spine_network_without_its_scaling_of_grey_values(tmp_path):
    state = spine()
    del state["config"]["intensity"]
    torch.save(state, tmp_path / "best.pt")
    with pytest.raises(ValueError, match='best.pt: config: "intensity" is missing, expected a text'):
        load_spine(tmp_path / "best.pt")


def test_the_parts_of_a_split_are_lists_of_names_and_may_be_missing(tmp_path):
    state = checkpoint_of(small(), split={"train": ["a"]})
    assert load(tmp_path, state).split == {"train": ["a"], "val": [], "test": []}
    for names in (7, [7], "a", {"a": 1}):
        with pytest.raises(ValueError, match='best.pt: "test" of its split: expected a list of names'):
            load(tmp_path, state | {"split": {"test": names}})


# ---- going on with a run ----


def run_of(folder, network, resumed=None) -> Run:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    parts = {"model": network, "optimizer": optimizer, "ema": None}
    options = {"flags": {}, "notes": {"preprocessing": {}, "split": {}}, "epochs": 1, "device": CPU}
    return Run(folder, {}, parts=parts, num_batches=2, accumulate=1, resumed=resumed, **options)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("rng"), "a part is missing or damaged (KeyError: 'rng')"),
        (lambda s: s["position"].pop("epoch"), "a part is missing or damaged (KeyError: 'epoch')"),
        (lambda s: s.update(optimizer=3), "a part is missing or damaged (AttributeError"),
        (lambda s: s["rng"].update(torch=torch.zeros(3)), "a part is missing or damaged (TypeError"),
        (lambda s: s["model"].pop("0.bias"), "1 of its 7 names are missing"),
        (lambda s: s["model"]["0.bias"].fill_(torch.nan), "0.bias holds NaN or infinite weights"),
    ],
)
def test_a_damaged_run_is_not_resumed(tmp_path, change, problem):
    network = small()
    run = run_of(tmp_path / "a", network)
    run.save()
    state = checkpoints.load_checkpoint(run.last)
    run_of(tmp_path / "a", small(), state)
    change(state)
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        run_of(tmp_path / "a", small(), state)
    assert "last.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s["position"].update(epoch=None), '"epoch" should be a number, found null'),
        (lambda s: s["position"].update(best_epoch=[]), '"best_epoch" should be a number'),
        (lambda s: s["position"].update(history=7), '"history" should be a list'),
        (
            lambda s: s["position"].update(history=[{"epoch": 0}, 7]),
            "a row of its history: expected an object",
        ),
        (lambda s: s.update(flags=None), '"flags" should be an object'),
        (lambda s: s.update(epochs=[]), '"epochs" should be a number'),
        (lambda s: s.update(position=3), '"position" should be an object'),
    ],
)
def test_a_run_whose_position_is_damaged_is_not_resumed(tmp_path, change, problem):
    run = run_of(tmp_path / "a", small())
    run.save()
    (tmp_path / "a" / "log.txt").touch()
    parser, words = runs.ArgumentParser(), ["--resume", str(tmp_path / "a")]
    parser.add_argument("--resume")
    runs.resume(parser, words, same=())
    state = checkpoints.load_checkpoint(run.last)
    change(state)
    torch.save(state, run.last)
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        runs.resume(parser, words, same=())
    assert "last.pt" in str(caught.value) and "\n" not in str(caught.value)
