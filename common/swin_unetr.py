"""Swin UNETR for 3-D images."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import Conv3d, check_image, padded_to_multiple
from common.recomputation import stage_runner

WINDOW = 7  # side of an attention window, in voxels of the stage's grid
DEPTH = 2  # blocks in each stage; the second one shifts its windows
HEADS = (3, 6, 12, 24)  # attention heads of the four stages

# Order in which merging concatenates the corners (z, y, x) of each 2 x 2 x 2 block.
CORNERS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
# MONAI before 1.5 took two corners twice and left two out; the weights published for it need the same.
LEGACY_CORNERS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


def _relative_index(n: int, device: torch.device) -> Tensor:
    """Row of the bias table for each pair of the first n voxels of a 7 x 7 x 7 window, (n, n).

    A window clipped to (d, h, w) takes the first d*h*w voxels of the full window, which are not its own
    offsets. The source and its published weights do the same, and the table is learned from it.
    """
    i = torch.arange(n, device=device)
    span = 2 * WINDOW - 1
    code = (i // WINDOW**2 * span + i // WINDOW % WINDOW) * span + i % WINDOW  # linear in the offset z, y, x
    return code[:, None] - code[None, :] + span**3 // 2


def _shift_mask(window: list[int], cut: list[int], device: torch.device) -> Tensor:
    """(n, n): 0 between voxels of one region, -100 between regions. The last `cut` voxels of an axis came
    round from the other end of the image by the shift, so they are another region."""
    axes = [torch.arange(side, device=device) >= side - c for side, c in zip(window, cut, strict=True)]
    region = (axes[0][:, None, None] * 4 + axes[1][:, None] * 2 + axes[2] * 1).flatten()
    return (region[:, None] != region[None, :]) * -100.0


class WindowAttention(nn.Module):
    """Multi-head attention within windows of 7^3 voxels, with a learned bias for each relative position.

    Along an axis on which the grid is smaller than a window, the window is clipped to the grid and not
    shifted. Sides that 7 does not divide are filled up with 0, which takes part in the attention, as in the
    source.
    """

    def __init__(self, channels: int, heads: int, shifted: bool) -> None:
        super().__init__()
        self.heads, self.shifted = heads, shifted
        self.bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, heads))
        nn.init.normal_(self.bias_table, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, H, W, C) -> the same shape."""
        size = x.shape[1:4]
        window = [min(WINDOW, side) for side in size]
        shift = [WINDOW // 2 if self.shifted and side > WINDOW else 0 for side in size]
        fill_d, fill_h, fill_w = [-side % w for side, w in zip(size, window, strict=True)]
        x = F.pad(x, (0, 0, 0, fill_w, 0, fill_h, 0, fill_d))
        x = torch.roll(x, [-s for s in shift], (1, 2, 3))

        wd, wh, ww = window
        n, gd, gh, gw = len(x), x.shape[1] // wd, x.shape[2] // wh, x.shape[3] // ww
        qkv = self.qkv(x).view(n, gd, wd, gh, wh, gw, ww, 3, self.heads, -1)
        # (3, N, windows along z, y, x, heads, voxels of a window, channels of a head)
        qkv = qkv.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9).flatten(6, 8)
        x = self._attend(qkv, window, shift).unflatten(5, window)  # (N, gd, gh, gw, heads, wd, wh, ww, c)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(n, gd * wd, gh * wh, gw * ww, -1)

        x = torch.roll(x, shift, (1, 2, 3))
        return self.proj(x[:, : size[0], : size[1], : size[2]])

    def _attend(self, qkv: Tensor, window: list[int], shift: list[int]) -> Tensor:
        """Attention in groups of windows with the same mask: only the last window along a shifted axis holds
        two regions, so 8 masks (heads, n, n) do. One mask for each window would be 462 MiB at 96^3."""
        index = _relative_index(qkv.shape[-2], qkv.device)
        bias = self.bias_table[index].permute(2, 0, 1)  # (heads, n, n)
        groups = [[(slice(-1), 0), (slice(-1, None), s)] if s else [(slice(None), 0)] for s in shift]
        result = torch.empty_like(qkv[0])
        for group in product(*groups):
            where, cut = (slice(None), *(g[0] for g in group)), [g[1] for g in group]
            query, key, value = qkv[(slice(None), *where)].flatten(1, 4).unbind()
            mask = bias + _shift_mask(window, cut, bias.device) if any(cut) else bias
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None].to(query.dtype))
            result[where] = out.view_as(result[where])
        return result


class SwinBlock(nn.Module):
    """Window attention and an MLP of four times the channels, each after a layer norm and with a shortcut."""

    def __init__(self, channels: int, heads: int, shifted: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, shifted)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Halves the grid: the 8 voxels of each 2 x 2 x 2 block concatenated, 8 C channels to 2 C."""

    def __init__(self, channels: int, corners: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        self.corners = corners
        self.reduction = nn.Linear(8 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(8 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, H, W, C) with even sides -> (N, D/2, H/2, W/2, 2 C)."""
        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.corners], -1)
        return self.reduction(self.norm(x))


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with instance norm without scale and shift and LeakyReLU, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.conv3 = (
            nn.Conv3d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(F.instance_norm(self.conv1(x)), 0.01, inplace=True)
        y = F.instance_norm(self.conv2(y))
        if self.conv3 is not None:
            x = F.instance_norm(self.conv3(x))
        return F.leaky_relu(y + x, 0.01, inplace=True)


class UpBlock(nn.Module):
    """Transposed convolution by 2, concatenate [up, skip], ResidualBlock."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2, bias=False)
        self.block = ResidualBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.up(x), skip], dim=1))


class SwinUNETR(nn.Module):
    """Swin transformer encoder, convolutional decoder; 3-D images of any size.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        width: channels of the first level, a multiple of 12; the encoder has 1, 2, 4, 8, 16 times as many at
            strides 2, 4, 8, 16, 32.
        checkpointing: in training keep only what passes between the blocks; backward computes the rest again.
            At 96^3, width 24, fp32 and batch 1 forward then leaves 247 MiB instead of 3,093.
        legacy_merging: concatenate the voxels of a block as MONAI before 1.5 did (`LEGACY_CORNERS`), for
            weights that were trained with it.

    Parameters (1 channel, 1 class, width 12 / 24 / 48): 4,078,051 / 15,702,979 / 62,186,659.

    Source: Hatamizadeh et al. 2022, Swin UNETR, arXiv:2201.01266; same results as MONAI's from the same
    weights. Differs: any size, the image is padded to multiples of 32 by repeating its border; memory of the
    attention masks does not grow with the image; no drop-out or drop-path.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        *,
        width: int = 24,
        checkpointing: bool = True,
        legacy_merging: bool = False,
    ) -> None:
        super().__init__()
        if width < 12 or width % 12:
            raise ValueError(f"width is {width}; take 12, 24, 48 or another multiple of 12")
        corners = LEGACY_CORNERS if legacy_merging else CORNERS
        self.in_channels, self.checkpointing = in_channels, checkpointing
        self.multiple = (32, 32, 32)
        self.embed = nn.Conv3d(in_channels, width, 2, stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(SwinBlock(width * 2**i, heads, shifted=j % 2 == 1) for j in range(DEPTH)),
                PatchMerging(width * 2**i, corners),
            )
            for i, heads in enumerate(HEADS)
        )
        self.encoders = nn.ModuleList(  # strides 1, 2, 4, 8
            [
                ResidualBlock(in_channels, width),
                ResidualBlock(width, width),
                ResidualBlock(2 * width, 2 * width),
                ResidualBlock(4 * width, 4 * width),
            ]
        )
        self.bottleneck = ResidualBlock(16 * width, 16 * width)  # stride 32
        self.decoders = nn.ModuleList(  # strides 16, 8, 4, 2, 1
            UpBlock(above * width, own * width) for above, own in [(16, 8), (8, 4), (4, 2), (2, 1), (1, 1)]
        )
        self.head = nn.Conv3d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W) -> logits (N, K, D, H, W)."""
        check_image(image, self.in_channels, 3)
        image, crop = padded_to_multiple(image, self.multiple, two_blocks=True)
        run = stage_runner(self)

        x = self.embed(image).movedim(1, -1).contiguous()  # (N, D/2, H/2, W/2, C)
        features = [_skip(x)]
        for stage in self.stages:
            for module in stage:
                x = run(module, x)
            features.append(_skip(x))

        inputs = [image, *features[:3]]  # strides 1, 2, 4, 8
        skips = [run(encoder, own) for encoder, own in zip(self.encoders, inputs, strict=True)]
        skips.append(features[3])  # stride 16, as it is
        y = run(self.bottleneck, features[4])
        for decoder in self.decoders:
            y = run(decoder, y, skips.pop())
        return self.head(y)[crop]


def _skip(x: Tensor) -> Tensor:
    """Layer norm without weights, then channels first: (N, D, H, W, C) -> (N, C, D, H, W)."""
    return F.layer_norm(x, x.shape[-1:]).movedim(-1, 1).contiguous()
