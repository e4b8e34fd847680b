"""LHA-Net: a light U-Net with attention over a pyramid of scales and a head for each size of organ.

    stride  1   image ── stem ──────────────────── + ── DecoderLevel 0 ──┐ small
    stride  2            EncoderLevel 1 ────────── + ── DecoderLevel 1 ──┤ medium   Heads ── logits
    stride  4            EncoderLevel 2 ── PMSA ── + ── DecoderLevel 2 ──┘ large
    stride  8            EncoderLevel 3 ── PMSA ── + ── DecoderLevel 3
    stride 16            EncoderLevel 4 ── PMSA ───┘

C0..C4 are the channels at strides 1, 2, 4, 8, 16; d h w stand for the size of a level.

All convolutions are dense. Depthwise ones have fewer parameters, but a CPU needs several times as long for
their gradients where there are many voxels (benchmarks/lha_blocks.py).
"""

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amos_lha.organs import GROUPS, NUM_CLASSES
from common.layers import (
    Conv3d,
    ConvNormAct,
    InstanceNorm,
    fast_layout,
    kernels_of_levels,
    pad_for_levels,
    resize_linear,
)
from common.recomputation import stage_runner

STRIDES = ((2, 2, 2),) * 4  # z y x, of the four steps down
CHECKPOINTING = ("none", "high", "all")


PRESETS = {  # channels C0..C4; residual blocks of the encoder levels 1 to 4
    "tiny": ((8, 16, 32, 64, 96), (1, 1, 2, 2)),
    "small": ((16, 32, 64, 128, 160), (1, 2, 2, 2)),
    "base": ((24, 48, 96, 192, 256), (1, 2, 3, 3)),
}


class TrainingOutput(NamedTuple):
    """What a network with a router returns in training."""

    levels: list[Tensor]  # logits (N, 16, ...) at stride 1; with deep supervision also at strides 2, 4 and 8
    router: Tensor | None  # (N, 3, ...) scores of the groups small, medium, large at stride 2; None without


class ResidualBlock(nn.Module):
    """x + ConvNormAct(x): one dense convolution, for the levels with few channels and many voxels."""

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.main = ConvNormAct(channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


class BottleneckBlock(nn.Module):
    """x + (1x1x1 to C/4, dense 3x3x3, 1x1x1 back to C), for the levels with many channels."""

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        inner = channels // 4
        self.main = nn.Sequential(
            ConvNormAct(channels, inner, (1, 1, 1)),
            ConvNormAct(inner, inner, kernel),
            nn.Conv3d(inner, channels, 1, bias=False),
            InstanceNorm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.main(x), 0.01)


def make_block(level: int, channels: int, kernel: tuple[int, int, int]) -> nn.Module:
    """The residual block of a level: dense at strides 1, 2 and 4, with a bottleneck at 8 and 16."""
    return ResidualBlock(channels, kernel) if level <= 2 else BottleneckBlock(channels, kernel)


class Gates(nn.Module):
    """x times a gate for each channel times a gate for each voxel, both in (0, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(4, channels // 4)
        self.channel = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.voxel = Conv3d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, b, d, h, w) -> the same shape."""
        gate = self.channel(x.mean((2, 3, 4))) + self.channel(x.amax((2, 3, 4)))  # (N, b)
        x = x * torch.sigmoid(gate)[:, :, None, None, None]
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)  # (N, 2, d, h, w)
        return x * torch.sigmoid(self.voxel(summary))


class PMSA(nn.Module):
    """Progressive multi-scale attention over a pyramid: the grid of the level, half of it, a quarter of it.

    Each scale is a gated feature of b = C/4 channels; from coarse to fine it takes up what the coarser ones
    say. Each voxel then weighs the three scales. The last convolution starts at zero, so the module starts
    as the identity.
    """

    SCALES = 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        b = max(8, channels // 4)
        self.reduce = nn.Conv3d(channels, b, 1)
        self.convs = nn.ModuleList(ConvNormAct(b, b) for _ in range(self.SCALES))
        self.gates = nn.ModuleList(Gates(b) for _ in range(self.SCALES))
        self.merge = nn.ModuleList(nn.Conv3d(2 * b, b, 1) for _ in range(self.SCALES - 1))
        self.scale_weights = nn.Conv3d(self.SCALES * b, self.SCALES, 1)
        self.expand = nn.Conv3d(b, channels, 1)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, d, h, w) -> the same shape."""
        size = x.shape[2:]
        features, y = [], self.reduce(x)
        for scale, (conv, gates) in enumerate(zip(self.convs, self.gates, strict=True)):
            if scale:  # half the grid, but never a single voxel
                y = resize_linear(y, tuple(max((side + 1) // 2, min(side, 2)) for side in y.shape[2:]))
            y = conv(y)
            features.append(resize_linear(gates(y), size))  # (N, b, d, h, w)
        fused = [features[-1]]  # from the coarsest scale to the finest
        for merge, feature in zip(self.merge, features[-2::-1], strict=True):
            fused.append(merge(torch.cat([fused[-1], feature], dim=1)))
        weights = self.scale_weights(torch.cat(fused, dim=1)).softmax(dim=1)  # (N, 3, d, h, w)
        return x + self.expand(sum(w * f for w, f in zip(weights.split(1, dim=1), fused, strict=True)))


class EncoderLevel(nn.Module):
    """Strided convolution, residual blocks, attention: (N, C(i-1), D, H, W) -> (N, Ci, D/s, H/s, W/s)."""

    def __init__(
        self, level: int, widths: tuple[int, int], blocks: int, kernel: tuple, stride: tuple, attention: bool
    ) -> None:
        super().__init__()
        self.down = ConvNormAct(*widths, kernel, stride)
        self.blocks = nn.Sequential(*(make_block(level, widths[1], kernel) for _ in range(blocks)))
        self.attention = PMSA(widths[1]) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.blocks(self.down(x)))


class DecoderLevel(nn.Module):
    """Transposed convolution up to the skip, which is added; a residual block; -> the shape of the skip."""

    def __init__(self, level: int, widths: tuple[int, int], kernel: tuple, stride: tuple) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(*widths, stride, stride=stride)
        # As strong as the skip that it is added to; PyTorch's own start makes it three times weaker.
        nn.init.normal_(self.up.weight, std=widths[0] ** -0.5)
        self.block = (
            ConvNormAct(widths[1], widths[1], kernel) if level == 0 else make_block(level, widths[1], kernel)
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.up(x) + skip)


class Heads(nn.Module):
    """A 1x1x1 convolution at stride 1 for all classes; size-aware, small organs also get logits from there,
    medium ones from stride 2 and large ones from stride 4.

    What a coarser level says is brought to stride 1; all logits meet in one softmax.
    """

    def __init__(self, widths: tuple[int, ...], kernels: list, size_aware: bool = True) -> None:
        super().__init__()
        self.all = nn.Conv3d(widths[0], NUM_CLASSES, 1)
        self.groups = nn.ModuleDict()
        for group, width, kernel in zip(GROUPS, widths, kernels, strict=True):  # small, medium, large
            if size_aware:
                self.groups[group] = nn.Sequential(
                    ConvNormAct(width, width // 2, kernel), nn.Conv3d(width // 2, len(GROUPS[group]), 1)
                )

    def forward(self, *features: Tensor) -> Tensor:
        """Features (N, C0..C2, ...) of strides 1, 2, 4 -> logits (N, 16, D, H, W) in the order of labels."""
        logits, size = self.all(features[0]), features[0].shape[2:]
        if not self.groups:
            return logits
        heads = zip(self.groups.values(), features, strict=True)
        return add_to_groups(logits, [resize_linear(head(x), size).unbind(dim=1) for head, x in heads])


def add_to_groups(logits: Tensor, more: list) -> Tensor:
    """Logits (N, 16, D, H, W) plus `more`, (N, D, H, W) for each organ of each group."""
    channels = list(logits.unbind(dim=1))
    for organs, of_group in zip(GROUPS.values(), more, strict=True):
        for organ, of_organ in zip(organs, of_group, strict=True):
            channels[organ] = channels[organ] + of_organ
    return torch.stack(channels, dim=1)


class LHANet(nn.Module):
    """Light hierarchical attention network.

    Args:
        preset: "tiny", "small" or "base": channels and blocks, see PRESETS; 554,309, 2,058,937 and 5,041,345
            parameters without router and deep supervision.
        heads: "size_aware", or "shared": one 1x1x1 convolution for all classes.
        attention: PMSA at strides 4, 8 and 16.
        router: in training also predict the size group of each voxel, and add its log probability to the
            logits of the group's organs.
        deep_supervision: in training also predict at strides 2, 4 and 8.
        checkpointing: what backward computes again instead of keeping it: "none"; "high", the levels of
            strides 1 and 2, which hold most of the memory; "all". True is "all", False is "none".
        strides: z y x of the four steps down. A level whose z has not been halved and is not about to be has
            kernels that look within a slice only.

    Raises:
        ValueError: an unknown preset, kind of heads or checkpointing policy.
    """

    def __init__(
        self,
        preset: str = "small",
        *,
        heads: str = "size_aware",
        attention: bool = True,
        router: bool = False,
        deep_supervision: bool = False,
        checkpointing: str | bool = "none",
        strides: list | tuple = STRIDES,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; take tiny, small or base")
        if heads not in ("size_aware", "shared"):
            raise ValueError(f"heads is {heads!r}; take size_aware or shared")
        if checkpointing not in (*CHECKPOINTING, True, False):
            raise ValueError(f"checkpointing is {checkpointing!r}; take one of {', '.join(CHECKPOINTING)}")
        strides = [tuple(stride) for stride in strides]
        c, blocks = PRESETS[preset]
        kernels = kernels_of_levels(strides)
        self.checkpointing = checkpointing
        self.multiple = tuple(prod(stride[axis] for stride in strides) for axis in range(3))
        self.stem = ConvNormAct(1, c[0], kernels[0])
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()  # both from fine to coarse
        for i in range(1, 5):
            widths, attended = (c[i - 1], c[i]), attention and i >= 2
            self.encoder.append(EncoderLevel(i, widths, blocks[i - 1], kernels[i], strides[i - 1], attended))
            self.decoder.append(DecoderLevel(i - 1, widths[::-1], kernels[i - 1], strides[i - 1]))
        self.heads = Heads(c[:3], kernels[:3], heads == "size_aware")
        self.router = nn.Conv3d(c[1], len(GROUPS), 1) if router else None
        more_heads = (nn.Conv3d(width, NUM_CLASSES, 1) for width in c[1:4])
        self.supervision = nn.ModuleList(more_heads) if deep_supervision else None

    def run(self, level: int, module: nn.Module, *inputs: Tensor) -> Tensor:
        """`module(*inputs)`, computed again in backward where the policy says so for this level."""
        if self.checkpointing == "high" and level > 1:
            return module(*inputs)
        return stage_runner(self)(module, *inputs)

    def forward(self, image: Tensor) -> Tensor | list[Tensor] | TrainingOutput:
        """image (N, 1, D, H, W), any size -> logits (N, 16, D, H, W).

        In training with deep supervision the list of logits at strides 1, 2, 4, 8, each on its own grid;
        with a router a `TrainingOutput`.

        Raises:
            ValueError: wrong shape; in training with deep supervision, sides that had to be padded.
        """
        supervised = self.training and self.supervision is not None
        padded, crop = pad_for_levels(image, 1, self.multiple, supervised)
        x = fast_layout(self.run(0, self.stem, padded))  # (N, C0, D, H, W)
        skips = [x]
        for level, encoder in enumerate(self.encoder, start=1):
            x = self.run(level, encoder, x)  # (N, C1..C4, d, h, w)
            skips.append(x)
        features = [skips.pop()]  # of the decoder, in the end (N, C0..C4, ...) from stride 1 to stride 16
        for level in (3, 2, 1, 0):
            features.insert(0, self.run(level, self.decoder[level], features[0], skips.pop()))
        logits = self.run(0, self.heads, *features[:3])
        router = None
        if self.router is not None:
            router = self.router(features[1])
            logits = routed(logits, router)
        logits = logits[crop]
        if not supervised and (router is None or not self.training):
            return logits
        levels = [logits]
        if supervised:
            levels += [head(x) for head, x in zip(self.supervision, features[1:4], strict=True)]
        return levels if router is None else TrainingOutput(levels, router)


def routed(logits: Tensor, router: Tensor) -> Tensor:
    """Logits (N, 16, D, H, W) of organs plus the log probability of their group; `router` (N, 3, d, h, w)."""
    scores = resize_linear(router.float().log_softmax(dim=1), logits.shape[2:]).to(logits.dtype)
    groups = zip(GROUPS.values(), scores.unbind(dim=1), strict=True)
    return add_to_groups(logits, [[score] * len(organs) for organs, score in groups])
