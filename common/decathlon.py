"""The Medical Segmentation Decathlon's folder layout: imagesTr/, labelsTr/, dataset.json."""

from dataclasses import dataclass
from pathlib import Path

from common.files import read_json
from common.nifti import case_name, is_nifti
from common.splits import natural_key


@dataclass(frozen=True)
class Case:
    """One scan and its label, both files on disk."""

    case_id: str
    image: Path
    label: Path


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
    images, labels = _files_by_case(folder / "imagesTr"), _files_by_case(folder / "labelsTr")
    if not images and not labels:
        raise ValueError(f"{folder}: imagesTr and labelsTr hold no .nii or .nii.gz file")
    problems = []
    for kind, names in (
        ("scan(s) without a file of that name in labelsTr", images.keys() - labels.keys()),
        ("label(s) without a file of that name in imagesTr", labels.keys() - images.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names, key=natural_key)[:10])
            problems.append(f"{len(names)} {kind}: {listed}{', ...' if len(names) > 10 else ''}")
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}. Add the missing files or move these away")
    return [Case(name, images[name], labels[name]) for name in sorted(images, key=natural_key)]


def read_dataset_json(folder: str | Path) -> dict:
    """The content of the folder's dataset.json; {} if there is no such file.

    Raises:
        ValueError: the file is not valid JSON, or not an object.
    """
    path = Path(folder) / "dataset.json"
    return read_json(path) if path.is_file() else {}


def _files_by_case(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_nifti(path) and (other := files.setdefault(case_name(path), path)) != path:
            raise ValueError(f"{folder}: {other.name} and {path.name} are the same case; move one away")
    return files
