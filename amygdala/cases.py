"""What a folder of T1 scans in the Decathlon's layout holds, and of whom each scan is.

    imagesTr/sub_01.nii.gz    labelsTr/sub_01.nii.gz     training and cross-validation
    imagesTs/sub_90.nii.gz    labelsTs/sub_90.nii.gz     test; without a label it is for predict.py only
    participants.tsv                                     subject and site of the scans, if there is one

Scans and labels may be .nii.gz, .nii, or FreeSurfer's .mgz.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amygdala.labels import map_labels, why_exchanged
from amygdala.structures import NUM_CLASSES, DataSet
from common.decathlon import find_decathlon, list_parts
from common.label_measures import label_counts
from common.nifti import Scan
from common.pairs import load_pair

PARTS = {"Tr": "train", "Ts": "test"}  # ending of the folder: part
UNKNOWN_SITE = "unknown"


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
        FileNotFoundError: no such folder or table, or no folder imagesTr.
        ValueError: nothing in it, or a table without the columns that are needed.
    """
    root = find_decathlon(source)
    if root is None:
        raise FileNotFoundError(
            f"--source {source}: no folder imagesTr in it; expected imagesTr/, labelsTr/ and, if there are "
            "any, imagesTs/ and labelsTs/"
        )
    files, warnings = list_parts(root, PARTS)
    if not files:
        raise ValueError(f"--source {source}: no scan (.nii.gz, .nii, .mgz) in imagesTr or imagesTs")
    has_bids_table = table is None and (root / "participants.tsv").is_file()
    path = root / "participants.tsv" if has_bids_table else table
    people = {} if path is None else read_subjects(path)
    cases, refused, unlisted = [], {}, []
    part_of_subject: dict[str, tuple[str, str]] = {}
    for part, file in files:
        subject, site = _who(file.case_id, people) or (file.case_id, UNKNOWN_SITE)
        case = Case(file.case_id, part, file.image, file.label, subject, site)
        other = part_of_subject.setdefault(subject, (part, case.name))
        if people and _who(case.name, people) is None:
            unlisted.append(case.name)
            if not has_bids_table:
                refused[case.name] = f"{path}: has no row of this name; add its subject and site"
                continue
        if other[0] != part:
            refused[case.name] = (
                f"subject {subject} stands in {part} and, as {other[1]}, in {other[0]}; scores would be too "
                "good. Keep a subject's scans in one of imagesTr and imagesTs"
            )
            continue
        cases.append(case)
    if unlisted and has_bids_table:
        warnings.append(
            f"{path}: has no row of {', '.join(unlisted[:5])}; each counts as a subject of its own, of "
            f"{UNKNOWN_SITE} site"
        )
    return cases, warnings + lonely_sites(cases), refused


def read_subjects(path: str | Path) -> dict[str, tuple[str, str]]:
    """{name: (subject, site)} of a CSV file, or a TSV file as BIDS has.

    The columns are name, subject and site; of BIDS participant_id, which is name and subject in one. Without
    a column for it the site is unknown.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no column of names, an empty cell, or two rows of one name that differ.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--subjects {path}: no such file")
    people: dict[str, tuple[str, str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        name_column = next((c for c in ("name", "participant_id") if c in columns), None)
        subject_column = "subject" if "subject" in columns else "participant_id"
        if name_column is None or subject_column not in columns:
            raise ValueError(
                f"{path}: its columns are {', '.join(columns) or 'missing'}; expected name, subject and site"
            )
        for row in reader:
            name, subject = ((row[c] or "").strip() for c in (name_column, subject_column))
            site = (row.get("site") or "").strip() or UNKNOWN_SITE
            if not name or not subject:
                raise ValueError(f"{path}, line {reader.line_num}: a row without name or subject")
            if people.setdefault(name, (subject, site)) != (subject, site):
                raise ValueError(f"{path}: two rows of {name} with different subjects or sites; remove one")
    return people


def _who(name: str, people: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
    """(subject, site) of a case by its name, or by a BIDS name that it goes on from, such as sub-01_ses-1."""
    parts = name.split("_")
    beginnings = ["_".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((people[beginning] for beginning in beginnings if beginning in people), None)


def lonely_sites(cases: Sequence[Case]) -> list[str]:
    """A sentence for each site that has one subject only, where there are several sites."""
    subjects: dict[str, set[str]] = {}
    for case in cases:
        subjects.setdefault(case.site, set()).add(case.subject)
    if len(subjects) < 2:
        return []
    return [
        f"site {site} has one subject only ({next(iter(people))}): what a fold tests there is a single person"
        for site, people in subjects.items()
        if len(people) == 1
    ]


# ---- one case ----


def load_case(
    case: Case, data_set: DataSet, label_map: str | dict[int, int]
) -> tuple[Scan, np.ndarray, list[str]]:
    """Scan, its labels 1 and 2 as (z, y, x) uint8 on its grid, and notes for the reader.

    Args:
        label_map: as `parse_label_map` returns it.

    Raises:
        FileNotFoundError, ValueError: as `load_pair` and `map_labels`; a file is missing; or left and right
            are exchanged.
    """
    if case.image is None or case.label is None:
        missing, there = ("label", case.image) if case.label is None else ("scan", case.label)
        raise ValueError(f"{there}: has no {missing} of the same name; add it, or move this file away")
    scan, drawn = load_pair(case.image, case.label)
    try:
        labels = map_labels(drawn.array, scan, label_map, data_set)
    except ValueError as error:
        raise ValueError(f"{case.label}: {error}") from error
    if reason := why_exchanged(labels, scan.affine, data_set):
        raise ValueError(f"{case.label}: {reason}")
    counts, notes = label_counts(labels, NUM_CLASSES), []
    for label, name in data_set.structures.names.items():
        mm3, (low, high) = counts[label] * scan.voxel_mm3, data_set.volume_mm3
        if not counts[label]:
            notes.append(f"holds no {name}")
        elif not low <= mm3 <= high:
            notes.append(f"{name} of {mm3:.0f} mm3, expected {low:g} to {high:g}")
    return scan, labels, notes
