"""U-Nets that go down by strided convolutions instead of pooling; they take the weights of MONAI's.

The names on the command line are `UNet`, `UNetFull` and `AttentionUNet`.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import Conv3d, check_image, make_norm, padded_to_multiple
from common.recomputation import stage_runner

CHANNELS = (16, 32, 64, 128, 256)  # of the five levels


def _upsampling(in_channels: int, out_channels: int, stride: int) -> nn.ConvTranspose3d:
    """3x3x3 transposed convolution that multiplies the size by `stride` exactly."""
    return nn.ConvTranspose3d(
        in_channels, out_channels, 3, stride=stride, padding=1, output_padding=stride - 1
    )


class _Merge(nn.Sequential):
    """Its modules in turn, applied to the concatenation [skip, x]."""

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return super().forward(torch.cat([skip, x], dim=1))


class StridedUNet(nn.Module):
    """U-Net with one convolution in each stage, the first one already with stride 2: cheap but coarse.

    Good for the heat map; for segmentation take StridedUNetFull.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        checkpointing: in training keep only what passes between the stages; backward computes the rest again.
        strides: of the four encoder stages, undone in reverse by the decoder.

    Parameters (1 -> 1): 1,978,745 for any strides. At 96^3: 2.8 GFLOP, 66 MiB kept for the backward (fp32).

    The same function as MONAI's UNet with these channels and without residual units. The biases of
    convolutions in front of an instance norm have no effect; they stay so that weights can be exchanged.

    Source: Kerfoot et al. 2018, Left-ventricle quantification using residual U-Net.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        *,
        checkpointing: bool = False,
        strides: tuple[int, int, int, int] = (2, 2, 2, 2),
    ) -> None:
        super().__init__()

        def stage(convolution: nn.Module) -> list[nn.Module]:
            return [convolution, nn.InstanceNorm3d(convolution.out_channels), nn.PReLU()]

        self.in_channels = in_channels
        self.checkpointing = checkpointing
        self.multiple = prod(strides)
        c = CHANNELS
        inputs = (in_channels, *c[:3])
        self.down = nn.ModuleList(
            nn.Sequential(*stage(Conv3d(i, o, 3, stride=s, padding=1)))
            for i, o, s in zip(inputs, c[:4], strides, strict=True)
        )
        self.bottom = nn.Sequential(*stage(Conv3d(c[3], c[4], 3, padding=1)))
        self.up = nn.ModuleList(  # from the coarsest to the finest
            [
                _Merge(*stage(_upsampling(c[3] + c[4], c[2], strides[3]))),
                _Merge(*stage(_upsampling(2 * c[2], c[1], strides[2]))),
                _Merge(*stage(_upsampling(2 * c[1], c[0], strides[1]))),
                _Merge(_upsampling(2 * c[0], num_classes, strides[0])),
            ]
        )

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = stage_runner(self)
        x, crop = padded_to_multiple(image, self.multiple, two_blocks=True)
        skips = []
        for down in self.down:
            x = run(down, x)
            skips.append(x)
        x = run(self.bottom, x)
        for up in self.up:
            x = run(up, skips.pop(), x)
        return x[crop]


class StridedUNetFull(StridedUNet):
    """StridedUNet whose first stage keeps the full resolution (strides 1, 2, 2, 2).

    Weights of either network can be loaded into the other.

    At 96^3: 22.2 GFLOP, 508 MiB kept for the backward (fp32).
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 1, *, checkpointing: bool = False) -> None:
        super().__init__(in_channels, num_classes, checkpointing=checkpointing, strides=(1, 2, 2, 2))


class _AdditiveGate(nn.Module):
    """skip * sigmoid(psi(relu(gate + skip))), where gate, skip and psi are 1x1x1 convolutions with a norm.

    Unlike those of common.layers.AttentionGate these convolutions have biases, which MONAI's weights need.
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()

        def project(channels: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv3d(channels, out, 1), make_norm(norm, out, 3))

        self.gate = project(channels, channels // 2)
        self.skip = project(channels, channels // 2)
        self.psi = project(channels // 2, 1)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        return skip * torch.sigmoid(self.psi(F.relu(self.gate(gate) + self.skip(skip), inplace=True)))


class _AttentionUp(nn.Module):
    """Upsample by 2, gate the skip with the result, merge both by a convolution."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.upsample = nn.Sequential(
            _upsampling(in_channels, out_channels, 2),
            make_norm(norm, out_channels, 3),
            nn.ReLU(inplace=True),
        )
        self.gate = _AdditiveGate(out_channels, norm)
        self.merge = _Merge(
            Conv3d(2 * out_channels, out_channels, 3, padding=1),
            nn.InstanceNorm3d(out_channels),
            nn.PReLU(),
        )

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        x = self.upsample(x)
        return self.merge(self.gate(x, skip), x)


class StridedAttentionUNet(nn.Module):
    """Attention U-Net: two convolutions in each stage, every skip weighed by an additive gate.

    Args:
        in_channels, num_classes, checkpointing: as for StridedUNet.
        norm: 'instance', 'batch' or 'group'. Instance is the default because 4 GB leave room for one patch
            at a time: from batches of 1, batch norm learns running statistics that mislead it in evaluation.
            With 'batch' it is the same function as MONAI's AttentionUnet.

    Parameters (1 -> 1): 5,909,113 with either norm. At 96^3: 82.7 GFLOP, 908 MiB kept for the backward
    (fp32).

    Source: Oktay et al. 2018, Attention U-Net, arXiv:1804.03999.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        *,
        checkpointing: bool = False,
        norm: str = "instance",
    ) -> None:
        super().__init__()

        def stage(i: int, o: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                Conv3d(i, o, 3, stride=stride, padding=1),
                make_norm(norm, o, 3),
                nn.ReLU(inplace=True),
                Conv3d(o, o, 3, padding=1),
                make_norm(norm, o, 3),
                nn.ReLU(inplace=True),
            )

        self.in_channels = in_channels
        self.checkpointing = checkpointing
        c = CHANNELS
        self.down = nn.ModuleList(
            [stage(in_channels, c[0], 1), *(stage(i, o, 2) for i, o in zip(c[:-1], c[1:], strict=True))]
        )
        self.up = nn.ModuleList(_AttentionUp(c[i + 1], c[i], norm) for i in (3, 2, 1, 0))
        self.head = nn.Conv3d(c[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = stage_runner(self)
        x, crop = padded_to_multiple(image, 16, two_blocks=True)
        skips = []
        for down in self.down:
            x = run(down, x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = run(up, skips.pop(), x)
        return self.head(x)[crop]
