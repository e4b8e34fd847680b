"""The network of wsss_medical by flag values and from files, and files that hold something else."""

import pytest
import torch
from test_mit import noise
from test_wetr import tiny

from common.checkpoints import save_checkpoint
from common.hardware import Precision
from common.mit import MixTransformer
from wsss_medical.model import ARCHITECTURE, get_model, load_trained

CONFIG = {"backbone": "tiny", "num_classes": 2, "pooling": "gmp", "cam_stages": [4], "contrast_weight": 0.0}
CPU = torch.device("cpu")
FULL = Precision("fp32", None, False, "")


def test_get_model():
    network = get_model(CONFIG | {"cam_stages": [4, 3], "pooling": "gap", "seg_detach": True})
    assert network.pooling == "gap" and network.seg_detach and network.cam_stages == [4, 3]
    assert not get_model(CONFIG | {"cam_stages": None, "epochs": 3}).aux_classifiers
    assert list(get_model(CONFIG | {"contrast_weight": 0.2}).aux_classifiers) == ["3"]
    assert set(ARCHITECTURE) == set(CONFIG) - {"num_classes"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone": "b9"}, "b9"),
        ({"pooling": "max"}, "gmp"),
        ({"cam_stages": [3]}, "take 4"),
        ({"cam_stages": [4, 1]}, "take 4"),
    ],
)
def test_unknown_choices(change, message):
    with pytest.raises(ValueError, match=message):
        get_model(CONFIG | change)


def trained(path, **changes):
    network = tiny()
    preprocessing = {"dataset": "LASC", "pixel_mm": 1.25, "step": 1, "channels": ["LGE"]}
    state = {
        "model": network.state_dict(),
        "config": CONFIG,
        "stage": "wsss_medical",
        "preprocessing": preprocessing,
    }
    state |= {"split": {"train": ["a"], "val": ["b"], "test": []}} | changes
    save_checkpoint(path, state)
    return network.eval()


def test_load_trained(tmp_path):
    network = trained(tmp_path / "best.pth")
    model = load_trained(tmp_path / "best.pth", CPU, FULL)
    assert model.config == CONFIG and model.preprocessing["dataset"] == "LASC" and not model.network.training
    image = noise(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.network(image).seg, network(image).seg)


@pytest.mark.parametrize("layout", ["bare", "wrapped", "distributed"])
def test_load_trained_from_weights_of_afa(tmp_path, layout):
    state = tiny(num_classes=21, embedding_dim=64).state_dict()
    if layout == "distributed":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": state, "iteration": 8000} if layout == "wrapped" else state, tmp_path / "wetr.pth")
    model = load_trained(tmp_path / "wetr.pth", CPU, FULL)
    assert model.config["backbone"] == "tiny" and model.config["num_classes"] == 21
    assert torch.equal(
        model.network.state_dict()["attn_proj.weight"],
        next(v for k, v in state.items() if "attn_proj.weight" in k),
    )
    assert model.preprocessing["channels"] is None and model.split["train"] == []


def test_checkpoints_of_something_else(tmp_path):
    encoder = MixTransformer("tiny").state_dict()
    trained(tmp_path / "other.pth", stage="lung_tumor")
    with pytest.raises(
        ValueError, match=r"other.pth: not weights of wsss_medical/dist_train.py but of lung_tumor"
    ):
        load_trained(tmp_path / "other.pth", CPU, FULL)
    torch.save(encoder, tmp_path / "mit.pth")
    with pytest.raises(ValueError, match="mit.pth: neither .* an encoder alone is for --pretrained"):
        load_trained(tmp_path / "mit.pth", CPU, FULL)
    weights = tiny().state_dict()
    weights["classifier.weight"] = weights["classifier.weight"] * torch.nan
    torch.save(weights, tmp_path / "wetr.pth")
    with pytest.raises(ValueError, match=r"wetr.pth: classifier.weight holds NaN"):
        load_trained(tmp_path / "wetr.pth", CPU, FULL)
