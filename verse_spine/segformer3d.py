"""SegFormer3D, for images of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import check_image, checkpointed, padded_to_multiple


class Attention(nn.Module):
    """Multi-head attention of all tokens to keys and values on a grid that is `reduction` times coarser."""

    def __init__(self, width: int, heads: int, reduction: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.reduce = None
        if reduction > 1:
            self.reduce = nn.Conv3d(width, width, reduction, stride=reduction)
            self.reduce_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x (N, tokens, C) of the grid (d, h, w), z outermost -> the same shape."""
        query = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, tokens, c)
        if self.reduce is not None:
            x = self.reduce_norm(_tokens(self.reduce(_volume(x, grid))))
        key, value = self.key_value(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """MLP of four times the width with a depthwise 3x3x3 convolution, which gives tokens their place."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.depthwise = nn.Conv3d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.norm = _norm(norm, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x = self.norm(self.depthwise(_volume(self.fc1(x), grid)))
        return self.fc2(F.gelu(_tokens(x)))


class Block(nn.Module):
    """Attention and MixFFN, each after a layer norm and with a shortcut."""

    def __init__(self, width: int, heads: int, reduction: int, scale: float, norm: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, reduction, scale)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = MixFFN(width, norm)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x = x + self.attention(self.norm1(x), grid)
        return x + self.ffn(self.norm2(x), grid)


class Stage(nn.Module):
    """Overlapping patches to tokens, blocks, layer norm: (N, C, D, H, W) -> (N, width, D/s, H/s, W/s)."""

    def __init__(self, in_channels: int, width: int, kernel: int, stride: int, blocks: list[Block]) -> None:
        super().__init__()
        self.embed = nn.Conv3d(in_channels, width, kernel, stride=stride, padding=kernel // 2)
        self.embed_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, checkpointing: bool) -> Tensor:
        x = self.embed(x)
        grid = tuple(x.shape[2:])
        x = self.embed_norm(_tokens(x))
        for block in self.blocks:
            x = checkpointed(block, x, grid, enabled=checkpointing)
        return _volume(self.norm(x), grid)


class Decoder(nn.Module):
    """All stages to one width on the grid of stride 4, fused by a 1x1x1 convolution, then to the classes."""

    def __init__(self, widths: tuple[int, ...], width: int, num_classes: int, norm: str) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Sequential(nn.Linear(w, width), nn.LayerNorm(width)) for w in widths)
        self.fuse = nn.Conv3d(len(widths) * width, width, 1, bias=False)
        self.norm = _norm(norm, width)
        self.head = nn.Conv3d(width, num_classes, 1)

    def forward(self, *features: Tensor) -> Tensor:
        """Features of strides 4, 8, 16, 32 -> logits of stride 4."""
        grid = features[0].shape[2:]
        projected = [
            _resized(_volume(project(_tokens(x)), x.shape[2:]), grid)
            for project, x in zip(self.project, features, strict=True)
        ]
        x = self.fuse(torch.cat(projected[::-1], dim=1))  # coarsest first, as in the source
        return self.head(F.relu(self.norm(x), inplace=True))


class SegFormer3D(nn.Module):
    """Transformer encoder of four strides with convolutions for position, and a small decoder.

    Cheap for its size, but the finest feature has stride 4: borders are smooth.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        widths: channels at strides 4, 8, 16, 32.
        depths: blocks of each stage.
        heads: attention heads of each stage; divide the widths.
        reductions: how much coarser keys and values are, a side; 1, 2, 4 or 8 at stride 4, at most 4, 2, 1
            at strides 8, 16, 32.
        decoder_width: channels of the decoder.
        norm: of the convolutions, 'instance' or 'batch'. The source has 'batch', which at batch size 1
            differs between training and prediction; instance works for any batch size.
        checkpointing: in training keep only what passes between the blocks; backward computes the rest again.
        legacy_scale: divide attention by the root of the number of heads, as early copies of the source did,
            and not by the root of the channels of a head; for weights trained so.

    Parameters (1 channel, 1 class): 4,491,809.

    Source: Perera et al. 2024, SegFormer3D, arXiv:2404.10156. Differs: the grid goes through the network with
    the tokens (the source takes cubes only); images are padded to multiples of 32 by repeating their border.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        *,
        widths: tuple[int, ...] = (32, 64, 160, 256),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        heads: tuple[int, ...] = (1, 2, 5, 8),
        reductions: tuple[int, ...] = (4, 2, 1, 1),
        decoder_width: int = 256,
        norm: str = "instance",
        checkpointing: bool = False,
        legacy_scale: bool = False,
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(heads) == len(reductions) == 4:
            raise ValueError(
                f"widths {widths}, depths {depths}, heads {heads} and reductions {reductions} "
                "need four values each, for strides 4, 8, 16, 32"
            )
        if any(width % n for width, n in zip(widths, heads, strict=True)):
            raise ValueError(f"widths {widths} are not divisible by heads {heads}")
        if any(8 // 2**i % r for i, r in enumerate(reductions)):
            raise ValueError(f"reductions {reductions} do not divide 8, 4, 2, 1; default (4, 2, 1, 1)")
        self.in_channels, self.checkpointing = in_channels, checkpointing
        self.stages = nn.ModuleList()
        for i, (width, n, r) in enumerate(zip(widths, heads, reductions, strict=True)):
            scale = (n if legacy_scale else width // n) ** -0.5
            blocks = [Block(width, n, r, scale, norm) for _ in range(depths[i])]
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            self.stages.append(Stage(in_channels, width, kernel, stride, blocks))
            in_channels = width
        self.decoder = Decoder(widths, decoder_width, num_classes, norm)
        self.apply(_init_weights)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W) -> logits (N, K, D, H, W)."""
        check_image(image, self.in_channels, 3)
        image, crop = padded_to_multiple(image, 32, two_blocks=True)
        enabled = self.checkpointing and self.training
        x, features = image, []
        for stage in self.stages:
            x = stage(x, enabled)
            features.append(x)
        logits = checkpointed(self.decoder, *features, enabled=enabled)
        return _resized(logits, image.shape[2:])[crop]


def _norm(norm: str, channels: int) -> nn.Module:
    if norm == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if norm == "batch":
        return nn.BatchNorm3d(channels)
    raise ValueError(f"unknown norm {norm!r}; instance or batch")


def _tokens(x: Tensor) -> Tensor:
    """(N, C, d, h, w) -> (N, d*h*w, C)."""
    return x.flatten(2).transpose(1, 2)


def _volume(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(N, d*h*w, C) -> (N, C, d, h, w)."""
    return x.transpose(1, 2).unflatten(2, grid).contiguous()


def _resized(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return F.interpolate(x, size=tuple(grid), mode="trilinear", align_corners=False)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv3d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
