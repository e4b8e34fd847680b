"""The convolutions of MedFormer: norm and activation stand in front of them, nothing behind."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amygdala.depthwise import DepthwiseConv3d
from common.layers import BATCH_NORM, CONV, InstanceNorm

NORMS = ("in", "bn", "ln")
ACTIVATIONS = {  # in place of what a norm made, which nobody else reads
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, inplace=True),
    "gelu": nn.GELU,
}
PROJECTIONS = ("depthwise", "linear")
CONV_EPS = 1e-4  # of instance norms before a convolution of a block; elsewhere PyTorch's 1e-5
SQUEEZE = 4  # the gate of an MBConv has a quarter of its channels in between


@dataclass(frozen=True)
class Style:
    """What all blocks of a network share; see the arguments of `MedFormer`."""

    ndim: int = 3
    conv_block: str = "BasicBlock"
    norm: str = "in"
    act: str = "relu"
    expansion: int = 4
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    proj_type: str = "depthwise"

    def __post_init__(self) -> None:
        choices = {"conv_block": CONV_BLOCKS, "norm": NORMS, "act": ACTIVATIONS, "proj_type": PROJECTIONS}
        for name, valid in choices.items():
            if (value := getattr(self, name)) not in valid:
                raise ValueError(f"{name} is {value!r}; take {' or '.join(valid)}")

    def make_norm(self, channels: int, eps: float = 1e-5) -> nn.Module:
        """in: instance norm with nothing learned; bn: batch norm; ln: layer norm over the channels."""
        if self.norm == "in":
            return InstanceNorm(channels, affine=False, eps=eps)
        return BATCH_NORM[self.ndim](channels) if self.norm == "bn" else ChannelNorm(channels)

    def conv(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> nn.Module:
        """A convolution without bias that keeps the size; `kernel` has odd sides."""
        padding = tuple(side // 2 for side in kernel)
        return CONV[self.ndim](in_channels, out_channels, tuple(kernel), padding=padding, bias=False)

    def depthwise(self, channels: int, kernel: Sequence[int]) -> nn.Module:
        """The same of each channel by itself."""
        if self.ndim == 3:
            return DepthwiseConv3d(channels, tuple(kernel))
        padding = tuple(side // 2 for side in kernel)
        return nn.Conv2d(channels, channels, tuple(kernel), padding=padding, groups=channels, bias=False)

    def pointwise(self, in_channels: int, out_channels: int, bias: bool = False) -> nn.Module:
        """A convolution of one voxel."""
        return CONV[self.ndim](in_channels, out_channels, 1, bias=bias)

    def separable(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> nn.Sequential:
        """A convolution of each channel by itself, then one of one voxel, with nothing in between."""
        return nn.Sequential(
            self.depthwise(in_channels, kernel),
            self.pointwise(in_channels, out_channels),
        )

    def projection(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> nn.Module:
        """How attention reads features: `separable`, or one voxel by itself."""
        if self.proj_type == "linear":
            return self.pointwise(in_channels, out_channels)
        return self.separable(in_channels, out_channels, kernel)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, *spatial)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PreActConv(nn.Module):
    """Norm, activation, convolution (with `depthwise` of each channel by itself, as many as come in)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        style: Style,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        self.norm = style.make_norm(in_channels, CONV_EPS)
        self.act = ACTIVATIONS[style.act]()
        if depthwise:
            self.conv = style.depthwise(in_channels, kernel)
        else:
            self.conv = style.conv(in_channels, out_channels, kernel)

    def activated(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.activated(x))


class BasicBlock(nn.Module):
    """Two `PreActConv`, and a shortcut, which is a third one where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int], style: Style) -> None:
        super().__init__()
        self.conv1 = PreActConv(in_channels, out_channels, kernel, style)
        self.conv2 = PreActConv(out_channels, out_channels, kernel, style)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = PreActConv(in_channels, out_channels, kernel, style)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Cin, *spatial) -> (B, Cout, *spatial)."""
        if self.shortcut is None:
            return x + self.conv2(self.conv1(x))
        activated = self.conv1.activated(x)
        # A norm without weights gives both convolutions the same input, which is then kept only once.
        same = not list(self.shortcut.norm.parameters())
        shortcut = self.shortcut.conv(activated if same else self.shortcut.activated(x))
        return shortcut + self.conv2(self.conv1.conv(activated))


CONV_BLOCKS = {"BasicBlock": BasicBlock}


class ChannelGate(nn.Module):
    """Squeeze and excitation: x times a gate for each channel, found from the means of all channels."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        hidden = channels // SQUEEZE
        self.squeeze = style.pointwise(channels, hidden, bias=True)
        self.excite = style.pointwise(hidden, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))


class MBConv(nn.Module):
    """Inverted bottleneck: x + (C to e C, each channel convolved by itself, gate, back to C)."""

    def __init__(self, channels: int, kernel: Sequence[int], style: Style) -> None:
        super().__init__()
        inner = channels * style.expansion
        self.expand = PreActConv(channels, inner, (1,) * style.ndim, style)
        self.depthwise = PreActConv(inner, inner, kernel, style, depthwise=True)
        self.gate = ChannelGate(inner, style)
        self.norm = style.make_norm(inner, CONV_EPS)
        self.reduce = style.pointwise(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reduce(self.norm(self.gate(self.depthwise(self.expand(x)))))


class PatchMerging(nn.Module):
    """The voxels of each block of `scale` as channels, norm, `separable` convolution.

    The channels are those of the block's first voxel, then those of the next one along the last axis.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], scale: Sequence[int], style: Style
    ) -> None:
        super().__init__()
        self.scale = tuple(scale)
        merged = in_channels * prod(scale)
        self.norm = style.make_norm(merged)
        self.reduce = style.separable(merged, out_channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Cin, d, h, w) -> (B, Cout, d / scale, ...); `scale` divides the sides."""
        corners = [
            x[(..., *(slice(offset, None, step) for offset, step in zip(offsets, self.scale, strict=True)))]
            for offsets in product(*map(range, self.scale))
        ]
        return self.reduce(self.norm(torch.cat(corners, dim=1)))


def per_axis(value: int | Sequence[int], ndim: int, name: str) -> tuple[int, ...]:
    """3 -> (3, 3, 3); a sequence must have `ndim` entries, else a ValueError that says `name`."""
    sides = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(sides) != ndim or min(sides) < 1:
        raise ValueError(f"{name}: {value} is neither a positive number nor one for each of {ndim} axes")
    return sides
