"""Which series lie in a folder of DICOM files, which of them can be a volume, and how they are called."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.conversion import failure_reason
from common.dicom_headers import DICOM_ENDINGS, Header, read_dicom_header
from common.files import visible_files
from common.foreign import FORMATS
from common.nifti import NIFTI_SUFFIXES
from common.splits import natural_key

LEAST_SLICES = 3  # of a volume; two are the side and front view of a localiser
LONGEST_NAME = 120  # bytes; a file system takes 255, with what the scripts append
FORBIDDEN = '/\\:*?"<>|'  # letters that some systems do not allow in names of files
WANTED = ("CT", "MR", "")  # kinds of scan that can be segmented; "" is not told
PICTURE, DIRECTORY = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.1.3.10"  # kinds: of the screen, DICOMDIR
# Endings of what can lie beside DICOM files, which have .dcm, .ima, none, or anything.
OTHERS = (*NIFTI_SUFFIXES, *(ending for ending in FORMATS if ending not in DICOM_ENDINGS))
OTHERS += (".json", ".csv", ".tsv", ".txt", ".md", ".py", ".yaml", ".yml", ".xml", ".html", ".pdf", ".zip")
OTHERS += (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".gz", ".tar", ".npy", ".npz", ".h5", ".pt", ".pth")


class Series(NamedTuple):
    """Images that belong together, in the natural order of their files.

    Attributes:
        name: of the scan that they become, from the folder and the series' number.
        files, headers: of each image.
    """

    name: str
    files: list[Path]
    headers: list[Header]

    @property
    def described(self) -> str:
        """Folder and number, as a user can find it."""
        number = self.headers[0].number
        return f"{common_folder(self.files)}{f', series {number}' if number else ''}"


def find_series(source: Path, out: Path, in_subfolders: bool) -> tuple[list[Series], dict[Path, str]]:
    """The series of a folder, or that of a file, in natural order of their names; {damaged file: reason}.

    Args:
        out: folder of results, of which nothing is taken.
        in_subfolders: look into subfolders as well.
    """
    damaged: dict[Path, str] = {}
    of_series: dict[tuple[str, str], list[tuple[Path, Header]]] = {}
    only, root = None, source
    if source.is_file():
        header = read_dicom_header(source)
        if header is None:
            return [], {}
        only, root, in_subfolders = header.series, source.parent, False
    candidates = visible_files(root, out, in_subfolders)
    for path, is_in_out in sorted(candidates, key=lambda pair: natural_key(str(pair[0]))):
        if is_in_out or path.name.lower().endswith(OTHERS):
            continue
        try:
            header = read_dicom_header(path)
        except (ValueError, OSError) as error:
            damaged[path] = failure_reason(error)
            continue
        if header is not None and header.kind != DIRECTORY and only in (None, header.series):
            whose = (header.series or str(path.parent), header.patient)
            of_series.setdefault(whose, []).append((path, header))
    found, names = [], set()
    for images in of_series.values():
        files, headers = [path for path, _ in images], [header for _, header in images]
        name = plain = _name(root, common_folder(files), headers[0].number)
        copy = 2
        while name.lower() in names:
            name, copy = f"{plain}_{copy}", copy + 1
        names.add(name.lower())
        found.append(Series(name, files, headers))
    found.sort(key=lambda series: natural_key(series.name))
    return found, {} if only is not None else damaged


def _name(root: Path, folder: Path, number: str) -> str:
    """Name of a scan: the folders below `root`, or that itself, and the number of the series."""
    parts = folder.relative_to(root).parts or (root.resolve().name,)
    whole = "_".join([*parts, *number.split()])
    name = whole.encode(errors="replace")[-LONGEST_NAME:].decode(errors="ignore")
    cleaned = ("_" if letter in FORBIDDEN or letter.isspace() else letter for letter in name)
    return "".join(cleaned).lstrip(".")


def common_folder(files: Sequence[Path]) -> Path:
    """The folder that all files lie in or below."""
    first, *others = {path.parent for path in files}
    while not all(first == other or first in other.parents for other in others):
        first = first.parent
    return first


def why_no_volume(headers: Sequence[Header]) -> str:
    """Why the images of a series cannot be a volume; "" if they can."""
    first, num_images = headers[0], sum(header.frames for header in headers)
    modality, count = first.modality.upper(), f"{num_images} image(s)"
    if modality not in WANTED:
        return f"{modality}, neither CT nor MR"
    if all(not header.rows for header in headers):
        return "holds no image"
    if "LOCALIZER" in first.image_type.upper() or "SCOUT" in first.image_type.upper():
        return f"a localiser, {count}"
    if first.samples > 1:
        return f"colour pictures, {count}"
    if first.kind.startswith(PICTURE) and not first.position:
        return f"pictures of a screen, {count}"
    if num_images < LEAST_SLICES:
        return f"{count}, where a volume has {LEAST_SLICES} or more"
    if first.frames == 1 and not first.position:
        return f"{count} without a place in space"
    return ""
