"""Folders of DICOM files as sources of the predict scripts: each series becomes a NIfTI file.

Series that are no volume are named and left out, and one that fails costs no other.
"""

from pathlib import Path

from tqdm import tqdm

from common import batch, distributed
from common.conversion import failure_reason
from common.dicom_conversion import convert_series, find_program
from common.dicom_headers import DICOM_ENDINGS, read_dicom_header
from common.dicom_series import Series, find_series, why_no_volume
from common.files import listed, make_folder
from common.foreign import foreign_files
from common.mask_files import CONVERTED

MOST_LISTED = 5  # reasons in a message


def find_scans(
    source: str | Path,
    suffixes: tuple[str, ...],
    *,
    out: Path,
    own_names: tuple[str, ...],
    recursive: bool,
    what: str,
) -> tuple[list[Path], dict[Path, str]]:
    """The files that --source names, as `batch.find_sources`, and its DICOM series as NIfTI files.

    A series is written to <out>/from_dicom/<folder>_<series number>.nii.gz, anew each time. Folder and number
    tell it from others without what is private, as the description of a series or the patient's name can be.
    Where the folder itself holds no scan, DICOM files are sought in its subfolders too, as each series often
    has one. A single DICOM file stands for its series. What is left out, and why, is printed.

    Args: as of `batch.find_sources`.

    Returns:
        scans; {file or folder: why it could not be converted}; the same in every process.

    Raises:
        FileNotFoundError: nothing to take. ValueError: DICOM files, of which none can be taken.
    """
    source, nothing, scans = Path(source), None, []
    is_dicom_file = source.is_file() and _is_dicom_file(source, suffixes)
    if not is_dicom_file:
        try:
            scans = batch.find_sources(
                source, suffixes, out=out, own_names=own_names, recursive=recursive, what=what
            )
        except FileNotFoundError as error:
            if not source.is_dir():
                raise
            nothing = error
        if source.is_file():
            return scans, {}
    series, failed = find_series(source, out, recursive or nothing is not None)
    converted, left_out = [], []
    distributed.barrier()  # all have looked before the first writes there
    if series:
        converted, not_converted, left_out = distributed.on_main(lambda: _convert_all(series, source, out))
        failed |= not_converted
    if not scans and not converted:
        if failed:
            raise ValueError(listed(list(failed.values()), MOST_LISTED, "; "))
        if left_out:
            raise ValueError(
                f"--source {source}: no volume among its DICOM series ({listed(left_out, MOST_LISTED, '; ')})"
            )
        raise nothing or ValueError(f"--source {source}: a DICOM directory, not an image")
    if nothing is not None and distributed.is_main():  # else `batch.find_sources` has told it
        if others := foreign_files(p for p in source.iterdir() if not p.name.lower().endswith(DICOM_ENDINGS)):
            tqdm.write(f"left out: {others}")
    return [*scans, *converted], failed


def _is_dicom_file(path: Path, suffixes: tuple[str, ...]) -> bool:
    return not path.name.lower().endswith(suffixes) and read_dicom_header(path) is not None


def _convert_all(
    series: list[Series], source: Path, out: Path
) -> tuple[list[Path], dict[Path, str], list[str]]:
    """(NIfTI files, {file that could not be made: reason}, what is left out with the reason)."""
    converted: list[Path] = []
    failed: dict[Path, str] = {}
    left_out: list[str] = []

    def leave_out(one: Series, reason: str) -> None:
        left_out.append(f"{one.described}: {reason}")
        tqdm.write(f"left out: {left_out[-1]}")

    volumes = []
    for one in series:
        if reason := why_no_volume(one.headers):
            leave_out(one, reason)
        else:
            volumes.append(one)
    if not volumes:
        return converted, failed, left_out
    program = find_program()
    if program is None:
        reason = f"{source}: converting DICOM files needs the program dcm2niix; pip install dcm2niix"
        return converted, {source: reason}, left_out
    folder = make_folder(make_folder(out) / CONVERTED)
    for one in tqdm(volumes, "DICOM series", unit="series", leave=False, disable=None):
        try:
            made, no_volumes = convert_series(one, folder, program)
        except (ValueError, OSError) as error:
            failed[folder / f"{one.name}.nii.gz"] = f"{one.described}: {failure_reason(error)}"
            continue
        for reason in no_volumes:
            leave_out(one, reason)
        if made:
            names = ", ".join(path.name for path in made)
            tqdm.write(f"converted: {one.described}, {len(one.files)} file(s) to {CONVERTED}/{names}")
        converted += made
    return converted, failed, left_out
