"""The Medical Segmentation Decathlon's folder layout: imagesTr/, labelsTr/, dataset.json.

AMOS22 has it too, with imagesVa/ and labelsVa/ for validation beside it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from common.files import read_json
from common.nifti import case_name, is_nifti
from common.splits import natural_key


@dataclass(frozen=True)
class Case:
    """One scan and its label, both files on disk; None for one that `list_files` did not find."""

    case_id: str
    image: Path | None
    label: Path | None


def find_decathlon(folder: str | Path) -> Path | None:
    """The folder that holds imagesTr: `folder` itself or its only subfolder that does; None without one."""
    folder = Path(folder)
    if (folder / "imagesTr").is_dir():
        return folder
    inside = [p for p in folder.glob("*/imagesTr") if p.is_dir()]
    return inside[0].parent if len(inside) == 1 else None


def list_cases(folder: str | Path) -> list[Case]:
    """Training cases in the natural order of their names; macOS resource files (`._*`) are passed over.

    Raises:
        FileNotFoundError: imagesTr or labelsTr is missing.
        ValueError: no scan at all, a scan without label, a label without scan, or two files of one case; it
            names them.
    """
    folder = Path(folder)
    for name in ("imagesTr", "labelsTr"):
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{folder}: no folder {name}; expected the Decathlon layout imagesTr/, labelsTr/ and "
                "dataset.json"
            )
    cases, same = list_files(folder, "Tr")
    if same:
        raise ValueError("; ".join(same))
    if not cases:
        raise ValueError(f"{folder}: imagesTr and labelsTr hold no .nii or .nii.gz file")
    without = {
        "scan(s) without a file of that name in labelsTr": [c.case_id for c in cases if c.label is None],
        "label(s) without a file of that name in imagesTr": [c.case_id for c in cases if c.image is None],
    }
    problems = []
    for kind, names in without.items():
        if names:
            more = ", ..." if len(names) > 10 else ""
            problems.append(f"{len(names)} {kind}: {', '.join(names[:10])}{more}")
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}. Add the missing files or move these away")
    return cases


def list_files(folder: str | Path, part: str) -> tuple[list[Case], list[str]]:
    """What images<part> and labels<part> hold, whether complete or not; either folder may be missing.

    Args:
        part: Tr for training, Va for validation (in AMOS22), Ts for the test, which mostly has no labels.

    Returns:
        cases in the natural order of their names, with None for the file that a case lacks; problems: a
        sentence for each file that is left out because it is one case with another file.
    """
    files: dict[str, dict[str, Path]] = {}
    problems = []
    for kind in ("image", "label"):
        inside = Path(folder) / f"{kind}s{part}"
        for path in sorted(inside.iterdir()) if inside.is_dir() else ():
            if not is_nifti(path):
                continue
            of_case = files.setdefault(case_name(path), {})
            if kind in of_case:
                problems.append(
                    f"{inside}: {of_case[kind].name} and {path.name} are the same case; move one away"
                )
            else:
                of_case[kind] = path
    names = sorted(files, key=natural_key)
    return [Case(name, files[name].get("image"), files[name].get("label")) for name in names], problems


def read_dataset_json(folder: str | Path) -> dict:
    """The content of the folder's dataset.json; {} if there is no such file.

    Raises:
        ValueError: the file is not valid JSON, or not an object.
    """
    path = Path(folder) / "dataset.json"
    return read_json(path) if path.is_file() else {}


def label_names(notes: dict) -> dict[int, str]:
    """{number: name} of the "labels" of a dataset.json: the Decathlon has them by number, nnU-Net by name.

    Other entries, such as nnU-Net's regions of several numbers, are left out.
    """
    names = {}
    for key, value in (notes.get("labels") or {}).items():
        number, name = (key, value) if str(key).isdigit() else (value, key)
        if str(number).isdigit():
            names[int(number)] = str(name)
    return names


def modality_of(notes: dict) -> str | None:
    """ "ct" or "mr" as "modality" or "channel_names" of a dataset.json say; None if they say neither."""
    channels = notes.get("modality") or notes.get("channel_names") or {}
    text = " ".join(map(str, channels.values())).upper()
    if "CT" in text:
        return "ct"
    return "mr" if re.search("MR|T1|T2|FLAIR", text) else None
