"""MedFormer: a U-Net whose coarse levels exchange what they hold with small semantic maps.

    stride  1   image ── inc ─────────────────────────────────────── up4 ── logits
    stride  2            down1 ──────────────────────────────── up3
    stride  4            down2 ── map ─┐             ┌── up2 ── auxiliary logits
    stride  8            down3 ── map ─┼─ MapFusion ─┼── up1
    stride 16            down4 ── map ─┘             └── (map of down4, to up1)

Source: Gao et al. 2022, A Data-scalable Transformer for Medical Image Segmentation, arXiv:2203.00131.
Differs: any size, the image is padded by repeating its border; auxiliary logits in training only.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amygdala.medformer_attention import AttentionBlock, MapFusion, MapGenerator
from amygdala.medformer_blocks import PatchMerging, Style
from common.conv_blocks import kernels_per_level, per_level, resize_aligned, same_size_conv, strides_product
from common.layers import check_image, fast_layout, padded_to_multiple
from common.recomputation import stage_runner

STAGES = ("down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4")
ATTENDED = STAGES[1:6]  # the stages with semantic maps


class Stage(NamedTuple):
    """Size of a stage: channels, numbers of convolution and attention blocks, heads, kernel."""

    channels: int
    convs: int
    attentions: int
    heads: int
    kernel: tuple[int, ...]

    def make_convs(self, in_channels: int, style: Style) -> list[nn.Module]:
        """The convolution blocks, of which the first takes `in_channels`."""
        return style.convs([in_channels, *[self.channels] * self.convs], self.kernel)

    def make_attention(self, in_channels: int, style: Style, last_map: bool = True) -> list[nn.Module]:
        """The attention blocks; without `last_map` the last one leaves the map as it is."""
        if not self.attentions:
            return []
        widths = [in_channels, *[self.channels] * (self.attentions - 1)]
        updates_map = [*[True] * (self.attentions - 1), last_map]
        return [
            AttentionBlock(c, self.channels, self.heads, self.kernel, style, updates)
            for c, updates in zip(widths, updates_map, strict=True)
        ]


class Down(nn.Module):
    """Patch merging, convolution blocks; then a map of their result, and attention between the two."""

    def __init__(
        self, in_channels: int, stage: Stage, scale: Sequence[int], map_size: Sequence[int], style: Style
    ) -> None:
        super().__init__()
        self.merge = PatchMerging(in_channels, stage.channels, stage.kernel, scale, style)
        self.convs = nn.ModuleList(stage.make_convs(stage.channels, style))
        self.generate = MapGenerator(stage.channels, map_size, style) if stage.attentions else None
        self.attention = nn.ModuleList(stage.make_attention(stage.channels, style))

    def forward(self, x: Tensor, run: Callable) -> tuple[Tensor, Tensor | None]:
        """(B, Cin, d, h, w) -> feature (B, C, d / scale, ...), and map (B, C, *cells) or None."""
        x = run(self.merge, x)
        for block in self.convs:
            x = run(block, x)
        semantic_map = run(self.generate, x) if self.generate is not None else None
        for block in self.attention:
            x, semantic_map = run(block, x, semantic_map)
        return x, semantic_map


class OnSkip(nn.Module):
    """A block that takes [x, brought to the grid of the skip; skip]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, skip: Tensor, *maps: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.block(torch.cat([resize_aligned(x, skip.shape[2:]), skip], dim=1), *maps)


class Up(nn.Module):
    """Attention blocks, then convolution blocks; the first of them takes the skip, too.

    Args:
        in_channels: of the feature below and the skip together; as many as their maps have.
        last_map: whether somebody reads the map afterwards.
    """

    def __init__(self, in_channels: int, stage: Stage, last_map: bool, style: Style) -> None:
        super().__init__()
        self.reduce_maps = style.pointwise(in_channels, stage.channels) if stage.attentions else None
        attention = stage.make_attention(in_channels, style, last_map)
        convs = stage.make_convs(stage.channels if attention else in_channels, style)
        first = attention or convs
        first[0] = OnSkip(first[0])
        self.attention, self.convs = nn.ModuleList(attention), nn.ModuleList(convs)

    def forward(self, x: Tensor, skip: Tensor, maps: Sequence[Tensor], run: Callable) -> tuple:
        """Feature below, skip, and the maps [below, of the skip], if any -> feature and map (or None)."""
        inputs = (x, skip)
        semantic_map = self.reduce_maps(torch.cat(maps, dim=1)) if self.reduce_maps is not None else None
        for block in self.attention:
            x, semantic_map = run(block, *inputs, semantic_map)
            inputs = (x,)
        for block in self.convs:
            x = run(block, *inputs)
            inputs = (x,)
        return x, semantic_map


class MedFormer(nn.Module):
    """MedFormer for images or slices of any size.

    Lists of eight numbers are those of down1 to down4 and up1 to up4.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        ndim: 3, or 2 for slices.
        base_chan: channels at stride 1.
        chan_num, conv_num, trans_num, num_heads: channels, convolution blocks, attention blocks and attention
            heads of each stage; attention belongs to down2 to up2 and only there.
        kernel_size: odd kernels of the stem and down1 to down4, a number or one for each axis; up1 to up4
            have those from the fourth to the first. None is 3 everywhere.
        down_scale: 1 or 2 for each of down1 to down4, a number or one for each axis. None is 2 everywhere.
        conv_block: kind of the convolution blocks, "BasicBlock".
        norm, act: "in", "bn" or "ln", see common/conv_blocks.py; "relu", "leaky_relu" or "gelu".
        map_size: cells of a semantic map, a number or one for each axis.
        expansion: how many times wider an MBConv is inside.
        fusion_depth, fusion_dim, fusion_heads: layers, channels and heads of the transformer of the maps.
        attn_drop, proj_drop: share dropped in training, of the weights by which maps read features, and of
            what attention adds to a feature.
        proj_type: how attention reads a feature: "depthwise" with the voxels around, "linear" without.
        aux_loss: in training also predict at stride 4.
        checkpointing: in training keep only what passes between the blocks; backward computes the rest again.

    Parameters with the defaults (3 classes): 39,591,942; with half of all channels and heads: 10,409,734.

    Raises:
        ValueError: a list of another length, or a value that does not fit.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 3,
        *,
        ndim: int = 3,
        base_chan: int = 32,
        chan_num: Sequence[int] = (64, 128, 256, 320, 256, 128, 64, 32),
        conv_num: Sequence[int] = (2, 1, 0, 0, 0, 1, 2, 2),
        trans_num: Sequence[int] = (0, 1, 4, 6, 4, 1, 0, 0),
        num_heads: Sequence[int] = (1, 4, 8, 10, 8, 4, 1, 1),
        kernel_size: Sequence | None = None,
        down_scale: Sequence | None = None,
        conv_block: str = "BasicBlock",
        norm: str = "in",
        act: str = "relu",
        map_size: int | Sequence[int] = 4,
        expansion: int = 4,
        fusion_depth: int = 2,
        fusion_dim: int = 320,
        fusion_heads: int = 10,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj_type: str = "depthwise",
        aux_loss: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        style = Style(ndim, conv_block, norm, act, expansion, attn_drop, proj_drop, proj_type)
        kernels = kernels_per_level(kernel_size, 5, ndim)
        scales = per_level("down_scale", down_scale, 2, 4, ndim)
        (cells,) = per_level("map_size", [map_size], 4, 1, ndim)
        check_sizes(chan_num=chan_num, conv_num=conv_num, trans_num=trans_num, num_heads=num_heads)
        if fusion_dim % fusion_heads:
            raise ValueError(
                f"fusion_heads is {fusion_heads}, which does not divide fusion_dim, {fusion_dim}"
            )
        if prod(cells) < 2:
            raise ValueError(f"map_size is {map_size}; a map needs at least two cells")

        self.in_channels, self.checkpointing = in_channels, checkpointing
        self.multiple = strides_product(scales)
        sizes = zip(chan_num, conv_num, trans_num, num_heads, kernels[1:] + kernels[3::-1], strict=True)
        stages = [Stage(*numbers) for numbers in sizes]
        widths = [base_chan, *chan_num]  # of inc, down1 to down4, up1 to up4
        self.stem = same_size_conv(in_channels, base_chan, kernels[0])
        self.inc = style.convs([base_chan, base_chan], kernels[0])[0]
        self.down = nn.ModuleList(Down(widths[i], stages[i], scales[i], cells, style) for i in range(4))
        self.map_fusion = MapFusion(chan_num[1:4], fusion_dim, fusion_depth, fusion_heads, style)
        self.up = nn.ModuleList(
            Up(widths[4 + i] + widths[3 - i], stages[4 + i], last_map=i == 0, style=style) for i in range(4)
        )
        self.aux = style.pointwise(chan_num[5], num_classes, bias=True) if aux_loss else None
        self.outc = style.pointwise(chan_num[7], num_classes, bias=True)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image (B, C, *spatial), any size -> logits (B, K, *spatial); in training with the auxiliary head
        [logits, auxiliary logits], both of the size of the image."""
        check_image(image, self.in_channels, len(self.multiple))
        padded, crop = padded_to_multiple(image, self.multiple, two_blocks=True)
        run = stage_runner(self)
        x = run(self.inc, fast_layout(self.stem(padded)))
        skips, maps = [x], []
        for down in self.down:
            x, semantic_map = down(x, run)
            skips.append(x)
            maps += [semantic_map] if semantic_map is not None else []
        maps = run(self.map_fusion, *maps)  # of strides 4, 8 and 16
        features = []  # of up1 to up4
        x, semantic_map = skips.pop(), maps.pop()
        for up in self.up:
            own = [semantic_map, maps.pop()] if maps else []
            x, semantic_map = up(x, skips.pop(), own, run)
            features.append(x)
        logits = self.outc(x)[crop]
        if self.aux is None or not self.training:
            return logits
        return [logits, resize_aligned(self.aux(features[1]), padded.shape[2:])[crop]]


def check_sizes(**lists: Sequence[int]) -> None:
    """Refuse lists of the stages that do not fit each other; ValueError names them.

    Args:
        lists: chan_num, conv_num, trans_num, num_heads, in this order.
    """
    for name, values in lists.items():
        if len(values) != len(STAGES):
            raise ValueError(f"{name} has {len(values)} entries instead of {len(STAGES)}: {list(values)}")
    for name, channels, convs, attentions, heads in zip(STAGES, *lists.values(), strict=True):
        if (attentions > 0) != (name in ATTENDED):
            needed = "at least 1" if name in ATTENDED else "0"
            given = list(lists["trans_num"])
            raise ValueError(f"trans_num is {attentions} in {name}, which needs {needed}: {given}")
        if channels % heads:
            raise ValueError(f"num_heads is {heads} in {name}, which does not divide its {channels} channels")
        if convs + attentions == 0:
            raise ValueError(f"{name} has no block: conv_num and trans_num are both 0 there")
