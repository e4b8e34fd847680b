"""A scan in a file whose voxels are read piece by piece, turned to (z, y, x) in RAS+.

Opened and written by common/nifti.py.
"""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common import nifti_checks as checks
from common.faults import first_line
from common.nrrd import is_nrrd, open_nrrd_voxels
from common.stored_values import Stored, clip_values, lowest_finite, scaled, without_nan

UNREADABLE = (EOFError, zlib.error, OSError, ValueError, OverflowError)  # what damaged files raise
CHUNK_BYTES = 2**22  # that are read at once: several planes, as turning the axes of each plane is slow


def voxel_mm3(affine: np.ndarray) -> float:
    """Volume of a voxel, of a (4, 4) affine in mm; the product of spacings is wrong where it is sheared."""
    x, y, z = np.asarray(affine, float)[:3, :3].T
    return float(abs(np.cross(x, y) @ z))


def open_voxels(path: Path) -> AbstractContextManager[BinaryIO]:
    """The bytes in which `Stored.offset` counts, decompressed; of some files they only come forwards."""
    if is_nrrd(path):
        return open_nrrd_voxels(path)
    return gzip.open(path) if path.name.lower().endswith("gz") else path.open("rb")


@dataclass(frozen=True)
class NiftiFile:
    """A 3-D volume in a file of which only the header has been read.

    Attributes:
        shape: (z, y, x) of the volume in RAS+.
        spacing_mm: voxel size, z y x.
        affine: (4, 4) float64, voxel (x, y, z) of the RAS+ volume to mm.
        header: nibabel's NIfTI header, with form codes and units; made up for other formats.
        file_affine: (4, 4) affine as stored in the file, in the file's unit.
        orientation: axis codes of the file, such as "LPS".
        stored: where and how the voxels are stored; only for this module.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    path: Path
    header: Any
    file_affine: np.ndarray
    orientation: str
    stored: Stored

    @property
    def file_shape(self) -> tuple[int, int, int]:
        """(x, y, z) of the array in the file's axes."""
        x, y, z = (*self.header.get_data_shape(), 1)[:3]  # a 2-D file has one slice
        return x, y, z

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel in mm^3; right for sheared affines too."""
        return voxel_mm3(self.affine)

    @cached_property
    def lowest(self) -> float:
        """Smallest finite value of the file, which is read once for it; warns of NaN and infinity."""
        parts = (self._scaled(part) for _, part in self._parts((0, 0, 0), self.shape))
        return lowest_finite(parts, self.path)

    def read_box(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Voxels [start, stop) as (z, y, x) RAS+; needs the memory of the box and of a chunk of the file.

        A .nii.gz is decompressed up to the last slice needed: read one box rather than many. The values are
        those of `load_nifti`, but the type depends only on the stored type: integers with an intercept may
        come as int32 or float32 where `load_nifti` sees that int16 holds them. NaN and infinity become the
        smallest finite value of the whole file, which is then read once more.

        Raises:
            ValueError: the box is empty or not inside the volume; the file is truncated before the box ends.
        """
        start, stop = (tuple(map(int, corner)) for corner in (start, stop))
        if not all(0 <= a < b <= n for a, b, n in zip(start, stop, self.shape, strict=True)):
            raise ValueError(f"{self.path}: box {start} to {stop} is not inside {self.shape} (z y x)")
        return without_nan(self._scaled(self._read(start, stop)), lambda: self.lowest)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """`file[a:b]`: the slices a to b along z, as `read_box` reads them."""
        return self.read_box((rows.start, 0, 0), (rows.stop, *self.shape[1:]))

    def read_reduced(self, factors: Sequence[int], value_range: Sequence[float] | None = None) -> np.ndarray:
        """Means over blocks of `factors` (z y x) voxels; needs the memory of the result and of a chunk.

        Values are cut to `value_range` before they are averaged, see `clip_values`.

        Returns (z, y, x) float32; the last block of an axis may have fewer voxels to average.
        """
        if len(factors) != 3 or any(f != int(f) or f < 1 for f in factors):
            raise ValueError(f"{self.path}: factors {factors}, expected three whole numbers above 0 (z y x)")
        checks.check_length(self)
        sums = np.zeros([-(-n // f) for n, f in zip(self.shape, factors, strict=True)])
        for place, part in self._parts((0, 0, 0), self.shape):
            part = clip_values(without_nan(self._scaled(part), lambda: self.lowest), value_range)
            # The number of the block that each plane of the part belongs to, along each axis.
            blocks = [np.arange(p.start, p.stop) // f for p, f in zip(place, factors, strict=True)]
            for axis in (2, 1, 0):
                firsts = np.flatnonzero(np.diff(blocks[axis], prepend=-1))
                part = np.add.reduceat(part, firsts, axis=axis, dtype=np.float64)
            sums[tuple(slice(b[0], b[-1] + 1) for b in blocks)] += part
        for axis, (n, f) in enumerate(zip(self.shape, factors, strict=True)):
            num_planes = np.minimum(n - np.arange(0, n, f), f)  # of each block
            sums /= num_planes.reshape(np.roll([-1, 1, 1], axis))
        return sums.astype(np.float32)

    def _scaled(self, part: np.ndarray) -> np.ndarray:
        return scaled(part, self.stored.slope, self.stored.inter)

    def _read(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """A box as it is stored, without slope and intercept, in native byte order."""
        checks.check_room(self, start, stop)
        box = np.empty(np.subtract(stop, start), self.stored.dtype.newbyteorder("="))
        for place, part in self._parts(start, stop):
            box[place] = part
        return box

    def _parts(self, start: Sequence[int], stop: Sequence[int]) -> Iterator[tuple[tuple, np.ndarray]]:
        """Pieces of the box in the order of the file: (slices of the box, stored values), z y x in RAS+."""
        codes = self.orientation[::-1]  # slowest axis of the file first
        axes = np.array([next(k for k, ends in enumerate(("IS", "PA", "LR")) if c in ends) for c in codes])
        flips = np.array([code in "IPL" for code in codes])
        start, stop, shape = (np.array(corner)[axes] for corner in (start, stop, self.shape))
        first = np.where(flips, shape - stop, start)  # corners of the box in the file's own voxels
        last = first + stop - start
        turn = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
        dtype = self.stored.dtype
        plane_bytes = int(shape[1] * shape[2]) * dtype.itemsize
        planes_at_once = max(1, CHUNK_BYTES // plane_bytes)
        try:
            with open_voxels(self.path) as file:
                file.seek(self.stored.offset + int(first[0]) * plane_bytes)
                for k in range(first[0], last[0], planes_at_once):
                    num = min(planes_at_once, int(last[0]) - k)
                    data = file.read(num * plane_bytes)
                    if len(data) < num * plane_bytes:
                        raise EOFError(f"ends between slice {k} and {k + num} of {shape[0]}")
                    part = np.frombuffer(data, dtype).reshape(num, *shape[1:])
                    part = part[:, first[1] : last[1], first[2] : last[2]][turn].transpose(np.argsort(axes))
                    place = [slice(0, n) for n in part.shape]
                    begin = last[0] - k - num if flips[0] else k - first[0]
                    place[axes[0]] = slice(begin, begin + num)
                    yield tuple(place), part
                if last[0] == shape[0]:
                    checks.check_end(self, file, plane_bytes)
        except UNREADABLE as error:
            message = f"{self.path}: truncated or damaged ({first_line(error)}); fetch it again"
            raise ValueError(message) from error


@dataclass(frozen=True)
class Scan(NiftiFile):
    """A NiftiFile with its voxels: `array` is (z, y, x) RAS+, of integers if the file's scaling allows."""

    array: np.ndarray
