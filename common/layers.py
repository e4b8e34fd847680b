"""Blocks for 2-D and 3-D networks."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LINEAR_MODE = {2: "bilinear", 3: "trilinear"}


def make_norm(norm: str, channels: int, ndim: int) -> nn.Module:
    """'batch', or 'group' with 8 groups (fewer for few channels), which does not depend on the batch size."""
    if norm == "batch":
        return BATCH_NORM[ndim](channels)
    if norm == "group":
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    raise ValueError(f"unknown norm {norm!r}; batch or group")


def upsample_to(x: Tensor, size: torch.Size) -> Tensor:
    """Linear interpolation of (N, C, *spatial) to `size`, corners aligned."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=tuple(size), mode=LINEAR_MODE[x.ndim - 2], align_corners=True)


def pad_to(x: Tensor, size: torch.Size) -> Tensor:
    """Zero-pad (N, C, *spatial) to `size`, half on each side, so that odd input sizes fit their skips."""
    padding: list[int] = []
    for have, want in zip(reversed(x.shape[2:]), reversed(size), strict=True):
        padding += [(want - have) // 2, want - have - (want - have) // 2]
    return F.pad(x, padding) if any(padding) else x


def check_image(image: Tensor, in_channels: int, ndim: int) -> None:
    """
    Raises:
        ValueError: `image` is not (N, in_channels, *spatial) with `ndim` spatial axes.
    """
    if image.ndim != ndim + 2 or image.shape[1] != in_channels or 0 in image.shape:
        axes = {2: "H, W", 3: "D, H, W"}[ndim]
        raise ValueError(
            f"the image has shape {tuple(image.shape)}, the network takes (N, {in_channels}, {axes}), none "
            "of them 0; add axes with image[None], or build the network with in_channels= of the image"
        )


def padded_to_multiple(x: Tensor, multiple: int, two_blocks: bool = False) -> tuple[Tensor, tuple]:
    """Repeat the border of (N, C, *spatial), half on each side, until every side is a multiple.

    The border is repeated and not filled with 0, because what 0 means depends on the normalisation: scaled to
    [-1, 1] it can be the HU of bone.

    Args:
        two_blocks: add another `multiple` to the last axis where all sides would be just one `multiple`: an
            instance norm at that stride needs more than one voxel.

    Returns:
        The padded tensor (`x` itself where nothing is needed), and the index that cuts the original grid out
        of it or of anything on its grid: `logits[crop]`.
    """
    size = [-(-side // multiple) * multiple for side in x.shape[2:]]
    if two_blocks and all(side == multiple for side in size):
        size[-1] *= 2
    before = [(want - have) // 2 for have, want in zip(x.shape[2:], size, strict=True)]
    crop = (..., *(slice(b, b + have) for b, have in zip(before, x.shape[2:], strict=True)))
    padding: list[int] = []
    for b, have, want in zip(reversed(before), reversed(x.shape[2:]), reversed(size), strict=True):
        padding += [b, want - have - b]
    return (F.pad(x, padding, mode="replicate") if any(padding) else x), crop


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


class AttentionGate(nn.Module):
    """Additive attention: weighs each position of a skip by what the coarser decoder level asks for.

    Source: Oktay et al. 2018, Attention U-Net, arXiv:1804.03999. Differs: works on the skip's grid (the paper
    brings the skip to the gating signal's grid), convolutions without bias but with a norm, no output
    transform.
    """

    def __init__(self, gate_channels: int, skip_channels: int, norm: str, ndim: int) -> None:
        super().__init__()
        mid = max(skip_channels // 2, 1)

        def project(channels: int, out: int) -> nn.Sequential:
            return nn.Sequential(CONV[ndim](channels, out, 1, bias=False), make_norm(norm, out, ndim))

        self.W_g = project(gate_channels, mid)
        self.W_x = project(skip_channels, mid)
        self.psi = project(mid, 1)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        """gate (N, Cg, *coarse), skip (N, Cx, *fine) -> skip times attention in (0, 1), (N, Cx, *fine)."""
        gate = upsample_to(gate, skip.shape[2:])
        attention = torch.sigmoid(self.psi(F.relu(self.W_g(gate) + self.W_x(skip), inplace=True)))
        return skip * attention


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


class _FrozenRunningStatistics:
    """Inside, BatchNorm normalises by the batch but leaves its running statistics and count of batches alone.

    No generator: that could be entered once only, but every backward through one graph enters again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self.kept = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            # Not track_running_stats=False: checkpointing demands that the same tensors are saved both times.
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_) -> None:
        for norm, (momentum, count) in zip(self.norms, self.kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def checkpointed(module: nn.Module, *inputs: Tensor, enabled: bool = True) -> Tensor:
    """Run `module` without keeping its activations; backward computes them again.

    The second computation must not update BatchNorm's running statistics a second time. Not `enabled`: run it
    as it is.
    """
    if not enabled:
        return module(*inputs)

    def contexts() -> tuple:
        return contextlib.nullcontext(), _FrozenRunningStatistics(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)
