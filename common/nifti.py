"""NIfTI in and out: the only file that knows NIfTI's axis order (x, y, z), affines and nibabel.

Everywhere else a volume is `(z, y, x)` in RAS+: z grows upwards, y to the front, x to the patient's right.
"""

import os
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NIFTI_SUFFIXES = (".nii.gz", ".nii")
HEADER_STARTS = {n.to_bytes(4, order) for n in (348, 540) for order in ("little", "big")}  # NIfTI-1 and 2
UNREADABLE = (EOFError, zlib.error, OSError, ValueError)  # what nibabel raises for damaged files
LABEL_TOLERANCE = 1e-3  # a label stored as float may be off by this much, e.g. 2.9999999993 for 3


@dataclass(frozen=True)
class Scan:
    """One 3-D volume and what is needed to write a mask back onto its own grid.

    Attributes:
        array: (z, y, x), RAS+. Integers stay integers when the file's scaling allows it, else float32.
        spacing_mm: voxel size, z y x.
        affine: (4, 4) float64, voxel (x, y, z) of the RAS+ array to mm.
        path: where it came from.
        header: nibabel header of the file (units, form codes); only this module looks inside.
        file_affine: (4, 4) affine as stored in the file.
        orientation: axis codes of the file, e.g. "LPS".
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    path: Path
    header: Any
    file_affine: np.ndarray
    orientation: str

    @property
    def file_shape(self) -> tuple[int, int, int]:
        """(x, y, z) of the array in the file's axes."""
        x, y, z = (*self.header.get_data_shape(), 1)[:3]  # a 2-D file has one slice
        return x, y, z

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel in mm^3; right for sheared affines too."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))


def is_nifti(path: str | Path) -> bool:
    """Whether the name ends as NIfTI files do and is no macOS resource file (`._name`)."""
    name = Path(path).name
    return name.lower().endswith(NIFTI_SUFFIXES) and not name.startswith(".")


def case_name(path: str | Path) -> str:
    """File name without .nii or .nii.gz."""
    name = Path(path).name
    for suffix in NIFTI_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return Path(path).stem


def load_nifti(path: str | Path) -> Scan:
    """Read one scan as (z, y, x) RAS+.

    Integer files with whole-number slope and intercept stay integers (int16 for CT); others become float32.
    NaN and infinity are replaced by the smallest finite value, with a warning that counts them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NIfTI, truncated, a Git-LFS pointer, 4-D, RGB, complex, or with an unusable affine.
    """
    import nibabel as nib

    path = Path(path)
    image = _open(path)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:  # a trailing singleton is how some tools write 3-D
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3:
        raise ValueError(
            f"{path}: {len(shape)}-D with shape {tuple(shape)}; one 3-D scan a file is needed. "
            "Split the time points or channels into files first"
        )
    if 0 in shape:
        raise ValueError(f"{path}: has no voxels (shape {tuple(shape)})")
    dtype = image.get_data_dtype()
    if dtype.fields is not None:
        raise ValueError(f"{path}: an RGB picture stored as NIfTI, not a scan; export grey values instead")
    if dtype.kind == "c":
        raise ValueError(f"{path}: complex values ({dtype}); export the magnitude image instead")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(
            f"{path}: its affine is not usable (not finite, or an axis of length zero): {affine}"
        )

    array = _finite(_read_values(image, path).reshape(shape), path)
    to_ras = nib.io_orientation(affine)
    array = nib.orientations.apply_orientation(array, to_ras)
    ras_affine = affine @ nib.orientations.inv_ornt_aff(to_ras, shape)
    spacing_xyz = np.sqrt((ras_affine[:3, :3] ** 2).sum(axis=0))
    return Scan(
        array=np.ascontiguousarray(array.transpose(2, 1, 0)),
        spacing_mm=tuple(float(s) for s in spacing_xyz[::-1]),
        affine=ras_affine,
        path=path,
        header=image.header.copy(),
        file_affine=affine,
        orientation="".join(nib.orientations.ornt2axcodes(to_ras)),
    )


def to_ras(array: np.ndarray, scan: Scan) -> np.ndarray:
    """(x, y, z) in the axes of the scan's file -> (z, y, x) RAS+, as `scan.array`."""
    import nibabel as nib

    orientation = nib.orientations.axcodes2ornt(scan.orientation)
    return nib.orientations.apply_orientation(array, orientation).transpose(2, 1, 0)


def load_label(path: str | Path) -> Scan:
    """Read a label map like `load_nifti`, as uint8 or uint16.

    Values that a float file stores a little off (0.99999997) are rounded.

    Raises:
        ValueError: as `load_nifti`, and if a value is negative or not within 0.001 of a whole number.
    """
    scan = load_nifti(path)
    array = scan.array
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        worst = float(np.abs(array - rounded).max())
        if worst > LABEL_TOLERANCE:
            example = float(array.flat[np.abs(array - rounded).argmax()])
            raise ValueError(
                f"{path}: label value {example:g} is no whole number; this looks like an image or a mask "
                "that was resampled with interpolation. Use the original label file"
            )
        array = rounded
    if array.min() < 0 or array.max() > 65535:
        raise ValueError(f"{path}: label values {array.min():g}..{array.max():g}, expected 0..65535")
    array = array.astype(np.uint8 if array.max() < 256 else np.uint16)
    return Scan(**{**scan.__dict__, "array": array})


def same_grid(a: Scan, b: Scan, tolerance_mm: float = 1e-2) -> bool:
    """Whether two scans share shape and, to `tolerance_mm` at every corner of the grid, position in space."""
    if a.array.shape != b.array.shape:
        return False
    z, y, x = a.array.shape
    corners = np.array([[i, j, k, 1] for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)], float)
    return bool(np.abs(corners @ (a.affine - b.affine).T).max() <= tolerance_mm)


def save_label(path: str | Path, labels: np.ndarray, like: Scan) -> None:
    """Write a label map on the grid of the file that `like` came from: same axes, affine, form codes, units.

    Args:
        labels: (z, y, x) RAS+, whole numbers in 0..65535, shape of `like.array`.
        like: the scan that was segmented.

    The file is written under a temporary name and renamed. Stored as uint8 (uint16 above 255), slope 1.

    Raises:
        ValueError: another shape than the scan's, or values that are no labels.
    """
    import nibabel as nib

    if labels.shape != like.array.shape:
        raise ValueError(f"{path}: labels {labels.shape} do not fit the scan's grid {like.array.shape}")
    low, high = labels.min(), labels.max()
    if not (low >= 0 and high <= 65535) or (labels.dtype.kind == "f" and (labels % 1).any()):
        raise ValueError(f"{path}: label values {low:g}..{high:g}, expected whole numbers in 0..65535")
    labels = labels.astype(np.uint8 if high < 256 else np.uint16)
    from_ras = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(like.orientation)
    )
    array = nib.orientations.apply_orientation(labels.transpose(2, 1, 0), from_ras)
    header = like.header.copy()
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(array.shape)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # No affine: the header holds both forms and their codes, and stays bit for bit as it was.
    _write(image_class(array, None, header), Path(path))


def write_nifti(
    path: str | Path,
    array: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    orientation: str = "RAS",
) -> None:
    """Write a new scan that has no file to be like (phantoms, tests).

    Args:
        array: (z, y, x) RAS+.
        spacing_mm: z y x.
        origin_mm: position (x, y, z) of voxel [0, 0, 0] of `array`.
        orientation: axis codes in which the file stores it, e.g. "LPS"; the place in space is the same.
    """
    import nibabel as nib

    affine = np.diag([*spacing_mm[::-1], 1.0])
    affine[:3, 3] = origin_mm
    from_ras = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
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
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a Git-LFS pointer, not the scan itself; run 'git lfs pull' where it came from"
        )
    if not start:
        raise ValueError(f"{path}: an empty file (0 bytes); fetch it again")
    if path.name.lower().endswith(".gz") and start[:4] in HEADER_STARTS:
        raise ValueError(f"{path}: named .gz but not compressed; rename it to .nii")
    if start.startswith(b"\x1f\x8b") and path.name.lower().endswith(".nii"):
        raise ValueError(f"{path}: compressed but not named .gz; rename it to .nii.gz")
    try:
        image = nib.load(path)
    except (*UNREADABLE, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError) as error:
        raise ValueError(f"{path}: not a readable NIfTI file ({_first_line(error)})") from error
    if not isinstance(image, nib.Nifti1Image):  # NIfTI-2 is a subclass; an .hdr/.img pair is not
        raise ValueError(f"{path}: {type(image).__name__}, not a NIfTI file; convert it to .nii.gz")
    return image


def _read_values(image, path: Path) -> np.ndarray:
    """Stored values with slope and intercept applied, native byte order, without a float64 copy."""
    try:
        raw = np.asarray(image.dataobj.get_unscaled())
    except UNREADABLE as error:
        raise ValueError(f"{path}: truncated or damaged ({_first_line(error)}); fetch it again") from error
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    if (slope, intercept) == (1.0, 0.0):
        return (
            raw.astype(np.float32, copy=False) if raw.dtype.kind == "f" and raw.dtype != np.float32 else raw
        )
    if raw.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        low, high = sorted((int(raw.min()) * int(slope), int(raw.max()) * int(slope)))
        low, high = low + int(intercept), high + int(intercept)
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return (raw.astype(np.int64) * int(slope) + int(intercept)).astype(dtype)
    return raw.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _finite(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind != "f":
        return array
    finite = np.isfinite(array)
    if finite.all():
        return array
    if not finite.any():
        raise ValueError(f"{path}: holds no finite value")
    lowest = array[finite].min()
    warnings.warn(f"{path}: {int((~finite).sum())} NaN or infinite voxels set to {lowest:g}", stacklevel=3)
    return np.where(finite, array, lowest)


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
