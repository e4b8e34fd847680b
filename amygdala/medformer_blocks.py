"""The blocks of MedFormer: norm and activation stand in front of convolutions, nothing behind."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.conv_blocks import NORMS, BasicBlock, PreActivationConv, make_activation, make_short_norm
from common.depthwise import DepthwiseConv3d
from common.layers import CONV, make_norm

CONV_BLOCKS = {"BasicBlock": BasicBlock}
ACTIVATIONS = ("relu", "leaky_relu", "gelu")
PROJECTIONS = ("depthwise", "linear")
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

    def make_norm(self, channels: int) -> nn.Module:
        """In front of attention and patch merging; unlike those of convolutions with PyTorch's eps."""
        return make_norm(NORMS[self.norm], channels, self.ndim)

    def convs(self, widths: Sequence[int], kernel: Sequence[int]) -> list[nn.Module]:
        """Convolution blocks from widths[0] to widths[1] channels, to widths[2], and so on."""
        block = CONV_BLOCKS[self.conv_block]
        return [
            block(i, o, kernel, self.norm, self.act) for i, o in zip(widths[:-1], widths[1:], strict=True)
        ]

    def pointwise_block(self, in_channels: int, out_channels: int) -> nn.Module:
        """Norm, activation, convolution of one voxel."""
        return PreActivationConv(in_channels, out_channels, (1,) * self.ndim, self.norm, self.act)

    def depthwise_block(self, channels: int, kernel: Sequence[int]) -> nn.Sequential:
        """Norm, activation, convolution of each channel by itself."""
        return nn.Sequential(
            make_short_norm(self.norm, channels, self.ndim),
            make_activation(self.act),
            self.depthwise(channels, kernel),
        )

    def depthwise(self, channels: int, kernel: Sequence[int]) -> nn.Module:
        """A convolution of each channel by itself, without bias, that keeps the size."""
        if self.ndim == 3:
            return DepthwiseConv3d(channels, tuple(kernel))
        padding = tuple(side // 2 for side in kernel)
        return nn.Conv2d(channels, channels, tuple(kernel), padding=padding, groups=channels, bias=False)

    def pointwise(self, in_channels: int, out_channels: int, bias: bool = False) -> nn.Module:
        """A convolution of one voxel."""
        return CONV[self.ndim](in_channels, out_channels, 1, bias=bias)

    def separable(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> nn.Sequential:
        """A convolution of each channel by itself, then one of one voxel, with nothing in between."""
        return nn.Sequential(self.depthwise(in_channels, kernel), self.pointwise(in_channels, out_channels))

    def projection(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> nn.Module:
        """How attention reads features: `separable`, or one voxel by itself."""
        if self.proj_type == "linear":
            return self.pointwise(in_channels, out_channels)
        return self.separable(in_channels, out_channels, kernel)


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
        self.expand = style.pointwise_block(channels, inner)
        self.depthwise = style.depthwise_block(inner, kernel)
        self.gate = ChannelGate(inner, style)
        self.norm = make_short_norm(style.norm, inner, style.ndim)
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
