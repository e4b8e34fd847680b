"""What a folder of T1 scans in the Decathlon's layout holds, and of whom each scan is.

    imagesTr/sub_01.nii.gz    labelsTr/sub_01.nii.gz     training and cross-validation
    imagesTs/sub_90.nii.gz    labelsTs/sub_90.nii.gz     test; without a label it is for predict.py only
    participants.tsv                                     subject and site of the scans, if there is one

Scans and labels may be .nii.gz, .nii, or FreeSurfer's .mgz.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amygdala.labels import map_labels
from amygdala.structures import NUM_CLASSES, DataSet
from common.decathlon import find_decathlon, list_parts
from common.foreign import foreign_hint
from common.label_measures import label_counts
from common.nifti import Scan
from common.pairs import load_pair
from common.sides import why_exchanged
from common.sites import UNKNOWN, lonely_sites, person_of, read_subjects, rows_without_case

PARTS = {"Tr": "train", "Ts": "test"}  # ending of the folder: part


@dataclass(frozen=True)
class Case:
    """One scan and its label.

    Attributes:
        part: "train" or "test".
        image, label: None where the data set does not have the file.
        subject: the person; all scans of one person stay on the same side of a split.
        site: where the scan was made.
    """

    name: str
    part: str
    image: Path | None
    label: Path | None
    subject: str
    site: str


# ---- which files belong together, and whose they are ----


def list_data_set(
    source: str | Path, table: str | Path | None = None
) -> tuple[list[Case], list[str], dict[str, str]]:
    """Every case of the folder, in natural order of the names, training first.

    Args:
        table: CSV or TSV file with the columns name, subject and site; None: participants.tsv of the folder.
            Without either each case is a subject of its own, and the site is unknown.

    Returns:
        cases; warnings; {case that cannot be used: reason}.

    Raises:
        FileNotFoundError, ValueError: no such folder or table, no folder imagesTr, nothing in it, or as
            `read_subjects`.
    """
    root = find_decathlon(source)
    if root is None:
        raise FileNotFoundError(
            f"--source {source}: no folder imagesTr in it; expected imagesTr/, labelsTr/ and, if there are "
            f"any, imagesTs/ and labelsTs/{foreign_hint(source)}"
        )
    files, warnings = list_parts(root, PARTS)
    if not files:
        raise ValueError(
            f"--source {source}: no scan (.nii.gz, .nii, .mgz) in imagesTr or imagesTs{foreign_hint(root)}"
        )
    has_bids_table = table is None and (root / "participants.tsv").is_file()
    path = root / "participants.tsv" if has_bids_table else table
    people = {} if path is None else read_subjects(path)
    cases, refused, unlisted = [], {}, []
    part_of_subject: dict[str, tuple[str, str]] = {}
    for part, file in files:
        name, person = file.case_id, person_of(file.case_id, people)
        subject, site = person or (name, UNKNOWN)
        other_part, other = part_of_subject.setdefault(subject, (part, name))
        if people and person is None:
            unlisted.append(name)
        if people and person is None and not has_bids_table:
            refused[name] = f"{path}: has no row of this name; add its subject and site"
        elif other_part != part:
            refused[name] = (
                f"subject {subject} stands in {part} and, as {other}, in {other_part}; scores would be too "
                "good. Keep a subject's scans in one of imagesTr and imagesTs"
            )
        else:
            cases.append(Case(name, part, file.image, file.label, subject, site))
    warnings += rows_without_case(path, people, [file.case_id for _, file in files])
    if unlisted and has_bids_table:
        warnings.append(
            f"{path}: has no row of {', '.join(unlisted[:5])}; each counts as a subject of its own, of "
            f"{UNKNOWN} site"
        )
    people_of_cases = [(case.subject, case.site) for case in cases]
    return cases, warnings + lonely_sites(people_of_cases), refused


# ---- one case ----


def load_case(
    case: Case, data_set: DataSet, label_map: str | dict[int, int]
) -> tuple[Scan, np.ndarray, list[str]]:
    """Scan, its labels 1 and 2 as (z, y, x) uint8 on its grid, and notes for the reader.

    Args:
        label_map: as `parse_label_map` returns it.

    Raises:
        FileNotFoundError, ValueError: as `load_pair` and `map_labels`; or left and right are exchanged.
    """
    scan, drawn = load_pair(case.image, case.label)
    labels = map_labels(drawn, scan, label_map, data_set)
    names = data_set.structures.names
    if reason := why_exchanged(labels, scan.affine, data_set.sides, names):
        in_file = [int(drawn.array[labels == label][0]) for label in names]
        remedy = ",".join(f"{label}={number}" for label, number in zip(names, in_file[::-1], strict=True))
        raise ValueError(f"{case.label}: {reason}. Where all files are so: --label_map {remedy}")
    counts, notes = label_counts(labels, NUM_CLASSES), []
    for label, name in names.items():
        mm3, (low, high) = counts[label] * scan.voxel_mm3, data_set.volume_mm3
        if not counts[label]:
            notes.append(f"holds no {name}")
        elif not low <= mm3 <= high:
            notes.append(f"{name} of {mm3:.0f} mm3, expected {low:g} to {high:g}")
    return scan, labels, notes
