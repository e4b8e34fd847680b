"""The attention of MedFormer: features of N voxels and semantic maps of M cells read each other.

A map sums a feature up in a fixed small number of cells, by learned weights. Attention between voxels and
cells then costs N * M instead of N * N. B is the batch, "*spatial" are the sides of a level, "*cells" those
of a map.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amygdala.medformer_blocks import MBConv, Style
from common.conv_blocks import same_size_conv
from common.layers import TransformerLayer


class MapGenerator(nn.Module):
    """Sums a feature up in a map: each cell is a mean over all voxels with weights of its own."""

    def __init__(self, channels: int, map_size: Sequence[int], style: Style) -> None:
        super().__init__()
        self.map_size = tuple(map_size)
        self.channels = channels
        # Both convolutions of the feature in one: what is summed up, and the scores of the cells.
        self.conv = same_size_conv(channels, channels + prod(map_size), (3,) * style.ndim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *map_size)."""
        both = self.conv(x).flatten(2)
        feature, scores = both.split((self.channels, prod(self.map_size)), dim=1)
        return (feature @ scores.softmax(dim=2).transpose(1, 2)).unflatten(2, self.map_size)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, c * heads, n) -> (B, heads, n, c): neighbouring channels belong to different heads."""
    return x.unflatten(1, (-1, heads)).permute(0, 2, 3, 1)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, n, c) -> (B, c * heads, n), the reverse of `split_heads`."""
    return x.permute(0, 3, 1, 2).flatten(1, 2)


def attend_both_ways(
    queries: Tensor, values: Tensor, map_queries: Tensor, map_values: Tensor, attn_drop: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Voxels read the cells of a map and cells read the voxels, by one matrix of scores.

    Args:
        queries, values: (B, heads, N, c) of the voxels.
        map_queries, map_values: (B, heads, M, c) of the cells.
        attn_drop: share of the weights by which cells read voxels that is dropped.

    Returns:
        (B, heads, N, c) for the voxels and (B, heads, M, c) for the cells.
    """
    scores = queries @ (map_queries * queries.shape[-1] ** -0.5).transpose(-1, -2)  # (B, heads, N, M)
    of_voxels = scores.softmax(dim=-1) @ map_values
    of_cells = F.dropout(scores.softmax(dim=-2), attn_drop).transpose(-1, -2) @ values
    return of_voxels, of_cells


class BidirectionalAttention(nn.Module):
    """Attention between a feature and a map; what one side asks with is also what the other finds it by.

    Args:
        updates_map: False leaves the map as it is, where nobody reads it afterwards.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int,
        kernel: Sequence[int],
        style: Style,
        updates_map: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.attn_drop = heads, style.attn_drop
        self.norm = style.make_norm(in_channels)
        self.map_norm = style.make_norm(out_channels)
        self.feat_qv = style.projection(in_channels, 2 * out_channels, kernel)
        self.map_qv = style.pointwise(out_channels, 2 * out_channels)
        self.feat_out = style.projection(out_channels, out_channels, kernel)
        self.map_out = style.pointwise(out_channels, out_channels) if updates_map else None
        self.proj_drop = nn.Dropout(style.proj_drop)

    def forward(self, x: Tensor, semantic_map: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, Cin, *spatial), (B, Cout, *cells) -> what is added to both: (B, Cout, ...), or None."""
        sizes = x.shape[2:], semantic_map.shape[2:]
        both = self.feat_qv(self.norm(x)), self.map_qv(self.map_norm(semantic_map))
        parts = [split_heads(half, self.heads) for qv in both for half in qv.flatten(2).chunk(2, dim=1)]
        of_voxels, of_cells = attend_both_ways(*parts, self.attn_drop if self.training else 0.0)
        x = self.proj_drop(self.feat_out(merge_heads(of_voxels).unflatten(2, sizes[0])))
        if self.map_out is None:
            return x, None
        return x, self.map_out(merge_heads(of_cells).unflatten(2, sizes[1]))


class AttentionBlock(nn.Module):
    """Feature and map read each other, both with a shortcut; then an MBConv of the feature."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int,
        kernel: Sequence[int],
        style: Style,
        updates_map: bool = True,
    ) -> None:
        super().__init__()
        self.attention = BidirectionalAttention(in_channels, out_channels, heads, kernel, style, updates_map)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = style.pointwise_block(in_channels, out_channels)
        self.mbconv = MBConv(out_channels, kernel, style)

    def forward(self, x: Tensor, semantic_map: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Cin, *spatial), (B, Cout, *cells) -> (B, Cout, *spatial), (B, Cout, *cells)."""
        read, read_by_map = self.attention(x, semantic_map)
        x = self.mbconv(read + self.shortcut(x))
        return x, semantic_map if read_by_map is None else semantic_map + read_by_map


class MapFusion(nn.Module):
    """The maps of all levels read each other: (B, Ci, *cells) each -> the same shapes."""

    def __init__(self, channels: Sequence[int], width: int, depth: int, heads: int, style: Style) -> None:
        super().__init__()
        self.enter = nn.ModuleList(style.pointwise(c, width) for c in channels)
        self.layers = nn.Sequential(*(TransformerLayer(width, width, heads) for _ in range(depth)))
        self.leave = nn.ModuleList(style.pointwise(width, c) for c in channels)

    def forward(self, *maps: Tensor) -> list[Tensor]:
        cells = maps[0].shape[2:]
        tokens = [enter(m).flatten(2).transpose(1, 2) for enter, m in zip(self.enter, maps, strict=True)]
        fused = self.layers(torch.cat(tokens, dim=1)).transpose(1, 2)  # (B, width, all cells)
        parts = [part.unflatten(2, cells) for part in fused.chunk(len(maps), dim=2)]
        return [leave(part) for leave, part in zip(self.leave, parts, strict=True)]
