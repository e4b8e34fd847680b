"""AttentionUNet3D: the U-Net of the thesis behind this task, with a channel and a spatial gate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import Conv3d, check_image, make_norm, padded_to_multiple
from common.recomputation import stage_runner

CHANNELS = (16, 32, 64, 128, 256, 512)  # of the six levels
REDUCTION = 16  # by how much SCA's hidden layer is narrower than its input


def _double_conv(in_channels: int, mid_channels: int, out_channels: int) -> nn.Sequential:
    """(3x3x3 convolution without bias, ReLU, group norm) twice: the norm comes last."""
    return nn.Sequential(
        Conv3d(in_channels, mid_channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        make_norm("group", mid_channels, 3),
        Conv3d(mid_channels, out_channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        make_norm("group", out_channels, 3),
    )


class SCA(nn.Module):
    """Spatial and channel attention: x + x * channel weights + x * position weights.

    The channel weights come from two fully connected layers on the mean over all positions, the position
    weights from one 1x1x1 convolution over all channels; both in (0, 1).

    Source: after Roy et al. 2018, Concurrent spatial and channel squeeze & excitation, arXiv:1803.02579.
    Differs: x itself is added, so that the result is 1 to 3 times x: it can amplify but not suppress.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(
            nn.Linear(channels, channels // REDUCTION),
            nn.ReLU(inplace=True),
            nn.Linear(channels // REDUCTION, channels),
        )
        self.position = nn.Conv3d(channels, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        channel = torch.sigmoid(self.channel(x.mean(dim=(2, 3, 4))))[:, :, None, None, None]
        position = torch.sigmoid(self.position(x))
        # Not x * (1 + channel + position): backward would keep that sum, as large as x.
        return x + x * channel + x * position


class _GatedUp(nn.Module):
    """Upsample by 2 (nearest), concatenate [skip, up], gate both by SCA, convolve twice."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.attention = SCA(in_channels + out_channels)
        self.conv = _double_conv(in_channels + out_channels, out_channels, out_channels)

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(self.attention(torch.cat([skip, x], dim=1)))


class AttentionUNet3D(nn.Module):
    """U-Net of six levels with 16 to 512 channels and an SCA gate on what the decoder concatenates.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        checkpointing: in training keep only what passes between the stages; backward computes the rest again.

    Parameters (1 -> 1): 16,608,918. At 96^3: 110.3 GFLOP, 951 MiB kept for the backward (fp32).
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 1, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.checkpointing = checkpointing
        c = CHANNELS
        inputs = (in_channels, *c[:-1])
        self.down = nn.ModuleList(_double_conv(i, max(o // 2, i), o) for i, o in zip(inputs, c, strict=True))
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ModuleList(_GatedUp(c[i + 1], c[i]) for i in (4, 3, 2, 1, 0))
        self.head = nn.Conv3d(c[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = stage_runner(self)
        x, crop = padded_to_multiple(image, 32)
        skips = []
        for level, down in enumerate(self.down):
            x = run(down, self.pool(x) if level else x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = run(up, skips.pop(), x)
        return self.head(x)[crop]
