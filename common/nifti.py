"""NIfTI in and out: the only file that knows NIfTI's axis order (x, y, z), affines and nibabel.

FreeSurfer's .mgz and .mgh are read as if they were NIfTI; masks of them are written as NIfTI.
Everywhere else a volume is `(z, y, x)` in RAS+: z grows upwards, y to the front, x to the patient's right.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.files import replacing
from common.nifti_checks import as_labels, check_file, check_forms, check_header, off_mm, rounded_labels
from common.stored_values import (
    BlockMeans,
    Stored,
    choose_channel,
    clip_values,
    lowest_finite,
    scaled,
    without_nan,
)

NIFTI_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")  # of what `open_nifti` reads
UNREADABLE = (EOFError, zlib.error, OSError, ValueError)  # what nibabel raises for damaged files
MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}  # any other unit is taken as mm
CHUNK_BYTES = 2**22  # that are read at once: several planes, as turning the axes of each plane is slow


def voxel_mm3(affine: np.ndarray) -> float:
    """Volume of a voxel, of a (4, 4) affine in mm; the product of spacings is wrong where it is sheared."""
    x, y, z = np.asarray(affine, float)[:3, :3].T
    return float(abs(np.cross(x, y) @ z))


@dataclass(frozen=True)
class NiftiFile:
    """A 3-D volume in a file of which only the header has been read.

    Attributes:
        shape: (z, y, x) of the volume in RAS+.
        spacing_mm: voxel size, z y x.
        affine: (4, 4) float64, voxel (x, y, z) of the RAS+ volume to mm.
        header: nibabel's NIfTI header, with form codes and units.
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
        means = BlockMeans(self.shape, factors)
        for place, part in self._parts((0, 0, 0), self.shape):
            means.add(place, clip_values(without_nan(self._scaled(part), lambda: self.lowest), value_range))
        return means.result()

    def _scaled(self, part: np.ndarray) -> np.ndarray:
        return scaled(part, self.stored.slope, self.stored.inter)

    def _read(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """A box as it is stored, without slope and intercept, in native byte order."""
        box = np.empty(np.subtract(stop, start), self.stored.dtype.newbyteorder("="))
        for place, part in self._parts(start, stop):
            box[place] = part
        return box

    def _parts(self, start: Sequence[int], stop: Sequence[int]) -> Iterator[tuple[tuple, np.ndarray]]:
        """Pieces of the box in the order of the file: (slices of the box, stored values), z y x in RAS+."""
        import nibabel as nib

        codes = nib.orientations.axcodes2ornt(self.orientation)[::-1]  # slowest axis of the file first
        axes, flips = 2 - codes[:, 0].astype(int), codes[:, 1] < 0
        start, stop, shape = (np.array(corner)[axes] for corner in (start, stop, self.shape))
        first = np.where(flips, shape - stop, start)  # corners of the box in the file's own voxels
        last = first + stop - start
        turn = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
        dtype = self.stored.dtype
        plane_bytes = int(shape[1] * shape[2]) * dtype.itemsize
        planes_at_once = max(1, CHUNK_BYTES // plane_bytes)
        try:
            with nib.openers.ImageOpener(self.path) as file:
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
        except UNREADABLE as error:
            message = f"{self.path}: truncated or damaged ({_first_line(error)}); fetch it again"
            raise ValueError(message) from error


@dataclass(frozen=True)
class Scan(NiftiFile):
    """A NiftiFile with its voxels: `array` is (z, y, x) RAS+, of integers if the file's scaling allows."""

    array: np.ndarray


def is_nifti(path: str | Path) -> bool:
    """Whether the name ends like a scan's and does not begin with a dot, as macOS' resource files do."""
    name = Path(path).name
    return name.lower().endswith(NIFTI_SUFFIXES) and not name.startswith(".")


def case_name(path: str | Path) -> str:
    """File name without .nii.gz, .nii, .mgz or .mgh."""
    name = Path(path).name
    endings = [s for s in NIFTI_SUFFIXES if name.lower().endswith(s)]
    return name[: -len(endings[0])] if endings else Path(path).stem


def open_nifti(path: str | Path, channel: int | None = None) -> NiftiFile:
    """Read the header of a scan; its voxels are read by the methods of what is returned.

    An affine in m or um is converted to mm. If the file holds both an sform and a qform the sform counts,
    with a warning if they differ by more than 1 mm at a corner of the grid.

    Args:
        channel: which 3-D volume of a 4-D file, from 0 on; a 3-D file has only the channel 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither NIfTI nor .mgz, a Git-LFS pointer, 4-D without `channel`, RGB, complex, without
            the channel, or with an unusable affine.
    """
    import nibabel as nib

    path = Path(path)
    image, stored = _open(path)
    shape = tuple(map(int, image.shape))
    if channel is not None:
        shape, stored = choose_channel(path, shape, stored, channel)
    while len(shape) > 3 and shape[-1] == 1:  # a trailing singleton is how some tools write 3-D
        shape = shape[:-1]
    shape = (*shape, 1) if len(shape) == 2 else shape
    file_affine = np.asarray(image.affine, dtype=np.float64)
    check_header(path, shape, image.get_data_dtype(), file_affine)
    mm = MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    affine = np.diag([mm, mm, mm, 1.0]) @ file_affine
    check_forms(path, image, shape, mm)
    to_ras = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(to_ras, shape)
    shape_zyx = tuple(np.array(shape)[np.argsort(to_ras[:, 0])][::-1].tolist())
    spacing_mm = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())
    orientation, header = "".join(nib.orientations.ornt2axcodes(to_ras)), image.header.copy()
    return NiftiFile(shape_zyx, spacing_mm, affine, path, header, file_affine, orientation, stored)


def load_nifti(path: str | Path, channel: int | None = None) -> Scan:
    """Read a scan, or with `channel` one volume of a 4-D file, as (z, y, x) RAS+.

    Integer files with a whole-number slope and intercept stay integers (int16 for CT); others become float32.
    NaN and infinity are replaced by the smallest finite value, with a warning that counts them.

    Raises what `open_nifti` does, and ValueError if the file is truncated or holds no finite value.
    """
    file = open_nifti(path, channel)
    raw = file._read((0, 0, 0), file.shape)
    array = scaled(raw, file.stored.slope, file.stored.inter, by_value=True)
    array = without_nan(array, lambda: lowest_finite([array], file.path))
    return Scan(**file.__dict__, array=array)


def to_ras(array: np.ndarray, scan: NiftiFile) -> np.ndarray:
    """An array (x, y, z) in the axes of the scan's file -> (z, y, x) RAS+, as `Scan.array`."""
    import nibabel as nib

    orientation = nib.orientations.axcodes2ornt(scan.orientation)
    return nib.orientations.apply_orientation(array, orientation).transpose(2, 1, 0)


def _from_ras(orientation: str) -> np.ndarray:
    """nibabel's note of how axes in RAS order become those of `orientation`."""
    from nibabel.orientations import axcodes2ornt, ornt_transform

    return ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))


def load_label(path: str | Path) -> Scan:
    """Read a label map like `load_nifti`, as uint8 or uint16.

    Values that a float file stores a little off (0.99999997) are rounded.

    Raises what `load_nifti` does, and ValueError if a value is negative or not within 0.001 of a whole
    number.
    """
    scan = load_nifti(path)
    return replace(scan, array=rounded_labels(scan.array, path))


def same_grid(a: NiftiFile, b: NiftiFile, tolerance_mm: float = 1e-2) -> bool:
    """Whether two scans have one shape, and every corner of their grids is at one place to `tolerance_mm`."""
    return a.shape == b.shape and off_mm(a.affine, b.affine, a.shape[::-1]) <= tolerance_mm


def save_label(path: str | Path, labels: np.ndarray, like: NiftiFile) -> None:
    """Write a label map with the axes, affine, form codes and units of the file that `like` came from.

    It is stored as uint8 (uint16 above 255) with slope 1, whole or not at all.

    Args:
        labels: (z, y, x) RAS+, whole numbers in 0..65535, of the shape of `like`.

    Raises:
        ValueError: another shape than the scan's, or values that cannot be labels.
    """
    _save_like(path, as_labels(labels, path), like)


def save_probability(path: str | Path, share: np.ndarray, like: NiftiFile) -> None:
    """Write a probability map like `save_label`: (z, y, x) uint8, 0 to 255, which readers see as 0 to 1."""
    _save_like(path, share, like, slope=1 / 255)


def _save_like(path: str | Path, array: np.ndarray, like: NiftiFile, slope: float = 1.0) -> None:
    import nibabel as nib

    if array.shape != like.shape:
        raise ValueError(f"{path}: an array {array.shape} does not fit the scan's grid {like.shape}")
    array = nib.orientations.apply_orientation(array.transpose(2, 1, 0), _from_ras(like.orientation))
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header["cal_min"] = header["cal_max"] = 0
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # Without an affine nibabel keeps both forms of the header and their codes bit for bit.
    image = image_class(array, None, header)
    image.header.set_slope_inter(slope, 0)  # an image forgets that of the header it is made with
    with replacing(path) as partial:
        nib.save(image, partial)


def write_nifti(
    path: str | Path,
    array: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
    orientation: str = "RAS",
) -> None:
    """Write a new scan that does not take its geometry from a file (phantoms, tests).

    Args:
        array: (z, y, x) RAS+.
        spacing_mm: z y x.
        origin_mm: position (x, y, z) of voxel [0, 0, 0] of `array`, whatever the orientation.
        orientation: axis codes of the file, such as "LPS".
    """
    import nibabel as nib

    affine = np.diag([*spacing_mm[::-1], 1.0])
    affine[:3, 3] = origin_mm
    from_ras = _from_ras(orientation)
    stored = nib.orientations.apply_orientation(array.transpose(2, 1, 0), from_ras)
    affine = affine @ nib.orientations.inv_ornt_aff(from_ras, array.shape[::-1])
    image = nib.Nifti1Image(stored, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    with replacing(path) as partial:
        nib.save(image, partial)


def _open(path: Path) -> tuple[Any, Stored]:
    """nibabel's NIfTI image, and how its voxels are stored; raises what `open_nifti` does."""
    import nibabel as nib

    check_file(path)
    damaged = (*UNREADABLE, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError)
    damaged += (nib.freesurfer.mghformat.MGHError, KeyError, TypeError)  # of .mgz files
    try:
        image = nib.load(path)
    except damaged as error:
        raise ValueError(f"{path}: not a readable NIfTI file ({_first_line(error)})") from error
    data = image.dataobj
    if isinstance(image, nib.MGHImage):
        image = nib.Nifti1Image(data, image.affine)
        image.header.set_xyzt_units("mm")
    if not isinstance(image, nib.Nifti1Image):  # NIfTI-2 is a subclass; an .hdr/.img pair is not
        raise ValueError(f"{path}: {type(image).__name__}, not a NIfTI file; convert it to .nii.gz")
    return image, Stored(int(data.offset), data.dtype, float(data.slope), float(data.inter))


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
