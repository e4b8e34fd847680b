"""Networks of this task by name, and a trained network with what it needs to predict."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from amos_lha.lha_net import LHANet
from amos_lha.organs import NUM_CLASSES
from common import checkpoints
from common.checkpoints import TrainedModel
from common.files import check_keys, check_numbers, check_sizes
from common.hardware import Precision
from common.nnunet import PlainUNet, ResEncUNet, strides_for
from common.segformer3d import SegFormer3D
from common.segresnet import SegResNet
from common.swin_unetr import SwinUNETR

MODELS = ("LHANet", "UNet", "ResEncUNet", "SegResNet", "SegFormer3D", "SwinUNetR")
# Flags that decide the shape of the weights; a run can only be resumed with the same ones.
ARCHITECTURE = ("model", "preset", "heads", "attention", "router", "deep_supervision", "feature_size")
HEADS = ("size_aware", "shared")  # of LHANet
FEATURE_SIZES = (12, 24, 48)  # of SwinUNetR
SEGRESNET_WIDTH = 16


def get_model(config: dict, spacing_mm: Sequence[float]) -> nn.Module:
    """The network that `config` (flag values, as in a checkpoint) names, for voxels of `spacing_mm` (z y x).

    It takes (N, 1, d, h, w) of any size and gives logits (N, 16, d, h, w); in training with deep supervision
    LHANet, UNet and ResEncUNet give a list, see there.
    """
    name, policy = config["model"], config["checkpointing"]
    levels = {"strides": strides_for(spacing_mm), "deep_supervision": config["deep_supervision"]}
    if name == "LHANet":
        of_its_own = {key: config[key] for key in ("heads", "attention", "router")}
        return LHANet(config["preset"], checkpointing=policy, **of_its_own, **levels)
    recompute = policy not in (False, "none")  # the others have one policy
    if name in ("UNet", "ResEncUNet"):
        network = PlainUNet if name == "UNet" else ResEncUNet
        return network(1, NUM_CLASSES, checkpointing=recompute, **levels)
    if name == "SegResNet":
        return SegResNet(1, NUM_CLASSES, width=SEGRESNET_WIDTH, checkpointing=recompute)
    if name == "SegFormer3D":
        return SegFormer3D(1, NUM_CLASSES, checkpointing=recompute)
    if name == "SwinUNetR":
        return SwinUNETR(1, NUM_CLASSES, width=config["feature_size"], checkpointing=recompute)
    raise ValueError(f"unknown model {name!r}; take one of {', '.join(MODELS)}")


def load_trained(weights: str | Path, device: torch.device, precision: Precision) -> TrainedModel:
    """Rebuild a network from a checkpoint of train.py.

    Raises:
        FileNotFoundError, ValueError: missing, refused, or a checkpoint of something else.
    """

    def make_network(checkpoint: dict) -> nn.Module:
        checkpoints.require_stage(checkpoint, "amos_lha", MODELS, "amos_lha/train.py")
        notes = checkpoint["preprocessing"]
        check_keys(
            notes, {"modality": str, "labelled": list, "scaling": list | tuple | None}, "preprocessing"
        )
        check_numbers(notes["spacing_mm"], 3, "spacing_mm in it", above=0)
        check_sizes(checkpoint["config"]["patch_size"], 3, "patch_size in it")
        if notes["scaling"] is not None:
            check_numbers(notes["scaling"], 4, "scaling in it")
        return get_model(checkpoint["config"], notes["spacing_mm"])

    return checkpoints.load_trained(weights, device, precision, make_network)
