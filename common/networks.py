"""U-Net and Attention U-Net with max pooling, in 2-D and 3-D; parameters are named as in milesial's U-Net."""

import torch
from torch import Tensor, nn

from common.layers import (
    CONV,
    CONV_TRANSPOSE,
    LINEAR_MODE,
    MAX_POOL,
    AttentionGate,
    make_norm,
    pad_to,
    upsample_to,
)
from common.recomputation import stage_runner


class DoubleConv(nn.Module):
    """(3x3 convolution without bias, norm, ReLU) twice."""

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int, norm: str, ndim: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            CONV[ndim](in_channels, mid_channels, 3, padding=1, bias=False),
            make_norm(norm, mid_channels, ndim),
            nn.ReLU(inplace=True),
            CONV[ndim](mid_channels, out_channels, 3, padding=1, bias=False),
            make_norm(norm, out_channels, ndim),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """Max pooling by 2, then DoubleConv."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, ndim: int) -> None:
        super().__init__()
        double_conv = DoubleConv(in_channels, out_channels, out_channels, norm, ndim)
        self.maxpool_conv = nn.Sequential(MAX_POOL[ndim](2), double_conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Upsample by 2, pad to the skip, concatenate [skip, up], DoubleConv.

    With `attention` the skip is gated first. `bilinear` takes linear interpolation (corners aligned) instead
    of a transposed convolution; then the incoming feature must already have half of `in_channels`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, bilinear: bool, attention: bool, norm: str, ndim: int
    ) -> None:
        super().__init__()
        half = in_channels // 2
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode=LINEAR_MODE[ndim], align_corners=True)
            self.conv = DoubleConv(in_channels, out_channels, half, norm, ndim)
        else:
            self.up = CONV_TRANSPOSE[ndim](in_channels, half, 2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels, out_channels, norm, ndim)
        self.gate = AttentionGate(half if bilinear else in_channels, half, norm, ndim) if attention else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        up = pad_to(self.up(x), skip.shape[2:])
        if self.gate is not None:
            skip = self.gate(x, skip)  # gated by the feature before upsampling
        return self.conv(torch.cat([skip, up], dim=1))


class OutConv(nn.Module):
    """1x1 convolution to the classes."""

    def __init__(self, in_channels: int, num_classes: int, ndim: int) -> None:
        super().__init__()
        self.conv = CONV[ndim](in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UNet(nn.Module):
    """U-Net that halves the image four times; takes images of any size, also with sides not divisible by 16.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        width: channels of the first level; each coarser level has twice as many, so 64 gives 64, 128, 256,
            512 and a bottleneck of 1024 (512 with `bilinear`).
        bilinear: upsample by interpolation instead of transposed convolutions, and halve the bottleneck.
        attention: gate all four skips (Attention U-Net).
        norm: 'batch', 'instance' or 'group', as `make_norm`.
        deep_supervision: also predict at strides 2, 4 and 8; used in training only.
        checkpointing: in training keep only what passes between the stages; backward computes the rest again.
            At 512 x 512, width 64, fp32 and batch 2 a training step then takes 1,990 MiB instead of 3,560,
            for a second forward pass.
        ndim: 2 or 3.

    Parameters (1 channel, 2 classes, bilinear, width 64 / 32 / 16): UNet 17,261,890 / 4,317,858 / 1,080,658,
    with attention 17,612,458 / 4,406,106 / 1,103,026.

    Source: Ronneberger et al. 2015, arXiv:1505.04597. Differs: padded convolutions, normalisation.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        width: int = 64,
        bilinear: bool = True,
        attention: bool = False,
        norm: str = "batch",
        deep_supervision: bool = False,
        checkpointing: bool = False,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        factor = 2 if bilinear else 1
        c = [width * m for m in (1, 2, 4, 8, 16)]
        self.checkpointing = checkpointing
        self.inc = DoubleConv(in_channels, c[0], c[0], norm, ndim)
        self.down1 = Down(c[0], c[1], norm, ndim)
        self.down2 = Down(c[1], c[2], norm, ndim)
        self.down3 = Down(c[2], c[3], norm, ndim)
        self.down4 = Down(c[3], c[4] // factor, norm, ndim)
        self.up1 = Up(c[4], c[3] // factor, bilinear, attention, norm, ndim)
        self.up2 = Up(c[3], c[2] // factor, bilinear, attention, norm, ndim)
        self.up3 = Up(c[2], c[1] // factor, bilinear, attention, norm, ndim)
        self.up4 = Up(c[1], c[0], bilinear, attention, norm, ndim)
        self.outc = OutConv(c[0], num_classes, ndim)
        self.heads = None
        if deep_supervision:
            widths = (c[1] // factor, c[2] // factor, c[3] // factor)  # strides 2, 4, 8
            self.heads = nn.ModuleList(OutConv(w, num_classes, ndim) for w in widths)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image (N, C, *spatial) -> logits (N, K, *spatial); in training with deep supervision the list
        [full, 1/2, 1/4, 1/8], each brought to the size of the image."""
        run = stage_runner(self)
        x1 = run(self.inc, image)  # stride 1
        x2 = run(self.down1, x1)  # stride 2
        x3 = run(self.down2, x2)  # stride 4
        x4 = run(self.down3, x3)  # stride 8
        x5 = run(self.down4, x4)  # stride 16
        d4 = run(self.up1, x5, x4)
        d3 = run(self.up2, d4, x3)
        d2 = run(self.up3, d3, x2)
        d1 = run(self.up4, d2, x1)
        logits = self.outc(d1)
        if self.heads is None or not self.training:
            return logits
        size = image.shape[2:]
        return [
            logits,
            *(upsample_to(head(d), size) for head, d in zip(self.heads, (d2, d3, d4), strict=True)),
        ]


class AttentionUNet(UNet):
    """U-Net with an additive attention gate on each of the four skips. Arguments as for `UNet`."""

    def __init__(self, in_channels: int = 1, num_classes: int = 2, **options) -> None:
        super().__init__(in_channels, num_classes, attention=True, **options)
