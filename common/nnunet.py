"""U-Nets in the shape that nnU-Net plans them: plain, and with a residual encoder."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import (
    ConvNormAct,
    InstanceNorm,
    fast_layout,
    kernels_of_levels,
    pad_for_levels,
    resize_linear,
)
from common.recomputation import stage_runner

CHANNELS = (32, 64, 128, 256, 320, 320)  # of the six levels
STRIDES = ((2, 2, 2),) * 5  # z y x, of the five steps down
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)  # of the six levels of the residual encoder
THICK = 2.5  # z is halved only while its spacing is below so many times that within the slice


def strides_for(spacing_mm: Sequence[float]) -> list[list[int]]:
    """Strides z y x of the four steps down for voxels of `spacing_mm` (z y x).

    Thick slices are left alone until the voxels are less than 2.5 times as thick as they are wide.
    """
    z, in_plane = spacing_mm[0], min(spacing_mm[1:])
    strides = []
    for _ in range(4):
        step = 1 if z >= THICK * in_plane else 2
        strides.append([step, 2, 2])
        z, in_plane = z * step, in_plane * 2
    return strides


def _two_convs(in_channels: int, out_channels: int, kernel: tuple, stride: tuple = (1, 1, 1)) -> nn.Module:
    return nn.Sequential(
        ConvNormAct(in_channels, out_channels, kernel, stride),
        ConvNormAct(out_channels, out_channels, kernel),
    )


class _ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, which takes means where the block halves the grid."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple, stride: tuple = (1, 1, 1)) -> None:
        super().__init__()
        self.main = nn.Sequential(
            ConvNormAct(in_channels, out_channels, kernel, stride),
            *list(ConvNormAct(out_channels, out_channels, kernel))[:2],  # without the leaky ReLU
        )
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, bias=False), InstanceNorm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        main = self.main(x)
        return F.leaky_relu(main + self.shortcut(resize_linear(x, main.shape[2:])), 0.01)


class _Up(nn.Module):
    """Transposed convolution to the grid of the skip, concatenation [up, skip], convolutions."""

    def __init__(self, channels: tuple[int, int], stride: tuple, convs: nn.Module) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(*channels, stride, stride=stride)
        self.convs = convs

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([self.up(x), skip], dim=1))


class PlainUNet(nn.Module):
    """nnU-Net's plain U-Net: six levels, two convolutions at each level on either side.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        strides: z y x of the five steps down; of four, the fifth is (2, 2, 2).
        deep_supervision: in training also predict at strides 2, 4 and 8.
        checkpointing: in training keep only what passes between the levels; backward computes the rest again.

    Parameters (1 -> 16): 31,190,672. nnU-Net's own count is 31,206,864: it also has biases in front of the
    norms (3,840), which the norms take out again, and keeps four heads for deep supervision (12,352).

    Source: Isensee et al. 2021, nnU-Net, Nature Methods 18.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        *,
        strides: Sequence[Sequence[int]] = STRIDES,
        deep_supervision: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        c = CHANNELS
        strides = [tuple(stride) for stride in (*strides, *STRIDES[len(strides) :])]
        kernels = kernels_of_levels(strides)
        self.in_channels = in_channels
        self.checkpointing = checkpointing
        self.multiple = tuple(prod(stride[axis] for stride in strides) for axis in range(3))
        self.down = self.make_encoder(in_channels, kernels, strides)
        self.up = nn.ModuleList(  # from the finest to the coarsest
            _Up((c[i + 1], c[i]), strides[i], self.make_decoder_convs(c[i], kernels[i]))
            for i in range(len(strides))
        )
        self.head = nn.Conv3d(c[0], num_classes, 1)
        self.supervision = None
        if deep_supervision:
            self.supervision = nn.ModuleList(nn.Conv3d(width, num_classes, 1) for width in c[1:4])

    def make_encoder(self, in_channels: int, kernels: list, strides: list) -> nn.ModuleList:
        """The six levels on the way down."""
        c = CHANNELS
        levels = [_two_convs(in_channels, c[0], kernels[0])]
        levels += [_two_convs(c[i], c[i + 1], kernels[i + 1], stride) for i, stride in enumerate(strides)]
        return nn.ModuleList(levels)

    def make_decoder_convs(self, channels: int, kernel: tuple) -> nn.Module:
        """What follows a concatenation on the way up."""
        return _two_convs(2 * channels, channels, kernel)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W); in training with deep
        supervision a list, at strides 1, 2, 4 and 8, each on its own grid.

        Raises:
            ValueError: wrong shape; with deep supervision in training, sides that had to be padded.
        """
        run = stage_runner(self)
        supervised = self.training and self.supervision is not None
        padded, crop = pad_for_levels(image, self.in_channels, self.multiple, supervised)
        x, skips = fast_layout(padded), []
        for down in self.down:
            x = run(down, x)
            skips.append(x)
        features = [skips.pop()]  # of the decoder, from fine to coarse
        for up in reversed(self.up):
            features.insert(0, run(up, features[0], skips.pop()))
        logits = self.head(features[0])[crop]
        if not supervised:
            return logits
        return [logits, *(head(x) for head, x in zip(self.supervision, features[1:4], strict=True))]


class ResEncUNet(PlainUNet):
    """nnU-Net's U-Net with a residual encoder of 1, 3, 4, 6, 6, 6 blocks, and one convolution on the way up.

    Arguments as for PlainUNet.

    Parameters (1 -> 16): 102,335,632; nnU-Net's own count, with such biases and heads, is 102,361,040.

    Source: Isensee et al. 2024, nnU-Net Revisited, arXiv:2404.09556.
    """

    def make_encoder(self, in_channels: int, kernels: list, strides: list) -> nn.ModuleList:
        """A convolution, then the residual blocks of the six levels."""
        c = CHANNELS
        levels, channels = [], c[0]
        for i, blocks in enumerate(RESIDUAL_BLOCKS):
            stride = strides[i - 1] if i else (1, 1, 1)
            level = [_ResidualBlock(channels, c[i], kernels[i], stride)]
            level += [_ResidualBlock(c[i], c[i], kernels[i]) for _ in range(blocks - 1)]
            levels.append(nn.Sequential(*level))
            channels = c[i]
        levels[0].insert(0, ConvNormAct(in_channels, c[0], kernels[0]))
        return nn.ModuleList(levels)

    def make_decoder_convs(self, channels: int, kernel: tuple) -> nn.Module:
        return ConvNormAct(2 * channels, channels, kernel)
