"""From the scan's grid to the network's and back, a few rows at a time, while a prediction streams along."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.stored_values import clip_values
from common.volumes import Box, Triple, needed_rows, resample_slab
from common.windows import CHUNK_BYTES, axis_first, row_bytes


class WorkingGrid:
    """A box of a volume on a grid of another shape: cut to a value range, then resampled, where it is sliced.

    Args:
        volume: (Z, Y, X) or (C, Z, Y, X) on the scan's grid, in memory or read where it is sliced.
        box: (start, stop), z y x, of the volume.
        shape: of the working grid over the same field of view, z y x.
        axis: of z y x, along which `read_rows` will slice.
        value_range: as of `clip_values`.
    """

    def __init__(
        self, volume: Any, box: Box, shape: Triple, axis: int, value_range: Sequence[float] | None
    ) -> None:
        self.volume, self.box, self.axis, self.value_range = volume, box, axis, value_range
        self.shape = (*volume.shape[:-3], *shape)

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """(C, Z, Y, X) or (Z, Y, X) float32: the rows that `index` names along the streaming axis."""
        axis, (start, stop) = self.axis, self.box
        rows = index[axis - 3]
        size_in, size_out = stop[axis] - start[axis], self.shape[axis - 3]
        first, last = needed_rows((rows.start, rows.stop), size_in, size_out)
        where = [slice(a, b) for a, b in zip(start, stop, strict=True)]
        where[axis] = slice(start[axis] + first, start[axis] + last)
        channels = [slice(None)] * (len(self.shape) - 3)
        values = clip_values(np.asarray(self.volume[(*channels, *where)]), self.value_range)
        slab = _as_channels(values).movedim(axis + 1, 1)
        plane = axis_first(self.shape[-3:], axis)[1:]
        rows_out = (rows.start, rows.stop)
        return resample_slab(slab, first, size_in, size_out, rows_out, plane).movedim(1, axis + 1)


def read_rows(volume: Any, axis: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop) along `axis` of z y x: (C, Z, Y, X) float32; (Z, Y, X) volumes get C = 1."""
    where = [slice(None)] * len(volume.shape)
    where[axis - 3] = slice(start, stop)
    return _as_channels(volume[tuple(where)])


def _as_channels(values: Any) -> Tensor:
    rows = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return rows.reshape(-1, *rows.shape[-3:])


def native_rows(slabs: Iterator, shape: Triple, size_in: int, axis: int) -> Iterator[tuple[int, Tensor]]:
    """Slabs of scores on the working grid -> scores on the scan's grid, as soon as all they need is there.

    Args:
        slabs: (start, stop, scores (K, Z, Y, X)) as of `stream_scores` along `axis`, `size_in` rows in all.
        shape: of the scan's grid, `axis` first.

    Yields:
        (first row, scores (K, rows, *plane)), float32, about CHUNK_BYTES at a time; `axis` comes first.
    """
    need = functools.partial(needed_rows, size_in=size_in, size_out=shape[0])
    row, earlier = 0, None  # earlier: rows before the slab that are still needed
    for start, stop, slab in slabs:
        slab = slab.movedim(axis + 1, 1)
        chunk = max(int(CHUNK_BYTES / row_bytes(len(slab), (size_in, *slab.shape[2:]), shape)), 1)
        while row < shape[0]:
            end = row
            while end < min(row + chunk, shape[0]) and need((end, end + 1))[1] <= stop:
                end += 1
            if end == row:  # the next row needs the next slab too
                earlier = _join(earlier, slab, need((row, row + 1))[0] - start, stop - start).clone()
                break
            first, last = need((row, end))
            part = _join(earlier, slab, first - start, last - start)
            yield row, resample_slab(part, first, size_in, shape[0], (row, end), shape[1:])
            row = end


def _join(earlier: Tensor | None, slab: Tensor, first: int, last: int) -> Tensor:
    """Rows [first, last) of a slab; negative ones are the last of `earlier`."""
    part = slab[:, max(first, 0) : last]
    return part if first >= 0 else torch.cat([earlier[:, first:], part], dim=1)
