"""SegResNet: residual encoder with a light decoder, weights as in MONAI."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import check_image, checkpointed, make_norm, padded_to_multiple

ENCODER_BLOCKS = (1, 2, 2, 4)


def _conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """x + (group norm, ReLU, convolution) twice."""

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


class _Up(nn.Module):
    """1x1x1 convolution to half the channels, linear upsampling by 2, plus the skip, residual block."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.project = _conv(in_channels, in_channels // 2, kernel=1)
        self.block = ResidualBlock(in_channels // 2)

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        # Corners not aligned, unlike common.layers.upsample_to: the weights of MONAI expect that.
        x = F.interpolate(self.project(x), scale_factor=2, mode="trilinear", align_corners=False)
        return self.block(skip + x)


class SegResNet(nn.Module):
    """Residual U-Net without its auto-encoder branch: most of the work in the encoder, skips are added.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        checkpointing: in training keep only what passes between the stages; backward computes the rest again.
        init_filters: channels of the first level, doubled at each of the three coarser ones; divisible by 8,
            as the norms have 8 groups.

    Parameters (1 -> 16), init_filters 8 / 16: 1,176,312 / 4,701,152. At 96^3: 31 / 123 GFLOP, 426 / 848 MiB
    kept for the backward (fp32). Same function as MONAI's SegResNet with its default numbers of blocks.

    Source: Myronenko 2018, 3D MRI brain tumor segmentation using autoencoder regularization,
    arXiv:1810.11654.

    Raises:
        ValueError: init_filters is not divisible by 8.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        *,
        checkpointing: bool = False,
        init_filters: int = 8,
    ) -> None:
        super().__init__()
        if init_filters < 8 or init_filters % 8:
            raise ValueError(f"init_filters is {init_filters}; take 8, 16 or another multiple of 8")
        self.in_channels = in_channels
        self.checkpointing = checkpointing
        c = [init_filters * 2**level for level in range(len(ENCODER_BLOCKS))]
        self.down = nn.ModuleList()  # the first stage keeps the resolution, each later one halves it
        for level, blocks in enumerate(ENCODER_BLOCKS):
            first = _conv(c[level - 1], c[level], stride=2) if level else _conv(in_channels, c[0])
            self.down.append(nn.Sequential(first, *(ResidualBlock(c[level]) for _ in range(blocks))))
        self.up = nn.ModuleList(_Up(channels) for channels in c[:0:-1])
        self.head = nn.Sequential(
            make_norm("group", c[0], 3), nn.ReLU(inplace=True), nn.Conv3d(c[0], num_classes, 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = partial(checkpointed, enabled=self.checkpointing and self.training)
        x, crop = padded_to_multiple(image, 8)
        skips = []
        for down in self.down:
            x = run(down, x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = run(up, skips.pop(), x)
        return run(self.head, x)[crop]
