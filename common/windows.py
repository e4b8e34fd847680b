"""The plan of a sliding-window prediction: where windows lie, how they weigh, what is read, how much memory.

common/inference.py carries it out.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.volumes import Box, Triple, resampled_shape

MIB = 2**20
CHUNK_BYTES = 32 * MIB  # of the scores that are on the scan's grid at the same time
READ_ROWS = 16  # of the working grid, read at the same time
GPU_SHARE = 0.4  # of the free GPU memory that the sums may take; the rest is for the network


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: evenly spaced, the first 0, the last flush, none repeated.

    Neighbours share at least `overlap` of the patch, in [0, 1). [0] where the patch covers the axis.

    Raises:
        ValueError: size or patch below 1, or overlap outside [0, 1).
    """
    if size < 1 or patch < 1 or not 0 <= overlap < 1:
        raise ValueError(f"patch {patch} on {size} voxels, overlap {overlap}: 1 or more, and [0, 1) needed")
    if size <= patch:
        return [0]
    # 10 * (1 - 0.8) is 1.9999999999999996: the steps of 2 that the overlap allows must not become steps of 1.
    step = max(math.floor(patch * (1 - overlap) + 1e-6), 1)
    gaps = math.ceil((size - patch) / step)
    return [i * (size - patch) // gaps for i in range(gaps + 1)]


def gaussian_weights(patch_shape: Sequence[int], sigma: float = 0.125) -> Tensor:
    """Weights of a window's voxels, (z, y, x) float32 in [0.001, 1], highest in the middle.

    `sigma` is the standard deviation as a share of the patch. Same values as MONAI's "gaussian" mode, which
    raises those below 0.001 to 0.001, or to the smallest where that is higher.
    """
    weights = torch.ones(())
    for size in patch_shape:
        offset = torch.arange(size) - (size - 1) / 2
        weights = weights.unsqueeze(-1) * torch.exp(-0.5 * (offset / (sigma * size)) ** 2)
    return weights.clamp_(min=1e-3)


def reading_box(
    box: Box,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    working_spacing_mm: Sequence[float],
    patch_shape: Sequence[int],
) -> Box:
    """What is read to predict a box: the box, grown to the size of a patch where it is smaller.

    So a window sees the scan's own tissue beyond the box, as the patches of training did; only where the
    scan itself ends there is nothing to read. The result lies inside the scan, contains the box and is the
    same if it is grown once more.

    Args:
        box: (start, stop), each z y x, in voxels of the scan.
        shape: of the scan, z y x.
        spacing_mm, working_spacing_mm: z y x, of the scan and of what the network was trained on.
        patch_shape: of the network, z y x, in voxels of the working spacing.
    """
    start, stop = [], []
    for axis, (first, last) in enumerate(zip(*box, strict=True)):
        patch = math.ceil(patch_shape[axis] * working_spacing_mm[axis] / spacing_mm[axis] - 1e-6)
        size = min(max(patch, last - first), shape[axis])
        before = (size - (last - first)) // 2
        first = min(max(first - before, 0), shape[axis] - size)
        start.append(first)
        stop.append(first + size)
    return tuple(start), tuple(stop)


def stream_axis(shape: Sequence[int], patch_shape: Sequence[int]) -> int:
    """The axis (of z y x) that is longest in patches; along it one patch's depth has the fewest voxels."""
    return max(range(3), key=lambda axis: shape[axis] / patch_shape[axis])


def windows_of_a_step(
    starts: Sequence[Sequence[int]], patch: Sequence[int], axis: int
) -> list[tuple[slice, ...]]:
    """Places of all windows at one position along the streaming axis, in the buffer of one patch's depth."""
    in_buffer = [[0] if a == axis else starts[a] for a in range(3)]
    return [
        (slice(None), *(slice(s, s + p) for s, p in zip(corner, patch, strict=True)))
        for corner in itertools.product(*in_buffer)
    ]


def padded_shape(shape: Sequence[int], patch_shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` (z y x), at least as large as the patch along each axis."""
    return tuple(max(pair) for pair in zip(shape, patch_shape, strict=True))


def sums_shape(shape: Sequence[int], patch_shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """z y x of the sums of scores: the padded volume, but only one patch deep along the streaming axis."""
    sums = list(padded_shape(shape, patch_shape))
    sums[axis] = patch_shape[axis]
    return tuple(sums)


def device_of_sums(
    device: torch.device, wish: torch.device | str | None, num_classes: int, sums: Sequence[int]
) -> torch.device:
    """Where (num_classes + 1, *sums) float32 sums lie: as wished, else with the network while they fit."""
    if wish is not None:
        return torch.device(wish)
    if device.type != "cuda":
        return torch.device("cpu")
    free_bytes = torch.cuda.mem_get_info(device)[0]
    fits = 4 * (num_classes + 1) * math.prod(sums) < GPU_SHARE * free_bytes
    return device if fits else torch.device("cpu")


def axis_first(shape: Triple, axis: int) -> tuple[int, ...]:
    """The sizes z y x with that of `axis` in front."""
    return (shape[axis], *(n for a, n in enumerate(shape) if a != axis))


def row_bytes(channels: int, shape_in: Sequence[int], shape_out: Sequence[int]) -> float:
    """Float32 bytes of a row (axis 0) of the result, or of the rows that it comes from, whichever is more."""
    rows_in = max(shape_in[0] / shape_out[0], 1)
    return 4 * channels * max(rows_in * math.prod(shape_in[1:]), math.prod(shape_out[1:]))


class PredictionPeak(NamedTuple):
    """Memory in MiB; `device_mib` is that of a GPU, 0 on the CPU."""

    host_mib: float
    device_mib: float


def prediction_peak_mib(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    working_spacing_mm: Sequence[float],
    patch_shape: Sequence[int],
    num_classes: int,
    *,
    batch_size: int = 1,
    channels: int = 1,
    device: torch.device | str = "cpu",
    accumulate_on: torch.device | str | None = None,
    network_mib: float = 0.0,
) -> PredictionPeak:
    """Upper bound of what `predict_labels` takes beside the scan itself, from shapes alone.

    `shape` is (z, y, x) of the scan, or of the `reading_box` of a region; the rest as in `predict_labels`.
    `network_mib`: weights and activations of the network for a batch, left out unless given.
    """
    working, device = resampled_shape(shape, spacing_mm, working_spacing_mm), torch.device(device)
    axis = stream_axis(working, patch_shape)
    sums = sums_shape(working, patch_shape, axis)
    sums_device = device_of_sums(device, accumulate_on, num_classes, sums)
    block_mib, patch_mib = (4 * math.prod(s) / MIB for s in (sums, patch_shape))
    image_mib = channels * block_mib + batch_size * channels * patch_mib
    sums_mib = (num_classes + 1) * block_mib + patch_mib
    # A batch: the input and what is prepared from it; scores, their sum over flips, one more while adding.
    batch_mib = batch_size * (2 * channels + 3 * num_classes) * patch_mib + network_mib
    # Resampling holds rows as they come, in the order it needs, after one step and at the end, and two more
    # at the borders. What is read exists once more, as stored, while it is cut to the value range.
    copies = 4 if tuple(working) != tuple(shape) else 2
    scan_shape, working_shape = axis_first(shape, axis), axis_first(working, axis)
    read_row_mib = row_bytes(channels, scan_shape, working_shape) / MIB
    reading_mib = (copies + 1) * (min(READ_ROWS, working_shape[0]) + 2) * read_row_mib
    row_mib = row_bytes(num_classes, working_shape, scan_shape) / MIB
    slab_rows = math.ceil(min(patch_shape[axis] / working_shape[0], 1) * scan_shape[0])
    chunk_mib = min(max(CHUNK_BYTES / MIB, row_mib), slab_rows * row_mib)
    reducing_mib = copies * (chunk_mib + 2 * row_mib)
    labels_mib = math.prod(shape) / MIB
    # block_mib: while the sums move on, one class of them is copied.
    stitching_mib = max(reducing_mib, block_mib)
    if sums_device.type != "cpu":
        return PredictionPeak(labels_mib + image_mib + reading_mib, sums_mib + max(batch_mib, stitching_mib))
    host_mib = labels_mib + image_mib + sums_mib + max(reading_mib, batch_mib, stitching_mib)
    return PredictionPeak(host_mib, 0.0 if device.type == "cpu" else batch_mib)
