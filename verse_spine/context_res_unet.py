"""ContextResUNet: a small residual U-Net that looks far around at its coarsest level."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import Conv3d, check_image, make_norm, padded_to_multiple
from common.recomputation import stage_runner

CHANNELS = (16, 32, 64)  # of the first three levels
BOTTLENECK = 128  # channels of the fourth
DILATIONS = (1, 2, 4, 8)


class ProjectedResidualBlock(nn.Module):
    """relu(main + shortcut): main is (convolution, norm, ReLU, convolution, norm), the shortcut a 1x1x1
    convolution with norm, also where the channels stay the same."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            Conv3d(in_channels, out_channels, 3, padding=1),
            make_norm("instance", out_channels, 3),
            nn.ReLU(inplace=True),
            Conv3d(out_channels, out_channels, 3, padding=1),
            make_norm("instance", out_channels, 3),
        )
        self.shortcut = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 1), make_norm("instance", out_channels, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x), inplace=True)


class DilatedContext(nn.Module):
    """Parallel 3x3x3 convolutions of growing dilation, concatenated and mixed by a 1x1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            Conv3d(in_channels, out_channels, 3, padding=d, dilation=d) for d in DILATIONS
        )
        concatenated = len(DILATIONS) * out_channels
        self.mix = nn.Sequential(
            make_norm("instance", concatenated, 3),
            nn.ReLU(inplace=True),
            nn.Conv3d(concatenated, out_channels, 1),
            make_norm("instance", out_channels, 3),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([branch(x) for branch in self.branches], dim=1))


class _ResidualUp(nn.Module):
    """Transposed convolution by 2, then a residual block on [skip, up]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2)
        self.block = ProjectedResidualBlock(2 * out_channels, out_channels)

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return self.block(torch.cat([skip, self.upsample(x)], dim=1))


class ContextResUNet(nn.Module):
    """Residual U-Net of 16, 32, 64 channels with four parallel dilated convolutions at stride 8.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        checkpointing: in training keep only what passes between the stages; backward computes the rest again.

    Parameters (1 -> 1): 1,703,841, the count that its paper tabulates. At 96^3: 97.6 GFLOP, 889 MiB kept for
    the backward (fp32). Convolution biases in front of a norm have no effect; the paper's count has them.

    Differs from the paper: instance instead of batch norm, for batches of 1; logits instead of probabilities.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 1, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.checkpointing = checkpointing
        c = CHANNELS
        inputs = (in_channels, *c[:-1])
        self.down = nn.ModuleList(ProjectedResidualBlock(i, o) for i, o in zip(inputs, c, strict=True))
        self.pool = nn.MaxPool3d(2)
        self.context = DilatedContext(c[-1], BOTTLENECK)
        outputs = c[::-1]
        self.up = nn.ModuleList(
            _ResidualUp(i, o) for i, o in zip((BOTTLENECK, *outputs[:-1]), outputs, strict=True)
        )
        self.head = nn.Conv3d(c[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = stage_runner(self)
        x, crop = padded_to_multiple(image, 8, two_blocks=True)
        skips = []
        for down in self.down:
            skips.append(run(down, x))
            x = self.pool(skips[-1])
        x = run(self.context, x)
        for up in self.up:
            x = run(up, skips.pop(), x)
        return self.head(x)[crop]
