"""Scans in formats that are not read: what they are, and what converts them to NIfTI."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from common.dicom_headers import DICOM_ENDINGS

SLICER = "3D Slicer or SimpleITK"
PAIR = "an .hdr/.img pair (Analyze or NIfTI)", "fslchfiletype NIFTI_GZ of FSL, or 3D Slicer"
PACKED = "NIfTI in a compression that is not read"
MOST_LISTED = 20_000  # files that are looked at for a hint
FORMATS = {  # ending: what it is, what converts it
    ".mha": ("MetaImage", SLICER),
    ".mhd": ("MetaImage", SLICER),
    ".hdr": PAIR,
    ".img": PAIR,
    ".hdr.gz": PAIR,
    ".img.gz": PAIR,
    ".nhdr": ("NRRD with its voxels in another file", SLICER),
    ".nii.bz2": (PACKED, "bunzip2 and gzip"),
    ".nii.xz": (PACKED, "unxz and gzip"),
    ".nii.zst": (PACKED, "unzstd and gzip"),
    ".mif": ("an image of MRtrix", "mrconvert of MRtrix"),
    ".mif.gz": ("an image of MRtrix", "mrconvert of MRtrix"),
    ".mnc": ("MINC", "mnc2nii of MINC"),
    ".head": ("an image of AFNI", "3dAFNItoNIFTI of AFNI"),
    ".brik": ("an image of AFNI", "3dAFNItoNIFTI of AFNI"),
    ".par": ("Philips PAR/REC", "dcm2niix"),
    ".gipl": ("GIPL", SLICER),
    ".vtk": ("VTK", SLICER),
    ".vti": ("VTK", SLICER),
    ".tif": ("TIFF, which tells no place in space", SLICER),
    ".tiff": ("TIFF, which tells no place in space", SLICER),
    ".mat": ("a file of MATLAB", "niftiwrite of MATLAB"),
} | dict.fromkeys(DICOM_ENDINGS, ("DICOM", "dcm2niix (pip install dcm2niix)"))


def foreign_ending(path: Path) -> str:
    """The ending of FORMATS that the name has, in lower case; "" if it has none."""
    name = path.name.lower()
    return next((ending for ending in FORMATS if name.endswith(ending)), "")


def why_foreign(path: Path) -> str:
    """A sentence that names the format of a file and what converts it; "" if it is none of FORMATS."""
    if not (ending := foreign_ending(path)):
        return ""
    what, program = FORMATS[ending]
    return f"{path}: {what}, which is not read; convert it to .nii.gz, such as with {program}"


def foreign_files(paths: Iterable[Path]) -> str:
    """How many files of which such formats there are and what converts them; "" if there are none."""
    count = Counter(filter(None, map(foreign_ending, paths)))
    formats = {}  # {(what, program): ["2 .hdr", "2 .img"]}: files of a pair are told together
    for ending, number in count.most_common():
        formats.setdefault(FORMATS[ending], []).append(f"{number} {ending}")
    parts = [
        f"{' and '.join(numbers)} file(s) ({what}), to be converted to .nii.gz, such as with {program}"
        for (what, program), numbers in formats.items()
    ]
    return "; ".join(parts)


def foreign_hint(folder: str | Path) -> str:
    """`foreign_files` of a folder and those below it, to be put behind a message that nothing was found."""
    if found := foreign_files(itertools.islice(Path(folder).rglob("[!.]*"), MOST_LISTED)):
        return f". There are {found}"
    return ""
