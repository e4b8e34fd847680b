"""Where a structure lies, from a volume and labels of its slices: what is cut off from those without it.

Many things are seen in just the slices that show the structure, so a classifier of slices cannot tell it from
them. But vessels and chambers that run through go on in slices where the structure is not, and the structure
does not. A random walker in the volume steps to neighbours of like grey value; it escapes where it reaches a
slice without the structure, the border of the volume or dark surroundings. Within a closed bright structure
this takes longest.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GREY_SD = 0.06  # difference of grey values, of 0 to 1, at which a step becomes e times less likely
LEAST = 1e-3  # likelihood of a step between voxels of any difference
ALONG_Z = 3.0  # likelihood of a step to the next slice, against one within the slice
SLICE_POWER = 0.75  # how far the slices of a volume are brought to the same largest time: 0 not, 1 fully
STEPS = ((0, 0, 1, 1.0), (0, 1, 0, 1.0), (0, 1, 1, 0.7), (0, 1, -1, 0.7), (1, 0, 0, ALONG_Z))  # z y x, weight


def escape_times(image: Tensor, is_exit: Tensor, *, tolerance: float = 1e-3, rounds: int = 150) -> Tensor:
    """Mean number of steps, up to a factor, until a random walker from each voxel meets an exit.

    Solves (degree - weights) times = degree over the voxels that are no exits, by conjugate gradients.

    Args:
        image: (z, y, x) grey values, 0 to 1.
        is_exit: (z, y, x) bool.
        tolerance: of the residual, relative; rounds: the most that are computed.

    Returns:
        (z, y, x) float32, 0 at the exits.
    """
    edges = []
    degree = torch.zeros_like(image)
    for dz, dy, dx, likelihood in STEPS:
        a, b = _shifted(image.shape, (dz, dy, dx))
        weight = torch.exp(-(((image[a] - image[b]) / GREY_SD) ** 2)).clamp(min=LEAST) * likelihood
        edges.append((a, b, weight))
        degree[a] += weight
        degree[b] += weight
    is_free = (~is_exit).to(image.dtype)

    def applied(x: Tensor) -> Tensor:
        y = degree * x
        for a, b, weight in edges:
            y[a] -= weight * x[b]
            y[b] -= weight * x[a]
        return y * is_free

    times, residual = torch.zeros_like(image), degree * is_free
    first, direction = residual.norm(), is_free.clone()  # the residual divided by the degree
    fit = (residual * direction).sum()
    for _ in range(rounds):
        if residual.norm() <= tolerance * first:
            break
        image_of = applied(direction)
        length = fit / (direction * image_of).sum()
        times += length * direction
        residual -= length * image_of
        scaled = residual / degree
        new_fit = (residual * scaled).sum()
        direction = scaled + new_fit / fit * direction
        fit = new_fit
    return times


def _shifted(shape: Sequence[int], shift: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Indices of all voxels that have a neighbour at `shift`, and of these neighbours."""
    first = tuple(slice(max(-s, 0), n - max(s, 0)) for n, s in zip(shape, shift, strict=True))
    second = tuple(slice(max(s, 0), n - max(-s, 0)) for n, s in zip(shape, shift, strict=True))
    return first, second


def otsu_threshold(values: Tensor) -> float:
    """The value, of 0 to 1 in 256 steps, that best parts the dark voxels from the bright ones (Otsu 1979)."""
    share = torch.histc(values.float(), 256, 0, 1).double()
    share /= share.sum()
    levels = torch.linspace(0, 1, 256, dtype=torch.float64)
    below, mean_below = share.cumsum(0), (share * levels).cumsum(0)
    spread = (mean_below[-1] * below - mean_below) ** 2 / (below * (1 - below)).clamp(min=1e-9)
    return float(levels[spread.argmax()])


def escape_map(
    slices: np.ndarray, is_positive: np.ndarray, dark: float = 0.8
) -> tuple[np.ndarray, np.ndarray]:
    """How closed in each pixel is: about 1 in the middle of what is seen in positive slices only.

    Computed at half the resolution, where noise is lower.

    Args:
        slices: uint8 (z, row, column[, 3]), neighbours of a patient; of colours the mean counts.
        is_positive: (z,) bool, whether the structure is seen in the slice.
        dark: surroundings are what is darker than this times Otsu's threshold; above 1 for structures that
            are brighter than most of the tissue.

    Returns:
        Float32 (z, row, column), 0 to 1, 0 in negative slices; and (z,) the longest time of each
        slice as a share of that of the volume. All is 0 where nothing is closed in.
    """
    is_positive = np.asarray(is_positive, bool)
    if slices.ndim == 4:
        slices = slices.mean(axis=-1).astype(np.uint8)
    found, shares = np.zeros(slices.shape, np.float32), np.zeros(len(slices), np.float32)
    if not is_positive.any():
        return found, shares
    grey = F.avg_pool2d(torch.from_numpy(slices).float()[:, None] / 255, 2, ceil_mode=True)
    grey = F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)[:, 0]
    least = dark * otsu_threshold(grey)
    first, last = np.flatnonzero(is_positive)[[0, -1]]
    inside = slice(first, last + 1)
    # What lies beyond the positive slices, or beyond the volume, is exit; one slice of it is enough.
    grey = torch.cat([grey[[max(first - 1, 0)]], grey[inside], grey[[min(last + 1, len(grey) - 1)]]])
    is_exit = (grey < least) | ~torch.from_numpy(np.pad(is_positive[inside], 1))[:, None, None]
    is_exit[:, [0, -1]] = is_exit[:, :, [0, -1]] = True
    times = escape_times(grey, is_exit)[1:-1]
    peaks = torch.stack([t[t > 0].quantile(0.98) if (t > 0).any() else t.new_zeros(()) for t in times])
    if not peaks.any():
        return found, shares
    share = peaks / peaks.max()
    times = times / (peaks.max() * share.clamp(min=0.02) ** SLICE_POWER)[:, None, None]
    full = F.interpolate(times[:, None], slices.shape[1:], mode="bilinear", align_corners=False)
    found[inside], shares[inside] = full[:, 0].clamp(max=1).numpy(), share.numpy()
    return found, shares
