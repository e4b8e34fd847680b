"""U-Net, ResUNet and Attention U-Net with four levels of max pooling, in 2-D and 3-D."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.conv_blocks import (
    NORMS,
    kernels_per_level,
    make_blocks,
    per_level,
    pool,
    resize_aligned,
    same_size_conv,
    strides_product,
)
from common.layers import CONV, AttentionGate, check_image, fast_layout, padded_to_multiple
from common.recomputation import stage_runner

WIDTHS = {2: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8, 10)}  # of the five levels, times base_chan


class _Up(nn.Module):
    """Interpolate to the skip's grid, concatenate [skip, upsampled], convolve.

    Args:
        in_channels: of the coarser feature.
        out_channels: of the skip and of the result.
        reduce: bring the upsampled feature to `out_channels` by a 1x1 convolution before the concatenation.
        gate: weighs the skip by the upsampled feature; None = the skip as it is.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        conv_block: str,
        norm: str,
        act: str,
        *,
        reduce: bool,
        gate: nn.Module | None,
    ) -> None:
        super().__init__()
        self.reduce = CONV[len(kernel)](in_channels, out_channels, 1) if reduce else nn.Identity()
        self.gate = gate
        joined = out_channels + (out_channels if reduce else in_channels)
        self.convs = make_blocks(conv_block, (joined, out_channels, out_channels), kernel, norm, act)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.reduce(resize_aligned(x, skip.shape[2:]))
        if self.gate is not None:
            skip = self.gate(x, skip)
        return self.convs(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """U-Net with two blocks at each of five levels; images of any size.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        ndim: 2 or 3 spatial axes.
        base_chan: channels of the first level; the others have 2, 4, 8 and 10 (2-D: 16) times as many.
        conv_block: 'SingleConv' (convolution, norm, activation), or 'BasicBlock' (two pre-activation
            convolutions with a shortcut), which makes it a ResUNet.
        norm: 'in' (instance norm without scale and shift), 'bn' or 'ln'.
        act: 'relu', 'leaky_relu', 'elu' or 'gelu'.
        kernel_size: kernels of the five levels, finest first, odd sides for each axis; None = 3 everywhere.
        down_scale: by what the four steps down divide the grid, for each axis; None = 2 everywhere.
        attention: gate the four skips, which makes it an Attention U-Net.
        checkpointing: in training keep only what passes between the levels; backward computes the rest again.

    Parameters in 3-D (1 channel, 3 classes): U-Net 16,562,115, ResUNet 40,560,579, Attention U-Net
    16,668,339. In 2-D (4 classes, batch norm): U-Net 7,240,260, Attention U-Net 7,980,828.

    Source: Ronneberger et al. 2015, arXiv:1505.04597; Oktay et al. 2018, arXiv:1804.03999. Differs: widths
    and blocks are those of the networks that MedFormer, arXiv:2203.00131, was compared with; the gate looks
    at the upsampled feature.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 3,
        *,
        ndim: int = 3,
        base_chan: int = 32,
        conv_block: str = "SingleConv",
        norm: str = "in",
        act: str = "relu",
        kernel_size: Sequence[Sequence[int]] | None = None,
        down_scale: Sequence[Sequence[int]] | None = None,
        attention: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        c = [base_chan * times for times in WIDTHS[ndim]]
        kernels = kernels_per_level(kernel_size, 5, ndim)
        scales = per_level("down_scale", down_scale, 2, 4, ndim)
        options = (conv_block, norm, act)
        self.in_channels, self.ndim, self.checkpointing = in_channels, ndim, checkpointing
        self.multiple = strides_product(scales)

        def blocks(channels: Sequence[int], level: int) -> nn.Sequential:
            return make_blocks(conv_block, channels, kernels[level], norm, act)

        first = same_size_conv(in_channels, c[0], kernels[0])
        self.down = nn.ModuleList([nn.Sequential(first, *blocks((c[0], c[0]), 0))])
        for i in range(1, 5):
            down = nn.Sequential(pool(scales[i - 1]), *blocks((c[i - 1], c[i], c[i]), i))
            self.down.append(down)
        self.up = nn.ModuleList()  # from the coarsest to the finest
        for i in (3, 2, 1, 0):
            # In 2-D only the plain U-Net reduces the upsampled feature.
            reduce = ndim == 2 and not attention
            gate = AttentionGate(c[i + 1], c[i], NORMS[norm], ndim) if attention else None
            self.up.append(_Up(c[i + 1], c[i], kernels[i], *options, reduce=reduce, gate=gate))
        self.head = CONV[ndim](c[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, *spatial), any size -> logits (N, num_classes, *spatial)."""
        check_image(image, self.in_channels, self.ndim)
        run = stage_runner(self)
        padded, crop = padded_to_multiple(image, self.multiple, two_blocks=True)
        x, skips = fast_layout(padded), []
        for down in self.down:
            x = run(down, x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = run(up, x, skips.pop())
        return self.head(x)[crop]
