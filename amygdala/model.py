"""Networks of this task by name, the flags of each, and a trained network with what it needs to predict."""

import re
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

import torch
from torch import nn

from amygdala.localiser import make_network as make_localiser
from amygdala.medformer import MedFormer
from amygdala.medformer_blocks import ACTIVATIONS as MEDFORMER_ACTIVATIONS
from amygdala.medformer_blocks import PROJECTIONS
from amygdala.structures import DATASETS, NUM_CLASSES
from amygdala.unet import UNet
from common import checkpoints
from common.checkpoints import TrainedModel
from common.config import Switch, fraction, non_negative_int, positive_int
from common.conv_blocks import ACTIVATIONS, BLOCKS, NORMS
from common.files import check_keys, check_numbers, check_sizes
from common.hardware import Precision
from common.layers import SliceBySlice
from common.swin_unetr import SwinUNETR
from common.unetpp import UNetPlusPlus
from common.unetr import UNETR
from common.vnet import VNet

MODELS_3D = ("unet", "resunet", "unetpp", "attention_unet", "vnet", "medformer", "unetr", "swin_unetr")
MODELS_2D = ("unet", "attention_unet", "medformer")
MODELS = {"3d": MODELS_3D, "2d": MODELS_2D}
POOLED = ("unet", "resunet", "unetpp", "attention_unet")  # U-Nets of convolution blocks and max pooling
FEATURE_SIZES = (12, 24, 48)  # of swin_unetr
NOT_ARCHITECTURE = ("checkpointing",)  # a resumed run may change it

ZYX = ("Z", "Y", "X")
HELP = {  # of the flags of the networks; of the same name in two families with the model in front
    "base_chan": "number of channels of the first level; memory grows in proportion, weights with the square",
    "norm": "normalisation: in = each channel of each image by itself, bn = over the batch, which needs "
    "batches of 8 or more, ln = over the channels of each voxel",
    "act": "activation function behind the norms",
    "down_scale": "by what the four steps down divide the grid: a number for all axes, or one for each, "
    "{axes}, such as {scale}; 1 leaves an axis alone, which suits thick slices",
    "conv_block": "convolution block: SingleConv = convolution, norm, activation, BasicBlock = two "
    "convolutions with a shortcut, which takes two to three times the weights",
    "kernel_size": "sides of the convolutions of the five levels, finest first, odd: a number for all axes, "
    "or one for each, {axes}, such as {kernel}",
    "chan_num": "number of channels of the four stages down and the four stages up",
    "conv_num": "number of convolution blocks in each of the eight stages",
    "trans_num": "number of attention blocks in each of the eight stages",
    "medformer num_heads": "number of attention heads in each of the eight stages; must divide the stage's "
    "--chan_num",
    "map_size": "size of the semantic map, whose voxels sum up the image; no more than the coarsest grid, "
    "which is --patch_size divided by 16",
    "expansion": "how many times wider the MLP of an attention block is inside",
    "fusion_depth": "number of transformer layers that fuse the maps of all scales",
    "fusion_dim": "number of channels of these layers, a multiple of --fusion_heads",
    "fusion_heads": "number of attention heads of these layers",
    "attn_drop": "share of the attention weights, 0 to 1, that training sets to 0",
    "proj_drop": "share of the attention blocks' outputs, 0 to 1, that training sets to 0",
    "proj_type": "how queries and values are made from the image's features: depthwise = by a depthwise and "
    "a 1x1x1 convolution, linear = by a 1x1x1 convolution",
    "aux_loss": "in training also predict at a quarter of the resolution, and add the loss of that "
    "prediction",
    "dropout": "share of the channels, 0 to 1, that training leaves out of the skips and of the two coarsest "
    "stages",
    "unetr feature_size": "number of channels of the decoder's finest level, doubled at each coarser one",
    "hidden_size": "number of channels of a token, a multiple of --num_heads",
    "mlp_dim": "number of channels inside the MLP of each transformer layer",
    "num_heads": "number of attention heads",
    "position_grid": "size, z y x, of the learned table of positions: the sides of --patch_size divided by "
    "16; for other sizes the table is interpolated",
    "feature_size": "number of channels of the first level, doubled at each deeper one; 48 takes four times "
    "the weights of 24",
    "checkpointing": "compute activations a second time in the backward pass instead of keeping them, which "
    "takes much less memory and about a third more time",
}


def sides(text: str) -> str:
    """For argparse's `type=`: '2', '1x2x2', or '[1, 2, 2]' of a YAML list -> '2' or '1x2x2'."""
    numbers = re.findall(r"\d+", text)
    if not re.fullmatch(r"\[?\s*\d+(\s*[x,]\s*\d+)*\s*\]?", text) or any(int(n) < 1 for n in numbers):
        raise ArgumentTypeError(f"{text!r} is neither a number such as 2 nor several such as 1x2x2")
    return "x".join(numbers)


def add_architecture_flags(parser: ArgumentParser, model: str, dimension: str) -> None:
    """The flags of one family of networks, and of no other, so that a key of another one is an error.

    Raises:
        ValueError: there is no such model in this dimension.
    """
    if model not in MODELS.get(dimension, ()):
        known = "; ".join(f"{d}: {', '.join(models)}" for d, models in MODELS.items())
        raise ValueError(f"there is no {model} in {dimension}; take {known}")
    net = parser.add_argument_group(f"model ({model}, {dimension})")
    is_3d = dimension == "3d"
    axes, example = ("z y x", "1x2x2") if is_3d else ("y x", "1x2")

    def add(name: str, default: object, **options) -> None:
        text = HELP.get(f"{model} {name}") or HELP[name]
        text = text.format(axes=axes, scale=example, kernel=example.replace("2", "3"))
        net.add_argument(f"--{name}", default=default, help=text, **options)

    def add_counts(**defaults: int) -> None:
        for name, default in defaults.items():
            add(name, default, type=positive_int)

    if model in (*POOLED, "medformer", "vnet"):
        add_counts(base_chan=16 if model == "vnet" else 32)
        add("norm", "in", choices=NORMS)
        acts = MEDFORMER_ACTIVATIONS if model == "medformer" else ACTIVATIONS
        add("act", "elu" if model == "vnet" else "relu", choices=acts)
        add("down_scale", ["2"] * 4, type=sides, nargs=4, metavar="SCALE")
    if model in (*POOLED, "medformer"):
        blocks = ("BasicBlock",) if model == "medformer" else BLOCKS
        default = "BasicBlock" if model in ("resunet", "medformer") else "SingleConv"
        add("conv_block", default, choices=blocks)
        add("kernel_size", ["3"] * 5, type=sides, nargs=5, metavar="KERNEL")
    if model == "medformer":
        deep = 320 if is_3d else 512
        for name, kind, default in (
            ("chan_num", positive_int, [64, 128, 256, deep, 256, 128, 64, 32]),
            ("conv_num", non_negative_int, [2, 1, 0, 0, 0, 1, 2, 2]),
            ("trans_num", non_negative_int, [0, 1, 4, 6, 4, 1, 0, 0]),
            ("num_heads", positive_int, [1, 4, 8, deep // 32, 8, 4, 1, 1]),
        ):
            add(name, default, type=kind, nargs=8, metavar="N")
        cells = [4, 4, 4] if is_3d else [3, 3]
        add("map_size", cells, type=positive_int, nargs=len(cells), metavar=ZYX[-len(cells) :])
        add_counts(expansion=4 if is_3d else 2)
        add_counts(fusion_depth=2, fusion_dim=deep, fusion_heads=deep // 32)
        add("attn_drop", 0.0, type=fraction)
        add("proj_drop", 0.0, type=fraction)
        add("proj_type", "depthwise", choices=PROJECTIONS)
        add("aux_loss", True, action=Switch)
    if model == "vnet":
        add("dropout", 0.5, type=fraction)
    if model == "unetr":
        add_counts(feature_size=16, hidden_size=768, mlp_dim=3072, num_heads=12)
        add("position_grid", [6, 6, 6], type=positive_int, nargs=3, metavar=ZYX)
    if model == "swin_unetr":
        add("feature_size", 24, type=int, choices=FEATURE_SIZES)
    add("checkpointing", model == "swin_unetr", action=Switch)


def architecture_defaults(model: str, dimension: str) -> dict:
    """The values of a family's flags that nobody gave."""
    parser = ArgumentParser(add_help=False)
    add_architecture_flags(parser, model, dimension)
    return vars(parser.parse_args([]))


def architecture(model: str, dimension: str) -> tuple[str, ...]:
    """Names of the flags that decide the weights and what they mean: a run is only resumed with the same."""
    names = (name for name in architecture_defaults(model, dimension) if name not in NOT_ARCHITECTURE)
    return ("model", "dimension", *names)


def get_model(config: dict) -> nn.Module:
    """The network that `config` names: "model", "dimension" ("2d" or "3d"), and the flags of its family.

    It takes (N, 1, D, H, W) of any size and gives logits (N, K, D, H, W), K = config["num_classes"] or 3; in
    training medformer with aux_loss gives a list of two. Flags that are left out have their defaults.

    Raises:
        ValueError: there is no such model in this dimension, or values do not fit together.
    """
    model, dimension = config["model"], config["dimension"]
    options = architecture_defaults(model, dimension)
    options |= {name: config[name] for name in options if name in config}
    num_classes, ndim = config.get("num_classes", NUM_CLASSES), int(dimension[0])
    for name in ("kernel_size", "down_scale"):
        if name in options:
            options[name] = [_numbers(word, ndim) for word in options[name]]
    if model in ("unet", "resunet", "attention_unet"):
        attention = model == "attention_unet"
        network = UNet(1, num_classes, ndim=ndim, attention=attention, **options)
    elif model == "medformer":
        network = MedFormer(1, num_classes, ndim=ndim, **options)
    elif model == "swin_unetr":
        options["width"] = options.pop("feature_size")
        network = SwinUNETR(1, num_classes, **options)
    else:
        network = {"unetpp": UNetPlusPlus, "vnet": VNet, "unetr": UNETR}[model](1, num_classes, **options)
    return SliceBySlice(network) if ndim == 2 else network


def _numbers(word: str, ndim: int) -> tuple[int, ...]:
    """'2' -> (2, 2, 2) for three axes, '1x2x2' -> (1, 2, 2)."""
    numbers = tuple(int(number) for number in word.split("x"))
    return numbers * ndim if len(numbers) == 1 else numbers


def load_trained(weights: str | Path, device: torch.device, precision: Precision) -> TrainedModel:
    """Rebuild a network from a checkpoint of train.py.

    Raises:
        FileNotFoundError, ValueError: missing, refused, or a checkpoint of something else.
    """

    def make_network(checkpoint: dict) -> nn.Module:
        config = checkpoint["config"]
        known = MODELS.get(config.get("dimension"), ())
        checkpoints.require_stage(checkpoint, "amygdala", known, "amygdala/train.py")
        notes = checkpoint["preprocessing"]
        check_keys(notes, {"dataset": str, "localiser": dict | None}, "preprocessing")
        check_numbers(notes["spacing_mm"], 3, "spacing_mm in it", above=0)
        check_sizes(config["patch_size"], 3, "patch_size in it")
        if notes["dataset"] not in DATASETS:
            raise ValueError(f"its dataset is {notes['dataset']!r}, expected {' or '.join(DATASETS)}")
        if DATASETS[notes["dataset"]].localised:
            localiser = notes["localiser"] or {}
            checkpoints.load_weights(make_localiser(), localiser.get("state"), "its localiser")
        return get_model(config)

    return checkpoints.load_trained(weights, device, precision, make_network)
