"""NRRD files (.nrrd) as common/nifti.py reads them: header by pynrrd, voxels piece by piece.

The 2018 atrium challenge (LASC) and 3D Slicer store scans so: a header of text, an empty line, the voxels.
"""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.stored_values import Stored

# The format has several names for each type, such as "short", "short int" and "int16_t".
TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
# What turns coordinates of a named space into RAS+: most files are left-posterior-superior.
TO_RAS = {"left-posterior-superior": (-1, -1, 1), "right-anterior-superior": (1, 1, 1)}
TO_RAS |= {"left-anterior-superior": (-1, 1, 1)}
MM = {"mm", "millimeter", "millimeters", "", "???"}  # names of the unit, and of none
MOST_PLANES = 2**15 - 1  # along an axis: the mask becomes a NIfTI file, which cannot hold more
TO_RAS |= {"".join(word[0] for word in name.split("-")): signs for name, signs in TO_RAS.items()}


def is_nrrd(path: str | Path) -> bool:
    """Whether the name ends like an NRRD file's."""
    return Path(path).name.lower().endswith(".nrrd")


def read_nrrd_header(path: Path) -> tuple[tuple[int, ...], np.ndarray, Stored]:
    """(x, y, z) of the stored array, (4, 4) affine from its voxels to mm in RAS+, and how voxels are stored.

    A file without a named space is taken as left-posterior-superior.

    Raises:
        ValueError: damaged, not 3-D, without a place in space or one in another unit than mm, or voxels in
            another file, as text or in a compression other than gzip; ImportError: pynrrd is not installed.
    """
    with path.open("rb") as file:
        header, start = _header(path, file), file.tell()
    advice = "save it as one 3-D .nrrd with gzip compression, or as .nii.gz"
    encoding, space = header["encoding"].lower(), str(header.get("space", "left-posterior-superior")).lower()
    dtype = next((name for name, words in TYPES.items() if header["type"].lower() in words), None)
    directions, origin = header.get("space directions"), header.get("space origin", np.zeros(3))
    has_directions = directions is not None and np.shape(directions) == (3, 3)
    lengths = np.linalg.norm(directions, axis=1) if has_directions else np.zeros(3)
    shape, endian = tuple(map(int, header["sizes"])), str(header.get("endian", "little")).lower()
    units = header.get("space units", ["mm"])
    problems = {
        f"{header['dimension']}-D": header["dimension"] != 3 or len(shape) != 3,
        f"sizes {shape}": not all(0 < num <= MOST_PLANES for num in shape),
        f"byte order {endian}": endian not in ("little", "big"),
        f"voxels of type {header['type']}": dtype is None,
        f"voxels stored as {encoding}": encoding not in ("raw", "gzip", "gz"),
        "its voxels lie in another file": "data file" in header or "datafile" in header,
        "bytes are to be skipped": any(header.get(f"{unit} skip", 0) for unit in ("line", "byte")),
        f"space {space}": space not in TO_RAS,
        f"space units {' '.join(units)}": not set(units) <= MM,
        "no space directions of all axes": not (np.isfinite(lengths) & (lengths > 0)).all(),
        f"space origin {origin}": np.shape(origin) != (3,),
    }
    if reasons := [reason for reason, is_so in problems.items() if is_so]:
        raise ValueError(f"{path}: cannot be read ({', '.join(reasons)}); {advice}")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.transpose(directions), origin
    affine = np.diag([*TO_RAS[space], 1.0]) @ affine
    offset = start if encoding == "raw" else 0
    stored = Stored(offset, np.dtype(dtype).newbyteorder(endian), slope=1.0, inter=0.0)
    return shape, affine, stored


@contextmanager
def open_nrrd_voxels(path: Path) -> Iterator[BinaryIO]:
    """The stream of bytes in which `Stored.offset` of the header counts; it can only be read forwards."""
    with path.open("rb") as file:
        is_raw = _header(path, file)["encoding"].lower() == "raw"
        yield file if is_raw else gzip.GzipFile(fileobj=file)


def _header(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The fields of the header; the file is behind it afterwards."""
    try:
        import nrrd
    except ImportError as error:
        raise ImportError(f"{path}: .nrrd files need the package pynrrd; pip install pynrrd") from error
    try:
        header = nrrd.read_header(file)
        return {key: header[key] for key in ("type", "dimension", "sizes", "encoding")} | header
    except (nrrd.NRRDError, ValueError, KeyError, StopIteration, IndexError) as error:
        raise ValueError(f"{path}: not a readable NRRD file ({type(error).__name__}: {error})") from error
