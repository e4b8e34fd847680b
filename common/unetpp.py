"""UNet++: a U-Net whose skips are a triangle of convolution blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.conv_blocks import (
    kernels_per_level,
    make_blocks,
    per_level,
    pool,
    resize_aligned,
    strides_product,
)
from common.layers import Conv3d, check_image, fast_layout, padded_to_multiple
from common.recomputation import stage_runner

WIDTHS = (1, 2, 4, 8, 10)  # of the five levels, times base_chan


class _Node(nn.Module):
    """Two blocks on all earlier nodes of the level and on the upsampled node below: [own level, below]."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], conv_block: str, norm: str, act: str
    ) -> None:
        super().__init__()
        self.convs = make_blocks(conv_block, (in_channels, out_channels, out_channels), kernel, norm, act)

    def forward(self, below: Tensor, *level: Tensor) -> Tensor:
        return self.convs(torch.cat([*level, resize_aligned(below, level[0].shape[2:])], dim=1))


class UNetPlusPlus(nn.Module):
    """UNet++ for 3-D images of any size, without deep supervision.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        base_chan: channels of the first level; the others have 2, 4, 8 and 10 times as many.
        conv_block: 'SingleConv' (convolution, norm, activation), or 'BasicBlock' (two pre-activation
            convolutions with a shortcut).
        norm: 'in' (instance norm without scale and shift), 'bn' or 'ln'.
        act: 'relu', 'leaky_relu', 'elu' or 'gelu'.
        kernel_size: kernels z y x of the five levels, finest first, odd sides; None = 3 everywhere.
        down_scale: by what the four steps down divide the grid, z y x; None = 2 everywhere.
        checkpointing: in training keep only what passes between the nodes; backward computes the rest again.

    Parameters (1 channel, 3 classes): 20,488,131, with BasicBlock 49,187,619.

    Source: Zhou et al. 2018, UNet++, arXiv:1807.10165. Differs: widths; a BasicBlock that sees the image
    itself convolves it as it is, where the activation would first set half of its grey values to 0.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 3,
        *,
        base_chan: int = 32,
        conv_block: str = "SingleConv",
        norm: str = "in",
        act: str = "relu",
        kernel_size: Sequence[Sequence[int]] | None = None,
        down_scale: Sequence[Sequence[int]] | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        c = [base_chan * times for times in WIDTHS]
        kernels = kernels_per_level(kernel_size, 5, ndim=3)
        scales = per_level("down_scale", down_scale, 2, 4, ndim=3)
        self.in_channels, self.checkpointing = in_channels, checkpointing
        self.multiple = strides_product(scales)
        self.down = nn.ModuleList()  # the five levels of the encoder, the first nodes of the triangle's rows
        for i in range(5):
            channels = (c[i - 1] if i else in_channels, c[i], c[i])
            options = {"of_image": True} if i == 0 and conv_block == "BasicBlock" else {}
            level = make_blocks(conv_block, channels, kernels[i], norm, act, **options)
            self.down.append(nn.Sequential(pool(scales[i - 1]), *level) if i else level)
        self.nodes = nn.ModuleList()  # nodes[j][i] is the node of level i after j + 1 steps up
        for j in range(1, 5):
            column = [
                _Node(j * c[i] + c[i + 1], c[i], kernels[i], conv_block, norm, act) for i in range(5 - j)
            ]
            self.nodes.append(nn.ModuleList(column))
        self.head = Conv3d(c[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = stage_runner(self)
        padded, crop = padded_to_multiple(image, self.multiple, two_blocks=True)
        x, rows = fast_layout(padded), []
        for down in self.down:
            x = run(down, x)
            rows.append([x])
        for column in self.nodes:
            for i, node in enumerate(column):
                rows[i].append(run(node, rows[i + 1][-1], *rows[i]))
        return self.head(rows[0][-1])[crop]
