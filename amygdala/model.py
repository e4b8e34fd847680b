"""Networks of this task by name, the flags of each, and a trained network with what it needs to predict."""

import re
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

import torch
from torch import Tensor, nn

from amygdala.structures import NUM_CLASSES
from amygdala.unet import UNet
from amygdala.unetpp import UNetPlusPlus
from common import checkpoints
from common.checkpoints import TrainedModel
from common.config import Switch, fraction, non_negative_int, positive_int
from common.conv_blocks import ACTIVATIONS, BLOCKS, NORMS
from common.hardware import Precision
from common.layers import check_image
from common.swin_unetr import SwinUNETR
from common.unetr import UNETR
from common.vnet import VNet

MODELS_3D = ("unet", "resunet", "unetpp", "attention_unet", "vnet", "medformer", "unetr", "swin_unetr")
MODELS_2D = ("unet", "attention_unet", "medformer")
MODELS = {"2d": MODELS_2D, "3d": MODELS_3D}
POOLED = ("unet", "resunet", "unetpp", "attention_unet")  # U-Nets of convolution blocks and max pooling
DIMENSIONS = ("2d", "3d")
FEATURE_SIZES = (12, 24, 48)  # of swin_unetr
PROJECTIONS = ("depthwise", "linear")  # of medformer
MEDFORMER_ACTIVATIONS = ("relu", "leaky_relu", "gelu")
NOT_ARCHITECTURE = ("checkpointing",)  # a resumed run may change it


class SliceBySlice(nn.Module):
    """A 2-D network on the slices of a volume, each by itself: (N, C, D, H, W) -> (N, K, D, H, W).

    All slices go through the network as one batch. A network that returns a list in training gives a list.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.multiple = (1, *network.multiple)

    @property
    def checkpointing(self) -> bool:
        return self.network.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.network.checkpointing = value

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        check_image(image, image.shape[1] if image.ndim > 1 else 1, ndim=3)
        batch, depth = image.shape[0], image.shape[2]
        outputs = self.network(image.transpose(1, 2).flatten(0, 1))

        def volume(logits: Tensor) -> Tensor:
            return logits.unflatten(0, (batch, depth)).transpose(1, 2)

        return [volume(o) for o in outputs] if isinstance(outputs, (list, tuple)) else volume(outputs)


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
    if dimension not in MODELS or model not in MODELS[dimension]:
        known = "; ".join(f"{d}: {', '.join(MODELS[d])}" for d in reversed(DIMENSIONS))
        raise ValueError(f"there is no {model} in {dimension}; take {known}")
    net = parser.add_argument_group(f"model ({model}, {dimension})")
    ndim = int(dimension[0])
    axes, example = ("z y x", "1x2x2") if ndim == 3 else ("y x", "1x2")
    if model in (*POOLED, "medformer", "vnet"):
        net.add_argument(
            "--base_chan",
            type=positive_int,
            default=16 if model == "vnet" else 32,
            help="number of channels of the first level; memory grows in proportion, weights with the square",
        )
        net.add_argument(
            "--norm",
            choices=NORMS,
            default="in",
            help="normalisation: in = each channel of each image by itself, bn = over the batch, which needs "
            "batches of 8 or more, ln = over the channels of each voxel",
        )
        net.add_argument(
            "--act",
            choices=MEDFORMER_ACTIVATIONS if model == "medformer" else ACTIVATIONS,
            default="elu" if model == "vnet" else "relu",
            help="activation function behind the norms",
        )
        net.add_argument(
            "--down_scale",
            type=sides,
            nargs=4,
            default=["2"] * 4,
            metavar="SCALE",
            help="by what the four steps down divide the grid: a number for all axes, or one for each, "
            f"{axes}, such as {example}; 1 leaves an axis alone, which suits thick slices",
        )
    if model in (*POOLED, "medformer"):
        net.add_argument(
            "--conv_block",
            choices=("BasicBlock",) if model == "medformer" else BLOCKS,
            default="BasicBlock" if model in ("resunet", "medformer") else "SingleConv",
            help="convolution block: SingleConv = convolution, norm, activation, BasicBlock = two "
            "convolutions with a shortcut, which takes two to three times the weights",
        )
        net.add_argument(
            "--kernel_size",
            type=sides,
            nargs=5,
            default=["3"] * 5,
            metavar="KERNEL",
            help="sides of the convolutions of the five levels, finest first, odd: a number for all axes, or "
            f"one for each, {axes}, such as {example.replace('2', '3')}",
        )
    if model == "medformer":
        _add_medformer_flags(net, ndim)
    if model == "vnet":
        net.add_argument(
            "--dropout",
            type=fraction,
            default=0.5,
            help="share of the channels, 0 to 1, that training leaves out of the skips and of the two "
            "coarsest stages",
        )
    if model == "unetr":
        _add_unetr_flags(net)
    if model == "swin_unetr":
        net.add_argument(
            "--feature_size",
            type=int,
            choices=FEATURE_SIZES,
            default=24,
            help="number of channels of the first level, doubled at each deeper one; 48 takes four times the "
            "weights of 24",
        )
    net.add_argument(
        "--checkpointing",
        action=Switch,
        default=model == "swin_unetr",
        help="compute activations a second time in the backward pass instead of keeping them, which takes "
        "much less memory and about a third more time",
    )


def _add_unetr_flags(net) -> None:
    numbers = {
        "feature_size": (16, "number of channels of the decoder's finest level, doubled at each coarser one"),
        "hidden_size": (768, "number of channels of a token, a multiple of --num_heads"),
        "mlp_dim": (3072, "number of channels inside the MLP of each transformer layer"),
        "num_heads": (12, "number of attention heads"),
    }
    for name, (default, text) in numbers.items():
        net.add_argument(f"--{name}", type=positive_int, default=default, help=text)
    net.add_argument(
        "--position_grid",
        type=positive_int,
        nargs=3,
        default=[6, 6, 6],
        metavar=("Z", "Y", "X"),
        help="size, z y x, of the learned table of positions: the sides of --patch_size divided by 16; for "
        "other sizes the table is interpolated",
    )


def _add_medformer_flags(net, ndim: int) -> None:
    deep = 320 if ndim == 3 else 512
    stages = {
        "chan_num": (
            positive_int,
            [64, 128, 256, deep, 256, 128, 64, 32],
            "number of channels of the four stages down and the four stages up",
        ),
        "conv_num": (
            non_negative_int,
            [2, 1, 0, 0, 0, 1, 2, 2],
            "number of convolution blocks in each of the eight stages",
        ),
        "trans_num": (
            non_negative_int,
            [0, 1, 4, 6, 4, 1, 0, 0],
            "number of attention blocks in each of the eight stages",
        ),
        "num_heads": (
            positive_int,
            [1, 4, 8, deep // 32, 8, 4, 1, 1],
            "number of attention heads in each of the eight stages; must divide the stage's --chan_num",
        ),
    }
    for name, (kind, default, text) in stages.items():
        net.add_argument(f"--{name}", type=kind, nargs=8, default=default, metavar="N", help=text)
    net.add_argument(
        "--map_size",
        type=positive_int,
        nargs=ndim,
        default=[4, 4, 4] if ndim == 3 else [3, 3],
        metavar=("Z", "Y", "X")[-ndim:],
        help="size of the semantic map, whose voxels sum up the image; no more than the coarsest grid, which "
        "is --patch_size divided by 16",
    )
    numbers = {
        "expansion": (4 if ndim == 3 else 2, "how many times wider the MLP of an attention block is inside"),
        "fusion_depth": (2, "number of transformer layers that fuse the maps of all scales"),
        "fusion_dim": (deep, "number of channels of these layers, a multiple of --fusion_heads"),
        "fusion_heads": (deep // 32, "number of attention heads of these layers"),
    }
    for name, (default, text) in numbers.items():
        net.add_argument(f"--{name}", type=positive_int, default=default, help=text)
    for name, what in {"attn_drop": "attention weights", "proj_drop": "attention blocks' outputs"}.items():
        text = f"share of the {what}, 0 to 1, that training sets to 0"
        net.add_argument(f"--{name}", type=fraction, default=0.0, help=text)
    net.add_argument(
        "--proj_type",
        choices=PROJECTIONS,
        default="depthwise",
        help="how queries and values are made from the image's features: depthwise = by a depthwise and a "
        "1x1x1 convolution, linear = by a 1x1x1 convolution",
    )
    net.add_argument(
        "--aux_loss",
        action=Switch,
        default=True,
        help="in training also predict at a quarter of the resolution, and add the loss of that prediction",
    )


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
        from amygdala.medformer import MedFormer

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
        config, found = checkpoint["config"], checkpoint.get("stage", "another task")
        if found != "amygdala" or config.get("model") not in MODELS.get(config.get("dimension"), ()):
            raise ValueError(f"not weights of amygdala/train.py but of {found}; swapped?")
        return get_model(config)

    return checkpoints.load_trained(weights, device, precision, make_network)
