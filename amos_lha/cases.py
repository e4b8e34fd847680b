"""Which files of a folder in AMOS22's layout belong together; which scans are MR; which organs are labelled.

    imagesTr/amos_0001.nii.gz    labelsTr/amos_0001.nii.gz     training
    imagesVa/amos_0008.nii.gz    labelsVa/amos_0008.nii.gz     validation
    imagesTs/amos_0010.nii.gz                                  test, without labels
    dataset.json

AMOS numbers its CT below 500 and its MR from 500 on. Cases of other names are taken too; their dataset.json
has to tell whether they are CT or MR, e.g. "modality": {"0": "CT"}.
"""

import os
import re
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amos_lha.organs import NUM_CLASSES, ORGANS
from common.config import non_negative_int
from common.decathlon import (
    find_decathlon,
    label_names,
    list_files,
    modality_of,
    read_dataset_json,
)
from common.label_measures import label_counts
from common.nifti import Scan, case_name, is_nifti
from common.pairs import load_pair
from common.splits import natural_key

PARTS = {"Tr": "train", "Va": "val", "Ts": "test"}  # ending of the folder: part
FIRST_MR = 500
AMOS22 = "AMOS22 has 200 CT and 40 MR for training, 100 CT and 20 MR for validation"
SPELLINGS = {  # other names of organs, by number
    2: ("kidney right",),
    3: ("kidney left",),
    4: ("gall bladder",),
    5: ("oesophagus",),
    8: ("arota",),
    9: ("postcava", "ivc"),
    11: ("right adrenal", "adrenal gland right", "rad"),
    12: ("left adrenal", "adrenal gland left", "lad"),
    14: ("urinary bladder",),
    15: ("prostate", "uterus", "prostate or uterus"),
}


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
        labelled: numbers of the organs that are labelled in all cases. None: "labelled" of dataset.json, a
            list of numbers or {case name: list}; else the organs that its "labels" name; else all.

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
    notes = read_dataset_json(root)
    check_label_names(notes, root / "dataset.json")
    cases, problems = [], []
    part_of: dict[str, str] = {}
    for ending, part in PARTS.items():
        files, same = list_files(root, ending)
        problems += same
        for file in files:
            if (other := part_of.setdefault(file.case_id, part)) != part:
                problems.append(
                    f"{root}: {file.case_id} is a case of {other} and of {part}; remove one of them"
                )
            modality = modality_of_case(file.case_id, notes)
            organs = labelled_organs(file.case_id, notes, labelled, root / "dataset.json")
            cases.append(Case(file.case_id, part, modality, organs, file.image, file.label))
    return cases, problems


def list_any(folder: str | Path, labelled: list[int] | None = None) -> tuple[list[Case], list[str]]:
    """As `list_data_set`; in a folder without imagesTr each NIfTI file is a label map without a scan."""
    paths = [path for path in sorted(Path(folder).glob("*")) if is_nifti(path)]
    if find_decathlon(folder) is not None or not paths:
        return list_data_set(folder, labelled)
    organs = labelled_organs("", {}, labelled, Path(folder))
    paths.sort(key=lambda path: natural_key(path.name))
    return [
        Case(case_name(p), "labels", modality_of_case(case_name(p), {}), organs, None, p) for p in paths
    ], []


def why_not_organs(labels: np.ndarray, labelled: tuple[int, ...]) -> str:
    """A phrase about numbers in a (z, y, x) label map that are no organs, or not `labelled` ones; else ""."""
    if labels.max() > max(ORGANS):
        unknown = np.unique(labels[labels > max(ORGANS)])[:10]
        return (
            f"label value(s) {', '.join(map(str, unknown))}; AMOS's organs are 1 to 15. Is it a label of "
            "another data set?"
        )
    found = np.flatnonzero(label_counts(labels, NUM_CLASSES)).tolist()
    if surplus := [f"{n} ({ORGANS[n]})" for n in found if n and n not in labelled]:
        return (
            f"holds {', '.join(surplus)}, which --labelled or dataset.json does not name as labelled; "
            "correct the list of labelled organs"
        )
    return ""


def load_case(case: Case) -> tuple[Scan, Scan]:
    """Scan and label (uint8) of a case, checked against each other.

    Raises:
        FileNotFoundError, ValueError: as `load_pair`; a file is missing; or the label holds other numbers
            than those of organs labelled in this case.
    """
    if case.image is None or case.label is None:
        missing, there = ("label", case.image) if case.label is None else ("scan", case.label)
        raise ValueError(f"{there}: has no {missing} of the same name; add it, or move this file away")
    scan, label = load_pair(case.image, case.label)
    if reason := why_not_organs(label.array, case.labelled):
        raise ValueError(f"{case.label}: {reason}")
    return scan, label


def check_label_names(notes: dict, path: Path) -> None:
    """Refuse a dataset.json whose "labels" name another organ than AMOS's under a number.

    Raises:
        ValueError: with the number, what it is called there, and what it is in AMOS.
    """
    for number, name in label_names(notes).items():
        spellings = [ORGANS.get(number, ""), *SPELLINGS.get(number, ())]
        if number in ORGANS and _letters(name) not in map(_letters, spellings):
            raise ValueError(
                f"{path}: calls label {number} {name!r}, which is the {ORGANS[number]} in AMOS; give the "
                "labels AMOS's numbers, or correct the name in this file"
            )


def add_flags(parser: ArgumentParser) -> None:
    """--labelled and --workers of the scripts that read a data set."""
    parser.add_argument(
        "--labelled",
        type=int,
        nargs="+",
        metavar="ORGAN",
        help="numbers of the organs that are labelled in this data set, e.g. 1 2 3 6; the others count "
        "neither as background nor as errors. Default: 'labelled' of dataset.json, else the organs that it "
        "names, else all",
    )
    parser.add_argument(
        "--workers",
        type=non_negative_int,
        default=min(4, os.cpu_count() or 1),
        help="number of processes that read scans; 0 = the main process does it itself; each may take 2 GB "
        "for a long scan",
    )


def labelled_organs(name: str, notes: dict, flag: list[int] | None, path: Path) -> tuple[int, ...]:
    """Numbers of the organs that a case has labels for.

    Args:
        notes: content of dataset.json; the rule stands at `list_data_set`.
        flag: what --labelled says; None = it says nothing.
        path: of dataset.json, for error messages.

    Raises:
        ValueError: no list of organ numbers.
    """
    noted = notes.get("labelled")
    if flag is not None:
        organs, where = flag, "--labelled"
    elif isinstance(noted, dict):
        organs, where = noted.get(name), f'{path}: "labelled" of {name}'
    elif noted is not None:
        organs, where = noted, f'{path}: "labelled"'
    else:
        organs, where = [n for n in label_names(notes) if n in ORGANS] or list(ORGANS), str(path)
    are_organs = isinstance(organs, list) and all(isinstance(n, int) and n in ORGANS for n in organs)
    if not are_organs or not organs:
        raise ValueError(f"{where}: expected numbers of organs from 1 to 15, found {organs}")
    return tuple(sorted(set(organs)))


def modality_of_case(name: str, notes: dict) -> str | None:
    """ct or mr by AMOS's number in the name, else by dataset.json; None where neither tells."""
    if match := re.fullmatch(r"amos_(\d+)", name):
        return "ct" if int(match[1]) < FIRST_MR else "mr"
    return modality_of(notes)


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())
