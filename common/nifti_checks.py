"""Why a file cannot be used as a scan or a label map, found out before it does harm."""

import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.foreign import why_foreign
from common.nifti_forms import by

HEADER_STARTS = {n.to_bytes(4, order) for n in (348, 540) for order in ("little", "big")}  # NIfTI-1 and 2
MGH_BYTES = {0: 1, 1: 4, 3: 4, 4: 2}  # of a voxel, by FreeSurfer's code of its type
HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
# How many bytes a byte of a file can hold: deflate packs no more than 1032 into one.
MOST_OF_A_BYTE = {".nii": 1, ".mgh": 1, ".gz": 1032, ".mgz": 1032, ".nrrd": 1032}
FORM_CODES = range(1, 6)  # of an sform or qform that is set
QUATERNION_TOLERANCE = 1e-3  # of its square, above 1: writers round it differently
MOST_BYTES = 2**50  # of a file
MOST_BEHIND = 2**26  # bytes behind the last voxel that are read
ALWAYS_FREE = 2**27  # bytes: less is not worth asking the system
LABEL_TOLERANCE = 1e-3  # a label stored as float may be off by this much, as in 2.9999999993 for 3


def check_file(path: Path) -> None:
    """Refuse what is recognised without reading the header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, an empty file, a Git-LFS pointer, or a name that does not tell whether it
            is compressed.
    """
    if not path.is_file():
        reason = (
            "a link that leads nowhere; fetch what it stands for" if path.is_symlink() else "no such file"
        )
        raise FileNotFoundError(f"{path}: {reason}")
    if reason := why_foreign(path):
        raise ValueError(reason)
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


def check_header(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse what is not a 3-D scan of real numbers.

    Args:
        shape: of the stored array.

    Raises:
        ValueError: not 3-D, without a voxel, RGB or complex.
    """
    if len(shape) != 3:
        raise ValueError(
            f"{path}: {len(shape)}-D with shape {shape}; each file must hold one 3-D scan. Split the time "
            "points or channels into files first"
        )
    if min(shape) < 1:
        raise ValueError(f"{path}: has no voxels (shape {shape})")
    if dtype.fields:
        raise ValueError(f"{path}: an RGB picture stored as NIfTI, not a scan; export grey values instead")
    if dtype.kind == "c":
        raise ValueError(f"{path}: complex values ({dtype}); export the magnitude image instead")


# ---- the header as it is stored ----


def check_stored(path: Path) -> None:
    """Refuse a header with numbers that nibabel takes for others, or stumbles over.

    Raises:
        ValueError: impossible dimensions, voxels inside the header or nowhere, or a voxel size of zero where
            nothing else tells it. What cannot be read at all is left to nibabel.
    """
    import nibabel as nib

    try:
        with nib.openers.ImageOpener(path) as file:
            start = file.read(HEADER_BYTES)
    except (OSError, EOFError, zlib.error):
        return
    if path.name.lower().endswith((".mgz", ".mgh")):
        _check_freesurfer(path, start)
    found = [kind for kind in (nib.Nifti1Header, nib.Nifti2Header) if kind.may_contain_header(start)]
    if not found or not path.name.lower().endswith((".nii", ".nii.gz")):
        return
    header = found[0](start[: found[0].sizeof_hdr], check=False)  # without nibabel's repairs
    num_axes, *sizes = header["dim"].tolist()
    if not 0 <= num_axes <= 7:
        raise ValueError(f"{path}: its header is damaged (not 1 to 7 dimensions); fetch it again")
    sizes = sizes[:num_axes]
    if any(size < 0 for size in sizes):
        raise ValueError(f"{path}: its header gives {sizes} voxels (x y z); fetch it again or correct it")
    first, offset = header.single_vox_offset, float(header["vox_offset"])
    if not first <= offset < MOST_BYTES:  # NaN too
        raise ValueError(
            f"{path}: its header says that the voxels begin at byte {offset:g}, but they cannot begin before "
            f"byte {first}; export it again, or set vox_offset to {first} if no extension is in it"
        )
    if int(header["sform_code"]) not in FORM_CODES:
        length2 = sum(float(header[f"quatern_{letter}"]) ** 2 for letter in "bcd")
        if int(header["qform_code"]) in FORM_CODES and not length2 <= 1 + QUATERNION_TOLERANCE:
            raise ValueError(
                f"{path}: its qform is no rotation (its quaternion has length {length2**0.5:.4g}, at most 1 "
                "is possible), and no sform tells its place; export the scan again"
            )
        sides = header["pixdim"][1:4].tolist()
        if any(n > 1 and not (mm and np.isfinite(mm)) for n, mm in zip(sizes, sides, strict=False)):
            raise ValueError(
                f"{path}: voxels of {by(sides)} mm (x y z) in its header, and no sform that tells "
                "their size; enter it, or export the scan again"
            )


def _check_freesurfer(path: Path, start: bytes) -> None:
    """`check_stored` of an .mgz or .mgh file that begins with `start`."""
    if len(start) < 30 or struct.unpack(">i", start[:4])[0] != 1:  # its version
        return
    *sizes, kind = struct.unpack(">5i", start[4:24])
    if min(sizes) < 1:
        raise ValueError(f"{path}: its header gives {sizes} voxels (x y z frames); fetch it again")
    _check_length(path, math.prod(sizes) * MGH_BYTES.get(kind, 1), sizes[2::-1])
    if start[28:30] == b"\0\0":  # goodRASFlag
        warnings.warn(
            f"{path}: its header tells no place in space, so its orientation and voxels of 1 mm are a guess",
            stacklevel=4,
        )


# ---- the voxels ----


def check_length(file: Any) -> None:
    """Refuse a header that promises more than its file can hold.

    Args:
        file: a NiftiFile.

    Raises:
        ValueError: the file is too short.
    """
    end = file.stored.offset + math.prod(file.shape) * file.stored.dtype.itemsize
    _check_length(file.path, end, file.shape)


def _check_length(path: Path, end: int, shape: Sequence[int]) -> None:
    num_bytes = path.stat().st_size
    if end > num_bytes * MOST_OF_A_BYTE.get(path.suffix.lower(), np.inf):
        raise ValueError(
            f"{path}: truncated or damaged ({num_bytes:,} bytes cannot hold the {by(shape)} voxels of "
            "its header); fetch it again"
        )


def check_room(file: Any, start: Sequence[int], stop: Sequence[int]) -> None:
    """Refuse a box that the file cannot hold, or the memory, before it is tried.

    Args:
        file: a NiftiFile.
        start, stop: of the box, z y x.

    Raises:
        ValueError: as `check_length`, for the whole scan; or the box is larger than the free memory.
    """
    size = [int(b) - int(a) for a, b in zip(start, stop, strict=True)]
    if size == list(file.shape):
        check_length(file)
    check_memory(
        f"{file.path}: reading {by(size)} voxels",
        math.prod(size) * file.stored.dtype.itemsize,
        "cut the scan to the part that matters, or use a machine with more memory",
    )


def check_end(file: Any, stream: Any, plane_bytes: int) -> None:
    """Read on behind the last voxel, as gzip compares its checksum only at the end; warn of voxels there.

    Args:
        file: a NiftiFile.
        stream: the open file, read up to the last voxel.
        plane_bytes: of a plane of voxels.

    Raises:
        EOFError, OSError, zlib.error: the file is damaged.
    """
    path, more = file.path, 0
    name = path.name.lower()
    # Behind a volume of a 4-D file others may follow, and FreeSurfer puts notes there.
    is_all = math.prod(file.header.get_data_shape()) == math.prod(file.shape)
    if MOST_OF_A_BYTE.get(path.suffix.lower()) != 1:
        while num := len(stream.read(2**20)):
            more += num
            if is_all and more > MOST_BEHIND:
                break
    else:
        more = path.stat().st_size - stream.tell()
    if is_all and more >= plane_bytes and not name.endswith((".mgz", ".mgh")):
        warnings.warn(
            f"{path}: {more:,} bytes follow behind the last voxel; are the dimensions in its header too "
            "small?",
            stacklevel=4,
        )


def check_memory(what: str, need_bytes: float, advice: str) -> None:
    """Refuse what needs more memory than is free, before it is tried.

    Args:
        what: names the file and what is done to it, as the beginning of the message.
        advice: what the user of this script can do about it.

    Raises:
        ValueError: not enough.
    """
    if need_bytes < ALWAYS_FREE:
        return
    from common.hardware import cores_and_ram_gib  # needs torch, which this module does not

    free_gib = cores_and_ram_gib()[2]
    if need_bytes / 2**30 > free_gib:
        raise ValueError(
            f"{what} takes {need_bytes / 2**30:.1f} GiB of memory, but {free_gib:.1f} GiB are free; {advice}"
        )


# ---- labels ----


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
