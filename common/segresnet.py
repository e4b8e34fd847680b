"""SegResNet: a residual encoder with a light decoder; it takes the weights of MONAI's."""

import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import Conv3d, check_image, make_norm, padded_to_multiple
from common.recomputation import stage_runner

ENCODER_BLOCKS = (1, 2, 2, 4)  # residual blocks of the four levels


def _conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    return Conv3d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


class PreActivationBlock(nn.Module):
    """x + (group norm, ReLU, 3x3x3 convolution) twice: a residual block that ends in a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            make_norm("group", channels, 3),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
            make_norm("group", channels, 3),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


class _AddingUp(nn.Module):
    """1x1x1 convolution to half the channels, linear upsampling by 2, the skip added, a residual block."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.project = _conv(in_channels, in_channels // 2, kernel=1)
        self.block = PreActivationBlock(in_channels // 2)

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        # Unlike in common.layers.upsample_to corners are not aligned: the weights of MONAI expect that.
        x = F.interpolate(self.project(x), scale_factor=2, mode="trilinear", align_corners=False)
        return self.block(skip + x)


class SegResNet(nn.Module):
    """Residual U-Net without the paper's auto-encoder branch; most of the work is in the encoder.

    The decoder adds the skips instead of concatenating them.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        checkpointing: in training keep only what passes between the stages; backward computes the rest again.
        width: channels of the first level, doubled at each of the three coarser ones; a multiple of 8, as the
            norms have 8 groups.

    Parameters (1 -> 16), width 8 / 16: 1,176,312 / 4,701,152. At 96^3: 31 / 123 GFLOP, 426 / 848 MiB
    kept for the backward (fp32). The same function as MONAI's SegResNet with its default numbers of blocks.

    Source: Myronenko 2018, 3D MRI brain tumor segmentation using autoencoder regularization,
    arXiv:1810.11654.

    Raises:
        ValueError: width is not a multiple of 8.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        *,
        checkpointing: bool = False,
        width: int = 8,
    ) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width is {width}; take 8, 16 or another multiple of 8")
        self.in_channels = in_channels
        self.checkpointing = checkpointing
        c = [width * 2**level for level in range(len(ENCODER_BLOCKS))]
        self.down = nn.ModuleList()  # the first stage keeps the resolution, each later one halves it
        for level, blocks in enumerate(ENCODER_BLOCKS):
            first = _conv(c[level - 1], c[level], stride=2) if level else _conv(in_channels, c[0])
            self.down.append(nn.Sequential(first, *(PreActivationBlock(c[level]) for _ in range(blocks))))
        self.up = nn.ModuleList(_AddingUp(channels) for channels in c[:0:-1])
        self.head = nn.Sequential(
            make_norm("group", c[0], 3), nn.ReLU(inplace=True), nn.Conv3d(c[0], num_classes, 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = stage_runner(self)
        x, crop = padded_to_multiple(image, 8)
        skips = []
        for down in self.down:
            x = run(down, x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = run(up, skips.pop(), x)
        return run(self.head, x)[crop]
