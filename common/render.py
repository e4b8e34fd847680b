"""Shaded pictures of label maps without a viewer or a graphics card.

Rays go through the smoothed mask, on the CPU by `grid_sample`, to where they first enter it. The light is
Lambert's with a soft shadow in hollows, which are found by comparing the depth with its blurred self. All
views are without perspective and with the head up. Azimuth 0 looks at the patient's front, so the right side
is on the left of the picture, as radiologists have it; 90 looks at the left side, 180 at the back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from common.mesh import check_labels
from common.volumes import box_of, resample, resampled_shape

BONE = (226, 209, 178)  # RGB, for masks of one class
MAX_VOXELS = 10_000_000  # of the grid that is drawn: 40 MB as float32
BLOCK_ROWS = 16  # rows of pixels whose rays are followed at once: a million samples, 20 MB
RAYS_PER_SIDE = 2  # each pixel is the mean of 2 x 2 rays
LIGHT = np.array([-0.37, 0.46, 0.81])  # from where it comes: right, up, towards the eye


@dataclass(frozen=True)
class Scene:
    """A label map cut to its content, on the grid that is drawn.

    Attributes:
        density: (z, y, x) float32, 0 to 1; the surface is where it is 0.5.
        slopes: (z, y, x) float32, a smoother density, from which the normals of the surface come.
        rgb: (z, y, x, 3) uint8 colour of each voxel.
        weight: (z, y, x) uint8 of the colours: 255 in the mask, and 1 in a rim around it, so that its colour
            counts only where no voxel of the mask is near.
        spacing_mm: z y x.
    """

    density: torch.Tensor
    slopes: np.ndarray
    rgb: np.ndarray
    weight: np.ndarray
    spacing_mm: tuple[float, float, float]

    @property
    def size_mm(self) -> np.ndarray:
        return np.multiply(self.weight.shape, self.spacing_mm)


def label_colors(labels: np.ndarray, colors: Sequence) -> np.ndarray:
    """Table of colours, (highest label + 1, 3) uint8: `colors` in turn from label 1 on. A mask of one class
    gets the colour of bone."""
    highest = int(labels.max(initial=0))
    table = np.zeros((highest + 1, 3), np.uint8)
    for label in range(1, highest + 1):
        table[label] = BONE if highest == 1 else colors[(label - 1) % len(colors)]
    return table


def make_scene(
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    colors: np.ndarray,
    *,
    voxel_mm: float = 1.0,
    box: tuple | None = None,
) -> Scene:
    """A label map cut to its content, resampled to cubes and smoothed, ready to be drawn from any side.

    Args:
        labels: (z, y, x) bool or integers; 0 is background.
        colors: (highest label + 1, 3) uint8 RGB by label; see `label_colors`.
        voxel_mm: side of the cubes; larger where there would be more than 10 million of them.
        box: (start, stop) in voxels of what is drawn, by default the box around all labels. Pictures of the
            same box have the same scale.

    Raises:
        ValueError: labels of another kind, a label without a colour, or a spacing that is not above 0.
    """
    from scipy import ndimage

    check_labels(labels, spacing_mm)
    if (highest := int(labels.max(initial=0))) >= len(colors):
        raise ValueError(f"label {highest} has no colour; the table has {len(colors)} rows")
    start, stop = box or box_of(labels) or ((0, 0, 0), (1, 1, 1))
    labels = labels[tuple(map(slice, start, stop))]
    shape, drawn_mm = drawn_grid(labels.shape, spacing_mm, voxel_mm)
    drawn_per_voxel = np.divide(shape, labels.shape)
    nearest = [((np.arange(n) + 0.5) / r).astype(int) for n, r in zip(shape, drawn_per_voxel, strict=True)]
    density, drawn = resample(labels > 0, shape), labels[np.ix_(*nearest)].astype(np.uint16)
    rim = ndimage.maximum_filter(drawn, tuple(2 * np.ceil(drawn_per_voxel).astype(int) + 1))
    weight = np.where(drawn > 0, np.uint8(255), (rim > 0).astype(np.uint8))
    return scene_of(density, drawn_per_voxel, colors[np.where(drawn > 0, drawn, rim)], weight, drawn_mm)


def drawn_grid(
    shape: Sequence[int], spacing_mm: Sequence[float], voxel_mm: float
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """(shape, spacing_mm) of a grid of about `voxel_mm`, coarser where it would have over MAX_VOXELS."""
    size_mm = np.multiply(shape, spacing_mm)
    voxel_mm = max(voxel_mm, float(np.prod(size_mm) / MAX_VOXELS) ** (1 / 3))
    new_shape = resampled_shape(shape, spacing_mm, (voxel_mm,) * 3)
    return new_shape, tuple(float(v) for v in size_mm / new_shape)


def scene_of(
    density: np.ndarray,
    drawn_per_voxel: np.ndarray,
    rgb: np.ndarray,
    weight: np.ndarray,
    spacing_mm: Sequence[float],
) -> Scene:
    """The scene of a mask that is already on the grid that is drawn; it gets a rim of 3 voxels.

    Args:
        density, rgb, weight: as in `Scene`, without the rim.
        drawn_per_voxel: (3,) how many drawn voxels there are to a voxel of the mask, z y x.
        spacing_mm: of the drawn voxels, z y x.
    """
    from scipy import ndimage

    # A blur by about half a voxel of the mask turns its steps into slopes; the rim lets the surface close.
    rim = 3
    density = ndimage.gaussian_filter(np.pad(density, rim), np.clip(0.6 * drawn_per_voxel, 0.7, 4))
    slopes = ndimage.gaussian_filter(density, 1.3)
    around = ((rim, rim),) * 3
    rgb, weight = np.pad(rgb, (*around, (0, 0))), np.pad(weight, around)
    return Scene(torch.from_numpy(density), slopes, rgb, weight, tuple(spacing_mm))


# ---- one picture ----


def render_scene(
    scene: Scene,
    azimuth_deg: float = 0.0,
    elevation_deg: float = 0.0,
    size: tuple[int, int] = (800, 400),
) -> np.ndarray:
    """Picture (h, w, 3) uint8 on white; its scale is the same from every azimuth, so that all views fit.

    Args:
        azimuth_deg: 0 looks at the front, 90 at the patient's left side, 180 at the back, 270 at the right.
        elevation_deg: of the eye above the horizon.
        size: (h, w) pixels.
    """
    eye = _axes(azimuth_deg, elevation_deg)
    height, width = (n * RAYS_PER_SIDE for n in size)
    tall, deep, broad = scene.size_mm
    across = float(np.hypot(deep, broad))
    elevation = np.deg2rad(abs(elevation_deg))
    upright = tall * np.cos(elevation) + across * np.sin(elevation)
    pixel_mm = max(upright / height, across / width)
    right_mm = (np.arange(width) - (width - 1) / 2) * pixel_mm
    up_mm = ((height - 1) / 2 - np.arange(height)) * pixel_mm
    depth = _first_hits(scene, eye, up_mm, right_mm)
    hit = np.isfinite(depth)
    rows, columns = np.nonzero(hit)
    places = np.stack([right_mm[columns], up_mm[rows], -depth[hit]], axis=1) @ eye  # x y z mm
    voxels = places[:, ::-1] / scene.spacing_mm + (np.array(scene.weight.shape) - 1) / 2
    normals = _normals(scene, voxels) @ eye.T
    diffuse = np.clip(normals @ LIGHT, 0, 1)
    facing = np.clip(normals[:, 2], 0, 1)
    middle = LIGHT + (0, 0, 1)
    shine = np.clip(normals @ (middle / np.linalg.norm(middle)), 0, 1) ** 40
    shade = (0.22 + 0.58 * diffuse + 0.24 * facing) * _open_sky(depth, hit, pixel_mm)[hit]
    color = _surface_colors(scene, voxels) * shade[:, None]
    picture = np.full((height, width, 3), 255.0)
    picture[hit] = np.clip(color + 45 * shine[:, None], 0, 255)
    picture = picture.reshape(size[0], RAYS_PER_SIDE, size[1], RAYS_PER_SIDE, 3).mean(axis=(1, 3))
    return picture.round().astype(np.uint8)


def _axes(azimuth_deg: float, elevation_deg: float) -> np.ndarray:
    """(3, 3): the rows are the directions right, up and towards the eye, the columns x y z."""
    a, e = np.deg2rad([azimuth_deg, elevation_deg])
    return np.array(
        [
            [-np.cos(a), -np.sin(a), 0],
            [np.sin(a) * np.sin(e), -np.cos(a) * np.sin(e), np.cos(e)],
            [-np.sin(a) * np.cos(e), np.cos(a) * np.cos(e), np.sin(e)],
        ]
    )


def _first_hits(scene: Scene, eye: np.ndarray, up_mm: np.ndarray, right_mm: np.ndarray) -> np.ndarray:
    """(h, w) mm: how far behind the plane through the scene's centre each ray meets the surface; infinite for
    rays that do not meet it."""
    step, pool = min(scene.spacing_mm), 4
    half_mm = (np.array(scene.weight.shape) - 1) / 2 * scene.spacing_mm
    volume = scene.density[None, None]
    # Rays are followed only where something is near: a spine fills a few percent of its box.
    coarse = F.max_pool3d(volume, pool, ceil_mode=True)[0, 0]
    filled = np.argwhere(coarse.numpy() >= 0.5) * pool + (pool - 1) / 2
    filled = (filled * scene.spacing_mm - half_mm)[:, ::-1] @ eye.T  # right, up, towards the eye
    margin = (pool + 1) / 2 * float(np.linalg.norm(scene.spacing_mm))
    # grid_sample counts from -1, the first voxel, to 1, the last one, in the order x y z.
    right, up, near = (torch.from_numpy(axis / half_mm[::-1]).float() for axis in eye)
    depth = np.full((len(up_mm), len(right_mm)), np.inf, np.float32)
    for first in range(0, len(up_mm), BLOCK_ROWS):
        rows = up_mm[first : first + BLOCK_ROWS]
        near_rows = filled[(filled[:, 1] > rows[-1] - margin) & (filled[:, 1] < rows[0] + margin)]
        if not len(near_rows):
            continue
        ends = near_rows[:, 0].min() - margin, near_rows[:, 0].max() + margin
        left, last = np.searchsorted(right_mm, ends)
        behind = np.arange(-near_rows[:, 2].max() - margin, -near_rows[:, 2].min() + margin + step, step)
        grid = (
            torch.from_numpy(rows).float()[:, None, None] * up
            + torch.from_numpy(right_mm[left:last]).float()[:, None] * right
            - torch.from_numpy(behind).float()[:, None, None, None] * near
        )
        found = F.grid_sample(volume, grid[None], align_corners=True)[0, 0]  # (behind, rows, columns)
        first_inside = (found >= 0.5).to(torch.uint8).argmax(dim=0)
        inside = found.gather(0, first_inside[None])[0]
        before = found.gather(0, (first_inside - 1).clamp(min=0)[None])[0]
        too_far = (first_inside > 0) * (inside - 0.5) / (inside - before).clamp(min=1e-6)  # in steps
        place = (first_inside - too_far) * step + behind[0]
        depth[first : first + BLOCK_ROWS, left:last] = torch.where(inside >= 0.5, place, torch.inf).numpy()
    return depth


def _normals(scene: Scene, voxels: np.ndarray) -> np.ndarray:
    """(n, 3) unit vectors x y z that point out of the surface, from central differences of the density."""
    from scipy import ndimage

    normals = []
    for axis in (2, 1, 0):
        one_voxel = np.zeros(3)
        one_voxel[axis] = 1.0
        ahead, behind = (
            ndimage.map_coordinates(scene.slopes, (voxels + side * one_voxel).T, order=1, mode="nearest")
            for side in (1, -1)
        )
        normals.append((behind - ahead) / scene.spacing_mm[axis])
    normals = np.stack(normals, axis=1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)


def _surface_colors(scene: Scene, voxels: np.ndarray) -> np.ndarray:
    """(n, 3) mean colour of the voxels around each place, weighted as in linear interpolation."""
    first = np.clip(voxels.astype(int), 0, np.array(scene.weight.shape) - 2)
    part = np.clip(voxels - first, 0.05, 0.95)
    total, weights = np.zeros((len(voxels), 3)), np.full((len(voxels), 1), 1e-9)
    for offset in product((0, 1), repeat=3):
        corner = tuple((first + offset).T)
        weight = np.prod(np.where(offset, part, 1 - part), axis=1) * scene.weight[corner]
        total += weight[:, None] * scene.rgb[corner]
        weights += weight[:, None]
    return total / weights


def _open_sky(depth: np.ndarray, hit: np.ndarray, pixel_mm: float) -> np.ndarray:
    """(h, w) share of the light that reaches each pixel: less where it lies deeper than its neighbourhood."""
    from scipy import ndimage

    light = np.ones(depth.shape)
    filled = np.where(hit, depth, 0.0)
    for radius_mm in (4.0, 14.0):
        size = 2 * max(1, round(radius_mm / pixel_mm)) + 1
        share = np.maximum(ndimage.uniform_filter(hit.astype(float), size), 1e-6)
        mean = ndimage.uniform_filter(filled, size) / share
        light *= 1 - 0.5 * np.clip((filled - mean) / (2 * radius_mm), 0, 1)
    return light
