"""One DICOM series becomes a NIfTI file, by the program dcm2niix.

The program (Li et al. 2016, doi 10.1016/j.jneumeth.2016.03.001) knows the habits of the scanners' makers.
What it is given, and what of its results is taken, is decided here.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.dicom_headers import UNCOMPRESSED
from common.dicom_series import LEAST_SLICES, Series
from common.files import link_file
from common.messages import warn
from common.nifti import open_nifti
from common.nifti_checks import check_memory

# Without the user's own settings, compressed fast, no other files, not the folders below, and without
# comments, which can hold the patient's name.
OPTIONS = ("-g", "i", "-z", "i", "-1", "-b", "n", "-d", "0", "-c", "", "-f", "scan")
LEAST_TIMEOUT_S, BYTES_PER_S = 60, 2e6  # of a conversion, on a slow disk
NO_SCAN = ("_ph", "_real", "_imaginary", "_ROI")  # what dcm2niix appends to names of other things


def find_program() -> str | None:
    """The program dcm2niix: that of the system, else that of the package; None if there is neither."""
    if found := shutil.which("dcm2niix"):
        return found
    try:
        from dcm2niix import bin as found
    except ImportError:
        return None
    return found


def convert_series(series: Series, folder: Path, program: str) -> tuple[list[Path], list[str]]:
    """Convert a series to <folder>/<its name>.nii.gz, which appears whole or not at all.

    Several are written of a series that holds several volumes, such as the echoes of an MR.

    Returns:
        the files written; for each part of the series that is no volume, what it is.

    Raises:
        ValueError: a damaged file, or the program fails, writes nothing, or does not end.
    """
    need_bytes = sum(header.num_bytes for header in series.headers)
    for path, header in zip(series.files, series.headers, strict=True):
        if header.syntax in UNCOMPRESSED and path.stat().st_size < header.num_bytes or not header.rows:
            raise ValueError(f"{path} is truncated or damaged; fetch it again, or move it away")
    check_memory("converting it", 3 * need_bytes, "move some of its images away")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial_") as partial:
        images, made = Path(partial) / "images", Path(partial) / "made"
        images.mkdir(), made.mkdir()
        originals = {}
        for number, path in enumerate(series.files):
            link = images / f"{number:06}.dcm"
            link_file(link, str(path.resolve()))
            originals[str(link)] = str(path)
        said = _run(program, images, made, LEAST_TIMEOUT_S + need_bytes / BYTES_PER_S, originals)
        chosen, left_out = _choose(series, made, said)
        written = []
        for ending, path in chosen.items():
            written.append(folder / f"{series.name}{ending}.nii.gz")
            path.replace(written[-1])
        return written, left_out


def _run(program: str, images: Path, made: Path, timeout_s: float, originals: dict[str, str]) -> list[str]:
    """Run dcm2niix on a folder; returns the lines that it prints, with the names of the user's files."""
    log = made.parent / "log.txt"  # not a pipe, which would be waited for if a child kept it open
    command = [program, *OPTIONS, "-o", str(made), str(images)]
    try:
        with log.open("wb") as file:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=timeout_s
            )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"dcm2niix did not end within {timeout_s:.0f} s and was stopped") from error
    except OSError as error:
        raise ValueError(f"{program} cannot be run ({error.strerror}); pip install dcm2niix") from error
    text = log.read_text("utf8", errors="replace")
    for link, original in originals.items():
        text = text.replace(link, original)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if done.returncode or not any(made.glob("*.nii.gz")):
        failed = f"failed with exit code {done.returncode}" if done.returncode else "wrote nothing"
        raise ValueError(f"dcm2niix {failed} ({lines[-1] if lines else 'without a word'})")
    return lines


def _choose(series: Series, made: Path, said: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """{ending of the name: file} of the volumes that dcm2niix wrote; what the others are.

    Of a series with a tilted gantry or unequal distances between slices it also writes a volume that is
    resampled (_Tilt, _Eq). Only that one lies where the patient was: NIfTI cannot hold the other.
    """
    files = {path.name.removesuffix(".nii.gz").removeprefix("scan"): path for path in made.glob("*.nii.gz")}
    resampled = {ending for ending in files if "_Tilt" in ending or "_Eq" in ending}
    if any("Interslice distance varies" in line for line in said) and not resampled:
        raise ValueError("its slices lie at unequal distances, which NIfTI cannot hold; are some missing?")
    for ending in resampled:
        stem = ending.split("_Tilt")[0].split("_Eq")[0]
        files.pop(stem, None)
        reasons = ["the gantry was tilted"] if "_Tilt" in ending else []
        if "_Eq" in ending:
            reasons.append("slices lie at unequal distances (are some missing?)")
        what = f"{' and '.join(reasons)}; the scan is resampled, and so is its mask's grid"
        warn(f"{series.described}: {what}")
    chosen, left_out = {}, []
    for ending, path in sorted(files.items()):
        try:
            num_slices = open_nifti(path).file_shape[2]
        except ValueError as error:
            left_out.append(str(error).removeprefix(f"{path}: "))
            continue
        if any(word in ending for word in NO_SCAN):
            left_out.append("phases, complex values or drawings, which are no scan")
        elif num_slices < LEAST_SLICES:
            left_out.append(f"{num_slices} image(s) of another size or orientation than the rest")
        else:
            chosen[ending.split("_Tilt")[0].split("_Eq")[0]] = path
    return chosen, left_out
