"""Networks of this task by name, and a trained network with what it needs to predict."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common import checkpoints
from common.checkpoints import TrainedModel
from common.files import check_keys, check_numbers, check_sizes
from common.hardware import Precision
from common.segformer3d import SegFormer3D
from common.segresnet import SegResNet
from common.swin_unetr import SwinUNETR
from verse_spine.attention_unet3d import AttentionUNet3D
from verse_spine.context_res_unet import ContextResUNet
from verse_spine.labels import num_outputs
from verse_spine.unet import StridedAttentionUNet, StridedUNet, StridedUNetFull

MODELS = (
    "UNet",
    "UNetFull",
    "AttentionUNet",
    "AttentionUNet3D",
    "SegFormer3D",
    "SwinUNetR",
    "ContextResUNet",
    "SegResNet",
)
FEATURE_SIZES = (12, 24, 48)  # of SwinUNetR
INTENSITIES = ("hu", "patch")
# Flags that decide the shape of the weights; a run can only be resumed with the same ones.
ARCHITECTURE = ("model", "feature_size", "init_filters")


def get_model(config: dict, num_outputs: int = 1) -> nn.Module:
    """The network that `config` (flag values, as in a checkpoint) names: (N, 1, d, h, w) of any size ->
    logits (N, num_outputs, d, h, w)."""
    name, checkpointing = config["model"], uses_checkpointing(config)
    if name == "SwinUNetR":
        return SwinUNETR(1, num_outputs, width=config["feature_size"], checkpointing=checkpointing)
    if name == "SegResNet":
        return SegResNet(1, num_outputs, width=config["init_filters"], checkpointing=checkpointing)
    network = {
        "UNet": StridedUNet,
        "UNetFull": StridedUNetFull,
        "AttentionUNet": StridedAttentionUNet,
        "AttentionUNet3D": AttentionUNet3D,
        "SegFormer3D": SegFormer3D,
        "ContextResUNet": ContextResUNet,
    }[name]
    return network(1, num_outputs, checkpointing=checkpointing)


def uses_checkpointing(config: dict) -> bool:
    """What --checkpointing says; if it says nothing, only SwinUNetR, which would not fit 4 GB without."""
    if config["checkpointing"] is None:
        return config["model"] == "SwinUNetR"
    return config["checkpointing"]


def scale_hu(image: Tensor) -> Tensor:
    """HU to network input: [-1000, 2000] -> [-1, 1], clamped; the same for every scan, so HU keep their
    meaning."""
    return (image.float().clamp(-1000, 2000) - 500) / 1500


def scale_by_range(image: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """[low, high] -> [-1, 1]: what `--intensity patch` does to each patch in training, and in prediction to
    all that is searched. HU lose their meaning: one metal implant changes everything. For comparison only."""
    return 2 * (image.float() - low) / (high - low + 1e-6) - 1


def scale_patches(image: Tensor, intensity: str) -> Tensor:
    """Training patches (N, 1, d, h, w) in HU -> network input, by `--intensity`."""
    if intensity == "hu":
        return scale_hu(image)
    flat = image.float().flatten(1)
    low, high = (v.view(-1, 1, 1, 1, 1) for v in (flat.amin(1), flat.amax(1)))
    return scale_by_range(image, low, high)


def load_trained(weights: str | Path, device: torch.device, precision: Precision, stage: str) -> TrainedModel:
    """Rebuild a network from a checkpoint of train_heatmap.py or train_segmentation.py.

    Args:
        stage: "heatmap" or "segmentation", which the checkpoint must be.

    Raises:
        FileNotFoundError, ValueError: missing, refused, or a checkpoint of something else.
    """

    def make_network(checkpoint: dict) -> nn.Module:
        checkpoints.require_stage(checkpoint, stage, MODELS, f"verse_spine/train_{stage}.py")
        check_numbers(checkpoint["preprocessing"]["spacing_mm"], 3, "spacing_mm in it", above=0)
        check_sizes(checkpoint["config"]["patch_size"], 3, "patch_size in it")
        check_numbers(checkpoint["preprocessing"].get("hu_range", (0, 1)), 2, "hu_range in it")
        intensity = str if stage == "segmentation" else str | None
        check_keys(checkpoint["config"], {"intensity": intensity, "target": str | None}, "config")
        if stage == "segmentation" and checkpoint["num_outputs"] != num_outputs(
            checkpoint["config"]["labels"]
        ):
            raise ValueError(f"num_outputs {checkpoint['num_outputs']} in it does not fit its labels")
        return get_model(checkpoint["config"], checkpoint["num_outputs"])

    return checkpoints.load_trained(weights, device, precision, make_network)
