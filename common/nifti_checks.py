"""Why a file cannot be used as a scan or a label map, found out before it does harm."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER_STARTS = {n.to_bytes(4, order) for n in (348, 540) for order in ("little", "big")}  # NIfTI-1 and 2
FORM_TOLERANCE_MM = 1.0  # sform and qform may differ by this much at a corner without a warning
LABEL_TOLERANCE = 1e-3  # a label stored as float may be off by this much, as in 2.9999999993 for 3


def check_file(path: Path) -> None:
    """Refuse what is recognised without reading the header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, a Git-LFS pointer, or a name that does not tell whether it is compressed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(64)
    name = path.name.lower()
    if not start:
        raise ValueError(f"{path}: an empty file (0 bytes); fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git-LFS pointer, not the scan; run 'git lfs pull' where it came from")
    if name.endswith(".gz") and start[:4] in HEADER_STARTS:
        raise ValueError(f"{path}: named .gz but not compressed; rename it to .nii")
    if name.endswith(".nii") and start[:2] == b"\x1f\x8b":
        raise ValueError(f"{path}: compressed but not named .gz; rename it to .nii.gz")
    if name.endswith(".mgz") and start[:2] != b"\x1f\x8b":
        raise ValueError(f"{path}: named .mgz but not compressed; rename it to .mgh if it is FreeSurfer's")
    if name.endswith(".mgh") and start[:2] == b"\x1f\x8b":
        raise ValueError(f"{path}: compressed but named .mgh; rename it to .mgz")


def check_header(path: Path, shape: tuple[int, ...], dtype: np.dtype, affine: np.ndarray) -> None:
    """Refuse what is not a 3-D scan of real numbers with a place in space.

    Args:
        shape: of the stored array.
        affine: (4, 4), in whatever unit.

    Raises:
        ValueError: not 3-D, without a voxel, RGB, complex, or with an unusable affine.
    """
    if len(shape) != 3:
        raise ValueError(
            f"{path}: {len(shape)}-D with shape {shape}; each file must hold one 3-D scan. Split the time "
            "points or channels into files first"
        )
    if 0 in shape:
        raise ValueError(f"{path}: has no voxels (shape {shape})")
    if dtype.fields:
        raise ValueError(f"{path}: an RGB picture stored as NIfTI, not a scan; export grey values instead")
    if dtype.kind == "c":
        raise ValueError(f"{path}: complex values ({dtype}); export the magnitude image instead")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    usable = np.isfinite(affine).all() and lengths.all()
    if not usable or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise ValueError(
            f"{path}: its affine is not usable (not finite, flat, or an axis of length zero): {affine}"
        )


def check_forms(path: Path, image: Any, shape: tuple[int, ...], mm: float) -> None:
    """Warn if the two affines of a NIfTI file, sform and qform, disagree by over FORM_TOLERANCE_MM.

    Args:
        image: nibabel's.
        shape: x y z.
        mm: length of the file's unit.
    """
    if image.header["sform_code"] > 0 and image.header["qform_code"] > 0:
        try:
            apart_mm = mm * off_mm(image.get_sform(), image.get_qform(), shape)
        except ValueError:  # the qform is not a rotation
            apart_mm = np.inf
        if apart_mm > FORM_TOLERANCE_MM:
            warnings.warn(f"{path}: sform and qform {apart_mm:.3g} mm apart; the sform is used", stacklevel=3)


def as_labels(array: np.ndarray, path: str | Path) -> np.ndarray:
    """Label values as uint8 where all of them fit, else uint16.

    Raises:
        ValueError: values that are not whole, negative, or above 65535.
    """
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 65535) or (array.dtype.kind == "f" and (array % 1).any()):
        raise ValueError(f"{path}: label values {low:g}..{high:g}, expected whole numbers in 0..65535")
    return array.astype(np.uint8 if high < 256 else np.uint16)


def rounded_labels(array: np.ndarray, path: str | Path) -> np.ndarray:
    """As `as_labels`, but values up to 0.001 beside a whole number are rounded to it, as floats store them.

    Raises:
        ValueError: as `as_labels`; values farther from a whole number.
    """
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        off = np.abs(array - rounded)
        if off.max() > LABEL_TOLERANCE:
            raise ValueError(
                f"{path}: label value {array.flat[off.argmax()]:g} is not a whole number; this looks like an "
                "image or a mask that was resampled with interpolation. Use the original label file"
            )
        array = rounded
    return as_labels(array, path)


def off_mm(a: np.ndarray, b: np.ndarray, shape_xyz: Sequence[int]) -> float:
    """Largest difference in a coordinate, mm, of two (4, 4) affines at the corners of a grid."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape_xyz))])
    return float(np.abs(corners @ (a - b).T).max())
