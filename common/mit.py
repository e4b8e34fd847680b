"""SegFormer for pictures: Mix Transformer (MiT), which hands out its last attention, and the decoder."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import check_image, resize_linear
from common.segformer3d import init_weights, to_tokens


class Size(NamedTuple):
    """Of an encoder: channels, blocks, attention heads and reduction of the keys' grid in its four stages."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)


BACKBONES = {
    "tiny": Size((32, 64, 128, 192), (1, 1, 2, 2), heads=(1, 2, 4, 8)),  # of this project, for CPUs
    "b0": Size((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": Size((64, 128, 320, 512), (2, 2, 2, 2)),
    "b2": Size((64, 128, 320, 512), (3, 4, 6, 3)),
    "b3": Size((64, 128, 320, 512), (3, 4, 18, 3)),
    "b4": Size((64, 128, 320, 512), (3, 8, 27, 3)),
    "b5": Size((64, 128, 320, 512), (3, 6, 40, 3)),
}
STRIDES = (4, 2, 2, 1)  # SegFormer has (4, 2, 2, 2); with 1 the stages 3 and 4 lie on the same grid
MEAN, SD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of the pixels of ImageNet
SMALLEST = 32  # side of an image in pixels, of which the first stage's keys are the mean
HANDED_OUT = 2  # blocks at the end, all of stage 4, whose attention is part of the result


class PatchEmbedding(nn.Module):
    """Overlapping patches of an image become tokens: (N, C, H, W) -> (N, tokens, channels) and their grid."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(to_tokens(x)), tuple(x.shape[2:])


class Attention(nn.Module):
    """Attention of all tokens to keys and values on a grid that is `reduction` times coarser."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.sr = None
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, stride=reduction)
            self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, grid: tuple[int, int], hand_out: bool) -> tuple[Tensor, Tensor | None]:
        """x (N, tokens, C) on `grid` (h, w) -> the same shape; and, with `hand_out`, queries times keys.

        That product is float32 (N, heads, tokens, keys), neither scaled nor passed through the softmax.
        """
        query = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, tokens, c)
        if self.sr is not None:
            x = self.norm(to_tokens(self.sr(_image(x, grid))))
        key, value = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        product = None
        if hand_out:
            with torch.autocast(x.device.type, enabled=False):  # it can exceed what fp16 holds
                product = query.float() @ key.float().transpose(2, 3)
                weights = (product * query.shape[3] ** -0.5).softmax(dim=3)
            mixed = weights.to(value.dtype) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)  # does not hold tokens x keys numbers
        return self.proj(mixed.transpose(1, 2).flatten(2)), product


class MixFFN(nn.Module):
    """MLP of four times the channels, with a 3 x 3 convolution of each by itself, which tells places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        # In memory as its gradient will be; otherwise DistributedDataParallel warns.
        depthwise.weight = nn.Parameter(depthwise.weight.detach().to(memory_format=torch.channels_last))
        self.dwconv = nn.ModuleDict({"dwconv": depthwise})  # for the original's names of weights
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.dwconv["dwconv"](_image(self.fc1(x), grid))
        return self.fc2(F.gelu(to_tokens(x)))


class Block(nn.Module):
    """Attention and MixFFN, each after a layer norm and with a shortcut.

    In training each image of a batch goes without such a branch with the probability `drop_path`; for the
    others the branch counts more, so that its mean stays.
    """

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MixFFN(channels)
        self.drop_path = drop_path

    def forward(self, x: Tensor, grid: tuple[int, int], hand_out: bool) -> tuple[Tensor, Tensor | None]:
        """As Attention."""
        mixed, product = self.attn(self.norm1(x), grid, hand_out)
        x = x + self._dropped(mixed)
        return x + self._dropped(self.mlp(self.norm2(x), grid)), product

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        # Drawn on the CPU in float32: the same images on every device and in every precision.
        factors = torch.bernoulli(torch.full((len(branch), 1, 1), keep)) / keep
        return branch * factors.to(branch.device, branch.dtype)


class MixTransformer(nn.Module):
    """Encoder of four stages for RGB images of any size from 32 x 32 pixels.

    Weights have the names of the original (NVlabs); common/mit_weights.py knows others.

    Args:
        backbone: size, one of BACKBONES.
        strides: by how much each stage makes the grid coarser.
        drop_path: of the last block, see Block; from the first block on it grows linearly from 0.

    Parameters: tiny 1,961,728, b0 3,319,392, b1 13,151,424, b2 24,196,288.

    Source: Xie et al. 2021, SegFormer, arXiv:2105.15203; the last stride and the attention that is handed
    out: Ru et al. 2022, AFA, arXiv:2203.02664. Differs: attention exists for the last two blocks only.
    """

    def __init__(self, backbone: str, strides: Sequence[int] = STRIDES, drop_path: float = 0.1) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {backbone!r}; take one of {', '.join(BACKBONES)}")
        size = BACKBONES[backbone]
        self.widths, self.attention_maps = size.widths, HANDED_OUT * size.heads[3]
        last, number, in_channels = sum(size.depths) - 1, 0, 3
        for i, (width, stride) in enumerate(zip(size.widths, strides, strict=True)):
            blocks = nn.ModuleList()
            for _ in range(size.depths[i]):
                rate = drop_path * number / last
                blocks.append(Block(width, size.heads[i], size.reductions[i], rate))
                number += 1
            kernel = 7 if i == 0 else 3
            self.add_module(f"patch_embed{i + 1}", PatchEmbedding(in_channels, width, kernel, stride))
            self.add_module(f"block{i + 1}", blocks)
            self.add_module(f"norm{i + 1}", nn.LayerNorm(width, eps=1e-6))
            in_channels = width
        self.apply(init_weights)

    def forward(
        self,
        image: Tensor,
        run: Callable = lambda block, *inputs: block(*inputs),
        handed_out: int = HANDED_OUT,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """image (N, 3, H, W) -> features and attention.

        Args:
            run: `run(block, *inputs)` calls each block.
            handed_out: number of blocks, counted from the last one, whose attention is wanted.

        Returns:
            Features of the four stages, (N, C, h, w) with h = H / stride rounded up; and, for each of these
            blocks, the product of queries (axis 2) and keys (axis 3), float32 (N, heads, n, n), as in
            Attention. In stage 4 n = h * w; where the grid of the keys is coarser, n is the number of its
            cells, and that of a cell is the mean over the queries in it.
        """
        check_image(image, 3, ndim=2)
        if min(image.shape[2:]) < SMALLEST:
            raise ValueError(
                f"an image of {image.shape[2]} x {image.shape[3]} pixels is too small for this network, it "
                f"takes {SMALLEST} x {SMALLEST} or more; enlarge it, or leave out the smallest of --scales"
            )
        x, features, products = image, [], []
        still_to_come = sum(len(getattr(self, f"block{stage}")) for stage in "1234")
        for stage in "1234":
            x, grid = getattr(self, f"patch_embed{stage}")(x)
            for block in getattr(self, f"block{stage}"):
                hand_out = still_to_come <= handed_out
                x, product = run(block, x, grid, hand_out)
                products += [_square(product, grid, block.attn.reduction)] if hand_out else []
                still_to_come -= 1
            x = _image(getattr(self, f"norm{stage}")(x), grid)
            features.append(x)
        return features, products


class SegFormerDecoder(nn.Module):
    """SegFormer's decoder: all stages on the grid of the first, concatenated, and turned into classes.

    Between a stage and the norm all steps are linear, so they are taken in another order: each stage is
    multiplied on its own coarse grid by the product of its two matrices, and the results are enlarged and
    added. The concatenated features at stride 4, the largest tensor of the network, never exist.

    Args:
        widths: channels of the stages.
        channels: of the concatenated features.
        num_classes: with the background.
    """

    def __init__(self, widths: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        for i, width in enumerate(widths):  # dictionaries for the original's names of weights
            self.add_module(f"linear_c{i + 1}", nn.ModuleDict({"proj": nn.Linear(width, channels)}))
        fuse = nn.Conv2d(len(widths) * channels, channels, 1, bias=False)
        self.linear_fuse = nn.ModuleDict({"conv": fuse, "bn": nn.BatchNorm2d(channels)})
        self.dropout = nn.Dropout2d(0.1)
        self.linear_pred = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features of the stages, finest first -> logits (N, K, h, w) on the grid of the first."""
        fuses = self.linear_fuse["conv"].weight.flatten(1).chunk(len(features), dim=1)  # coarsest stage first
        fused = 0
        for i, (x, fuse) in enumerate(zip(features, reversed(fuses), strict=True)):
            linear = getattr(self, f"linear_c{i + 1}")["proj"]
            with torch.autocast(x.device.type, enabled=False):
                weight, bias = fuse @ linear.weight, fuse @ linear.bias
            x = F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
            fused = fused + resize_linear(x, features[0].shape[2:])
        return self.linear_pred(self.dropout(F.relu(self.linear_fuse["bn"](fused))))


def to_network_input(image: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> float32 with mean and deviation of ImageNet, which encoders are trained on."""
    mean, sd = (torch.tensor(v, device=image.device).reshape(1, 3, 1, 1) for v in (MEAN, SD))
    return (image.float() - mean) / sd


def _square(product: Tensor, grid: tuple[int, int], reduction: int) -> Tensor:
    """(N, heads, h * w queries, keys) -> (N, heads, keys, keys): means over the queries in a cell of keys."""
    if reduction == 1:
        return product
    per_key = product.transpose(2, 3).flatten(1, 2).unflatten(2, grid)
    return F.avg_pool2d(per_key, reduction).flatten(2).unflatten(1, (product.shape[1], -1)).transpose(2, 3)


def _image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, h*w, C) -> (N, C, h, w), the channels next to each other in memory, as convolutions like it."""
    return x.transpose(1, 2).unflatten(2, grid)
