"""NIfTI in and out: the only file that knows NIfTI's axis order (x, y, z), affines and nibabel.

FreeSurfer's .mgz and .mgh, and .nrrd, are read as if they were NIfTI; masks of them are written as NIfTI.
Everywhere else a volume is `(z, y, x)` in RAS+: z grows upwards, y to the front, x to the patient's right.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common import nifti_checks as checks
from common.faults import first_line
from common.files import replacing
from common.nifti_checks import as_labels, rounded_labels
from common.nifti_forms import GRID_TOLERANCE_MM, choose_affine, grid_difference, unit_mm
from common.nrrd import is_nrrd, read_nrrd_header
from common.scan_files import UNREADABLE, NiftiFile, Scan
from common.stored_values import Stored, choose_channel, lowest_finite, scaled, without_nan

NIFTI_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh", ".nrrd")  # of what `open_nifti` reads


def is_nifti(path: str | Path) -> bool:
    """Whether the name ends like a scan's and does not begin with a dot, as macOS' resource files do."""
    name = Path(path).name
    return name.lower().endswith(NIFTI_SUFFIXES) and not name.startswith(".")


def case_name(path: str | Path) -> str:
    """File name without the ending of a scan, such as .nii.gz."""
    name = Path(path).name
    endings = [s for s in NIFTI_SUFFIXES if name.lower().endswith(s)]
    return name[: -len(endings[0])] if endings else Path(path).stem


def open_nifti(path: str | Path, channel: int | None = None) -> NiftiFile:
    """Read the header of a scan; its voxels are read by the methods of what is returned.

    An affine in m or um is converted to mm. Of an sform and a qform the sform counts, unless only the other
    one is usable; see `choose_affine`, which warns where they differ or where the orientation is a guess.

    Args:
        channel: which 3-D volume of a 4-D file, from 0 on; a 3-D file has only the channel 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not NIfTI, .mgz or .nrrd, a Git-LFS pointer, 4-D without `channel`, RGB, complex, without
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
    checks.check_header(path, shape, image.get_data_dtype())
    mm = unit_mm(path, image.header)
    file_affine = choose_affine(path, image, shape, mm)
    affine = np.diag([mm, mm, mm, 1.0]) @ file_affine
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


def same_grid(a: NiftiFile, b: NiftiFile, tolerance_mm: float = GRID_TOLERANCE_MM) -> bool:
    """Whether two scans have one shape, and every corner of their grids is at one place to `tolerance_mm`."""
    return not grid_difference(a, b, tolerance_mm)


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
    array = array[:, :, 0] if len(header.get_data_shape()) == 2 else array
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

    checks.check_file(path)
    if is_nrrd(path):
        shape, affine, stored = read_nrrd_header(path)
        image = nib.Nifti1Image(np.broadcast_to(np.uint8(0), shape), affine)
        image.header.set_xyzt_units("mm")
        return image, stored
    checks.check_stored(path)
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # the checks say what matters
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        kind.quaternion_threshold = -checks.QUATERNION_TOLERANCE
    damaged = (*UNREADABLE, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError)
    damaged += (nib.freesurfer.mghformat.MGHError, KeyError, TypeError)  # of .mgz files
    try:
        image = nib.load(path)
        data = image.dataobj
        if isinstance(image, nib.MGHImage):
            image = nib.Nifti1Image(data, image.affine)
            image.header.set_xyzt_units("mm")
    except damaged as error:
        raise ValueError(f"{path}: not a readable NIfTI file ({first_line(error)})") from error
    if not isinstance(image, nib.Nifti1Image):  # NIfTI-2 is a subclass; an .hdr/.img pair is not
        raise ValueError(f"{path}: {type(image).__name__}, not a NIfTI file; convert it to .nii.gz")
    return image, Stored(int(data.offset), data.dtype, float(data.slope), float(data.inter))
