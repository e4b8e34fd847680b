"""V-Net: 5x5x5 convolutions, residual stages, strided convolutions instead of pooling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.conv_blocks import (
    SingleConv,
    make_activation,
    make_short_norm,
    per_level,
    strides_product,
)
from common.layers import Conv3d, check_image, fast_layout, padded_to_multiple
from common.recomputation import stage_runner

DOWN_CONVS = (1, 2, 3, 2)  # convolutions of the four stages on the way down
UP_CONVS = (2, 2, 1, 1)  # and on the way up, coarsest first
UP_WIDTHS = (16, 8, 4, 2)  # channels on the way up, coarsest first, times base_chan


def _convs(channels: int, number: int, norm: str, act: str) -> nn.Sequential:
    return nn.Sequential(*(SingleConv(channels, channels, (5, 5, 5), norm, act) for _ in range(number)))


class _Input(nn.Module):
    """A convolution, added to as many copies of the image as there are channels."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, act: str) -> None:
        super().__init__()
        self.copies = out_channels // in_channels
        *layers, self.act = SingleConv(in_channels, out_channels, (5, 5, 5), norm, act)
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x.repeat(1, self.copies, 1, 1, 1))


class _Down(nn.Module):
    """Strided convolution to twice the channels, then convolutions with a shortcut around them."""

    def __init__(
        self, in_channels: int, scale: tuple[int, ...], convs: int, norm: str, act: str, dropout: float
    ) -> None:
        super().__init__()
        out_channels = 2 * in_channels
        self.down = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, scale, stride=scale, bias=False),
            make_short_norm(norm, out_channels, 3),
            make_activation(act),
        )
        self.dropout = nn.Dropout3d(dropout)
        self.convs = _convs(out_channels, convs, norm, act)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.act(self.convs(self.dropout(x)) + x)


class _Up(nn.Module):
    """Transposed convolution, concatenation [upsampled, skip], convolutions with a shortcut around them.

    `dropout` holds two shares: of the channels from below, and of those of the skip.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scale: tuple[int, ...],
        convs: int,
        norm: str,
        act: str,
        dropout: tuple[float, float],
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.dropout, self.skip_dropout = nn.Dropout3d(dropout[0]), nn.Dropout3d(dropout[1])
        self.up = nn.Sequential(
            nn.ConvTranspose3d(in_channels, half, scale, stride=scale),
            make_short_norm(norm, half, 3),
            make_activation(act),
        )
        self.convs = _convs(out_channels, convs, norm, act)
        self.act = make_activation(act)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([self.up(self.dropout(x)), self.skip_dropout(skip)], dim=1)
        return self.act(self.convs(x) + x)


class VNet(nn.Module):
    """V-Net for 3-D images of any size.

    Args:
        in_channels: channels of the image; must divide base_chan.
        num_classes: output channels, background included.
        base_chan: channels of the first level; each coarser level has twice as many.
        norm: 'in' (instance norm without scale and shift), 'bn' or 'ln'.
        act: 'relu', 'leaky_relu', 'elu' or 'gelu'.
        down_scale: by what the four steps down divide the grid, z y x; None = 2 everywhere.
        dropout: share of the channels that training leaves out of all skips, and of what enters the two
            coarsest stages on either side.
        checkpointing: in training keep only what passes between the stages; backward computes the rest again.

    Parameters (1 channel, 3 classes): 45,596,588; with batch norm 45,601,906, as MONAI's, from whose weights
    it then computes the same. An implementation with biases in front of the norms, which take them out again,
    has 2,419 more.

    Source: Milletari et al. 2016, V-Net, arXiv:1606.04797. Differs: a norm, and dropout.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 3,
        *,
        base_chan: int = 16,
        norm: str = "in",
        act: str = "elu",
        down_scale: Sequence[Sequence[int]] | None = None,
        dropout: float = 0.5,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if base_chan % in_channels or base_chan % 2:
            raise ValueError(f"base_chan is {base_chan}; take an even multiple of in_channels, {in_channels}")
        scales = per_level("down_scale", down_scale, 2, 4, ndim=3)
        self.in_channels, self.checkpointing = in_channels, checkpointing
        self.multiple = strides_product(scales)
        self.down = nn.ModuleList([_Input(in_channels, base_chan, norm, act)])
        for i, convs in enumerate(DOWN_CONVS):
            share = dropout if i >= 2 else 0.0
            self.down.append(_Down(base_chan * 2**i, scales[i], convs, norm, act, share))
        self.up = nn.ModuleList()  # from the coarsest to the finest
        channels = 16 * base_chan
        for i, (width, convs) in enumerate(zip(UP_WIDTHS, UP_CONVS, strict=True)):
            shares = (dropout if i < 2 else 0.0, dropout)
            self.up.append(_Up(channels, width * base_chan, scales[3 - i], convs, norm, act, shares))
            channels = width * base_chan
        self.head = nn.Sequential(
            *SingleConv(channels, num_classes, (5, 5, 5), norm, act), Conv3d(num_classes, num_classes, 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = stage_runner(self)
        padded, crop = padded_to_multiple(image, self.multiple, two_blocks=True)
        x, skips = fast_layout(padded), []
        for down in self.down:
            x = run(down, x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = run(up, x, skips.pop())
        return run(self.head, x)[crop]
