"""Mix Transformer (MiT), the encoder of SegFormer, for 2-D images; it also hands out its last attention."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import check_image
from common.recomputation import stage_runner


class Size(NamedTuple):
    """Of an encoder: for each of its four stages channels, blocks, attention heads and reduction of keys."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    reductions: tuple[int, int, int, int] = (8, 4, 2, 1)


B_WIDTHS = (64, 128, 320, 512)
BACKBONES = {
    "tiny": Size((32, 64, 128, 192), (1, 1, 2, 2), heads=(1, 2, 4, 8)),  # of this project, for CPUs
    "b0": Size((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": Size(B_WIDTHS, (2, 2, 2, 2)),
    "b2": Size(B_WIDTHS, (3, 4, 6, 3)),
    "b3": Size(B_WIDTHS, (3, 4, 18, 3)),
    "b4": Size(B_WIDTHS, (3, 8, 27, 3)),
    "b5": Size(B_WIDTHS, (3, 6, 40, 3)),
}
STRIDES = (4, 2, 2, 1)  # SegFormer has (4, 2, 2, 2); with 1 the stages 3 and 4 lie on the same grid
HANDED_OUT = 2  # blocks at the end of stage 4 whose attention is part of the result


class PatchEmbedding(nn.Module):
    """Overlapping patches of an image become tokens: (N, C, H, W) -> (N, tokens, channels) and their grid."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(_tokens(x)), tuple(x.shape[2:])


class Attention(nn.Module):
    """Attention of all tokens to keys and values on a grid that is `reduction` times coarser."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, stride=reduction)
            self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, grid: tuple[int, int], hand_out: bool) -> tuple[Tensor, Tensor | None]:
        """x (N, tokens, C) on `grid` (h, w) -> the same shape; and, with `hand_out`, what its softmax is of.

        That is the product of queries and keys, float32 (N, heads, tokens, keys), not yet scaled.
        """
        query = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, tokens, c)
        if self.reduction > 1:
            if min(grid) < self.reduction:
                raise ValueError(
                    f"the image is too small for this encoder: a stage has {grid[0]} x {grid[1]} tokens and "
                    f"takes the mean of {self.reduction} x {self.reduction} of them; no side below 32 pixels"
                )
            x = self.norm(_tokens(self.sr(_image(x, grid))))
        key, value = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        product = None
        if hand_out:
            # The product itself is needed, and it can exceed what fp16 holds.
            with torch.autocast(x.device.type, enabled=False):
                product = query.float() @ key.float().transpose(-2, -1)
                weights = (product * query.shape[-1] ** -0.5).softmax(dim=-1)
            mixed = weights.to(value.dtype) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)  # never holds tokens x keys numbers
        return self.proj(mixed.transpose(1, 2).flatten(2)), product


class DepthwiseConv(nn.Module):
    """3 x 3 convolution of each channel by itself, which tells tokens their place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return _tokens(self.dwconv(_image(x, grid)))


class MixFFN(nn.Module):
    """MLP of four times the channels with a depthwise convolution in its middle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.dwconv = DepthwiseConv(4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), grid)))


class DropPath(nn.Module):
    """In training each image of a batch goes without this branch with `probability`, the others get more."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        # Drawn on the CPU in float32: the same images on every device and in every precision.
        factors = torch.bernoulli(torch.full((len(x),), keep)) / keep
        return x * factors.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Block(nn.Module):
    """Attention and MixFFN, each after a layer norm and with a shortcut."""

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MixFFN(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int], hand_out: bool) -> tuple[Tensor, Tensor | None]:
        mixed, product = self.attn(self.norm1(x), grid, hand_out)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x), grid)), product


class MixTransformer(nn.Module):
    """Encoder of four stages for RGB images of any size from 32 x 32 pixels.

    Weights have the names of the original (NVlabs), see wsss_medical/pretrained.py for those of others.

    Args:
        backbone: size, one of BACKBONES.
        strides: by how much each stage makes the grid coarser.
        drop_path: probability with which the branches of the last block are left out in training; from the
            first block on it grows linearly from 0.
        checkpointing: in training keep only what passes between the blocks; backward computes the rest again.

    Parameters: tiny 1,961,728, b0 3,319,392, b1 13,151,424, b2 24,196,288.

    Source: Xie et al. 2021, SegFormer, arXiv:2105.15203; the last stride and the attention that is handed
    out: Ru et al. 2022, AFA, arXiv:2203.02664. Differs: attention exists for the last two blocks only.
    """

    def __init__(
        self,
        backbone: str = "b1",
        strides: Sequence[int] = STRIDES,
        drop_path: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {backbone!r}; take one of {', '.join(BACKBONES)}")
        if len(strides) != 4:
            raise ValueError(f"strides {tuple(strides)}: four are needed, one for each stage, like {STRIDES}")
        size = BACKBONES[backbone]
        self.widths, self.checkpointing = size.widths, checkpointing
        self.attention_maps = HANDED_OUT * size.heads[3]
        drops = iter(torch.linspace(0, drop_path, sum(size.depths)).tolist())
        in_channels = 3
        for i, (width, stride) in enumerate(zip(size.widths, strides, strict=True)):
            embed = PatchEmbedding(in_channels, width, 7 if i == 0 else 3, stride)
            blocks = [
                Block(width, size.heads[i], size.reductions[i], next(drops)) for _ in range(size.depths[i])
            ]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(width, eps=1e-6))
            in_channels = width
        self.apply(_init_weights)

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """image (N, 3, H, W) -> features and attention.

        Returns:
            Features of the four stages, (N, C, h, w) with h = H / stride rounded up; and, for each of the
            last two blocks, float32 (N, heads, n, n) with n tokens of stage 4: the product of queries (third
            axis) and keys, neither scaled nor passed through a softmax.
        """
        check_image(image, 3, ndim=2)
        run = stage_runner(self)
        x, features, products = image, [], []
        for stage in "1234":
            x, grid = getattr(self, f"patch_embed{stage}")(x)
            blocks = getattr(self, f"block{stage}")
            for number, block in enumerate(blocks):
                hand_out = stage == "4" and number >= len(blocks) - HANDED_OUT
                x, product = run(block, x, grid, hand_out)
                if hand_out:
                    products.append(product)
            x = _image(getattr(self, f"norm{stage}")(x), grid)
            features.append(x)
        return features, products


def _tokens(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h*w, C)."""
    return x.flatten(2).transpose(1, 2)


def _image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, h*w, C) -> (N, C, h, w), the channels next to each other in memory."""
    return x.transpose(1, 2).unflatten(2, grid)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        nn.init.zeros_(module.bias)
