"""NIfTI in and out: the only file that knows NIfTI's axis order (x, y, z), affines and nibabel.

Everywhere else a volume is `(z, y, x)` in RAS+: z grows upwards, y to the front, x to the patient's right.
"""

import itertools
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

NIFTI_SUFFIXES = (".nii.gz", ".nii")
HEADER_STARTS = {n.to_bytes(4, order) for n in (348, 540) for order in ("little", "big")}  # NIfTI-1 and 2
UNREADABLE = (EOFError, zlib.error, OSError, ValueError)  # what nibabel raises for damaged files
LABEL_TOLERANCE = 1e-3  # a label stored as float may be off by this much, e.g. 2.9999999993 for 3
MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}  # all others are taken as mm
FORM_TOLERANCE_MM = 1.0  # sform and qform may differ by this much at a corner without a warning
CHUNK_BYTES = 2**22  # read at once: several planes, since turning axes plane by plane is slow


@dataclass(frozen=True)
class NiftiFile:
    """One 3-D volume in a file, of which only the header was read.

    Attributes:
        shape: (z, y, x) of the volume in RAS+.
        spacing_mm: voxel size, z y x.
        affine: (4, 4) float64, voxel (x, y, z) of the RAS+ volume to mm.
        header, stored: what nibabel read (codes, units; type, place and scaling); for this module only.
        file_affine: (4, 4) affine as stored in the file, in the file's unit.
        orientation: axis codes of the file, e.g. "LPS".
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    path: Path
    header: Any
    file_affine: np.ndarray
    orientation: str
    stored: Any

    @property
    def file_shape(self) -> tuple[int, int, int]:
        """(x, y, z) of the array in the file's axes."""
        x, y, z = (*self.header.get_data_shape(), 1)[:3]  # a 2-D file has one slice
        return x, y, z

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel in mm^3; right for sheared affines too."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @cached_property
    def lowest(self) -> float:
        """Smallest finite value of the file, for which the file is read once; warns of NaN and infinity."""
        return _lowest((_scaled(p, self.stored) for _, p in self._parts((0, 0, 0), self.shape)), self.path)

    def read_box(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Voxels [start, stop) as (z, y, x) RAS+; needs the memory of the box and of a chunk of the file.

        A .nii.gz is decompressed up to the last slice needed: read one box rather than many. Values as of
        `load_nifti`, but the type follows from the stored type: integers with an intercept may come as int32
        or float32 where `load_nifti` sees that int16 holds them. NaN and infinity become the smallest finite
        value of the whole file, which is then read once more.

        Raises:
            ValueError: the box is empty or not inside the volume; the file is truncated before the box ends.
        """
        start, stop = (tuple(map(int, corner)) for corner in (start, stop))
        if not all(0 <= a < b <= n for a, b, n in zip(start, stop, self.shape, strict=True)):
            raise ValueError(f"{self.path}: box {start} to {stop} is not inside {self.shape} (z y x)")
        return _without_nan(_scaled(self._read(start, stop), self.stored), lambda: self.lowest)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """`file[a:b]`: rows of axis z, as `read_box`."""
        return self.read_box((rows.start, 0, 0), (rows.stop, *self.shape[1:]))

    def read_reduced(self, factors: Sequence[int]) -> np.ndarray:
        """Means over blocks of `factors` (z y x) voxels, in one pass: memory of the result and of a chunk.

        Returns (z, y, x) float32; the last block of an axis averages the voxels there are.
        """
        if len(factors) != 3 or any(f != int(f) or f < 1 for f in factors):
            raise ValueError(f"{self.path}: factors {factors}, expected three whole numbers above 0 (z y x)")
        sums = np.zeros([-(-n // f) for n, f in zip(self.shape, factors, strict=True)])
        for place, part in self._parts((0, 0, 0), self.shape):
            part = _without_nan(_scaled(part, self.stored), lambda: self.lowest)
            blocks = [np.arange(at.start, at.stop) // f for at, f in zip(place, factors, strict=True)]
            for axis in (2, 1, 0):
                cuts = np.flatnonzero(np.diff(blocks[axis], prepend=-1))
                part = np.add.reduceat(part, cuts, axis=axis, dtype=np.float64)
            sums[tuple(slice(b[0], b[-1] + 1) for b in blocks)] += part
        for axis, (n, f) in enumerate(zip(self.shape, factors, strict=True)):
            sums /= np.minimum(n - np.arange(0, n, f), f).reshape(np.roll([-1, 1, 1], axis))
        return sums.astype(np.float32)

    def _read(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Box as stored, without slope and intercept, in native byte order."""
        box = np.empty(np.subtract(stop, start), self.stored.dtype.newbyteorder("="))
        for place, part in self._parts(start, stop):
            box[place] = part
        return box

    def _parts(self, start: Sequence[int], stop: Sequence[int]) -> Iterator[tuple[tuple, np.ndarray]]:
        """The box in the order of the file: (place in the box, values as stored) each, (z, y, x) RAS+."""
        import nibabel as nib

        codes = nib.orientations.axcodes2ornt(self.orientation)[::-1]  # slowest axis of the file first
        axes, flips = 2 - codes[:, 0].astype(int), codes[:, 1] < 0
        start, stop, shape = (np.array(t)[axes] for t in (start, stop, self.shape))
        first = np.where(flips, shape - stop, start)  # of the file
        last = first + stop - start
        turn = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
        dtype, plane = self.stored.dtype, int(shape[1] * shape[2]) * self.stored.dtype.itemsize  # bytes
        step = max(1, CHUNK_BYTES // plane)
        try:
            with nib.openers.ImageOpener(self.path) as file:
                file.seek(self.stored.offset + int(first[0]) * plane)
                for k in range(first[0], last[0], step):
                    num = min(step, int(last[0]) - k)
                    data = file.read(num * plane)
                    if len(data) < num * plane:
                        raise EOFError(f"ends between slice {k} and {k + num} of {shape[0]}")
                    part = np.frombuffer(data, dtype).reshape(num, *shape[1:])
                    part = part[:, first[1] : last[1], first[2] : last[2]][turn].transpose(np.argsort(axes))
                    place = [slice(0, n) for n in part.shape]
                    at = last[0] - k - num if flips[0] else k - first[0]
                    place[axes[0]] = slice(at, at + num)
                    yield tuple(place), part
        except UNREADABLE as error:
            message = f"{self.path}: truncated or damaged ({_first_line(error)}); fetch it again"
            raise ValueError(message) from error


@dataclass(frozen=True)
class Scan(NiftiFile):
    """A NiftiFile with its voxels: `array` is (z, y, x), RAS+, integers if the file's scaling allows."""

    array: np.ndarray


def is_nifti(path: str | Path) -> bool:
    """Whether the name ends as NIfTI files do and is no macOS resource file (`._name`)."""
    name = Path(path).name
    return name.lower().endswith(NIFTI_SUFFIXES) and not name.startswith(".")


def case_name(path: str | Path) -> str:
    """File name without .nii or .nii.gz."""
    name = Path(path).name
    endings = [s for s in NIFTI_SUFFIXES if name.lower().endswith(s)]
    return name[: -len(endings[0])] if endings else Path(path).stem


def open_nifti(path: str | Path) -> NiftiFile:
    """Read the header of one scan; voxels are read by the methods of what is returned.

    An affine in m or um is converted to mm. Where sform and qform are both coded the sform counts, with a
    warning if they differ by more than 1 mm at a corner.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NIfTI, a Git-LFS pointer, 4-D, RGB, complex, or with an unusable affine.
    """
    import nibabel as nib

    path = Path(path)
    image = _open(path)
    shape, dtype = tuple(image.shape), image.get_data_dtype()
    while len(shape) > 3 and shape[-1] == 1:  # a trailing singleton is how some tools write 3-D
        shape = shape[:-1]
    shape = (*shape, 1) if len(shape) == 2 else shape
    file_affine = np.asarray(image.affine, dtype=np.float64)
    lengths = np.linalg.norm(file_affine[:3, :3], axis=0)
    usable = np.isfinite(file_affine).all() and lengths.all()
    usable = usable and abs(np.linalg.det(file_affine[:3, :3] / lengths)) > 1e-6  # whatever the unit
    for wrong, message in (
        (len(shape) != 3, f"{len(shape)}-D with shape {shape}; one 3-D scan a file is needed. "
                          "Split the time points or channels into files first"),
        (0 in shape, f"has no voxels (shape {shape})"),
        (dtype.fields, "an RGB picture stored as NIfTI, not a scan; export grey values instead"),
        (dtype.kind == "c", f"complex values ({dtype}); export the magnitude image instead"),
        (not usable, f"its affine is not usable (not finite, or an axis of length zero): {file_affine}"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(f"{path}: {message}")
    mm = MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    affine = np.diag([mm, mm, mm, 1.0]) @ file_affine
    if image.header["sform_code"] > 0 and image.header["qform_code"] > 0:
        try:
            off_mm = mm * _off_mm(image.get_sform(), image.get_qform(), shape)
        except ValueError:  # the qform is no rotation
            off_mm = np.inf
        if off_mm > FORM_TOLERANCE_MM:
            warnings.warn(f"{path}: sform and qform {off_mm:.3g} mm apart; the sform is used", stacklevel=2)

    to_ras = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(to_ras, shape)
    shape_zyx = tuple(np.array(shape)[np.argsort(to_ras[:, 0])][::-1].tolist())
    spacing_mm = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())
    orientation, header = "".join(nib.orientations.ornt2axcodes(to_ras)), image.header.copy()
    return NiftiFile(shape_zyx, spacing_mm, affine, path, header, file_affine, orientation, image.dataobj)


def load_nifti(path: str | Path) -> Scan:
    """Read one scan as (z, y, x) RAS+.

    Integer files with whole-number slope and intercept stay integers (int16 for CT); others become float32.
    NaN and infinity are replaced by the smallest finite value, with a warning that counts them.

    Raises as `open_nifti`, and ValueError if the file is truncated or holds no finite value.
    """
    file = open_nifti(path)
    array = _scaled(file._read((0, 0, 0), file.shape), file.stored, by_value=True)
    array = _without_nan(array, lambda: _lowest([array], file.path))
    return Scan(**file.__dict__, array=array)


def to_ras(array: np.ndarray, scan: NiftiFile) -> np.ndarray:
    """(x, y, z) in the axes of the scan's file -> (z, y, x) RAS+, as `Scan.array`."""
    import nibabel as nib

    orientation = nib.orientations.axcodes2ornt(scan.orientation)
    return nib.orientations.apply_orientation(array, orientation).transpose(2, 1, 0)


def _from_ras(orientation: str) -> np.ndarray:
    from nibabel.orientations import axcodes2ornt, ornt_transform

    return ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))


def load_label(path: str | Path) -> Scan:
    """Read a label map like `load_nifti`, as uint8 or uint16.

    Values that a float file stores a little off (0.99999997) are rounded.

    Raises as `load_nifti`, and ValueError if a value is negative or not within 0.001 of a whole number.
    """
    scan = load_nifti(path)
    array = scan.array
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        off = np.abs(array - rounded)
        if off.max() > LABEL_TOLERANCE:
            raise ValueError(
                f"{path}: label value {array.flat[off.argmax()]:g} is no whole number; this looks like an "
                "image or a mask that was resampled with interpolation. Use the original label file"
            )
        array = rounded
    if array.min() < 0 or array.max() > 65535:
        raise ValueError(f"{path}: label values {array.min():g}..{array.max():g}, expected 0..65535")
    return replace(scan, array=array.astype(np.uint8 if array.max() < 256 else np.uint16))


def same_grid(a: NiftiFile, b: NiftiFile, tolerance_mm: float = 1e-2) -> bool:
    """Whether two scans share shape and, to `tolerance_mm` at every corner of the grid, position in space."""
    return a.shape == b.shape and _off_mm(a.affine, b.affine, a.shape[::-1]) <= tolerance_mm


def save_label(path: str | Path, labels: np.ndarray, like: NiftiFile) -> None:
    """Write a label map on the grid of the file that `like` came from: same axes, affine, form codes, units.

    Stored as uint8 (uint16 above 255) with slope 1, under a temporary name that is then renamed.

    Args:
        labels: (z, y, x) RAS+, whole numbers in 0..65535, shape of `like`.

    Raises:
        ValueError: another shape than the scan's, or values that are no labels.
    """
    import nibabel as nib

    if labels.shape != like.shape:
        raise ValueError(f"{path}: labels {labels.shape} do not fit the scan's grid {like.shape}")
    low, high = labels.min(), labels.max()
    if not (low >= 0 and high <= 65535) or (labels.dtype.kind == "f" and (labels % 1).any()):
        raise ValueError(f"{path}: label values {low:g}..{high:g}, expected whole numbers in 0..65535")
    labels = labels.astype(np.uint8 if high < 256 else np.uint16)
    array = nib.orientations.apply_orientation(labels.transpose(2, 1, 0), _from_ras(like.orientation))
    header = like.header.copy()
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(array.shape)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # No affine: the header holds both forms and their codes, and stays bit for bit as it was.
    _write(image_class(array, None, header), Path(path))


def write_nifti(
    path: str | Path, array: np.ndarray, spacing_mm: Sequence[float], *,
    origin_mm: Sequence[float] = (0.0, 0.0, 0.0), orientation: str = "RAS",
) -> None:  # fmt: skip
    """Write a new scan, (z, y, x) RAS+, that has no file to be like (phantoms, tests).

    spacing_mm is z y x; origin_mm the position (x, y, z) of voxel [0, 0, 0] of `array`, in whatever axes
    `orientation` (axis codes, e.g. "LPS") lets the file store it.
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
    _write(image, Path(path))


def _open(path: Path):
    import nibabel as nib

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(64)
    gz, nii = (path.name.lower().endswith(suffix) for suffix in (".gz", ".nii"))
    for wrong, message in (
        (start.startswith(b"version https://git-lfs"),
         "a Git-LFS pointer, not the scan itself; run 'git lfs pull' where it came from"),
        (not start, "an empty file (0 bytes); fetch it again"),
        (gz and start[:4] in HEADER_STARTS, "named .gz but not compressed; rename it to .nii"),
        (nii and start[:2] == b"\x1f\x8b", "compressed but not named .gz; rename it to .nii.gz"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(f"{path}: {message}")
    try:
        image = nib.load(path)
    except (*UNREADABLE, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError) as error:
        raise ValueError(f"{path}: not a readable NIfTI file ({_first_line(error)})") from error
    if not isinstance(image, nib.Nifti1Image):  # NIfTI-2 is a subclass; an .hdr/.img pair is not
        raise ValueError(f"{path}: {type(image).__name__}, not a NIfTI file; convert it to .nii.gz")
    return image


def _off_mm(a: np.ndarray, b: np.ndarray, shape_xyz: Sequence[int]) -> float:
    """Largest coordinate difference of two affines at the corners of a grid."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape_xyz))])
    return float(np.abs(corners @ (a - b).T).max())


def _scaled(raw: np.ndarray, stored: Any, by_value: bool = False) -> np.ndarray:
    """Slope and intercept applied without a float64 copy; integers stay if their values, or type, allow."""
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    slope, intercept = float(stored.slope), float(stored.inter)
    if (slope, intercept) == (1.0, 0.0):
        return raw.astype(np.float32, copy=False) if raw.dtype.kind == "f" else raw
    if raw.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        limits = (raw.min(), raw.max()) if by_value else (np.iinfo(raw.dtype).min, np.iinfo(raw.dtype).max)
        low, high = sorted(int(v) * int(slope) + int(intercept) for v in limits)
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return (raw.astype(np.int64) * int(slope) + int(intercept)).astype(dtype)
    return raw.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _lowest(parts: Iterable[np.ndarray], path: Path) -> float:
    lowest, num_bad = np.inf, 0
    for part in parts:
        finite = np.isfinite(part)
        lowest = min(lowest, part.min(where=finite, initial=np.inf))
        num_bad += part.size - np.count_nonzero(finite)
    if lowest == np.inf:
        raise ValueError(f"{path}: holds no finite value")
    if num_bad:
        warnings.warn(f"{path}: {num_bad} NaN or infinite voxels set to {lowest:g}", stacklevel=5)
    return lowest


def _without_nan(array: np.ndarray, lowest: Callable[[], float]) -> np.ndarray:
    """NaN and infinity set to `lowest()`, which is asked for only where there are any."""
    if array.dtype.kind != "f" or (finite := np.isfinite(array)).all():
        return array
    return np.where(finite, array, np.float32(lowest()))


def _write(image, path: Path) -> None:
    import nibabel as nib

    partial = path.with_name(f".partial_{path.name}")  # nibabel chooses compression by the suffix
    try:
        nib.save(image, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
