"""Which files of a folder in AMOS22's layout belong together; which scans are MR; which organs are labelled.

    imagesTr/amos_0001.nii.gz    labelsTr/amos_0001.nii.gz     training
    imagesVa/amos_0008.nii.gz    labelsVa/amos_0008.nii.gz     validation
    imagesTs/amos_0010.nii.gz                                  test, without labels
    dataset.json

AMOS numbers its CT below 500 and its MR from 500 on. Cases of other names are taken too; their dataset.json
has to tell whether they are CT or MR, e.g. "modality": {"0": "CT"}.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from amos_lha.organs import ORGANS
from common.decathlon import (
    check_label_names,
    find_decathlon,
    labelled_numbers,
    list_parts,
    modality_of,
    read_dataset_json,
)
from common.nifti import Scan, case_name, is_nifti
from common.pairs import load_labelled
from common.splits import natural_key

PARTS = {"Tr": "train", "Va": "val", "Ts": "test"}  # ending of the folder: part
FIRST_MR = 500
AMOS22 = "AMOS22 has 200 CT and 40 MR for training, 100 CT and 20 MR for validation"
SPELLINGS = {5: ("oesophagus",), 8: ("arota",), 9: ("postcava",)}  # the latter two are AMOS's own


@dataclass(frozen=True)
class Case:
    """One scan and its label.

    Attributes:
        part: "train", "val" or "test"; "labels" in a folder of label maps alone.
        modality: "ct" or "mr"; None where neither the name nor dataset.json tells.
        labelled: numbers of the organs that the case has labels for, present in the scan or not.
        image, label: None where the data set does not have the file.
    """

    name: str
    part: str
    modality: str | None
    labelled: tuple[int, ...]
    image: Path | None
    label: Path | None


def list_data_set(folder: str | Path, labelled: list[int] | None = None) -> tuple[list[Case], list[str]]:
    """Every case of a folder, complete or not, in natural order of the names, part by part.

    Args:
        labelled: numbers of the organs that are labelled in all cases; None: see `labelled_numbers`.

    Returns:
        cases; problems: a sentence for each file that had to be left out, and for each name in two parts.

    Raises:
        FileNotFoundError: no such folder, or no folder imagesTr in it.
        ValueError: dataset.json cannot be read, its labels are not AMOS's, or a number is not an organ's.
    """
    root = find_decathlon(folder)
    if root is None:
        raise FileNotFoundError(
            f"--data_path {folder}: no folder imagesTr in it; expected AMOS22's layout imagesTr/, labelsTr/ "
            "and, if there are any, imagesVa/, labelsVa/, imagesTs/ and dataset.json"
        )
    notes, path = read_dataset_json(root), root / "dataset.json"
    check_label_names(notes, ORGANS, SPELLINGS, "AMOS", path)
    files, problems = list_parts(root, PARTS)
    cases = []
    for part, file in files:
        organs = labelled_numbers(file.case_id, notes, labelled, ORGANS, path)
        modality = modality_of_case(file.case_id, notes)
        cases.append(Case(file.case_id, part, modality, organs, file.image, file.label))
    return cases, problems


def list_any(folder: str | Path, labelled: list[int] | None = None) -> tuple[list[Case], list[str]]:
    """As `list_data_set`; in a folder without imagesTr each NIfTI file is a label map without a scan."""
    paths = [path for path in Path(folder).glob("*") if is_nifti(path)]
    if find_decathlon(folder) is not None or not paths:
        return list_data_set(folder, labelled)
    organs = labelled_numbers("", {}, labelled, ORGANS, Path(folder))
    named = [(case_name(path), path) for path in sorted(paths, key=lambda path: natural_key(path.name))]
    return [Case(name, "labels", modality_of_case(name, {}), organs, None, path) for name, path in named], []


def modality_of_case(name: str, notes: dict) -> str | None:
    """ct or mr by AMOS's number in the name, else by dataset.json; None where neither tells."""
    if match := re.fullmatch(r"amos_(\d+)", name):
        return "ct" if int(match[1]) < FIRST_MR else "mr"
    return modality_of(notes)


def load_case(case: Case) -> tuple[Scan | None, Scan]:
    """Scan and label of a case, checked against each other; of a label map alone the scan is None.

    Raises:
        FileNotFoundError, ValueError: as `load_labelled`.
    """
    return load_labelled(case.image, case.label, ORGANS, case.labelled, label_alone=case.part == "labels")
