"""Which files of a raw data set belong to which patient: a reader for each layout of folders.

For another layout write one more reader and name it in READERS.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.decathlon import channel_names, find_decathlon, list_cases, read_dataset_json
from common.foreign import foreign_files, foreign_hint
from common.nifti import case_name, is_nifti
from common.splits import natural_key

# Other names of the MR sequences flair, t1, t1ce and t2, in the Decathlon and in later releases of BraTS.
SEQUENCES = {"t2f": "flair", "t1w": "t1", "t1n": "t1", "t1gd": "t1ce", "t1c": "t1ce", "t2w": "t2"}
BRATS_FILE = "(.+)[_-](flair|t1|t1ce|t2|t1n|t1c|t2w|t2f|seg)"


class Record(NamedTuple):
    """A scan with its label map.

    Attributes:
        patient: number in the names of the slices; decides their order and so the split.
        scan: 0, or which of several scans of the patient this is; they stay in one part of the split.
        name: for messages.
        images: sequence, file, and channel of a 4-D file or None; for each sequence.
    """

    patient: int
    scan: int
    name: str
    images: tuple[tuple[str, Path, int | None], ...]
    label: Path


def read_decathlon(source: Path) -> list[Record]:
    """imagesTr, labelsTr; dataset.json names the channels of 4-D files. Patients keep their numbers."""
    root = find_decathlon(source) or source
    channels = channel_names(read_dataset_json(root)) or {0: "image"}
    records = []
    for case in list_cases(root):
        images = tuple((sequence_name(name), case.image, k) for k, name in channels.items())
        records.append(Record(last_number(case.case_id), 0, case.case_id, images, case.label))
    return records


def read_lasc(source: Path) -> list[Record]:
    """<patient>/lgemri.nrrd with laendo.nrrd (or NIfTI). The folders' names are no numbers, so patients are
    numbered from 1 on in the order of the names, those in a test folder last."""
    records = []
    scans = {path.relative_to(source).as_posix(): path for path in source.rglob("lgemri.*") if is_nifti(path)}
    for inside in sorted(scans, key=lambda inside: ("test" in inside.lower(), natural_key(inside))):
        image = ("lge", scans[inside], None)
        for label in filter(is_nifti, sorted(scans[inside].parent.glob("laendo.*"))[:1]):
            records.append(Record(len(records) + 1, 0, str(Path(inside).parent), (image,), label))
    return tell_unlabelled(records, len(scans), "laendo")


def read_brats(source: Path) -> list[Record]:
    """BraTS 2020 to 2023: <case>_flair.nii.gz, or <case>-t2f.nii.gz, and so on, with <case>_seg or -seg.

    BraTS-GLI-00005-001 is a later scan of patient 5.
    """
    cases: dict[str, dict[str, Path]] = {}
    for path in sorted(filter(is_nifti, source.rglob("*"))):
        if match := re.fullmatch(BRATS_FILE, case_name(path), re.IGNORECASE):
            cases.setdefault(match[1], {})[sequence_name(match[2])] = path
    records = []
    for name, files in cases.items():
        if label := files.pop("seg", None):
            numbers = re.search(r"-(\d+)-(\d+)$", name)
            patient, scan = map(int, numbers.groups()) if numbers else (last_number(name), 0)
            images = tuple((sequence, path, None) for sequence, path in files.items())
            records.append(Record(patient, scan, name, images, label))
    return tell_unlabelled(records, len(cases), "seg")


READERS = {"decathlon": read_decathlon, "lasc": read_lasc, "brats": read_brats}


def find_layout(source: Path) -> str:
    """Which of READERS fits what lies in the folder.

    Raises:
        FileNotFoundError: none does.
    """
    if find_decathlon(source):
        return "decathlon"
    for layout, pattern in (("lasc", "lgemri.*"), ("brats", "*[_-]seg.*")):
        if any(map(is_nifti, source.rglob(pattern))):
            return layout
    raise FileNotFoundError(
        f"--source {source}: there is neither imagesTr/ (Decathlon), nor <patient>/lgemri.nrrd (LASC), nor "
        f"<case>_seg.nii.gz (BraTS) in it; README.md tells how to add another layout{foreign_hint(source)}"
    )


def list_records(source: Path, layout: str, modality: Sequence[str]) -> list[Record]:
    """All labelled scans with the wanted sequences, in the order of patients and scans.

    Args:
        modality: names of sequences or numbers of channels; none: FLAIR where there is one, else the first.

    Raises:
        FileNotFoundError, ValueError: no scan, one without a sequence, or two with the same number.
    """
    records = sorted(READERS[layout](source))
    for i, record in enumerate(records):
        if i and record[:2] == records[i - 1][:2]:
            both = f"{records[i - 1].name} and {record.name} both have the number {record.patient}"
            raise ValueError(f"--source {source}: {both}; rename one")
        there = {image[0]: image for image in record.images}
        numbered = {str(k): image for k, image in enumerate(record.images)}
        wanted = list(modality) or ["flair" if "flair" in there else "0"]
        images = tuple((numbered | there).get(sequence_name(name)) for name in wanted)
        if None in images:
            raise ValueError(f"--modality {' '.join(wanted)}: {record.name} only has {', '.join(there)}")
        records[i] = record._replace(images=images)
    if not records:
        hint = foreign_hint(source)
        raise ValueError(f"--source {source}: no scan with labels in the layout {layout}{hint}")
    if foreign := foreign_files(source.rglob("[!.]*")):
        print(f"left out: {foreign}")
    return records


def find_sequences(path: Path, wanted: Sequence[str]) -> list[tuple[Path, int | None]]:
    """(file, channel or None) of each sequence wanted of the scan that `path` belongs to.

    Beside <case>_flair lie the other sequences of BraTS; the channels of a 4-D file in the Decathlon's
    imagesTr or imagesTs are named by dataset.json. Any other file holds the only sequence.

    Raises:
        ValueError: a sequence is not there.
    """
    notes = read_dataset_json(path.parent.parent) if path.parent.name.startswith("images") else {}
    channels = channel_names(notes)
    files: dict[str, tuple[Path, int | None]] = {wanted[0]: (path, None)}
    if case := re.fullmatch(BRATS_FILE, case_name(path), re.IGNORECASE):
        beside = {p: re.fullmatch("(.+)[_-](.+)", case_name(p)) for p in path.parent.iterdir() if is_nifti(p)}
        files |= {sequence_name(m[2]): (p, None) for p, m in beside.items() if m and m[1] == case[1]}
    elif len(channels) > 1:
        files = {sequence_name(name): (path, number) for number, name in channels.items()}
    if missing := [name for name in wanted if name not in files]:
        raise ValueError(f"{path}: the model needs the sequence {missing[0]}; there is {', '.join(files)}")
    return [files[name] for name in wanted]


def name_of_case(path: Path, sequence: str) -> str:
    """Name of the case that a scan with the wanted sequence belongs to: of LASC, where every scan is called
    lgemri, that of its folder; of BraTS without the sequence; otherwise that of the file."""
    if case_name(path) == "lgemri":
        return path.parent.name
    is_brats = sequence in SEQUENCES.values()
    case = re.fullmatch(BRATS_FILE, case_name(path), re.IGNORECASE) if is_brats else None
    return case[1] if case else case_name(path)


def endings_beside(sequence: str) -> tuple[str, ...]:
    """How names of files end that lie beside scans with the wanted sequence: label maps, other sequences."""
    names = {*SEQUENCES, *SEQUENCES.values()} if sequence in SEQUENCES.values() else set()
    others = sorted(name for name in names if sequence_name(name) != sequence)
    return ("laendo", *(sign + name for name in ("seg", *others) for sign in "_-"))


def sequence_name(name: str) -> str:
    """One spelling for each MR sequence: t1gd of the Decathlon is BraTS' t1ce."""
    return SEQUENCES.get(name.lower(), name.lower())


def last_number(name: str) -> int:
    """104 of BraTS20_Training_104."""
    numbers = re.findall(r"\d+", name)
    if not numbers:
        raise ValueError(f"{name}: no number in this name, by which patients are told apart and ordered")
    return int(numbers[-1])


def tell_unlabelled(records: list[Record], num_cases: int, what: str) -> list[Record]:
    """The records, after a line that counts the cases that are not among them."""
    if len(records) < num_cases:
        print(f"left out: {num_cases - len(records)} case(s) without a file {what}, and so without labels")
    return records
