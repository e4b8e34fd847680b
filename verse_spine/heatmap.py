"""The spine as a heat map on a small grid: where the grid lies, its targets, losses, and the box it gives.

The grid keeps the proportions of the scan: voxels are nearly isotropic, the scan lies in the middle and its
edges are repeated in what is left of the grid. So a vertebra looks alike in scans of any length.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.volumes import resample

TARGETS = ("distance", "gaussian", "mask", "hull")
LOSSES = ("weighted_mse", "sum_mse", "bce", "adaptive_wing")
GAUSSIAN_MM = 24.0  # sigma of the gaussian target: 3 voxels of 8 mm, as Payer et al. 2020
MARGIN_MM = (30.0, 20.0, 20.0)  # z y x, around the predicted box
FAINT = 0.3  # a heat map that stays below has found no spine
HU_RANGE = (-1024, 3071)  # 12 bits, what scanners deliver; voxels are cut to it before they are resampled


@dataclass(frozen=True)
class SmallGrid:
    """A grid of `shape` voxels, in which a scan takes the block from `start` to `start + inner`; z y x."""

    shape: tuple[int, int, int]
    inner: tuple[int, int, int]
    start: tuple[int, int, int]
    scan_shape: tuple[int, int, int]
    scan_spacing_mm: tuple[float, float, float]

    @property
    def voxel_mm(self) -> np.ndarray:
        """Exact voxel size, z y x; rounding of `inner` makes it slightly anisotropic."""
        return np.multiply(self.scan_shape, self.scan_spacing_mm) / self.inner

    def to_scan(self, position: np.ndarray) -> np.ndarray:
        """Edges on the grid (..., 3) -> edges on the scan: 0 is its first border, its shape the last."""
        return (np.asarray(position, float) - self.start) * np.divide(self.scan_shape, self.inner)

    def from_scan(self, position: np.ndarray) -> np.ndarray:
        """The inverse of `to_scan`."""
        return np.asarray(position, float) * np.divide(self.inner, self.scan_shape) + self.start


def small_grid(scan_shape: tuple, spacing_mm: tuple, shape: tuple) -> SmallGrid:
    """The grid of `shape` for a scan, which fills the side on which it is relatively longest."""
    extent_mm = np.multiply(scan_shape, spacing_mm)
    voxel_mm = (extent_mm / shape).max()
    inner = np.clip(np.rint(extent_mm / voxel_mm), 1, shape).astype(int)
    start = (np.asarray(shape) - inner) // 2
    whole = [tuple(int(v) for v in values) for values in (shape, inner, start, scan_shape)]
    return SmallGrid(*whole, tuple(float(s) for s in spacing_mm))  # type: ignore[arg-type]


def to_small_grid(volume, grid: SmallGrid, fill: float | None = None) -> np.ndarray:
    """A (z, y, x) volume on the small grid, anti-aliased, float32.

    Args:
        volume: array, HDF5 data set or anything else with shape and slices, over the scan's field of view;
            its own shape may be reduced.
        fill: value where there is no scan. None = the scan's edge repeated, as beyond the border of patches:
            on phantoms, boxes of short scans became tighter than with air there, and lost no vertebra.
    """
    sizes = zip(grid.start, grid.inner, grid.shape, strict=True)
    around = [(start, size - start - inner) for start, inner, size in sizes]
    inside = resample(volume, grid.inner)
    if fill is None:
        return np.pad(inside, around, mode="edge")
    return np.pad(inside, around, constant_values=fill)


# ---- targets ----


def make_target(kind: str, grid: SmallGrid, boxes: np.ndarray, occupancy: np.ndarray) -> np.ndarray:
    """Heat map in [0, 1] on the small grid, float32; zeros without vertebrae.

    Args:
        kind: distance (the thesis' default): union of the ellipsoids inscribed in the vertebrae's boxes,
            inside 0.5 + 0.5 * depth / largest depth, outside 0.5 * exp(-0.1 * distance), both in voxels of
            the grid, smoothed with sigma 1 and divided by the maximum. gaussian: the largest of the
            vertebrae's exp(-r^2 / 2 sigma^2), sigma GAUSSIAN_MM. mask: share of vertebra in each voxel. hull:
            convex hull of the mask.
        boxes: (n, 6), start and stop (z y x) of each vertebra in voxels of the scan.
        occupancy: share of vertebra in each voxel of the grid, float (z, y, x).
    """
    if kind not in TARGETS:
        raise ValueError(f"unknown heat-map target {kind!r}; choose from {', '.join(TARGETS)}")
    if len(boxes) == 0:
        return np.zeros(grid.shape, np.float32)
    if kind == "mask":
        return occupancy.astype(np.float32)
    if kind == "hull":
        return _convex_hull(occupancy >= 0.5 * occupancy.max())
    edges = grid.from_scan(np.asarray(boxes, float).reshape(-1, 2, 3))
    centres = edges.mean(1) - 0.5  # voxel i has its middle at i
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in grid.shape), indexing="ij", sparse=True)
    if kind == "gaussian":
        heat = np.zeros(grid.shape, np.float32)
        for centre in centres:
            square_mm = sum(((a - c) * mm) ** 2 for a, c, mm in zip(axes, centre, grid.voxel_mm, strict=True))
            np.maximum(heat, np.exp(-square_mm / (2 * GAUSSIAN_MM**2)), out=heat)
        return heat
    return _distance(axes, centres, (edges[:, 1] - edges[:, 0]) / 2)


def _distance(axes: list[np.ndarray], centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    inside = np.zeros([a.size for a in axes], bool)
    for centre, radius in zip(centres, radii, strict=True):
        radius = np.maximum(radius, 0.5)  # a vertebra thinner than the grid must not vanish
        inside |= sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radius, strict=True)) <= 1
        inside[tuple(np.clip(np.rint(centre).astype(int), 0, np.subtract(inside.shape, 1)))] = True
    depth = ndimage.distance_transform_edt(inside)
    if inside.all():
        return np.ones(inside.shape, np.float32)
    outside = ndimage.distance_transform_edt(~inside)
    heat = np.where(inside, 0.5 + 0.5 * depth / depth.max(), 0.5 * np.exp(-0.1 * outside))
    heat = ndimage.gaussian_filter(heat.astype(np.float32), 1.0, mode="nearest")
    return heat / heat.max()


def _convex_hull(mask: np.ndarray) -> np.ndarray:
    from scipy.spatial import ConvexHull, QhullError

    voxels = np.argwhere(mask)
    corners = (voxels[:, None] + np.stack(np.meshgrid(*[[-0.5, 0.5]] * 3), -1).reshape(-1, 3)).reshape(-1, 3)
    try:
        planes = ConvexHull(corners).equations  # (m, 4): normal and offset
    except QhullError:
        return mask.astype(np.float32)
    low, high = voxels.min(0), voxels.max(0) + 1
    block = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), -1)
    hull = np.zeros(mask.shape, np.float32)
    inside = np.ones(block.shape[:3], bool)
    for plane in planes:
        inside &= block @ plane[:3] + plane[3] <= 1e-6
    hull[tuple(map(slice, low, high))] = inside
    return hull


# ---- losses on logits (N, 1, d, h, w) against targets in [0, 1] of the same shape ----


def heatmap_loss(name: str, logits: Tensor, target: Tensor) -> Tensor:
    """Scalar loss.

    Args:
        name: weighted_mse: mean of (1 + 10 y) (p - y)^2. sum_mse: sum of (p - y)^2 an item, as in the thesis;
            grows with the grid. bce: cross-entropy with the soft target. adaptive_wing: Wang et al. 2019,
            arXiv:1904.07399, omega 14, theta 0.5, epsilon 1, alpha 2.1.
    """
    logits, target = logits.float(), target.float()
    if name == "bce":
        return F.binary_cross_entropy_with_logits(logits, target)
    probs = logits.sigmoid()
    if name == "weighted_mse":
        return ((1 + 10 * target) * (probs - target) ** 2).mean()
    if name == "sum_mse":
        return ((probs - target) ** 2).sum() / len(logits)
    if name != "adaptive_wing":
        raise ValueError(f"unknown heat-map loss {name!r}; choose from {', '.join(LOSSES)}")
    omega, theta, epsilon = 14.0, 0.5, 1.0
    power = 2.1 - target
    error = (probs - target).abs()
    ratio = theta / epsilon
    slope = omega / (1 + ratio**power) * power * ratio ** (power - 1) / epsilon
    offset = theta * slope - omega * torch.log1p(ratio**power)
    # Clamped: the gradient of a power with exponent just above 1 is not defined at 0 for torch.
    near = omega * torch.log1p((error.clamp(min=1e-6) / epsilon) ** power)
    return torch.where(error < theta, near, slope * error - offset).mean()


# ---- from heat map to box ----


def heatmap_box(heat: np.ndarray, *, share: float = 0.5) -> tuple[np.ndarray, np.ndarray] | None:
    """Box (start, stop) on the grid of where the heat exceeds `share` of its maximum; None if it is faint.

    Kept are the largest component and others of at least a fifth of its size above or below it: a spine that
    the heat map breaks in two stays whole, a hot spot beside it does not count.
    """
    from scipy import ndimage

    if heat.max() < FAINT:
        return None
    components, num = ndimage.label(heat > share * heat.max(), np.ones((3, 3, 3)))
    boxes = ndimage.find_objects(components)
    sizes = np.bincount(components.ravel())[1:]
    main = int(sizes.argmax())
    start = np.array([s.start for s in boxes[main]])
    stop = np.array([s.stop for s in boxes[main]])
    for k in range(num):
        z = boxes[k][0]
        apart = z.stop <= boxes[main][0].start or z.start >= boxes[main][0].stop
        if k != main and sizes[k] >= 0.2 * sizes[main] and apart:
            start = np.minimum(start, [s.start for s in boxes[k]])
            stop = np.maximum(stop, [s.stop for s in boxes[k]])
    return start, stop


def scan_box(grid: SmallGrid, box: tuple, margin_mm: tuple = MARGIN_MM) -> tuple[tuple, tuple]:
    """A box on the grid, widened by `margin_mm`, in voxels of the scan and inside it: (start, stop) ints."""
    margin = np.divide(margin_mm, grid.scan_spacing_mm)
    start = np.floor(grid.to_scan(box[0]) - margin + 1e-6).astype(int)
    stop = np.ceil(grid.to_scan(box[1]) + margin - 1e-6).astype(int)
    start = np.clip(start, 0, np.subtract(grid.scan_shape, 1))
    stop = np.clip(stop, start + 1, grid.scan_shape)
    return tuple(int(v) for v in start), tuple(int(v) for v in stop)


def box_iou(a: tuple | None, b: tuple | None) -> float:
    """Intersection over union of two (start, stop) boxes; NaN if both are None, 0 if one is."""
    if a is None or b is None:
        return float("nan") if a is b else 0.0
    overlap = np.prod(np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None))
    volumes = np.prod(np.subtract(a[1], a[0])) + np.prod(np.subtract(b[1], b[0]))
    return float(overlap / (volumes - overlap))


def box_recall(occupancy: np.ndarray, box: tuple | None) -> float:
    """Share of the vertebrae (any weights or mask) inside a box; NaN without vertebrae, 0 without a box."""
    total = float(occupancy.sum(dtype=np.float64))
    if total == 0:
        return float("nan")
    if box is None:
        return 0.0
    inside = occupancy[tuple(slice(int(a), int(b)) for a, b in zip(*box, strict=True))]
    return float(inside.sum(dtype=np.float64) / total)
