"""Clip, resample and crop (z, y, x) volumes; every result can be computed slab by slab along z.

Resampling keeps the field of view: output voxel i has its centre at (i + 0.5) * n_in / n_out - 0.5. It is
linear; where an axis shrinks, the triangle is widened by the ratio, so that nothing aliases. Weights that
reach over a border are left out and the others scaled to sum 1.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.metrics import largest_component
from common.stored_values import clip_values

Triple = tuple[int, int, int]  # z y x
Box = tuple[Triple, Triple]  # start and stop, z y x, half-open

# Of a slab at work, input and output together; of 2^22 to 2^25 bytes this was the fastest by a little.
SLAB_BYTES = 2**24
BODY_GRID = 128  # most voxels along an axis that body_box looks at


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]
) -> Triple:
    """Voxels (z y x) of about `new_spacing_mm` in the same field of view, at least 1 along each axis.

    The spacing really got is shape * spacing_mm / result: the field of view is kept, not the spacing.
    """
    axes = zip(shape, spacing_mm, new_spacing_mm, strict=True)
    z, y, x = (max(1, round(n * old / new)) for n, old, new in axes)
    return z, y, x


def resampled_affine(affine: np.ndarray, shape: Sequence[int], new_shape: Sequence[int]) -> np.ndarray:
    """(4, 4) affine, voxel (x, y, z) to mm, of a volume resampled from `shape` to `new_shape` (z y x)."""
    ratio = np.divide(shape, new_shape)[::-1]
    to_old = np.diag([*ratio, 1.0])
    to_old[:3, 3] = (ratio - 1) / 2  # half-pixel centres
    return affine @ to_old


def crop_affine(affine: np.ndarray, start_zyx: Sequence[int]) -> np.ndarray:
    """(4, 4) affine, voxel (x, y, z) to mm, of a volume cropped from `start_zyx` on; padded if negative."""
    to_old = np.eye(4)
    to_old[:3, 3] = start_zyx[::-1]
    return affine @ to_old


# ---- values ----


# ---- resampling ----


def resample(
    volume: Any,
    shape: Sequence[int],
    *,
    rows: tuple[int, int] | None = None,
    value_range: Sequence[float] | None = None,
) -> np.ndarray:
    """Linear resampling to `shape` (z y x) with the field of view kept, antialiased where an axis shrinks.

    Args:
        volume: (z, y, x) numbers: an array, an HDF5 dataset, a NiftiFile; read in slabs `volume[a:b]`. A
            compressed NIfTI is decompressed again for every slab: read what is needed of it beforehand.
        shape: of the whole result.
        rows: [first, last) along z of the result, None = all. Bit for bit the same as the whole cut there.
        value_range: values are cut to it before they are weighed; see `clip_values`.

    Returns:
        float32, (z, y, x) of the result or of its rows.

    Raises:
        ValueError: no three axes, an axis without voxels, or rows outside the result.
    """
    first, last = _checked_rows(volume.shape, shape, rows)
    result = np.empty((last - first, *shape[1:]), np.float32)
    for a, b in _slabs(volume.shape, shape, first, last):
        start, stop = needed_rows((a, b), volume.shape[0], shape[0])
        values = clip_values(np.asarray(volume[start:stop]), value_range)
        slab = torch.from_numpy(np.array(values, dtype=np.float32))[None]
        part = resample_slab(slab, start, volume.shape[0], shape[0], (a, b), tuple(shape[1:]))
        result[a - first : b - first] = part[0].numpy()
    return result


def resample_slab(
    slab: Tensor,
    first_row: int,
    size_in: int,
    size_out: int,
    rows_out: tuple[int, int],
    plane_out: tuple[int, int],
) -> Tensor:
    """Rows of the resampled volume from those rows of the input that they need, on the slab's device.

    Args:
        slab: (C, rows, Y, X) floating point: rows [first_row, first_row + rows) of `size_in` rows in all.
        size_out: rows of the whole result.
        rows_out: [first, last) rows of the result; the slab must hold `needed_rows(rows_out, ...)`.
        plane_out: (Y', X') of the result.

    Returns:
        (C, last - first, Y', X') of the slab's dtype; in-plane work and sums in float32. Besides slab and
        result it takes a float32 slab of (C, fewer of the input and output rows, Y', X').

    Raises:
        ValueError: a row needed is not in the slab.
    """
    start, stop = needed_rows(rows_out, size_in, size_out)
    if not first_row <= start < stop <= first_row + slab.shape[1]:
        raise ValueError(
            f"output rows {rows_out} need input rows {(start, stop)}, but the slab holds "
            f"{(first_row, first_row + slab.shape[1])}; see needed_rows"
        )
    slab = slab[:, start - first_row : stop - first_row]
    if size_in == size_out:  # nothing to weigh along the rows
        return _resample_planes(slab.float(), plane_out).to(slab.dtype)
    taps = [[(j - start, w) for j, w in row] for row in _taps(rows_out, size_in, size_out)]
    if size_out < size_in:  # the costly in-plane part on the fewer rows, whatever the slab
        return _resample_planes(_weigh_rows(slab, taps, torch.float32), plane_out).to(slab.dtype)
    return _weigh_rows(_resample_planes(slab.float(), plane_out), taps, slab.dtype)


def needed_rows(rows_out: tuple[int, int], size_in: int, size_out: int) -> tuple[int, int]:
    """[first, last) input rows that the output rows [first, last) are computed from."""
    used = [j for row in _taps(rows_out, size_in, size_out) for j, _ in row]
    return min(used), max(used) + 1


def _taps(rows_out: tuple[int, int], size_in: int, size_out: int) -> list[list[tuple[int, float]]]:
    """For every output row its (input row, weight)s; the weights sum to 1 and none is 0."""
    ratio = size_in / size_out
    reach = max(ratio, 1.0)
    taps = []
    for i in range(*rows_out):
        centre = (i + 0.5) * ratio - 0.5
        near = range(max(0, math.floor(centre - reach)), min(size_in, math.ceil(centre + reach) + 1))
        weights = [(j, 1 - abs(j - centre) / reach) for j in near if abs(j - centre) < reach - 1e-9]
        total = sum(w for _, w in weights)
        taps.append([(j, w / total) for j, w in weights])
    return taps


def _weigh_rows(slab: Tensor, taps: list[list[tuple[int, float]]], dtype: torch.dtype) -> Tensor:
    """Weighted sums of rows, (C, rows, Y, X) -> (C, len(taps), Y, X).

    Products and sums are rounded apart and in one order. A matrix product would depend on the slab's size in
    the last bit, so that slabs would not equal the whole.
    """
    total = None
    for tap in range(max(map(len, taps))):
        # Rows of fewer taps take their first once more, with weight 0.
        index, weights = zip(*(row[tap] if tap < len(row) else (row[0][0], 0.0) for row in taps), strict=True)
        part = slab[:, list(index)].float()
        part *= torch.tensor(weights, device=slab.device).view(-1, 1, 1)
        total = part if total is None else total.add_(part)
    return total.to(dtype)


def _resample_planes(slab: Tensor, plane: tuple[int, int]) -> Tensor:
    """(C, rows, Y, X) float32 -> (C, rows, Y', X')."""
    if tuple(slab.shape[2:]) == tuple(plane):
        return slab
    shrinks = plane[0] < slab.shape[2] or plane[1] < slab.shape[3]  # antialias takes three times as long
    planes = slab.reshape(-1, 1, *slab.shape[2:])
    # To planes one voxel wide, torch's antialiasing on the CPU gives every row the weights of the first (seen
    # in 2.13); planes one voxel high are right.
    is_one_wide = plane[1] == 1
    if is_one_wide:
        planes, plane = planes.mT, plane[::-1]
    planes = F.interpolate(planes, plane, mode="bilinear", align_corners=False, antialias=shrinks)
    if is_one_wide:
        planes = planes.mT
    return planes.reshape(*slab.shape[:2], *planes.shape[2:])


def resample_labels(
    labels: Any,
    shape: Sequence[int],
    values: Sequence[int] | None = None,
    *,
    rows: tuple[int, int] | None = None,
) -> np.ndarray:
    """Each class resampled linearly as 0/1, the largest score wins, the lower label where two are equal.

    One class after the other with a running maximum, in slabs along z. A class of one voxel can lose
    everywhere, even on a finer grid (twice as fine, its score is 0.75^3 < 0.5); if the whole is resampled, a
    warning names the labels that are gone.

    Args:
        labels: (z, y, x) whole numbers in 0..65535; as `volume` of `resample`.
        values: labels to keep, all others become 0; None = all.
        rows: [first, last) along z of the result, None = all.

    Returns:
        uint8 if `labels` is bool or uint8, else uint16; (z, y, x) of the result or of its rows.

    Raises:
        ValueError: as `resample`, or a label is not in 0..65535.
    """
    first, last = _checked_rows(labels.shape, shape, rows)
    small = np.dtype(labels.dtype) in (np.bool_, np.uint8)
    result = np.zeros((last - first, *shape[1:]), np.uint8 if small else np.uint16)
    seen_in, seen_out = np.zeros((2, 65536), bool)
    for a, b in _slabs(labels.shape, shape, first, last):
        start, stop = needed_rows((a, b), labels.shape[0], shape[0])
        slab = np.asarray(labels[start:stop])
        if not small and (slab.min() < 0 or slab.max() > 65535 or (slab.astype(np.uint16) != slab).any()):
            raise ValueError(f"labels {slab.min()}..{slab.max()}, expected whole numbers in 0..65535")
        slab = slab.astype(result.dtype, copy=False)
        if values is not None:
            slab = np.where(np.isin(slab, values), slab, 0)
        present = np.flatnonzero(np.bincount(slab.ravel())).tolist()
        part = result[a - first : b - first]
        part[...] = present[0]
        best = None
        for value in present if len(present) > 1 else ():
            mask = torch.from_numpy((slab == value).astype(np.float32))[None]
            score = resample_slab(mask, start, labels.shape[0], shape[0], (a, b), tuple(shape[1:]))[0].numpy()
            if best is None:
                best = score
                continue
            part[score > best] = value
            np.maximum(best, score, out=best)
        seen_in[present] = True
        seen_out[np.flatnonzero(np.bincount(part.ravel()))] = True
    lost = np.flatnonzero(seen_in & ~seen_out).tolist()
    if lost and rows is None:
        warnings.warn(
            f"labels {lost} are gone after resampling {tuple(labels.shape)} to {tuple(shape)}", stacklevel=2
        )
    return result


def _checked_rows(size: Sequence[int], shape: Sequence[int], rows: tuple[int, int] | None) -> tuple[int, int]:
    if len(size) != 3 or len(shape) != 3 or min(*size, *shape) < 1:
        raise ValueError(
            f"cannot resample {tuple(size)} to {tuple(shape)}; both need three axes (z y x) of 1 or more"
        )
    first, last = rows or (0, shape[0])
    if not 0 <= first < last <= shape[0]:
        raise ValueError(f"rows {rows} of a result with {shape[0]} rows")
    return first, last


def _slabs(size: Sequence[int], shape: Sequence[int], first: int, last: int) -> list[tuple[int, int]]:
    row_bytes = 4 * (shape[1] * shape[2] + size[0] / shape[0] * size[1] * size[2])
    step = max(1, int(SLAB_BYTES / row_bytes))
    return [(a, min(a + step, last)) for a in range(first, last, step)]


# ---- boxes: start and stop are z y x, half-open ----


def crop(array: np.ndarray, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
    """View of the box of the last three axes.

    Raises:
        ValueError: the box is empty or not inside the array.
    """
    shape = array.shape[-3:]
    if not all(0 <= a < b <= n for a, b, n in zip(start, stop, shape, strict=True)):
        raise ValueError(f"box {tuple(start)} to {tuple(stop)} is not inside {shape} (z y x)")
    return array[(..., *(slice(a, b) for a, b in zip(start, stop, strict=True)))]


def expand_box(
    start: Sequence[int], stop: Sequence[int], margin: int | Sequence[int], shape: Sequence[int]
) -> Box:
    """The box grown by `margin` voxels (one number or z y x) on all sides, cut at the borders of `shape`."""
    margin = np.broadcast_to(margin, 3)
    start = np.clip(np.subtract(start, margin), 0, shape).tolist()
    stop = np.clip(np.add(stop, margin), 0, shape).tolist()
    return tuple(start), tuple(stop)


def box_around(
    middle: Sequence[float],
    patch_size: Sequence[int],
    working_mm: Sequence[float],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
) -> Box:
    """The box of a patch of voxels of `working_mm` around a voxel, within a scan of `shape`; all z y x."""
    extent = np.multiply(patch_size, np.divide(working_mm, spacing_mm))
    start = np.rint(np.asarray(middle) + 0.5 - extent / 2).astype(int)
    size = np.minimum(np.rint(extent).astype(int), shape)
    start = np.clip(start, 0, np.subtract(shape, size))
    return tuple(start.tolist()), tuple((start + size).tolist())


def box_of(mask: np.ndarray) -> Box | None:
    """Smallest box around the voxels of a (z, y, x) mask that are not 0; None if all are 0."""
    start, stop = [], []
    for axis in range(3):
        occupied = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        if occupied.size == 0:
            return None
        start.append(int(occupied[0]))
        stop.append(int(occupied[-1]) + 1)
    return tuple(start), tuple(stop)


def body_box(
    image_hu: np.ndarray, threshold_hu: float = -500.0, margin_voxels: int | Sequence[int] = 0
) -> Box:
    """Box of the largest connected part above the threshold of a (z, y, x) CT; the whole image if none is.

    Looks at every s-th voxel only, at most 128 along each axis, and adds the s - 1 voxels around that it did
    not see; parts thinner than s may be missed. A table that touches the body counts as body.
    """
    step = [-(-n // BODY_GRID) for n in image_hu.shape]
    mask = image_hu[tuple(slice(None, None, s) for s in step)] > threshold_hu
    box = box_of(largest_component(mask))
    if box is None:
        return (0, 0, 0), tuple(image_hu.shape)
    start = [a * s for a, s in zip(box[0], step, strict=True)]
    stop = [(b - 1) * s + 1 for b, s in zip(box[1], step, strict=True)]
    margin = np.add(margin_voxels, np.subtract(step, 1))
    return expand_box(start, stop, margin, image_hu.shape)
