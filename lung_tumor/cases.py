"""Scans with tumour masks on disk, in the Decathlon or the Kaggle layout: find them, load them."""

import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from common.conversion import file_stamp
from common.decathlon import Case, find_decathlon, list_cases
from common.foreign import foreign_hint
from common.nifti import Scan, load_label, load_nifti, open_nifti, to_ras
from common.pairs import why_not_a_pair
from lung_tumor.kaggle import (
    KaggleCase,
    extract_image,
    find_task,
    is_kaggle_folder,
    list_kaggle_cases,
    load_ground_truth,
)

HEADER_BYTES = 2**16  # of a packed scan: more than its NIfTI header with extensions


def find_cases(source: str | Path, task: str = "Task006_Lung") -> list:
    """Cases of a folder in the Decathlon or the Kaggle layout.

    Raises:
        FileNotFoundError: no such folder, or neither layout.
        ValueError: a scan without label or the reverse.
    """
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"--source {source}: no such folder; see lung_tumor/download.py for the data")
    decathlon = find_decathlon(source)
    if decathlon is not None:
        return list_cases(decathlon)
    if is_kaggle_folder(source) or any(
        p.name.startswith("Task") for p in source.rglob("Task*") if p.is_dir()
    ):
        return list_kaggle_cases(find_task(source, task))
    raise FileNotFoundError(
        f"{source}: neither imagesTr/ and labelsTr/ (Decathlon) nor TaskXXX_Name/CT.zip (Kaggle) in it"
        f"{foreign_hint(source)}"
    )


def load_case(case: Case | KaggleCase) -> tuple[Scan, np.ndarray]:
    """(scan, mask): HU (z, y, x) RAS+ and 0/1 uint8 on the same grid; the label above 0 is tumour.

    Raises:
        ValueError: the two files do not fit, or one of them cannot be read; names the case.
    """
    if isinstance(case, Case):
        scan, label = load_nifti(case.image), load_label(case.label)
        if reason := why_not_a_pair(scan, label):
            raise ValueError(reason)
        return scan, tumour_mask(label.array, case.label)
    with tempfile.TemporaryDirectory(prefix="lung_tumor_") as temporary:
        scan = load_nifti(extract_image(case.label_path.parents[1], case, temporary))
    mask_xyz = load_ground_truth(case.label_path, scan.file_shape)
    return scan, tumour_mask(to_ras(mask_xyz, scan), case.label_path)


def tumour_mask(labels: np.ndarray, path: Path) -> np.ndarray:
    """Label map (z, y, x) -> 0/1 uint8.

    Raises:
        ValueError: it holds several labels, of which some may be the lung or to be ignored.
    """
    mask = labels > 0
    found = np.unique(labels[mask])
    if len(found) > 1:
        shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        raise ValueError(
            f"{path}: label values {shown} are several classes; make a mask of the tumour alone, 0 and 1 "
            "(several tumours are 1, too)"
        )
    return mask.astype(np.uint8)


def pixel_size_mm(case: Case | KaggleCase) -> tuple[float, float]:
    """Pixel size of an axial slice, (front to back, left to right); reads the header only.

    Raises:
        ValueError, OSError: the file cannot be read.
    """
    if isinstance(case, Case):
        return open_nifti(case.image).spacing_mm[1:]
    # The header stands at the front of the member; unpacking a whole scan for it takes seconds.
    archive = case.label_path.parents[1] / "CT.zip"
    with tempfile.TemporaryDirectory(prefix="lung_tumor_") as temporary:
        start = Path(temporary) / Path(case.image_member).name
        try:
            with zipfile.ZipFile(archive) as file, file.open(case.image_member) as member:
                start.write_bytes(member.read(HEADER_BYTES))
        except (KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{archive}: cannot read {case.image_member} ({error})") from error
        return open_nifti(start).spacing_mm[1:]


def source_files(case: Case | KaggleCase) -> dict[str, str]:
    """Where a case came from, for volumes.json."""
    if isinstance(case, Case):
        return {"image": str(case.image.resolve()), "label": str(case.label.resolve())}
    archive = case.label_path.parents[1] / "CT.zip"
    return {
        "archive": f"{archive.resolve()}",
        "image": case.image_member,
        "label": str(case.label_path.resolve()),
    }


def source_stamp(case: Case | KaggleCase) -> list:
    """[path, bytes, time of change] of a case's files: tells whether they are still the ones converted."""
    paths = [
        Path(path) for key, path in source_files(case).items() if key != "image" or isinstance(case, Case)
    ]
    return file_stamp(paths)


def case_from_entry(volume: str, entry: dict) -> Case | KaggleCase | None:
    """The case that an entry of volumes.json was made from; None if its files are no longer there."""
    files = {kind: Path(path) for kind, path in entry["source"].items()}
    if "archive" in files and files["archive"].is_file() and files["label"].is_file():
        return KaggleCase(volume, entry["source"]["image"], files["label"])
    return Case(volume, **files) if all(p.is_file() for p in files.values()) else None
