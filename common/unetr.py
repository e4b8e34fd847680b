"""UNETR: a vision transformer as encoder, a convolutional decoder."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from common.layers import TransformerLayer, check_image, padded_to_multiple, resize_linear
from common.recomputation import stage_runner
from common.swin_unetr import ResidualBlock, UpBlock

PATCH = 16  # side in voxels of the patches that become tokens
LAYERS = 12
SKIPS = (3, 6, 9)  # the layers, counted from 0, whose tokens go to the decoder too


class _Climb(nn.Sequential):
    """Tokens' grid to a finer one: a transposed convolution by 2, then others, each with a ResidualBlock."""

    def __init__(self, in_channels: int, out_channels: int, more: int) -> None:
        def double(channels: int) -> nn.ConvTranspose3d:
            return nn.ConvTranspose3d(channels, out_channels, 2, stride=2, bias=False)

        steps = [double(in_channels)]
        for _ in range(more):
            steps += [double(out_channels), ResidualBlock(out_channels, out_channels)]
        super().__init__(*steps)


class UNETR(nn.Module):
    """UNETR for 3-D images of any size.

    Args:
        in_channels: channels of the image.
        num_classes: output channels, background included.
        feature_size: channels of the decoder's finest level; the coarser ones have 2, 4, 8 times as many.
        hidden_size: channels of a token, a multiple of num_heads.
        mlp_dim: channels inside the MLP of a layer.
        num_heads: attention heads.
        position_grid: size z y x, in patches of 16 voxels, of the learned table of positions: (6, 6, 6) is
            that of images of 96 x 96 x 96 voxels. For other sizes the table is interpolated.
        checkpointing: in training keep only what passes between the layers; backward computes the rest again.

    Parameters (1 channel, 3 classes): 92,783,859. MONAI 1.4 counts 121,123,059: its layers also hold weights
    of a cross-attention that nothing uses, 2,361,600 in each. From the same weights it computes the same.

    Source: Hatamizadeh et al. 2022, UNETR, arXiv:2103.10504. Differs: any size, the image is padded to
    multiples of 16 by repeating its border.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 3,
        *,
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_heads: int = 12,
        position_grid: Sequence[int] = (6, 6, 6),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.in_channels, self.checkpointing = in_channels, checkpointing
        self.multiple = (PATCH,) * 3
        self.position_grid = tuple(position_grid)
        self.embed = nn.Conv3d(in_channels, hidden_size, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.randn(1, prod(position_grid), hidden_size) * 0.02)
        self.layers = nn.ModuleList(TransformerLayer(hidden_size, mlp_dim, num_heads) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(hidden_size)
        f = feature_size
        self.encoders = nn.ModuleList(  # strides 1, 2, 4, 8
            [
                ResidualBlock(in_channels, f),
                _Climb(hidden_size, 2 * f, more=2),
                _Climb(hidden_size, 4 * f, more=1),
                _Climb(hidden_size, 8 * f, more=0),
            ]
        )
        self.decoders = nn.ModuleList(  # strides 8, 4, 2, 1
            [UpBlock(hidden_size, 8 * f), UpBlock(8 * f, 4 * f), UpBlock(4 * f, 2 * f), UpBlock(2 * f, f)]
        )
        self.head = nn.Conv3d(f, num_classes, 1)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def positions_for(self, grid: tuple[int, ...]) -> Tensor:
        """The table of positions for a grid of tokens z y x, (1, tokens, hidden_size)."""
        table = self.positions.transpose(1, 2).unflatten(2, self.position_grid)
        return resize_linear(table, grid).flatten(2).transpose(1, 2)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, C, D, H, W), any size -> logits (N, num_classes, D, H, W)."""
        check_image(image, self.in_channels, ndim=3)
        run = stage_runner(self)
        image, crop = padded_to_multiple(image, PATCH, two_blocks=True)
        x = self.embed(image)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + self.positions_for(grid)  # (N, tokens, hidden_size)

        def volume(tokens: Tensor) -> Tensor:
            return tokens.transpose(1, 2).unflatten(2, grid).contiguous()

        inputs = [image]  # of the encoders
        for number, layer in enumerate(self.layers):
            x = run(layer, x)
            if number in SKIPS:
                inputs.append(volume(x))
        y = volume(self.norm(x))
        skips = [run(encoder, own) for encoder, own in zip(self.encoders, inputs, strict=True)]
        for decoder in self.decoders:
            y = run(decoder, y, skips.pop())
        return self.head(y)[crop]
