"""A patch read at other places: rotated, scaled and deformed in one interpolation, sizes and angles in mm."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[float, float, float]


def sampling_grid(
    shape: Sequence[int],
    spacing_mm: Triple,
    rotation_deg: Triple = (0.0, 0.0, 0.0),
    scale: float = 1.0,
    elastic_mm: Tensor | None = None,
    elastic_grid_mm: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Where each voxel of the result is read: (D, H, W, 3) float32, x y z in -1..1, for `F.grid_sample`.

    The result is the patch scaled, then rotated about the x, y and z axis in this order, all about the patch
    centre in mm: position p is read at R^T p / scale + displacement(p). Positive angles turn x towards y
    (about z), z towards x (about y), y towards z (about x).

    Args:
        shape: (D, H, W) of the patch.
        elastic_mm: (gz, gy, gx, 3) displacements of the control points along z y x, or None. Uniform cubic
            B-spline; its second control point along each axis stands at the first edge of the patch.
        elastic_grid_mm: distance of the control points.
    """
    size_mm = [n * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    inverse = _rotation(rotation_deg).T / scale  # z y x in mm -> z y x in mm
    # mm, x y z -> share of half the patch
    to_grid = torch.tensor([2 / mm for mm in reversed(size_mm)], dtype=torch.float64)
    terms = []
    for axis, (n, mm) in enumerate(zip(shape, spacing_mm, strict=True)):
        position_mm = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * mm
        term = position_mm[:, None] * (inverse[:, axis].flip(0) * to_grid)
        terms.append(term.float().to(device))  # (n, 3)
    # An affine map is a sum with one term for each axis: no matrix product over all voxels.
    grid = terms[0][:, None, None] + (terms[1][:, None] + terms[2])
    if elastic_mm is not None:
        field = (elastic_mm.flip(-1) * to_grid).float().to(device)  # (gz, gy, gx, 3)
        weights = [
            _bspline_weights(n, mm, points, elastic_grid_mm).to(device)
            for n, mm, points in zip(shape, spacing_mm, field.shape, strict=False)
        ]
        field = torch.einsum("zyxc,wx->zywc", field, weights[2])
        field = torch.einsum("zywc,hy->zhwc", field, weights[1])
        # z last: the only product of full size, and it is contiguous.
        grid.view(shape[0], -1).addmm_(weights[0], field.reshape(field.shape[0], -1))
    return grid


def _rotation(rotation_deg: Triple) -> Tensor:
    """(3, 3) float64, acting on (z, y, x): about x first, then y, then z."""
    z, y, x = (math.radians(angle) for angle in rotation_deg)
    cos, sin = math.cos, math.sin
    about_z = torch.tensor([[1, 0, 0], [0, cos(z), sin(z)], [0, -sin(z), cos(z)]], dtype=torch.float64)
    about_y = torch.tensor([[cos(y), 0, -sin(y)], [0, 1, 0], [sin(y), 0, cos(y)]], dtype=torch.float64)
    about_x = torch.tensor([[cos(x), sin(x), 0], [-sin(x), cos(x), 0], [0, 0, 1]], dtype=torch.float64)
    return about_z @ about_y @ about_x


def _bspline_weights(n: int, mm: float, points: int, grid_mm: float) -> Tensor:
    """(n, points) float32: weight of each control point at each voxel centre; rows sum to 1."""
    position = (torch.arange(n, dtype=torch.float64) + 0.5) * mm / grid_mm + 1  # in control points
    distance = (position[:, None] - torch.arange(points)).abs()
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far).float()


def warp(x: Tensor, grid: Tensor, mode: str) -> Tensor:
    """(C, D, H, W) read at the places of `sampling_grid`; beyond the edge, the edge is repeated.

    Args:
        x: floating point; labels too, which float32 holds exactly up to 2^24.
        mode: "bilinear" (of three axes here) or "nearest".
    """
    # A slice of the result as an item of the batch: torch's CPU kernel spreads only the batch over threads.
    # `expand` copies nothing.
    x = x.expand(grid.shape[0], *x.shape)
    out = F.grid_sample(x, grid.unsqueeze(1), mode=mode, padding_mode="border", align_corners=False)
    return out.squeeze(2).transpose(0, 1)
