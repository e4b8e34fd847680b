"""SegFormer3D, for images of any size."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import Conv3d, check_image, make_norm, padded_to_multiple
from common.recomputation import stage_runner


class ReducedAttention(nn.Module):
    """Multi-head attention of all tokens to keys and values on a grid that is `reduction` times coarser."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reduce = None
        if reduction > 1:
            self.reduce = nn.Conv3d(channels, channels, reduction, stride=reduction)
            self.reduce_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x (N, tokens, C) of the grid (d, h, w), z outermost -> the same shape."""
        query = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, tokens, c)
        if self.reduce is not None:
            x = self.reduce_norm(to_tokens(self.reduce(_volume(x, grid))))
        key, value = self.key_value(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """MLP of four times the channels, with a depthwise 3x3x3 convolution, which tells tokens their place."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.depthwise = nn.Conv3d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels)
        self.norm = make_norm(norm, 4 * channels, 3)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x = self.norm(self.depthwise(_volume(self.fc1(x), grid)))
        return self.fc2(F.gelu(to_tokens(x)))


class TransformerBlock(nn.Module):
    """Attention and MixFFN, each after a layer norm and with a shortcut."""

    def __init__(self, channels: int, heads: int, reduction: int, norm: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = ReducedAttention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = MixFFN(channels, norm)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x = x + self.attention(self.norm1(x), grid)
        return x + self.ffn(self.norm2(x), grid)


class TransformerStage(nn.Module):
    """Overlapping patches to tokens, blocks, layer norm: (N, C, D, H, W) -> (N, channels, D/s, H/s, W/s).

    `run(block, *inputs)` calls each block; see `stage_runner`.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int, blocks: list[TransformerBlock]
    ) -> None:
        super().__init__()
        self.embed = Conv3d(in_channels, channels, kernel, stride=stride, padding=kernel // 2)
        self.embed_norm = nn.LayerNorm(channels)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.embed(x)
        grid = tuple(x.shape[2:])
        x = self.embed_norm(to_tokens(x))
        for block in self.blocks:
            x = run(block, x, grid)
        return _volume(self.norm(x), grid)


class MlpDecoder(nn.Module):
    """All stages brought to `channels` on the grid of stride 4, concatenated, and turned into classes."""

    def __init__(self, widths: tuple[int, ...], channels: int, num_classes: int, norm: str) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Sequential(nn.Linear(width, channels), nn.LayerNorm(channels)) for width in widths
        )
        self.fuse = nn.Conv3d(len(widths) * channels, channels, 1, bias=False)
        self.norm = make_norm(norm, channels, 3)
        self.head = nn.Conv3d(channels, num_classes, 1)

    def forward(self, *features: Tensor) -> Tensor:
        """Features of strides 4, 8, 16, 32 -> logits of stride 4."""
        grid = features[0].shape[2:]
        projected = [
            _resized(_volume(project(to_tokens(x)), x.shape[2:]), grid)
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
        depths: number of blocks in each stage.
        heads: number of attention heads in each stage; must divide the stage's width.
        reductions: by how much the grid of keys and values is coarser along each axis: a divisor of 8 at
            stride 4, of 4 at stride 8, of 2 at stride 16, and 1 at stride 32.
        decoder_width: channels of the decoder.
        norm: of the convolutions, 'instance', 'batch' or 'group'. The source has 'batch', which at batch size
            1 differs between training and prediction; 'instance' works for any batch size.
        checkpointing: in training keep only what passes between the blocks; backward computes the rest again.

    Parameters (1 channel, 1 class): 4,491,809.

    Source: Perera et al. 2024, SegFormer3D, arXiv:2404.10156. Differs: the grid goes through the network with
    the tokens (the source takes only cubes); images are padded to multiples of 32 by repeating their border.
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
            blocks = [TransformerBlock(width, n, r, norm) for _ in range(depths[i])]
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            self.stages.append(TransformerStage(in_channels, width, kernel, stride, blocks))
            in_channels = width
        self.decoder = MlpDecoder(widths, decoder_width, num_classes, norm)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W) -> logits (N, K, D, H, W)."""
        check_image(image, self.in_channels, 3)
        image, crop = padded_to_multiple(image, 32, two_blocks=True)
        run = stage_runner(self)
        x, features = image, []
        for stage in self.stages:
            x = stage(x, run)
            features.append(x)
        logits = run(self.decoder, *features)
        return _resized(logits, image.shape[2:])[crop]


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, *grid) -> (N, tokens, C)."""
    return x.flatten(2).transpose(1, 2)


def _volume(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(N, d*h*w, C) -> (N, C, d, h, w)."""
    return x.transpose(1, 2).unflatten(2, grid).contiguous()


def _resized(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return F.interpolate(x, size=tuple(grid), mode="trilinear", align_corners=False)


def init_weights(module: nn.Module) -> None:
    """SegFormer's random start of a linear layer or a convolution; other layers stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
