"""U-Net and Attention U-Net in 2-D and 3-D; parameter names follow the widespread milesial layout."""

from torch import Tensor, nn

from common.layers import DoubleConv, Down, OutConv, Up, checkpointed, upsample_to


class UNet(nn.Module):
    """U-Net with four levels and batch norm; any input size, also sides not divisible by 16.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        base_features: channels of the first level; 64 -> encoder 64, 128, 256, 512 and, bilinear, bottleneck
            512.
        bilinear: upsample by interpolation instead of transposed convolutions, and halve the bottleneck.
        attention: gate all four skips (Attention U-Net).
        norm: 'batch' or 'group'.
        deep_supervision: also predict at strides 2, 4 and 8; used in training only.
        checkpointing: keep only what passes between the stages; backward computes the rest again. At
            512 x 512, base 64, fp32 and batch 2 a training step then takes 1,990 MiB instead of 3,560, for
            a second forward pass.
        ndim: 2 or 3.

    Parameters (1 channel, 2 classes, bilinear, base 64 / 32 / 16): UNet 17,261,890 / 4,317,858 / 1,080,658,
    with attention 17,612,458 / 4,406,106 / 1,103,026.

    Source: Ronneberger et al. 2015, arXiv:1505.04597. Differs: padded convolutions, normalisation.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        base_features: int = 64,
        bilinear: bool = True,
        attention: bool = False,
        norm: str = "batch",
        deep_supervision: bool = False,
        checkpointing: bool = False,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        factor = 2 if bilinear else 1
        c = [base_features * m for m in (1, 2, 4, 8, 16)]
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
        run = checkpointed if self.checkpointing and self.training else _call
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


def _call(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs)


class AttentionUNet(UNet):
    """U-Net whose four skips pass an additive attention gate each. Arguments as `UNet`."""

    def __init__(self, in_channels: int = 1, num_classes: int = 2, **options) -> None:
        super().__init__(in_channels, num_classes, attention=True, **options)
