"""Which files of a folder in AMOS22's layout belong together; which scans are MR; which organs are labelled.

    imagesTr/amos_0001.nii.gz    labelsTr/amos_0001.nii.gz     training
    imagesVa/amos_0008.nii.gz    labelsVa/amos_0008.nii.gz     validation
    imagesTs/amos_0010.nii.gz                                  test, without labels
    dataset.json

AMOS numbers its CT below 500 and its MR from 500 on. Cases of other names are taken too; their dataset.json
has to tell whether they are CT or MR, e.g. "modality": {"0": "CT"}.
"""

import re
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

from amos_lha.organs import ORGANS
from common.decathlon import LabelledCase as Case
from common.decathlon import find_decathlon, list_label_maps, list_labelled
from common.flags import add_labelled_flag, add_workers_flag
from common.nifti import Scan
from common.pairs import load_labelled

PARTS = {"Tr": "train", "Va": "val", "Ts": "test"}  # ending of the folder: part
FIRST_MR = 500
AMOS22 = "AMOS22 has 200 CT and 40 MR for training, 100 CT and 20 MR for validation"
SPELLINGS = {5: ("oesophagus",), 8: ("arota",), 9: ("postcava",)}  # the latter two are AMOS's own


def add_raw_data_flags(parser: ArgumentParser, also: str = "") -> None:
    """--data_path, --labelled and --workers of the scripts that read AMOS22 itself; `also` is what else
    --data_path may be."""
    parser.add_argument(
        "--data_path",
        default="data/amos22",
        help="folder that holds the data set in AMOS22's layout (imagesTr, labelsTr, imagesVa, labelsVa)"
        f"{also}",
    )
    add_labelled_flag(parser, "this data set")
    add_workers_flag(parser)


def list_data_set(folder: str | Path, labelled: list[int] | None = None) -> tuple[list[Case], list[str]]:
    """Cases and problems of a folder as `list_labelled` has them; ct or mr by AMOS's number where a name has
    one."""
    cases, problems = list_labelled(folder, PARTS, ORGANS, labelled, data_set="AMOS22", spellings=SPELLINGS)
    return [_with_modality(case) for case in cases], problems


def list_any(folder: str | Path, labelled: list[int] | None = None) -> tuple[list[Case], list[str]]:
    """As `list_data_set`; in a folder without imagesTr each NIfTI file is a label map without a scan."""
    maps = [] if find_decathlon(folder) else list_label_maps(folder, ORGANS, labelled)
    return ([_with_modality(case) for case in maps], []) if maps else list_data_set(folder, labelled)


def modality_of_name(name: str) -> str | None:
    """ct or mr by AMOS's number in the name of a case; None without one."""
    match = re.fullmatch(r"amos_(\d+)", name)
    return match and ("ct" if int(match[1]) < FIRST_MR else "mr")


def _with_modality(case: Case) -> Case:
    return replace(case, modality=modality_of_name(case.name) or case.modality)


def load_case(case: Case) -> tuple[Scan | None, Scan]:
    """Scan and label of a case, checked against each other; of a label map alone the scan is None.

    Raises:
        FileNotFoundError, ValueError: as `load_labelled`.
    """
    return load_labelled(case.image, case.label, ORGANS, case.labelled, label_alone=case.part == "labels")
