"""The Medical Segmentation Decathlon's folder layout: imagesTr/, labelsTr/, dataset.json.

AMOS22 has it too, with imagesVa/ and labelsVa/ for validation beside it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import read_json
from common.foreign import foreign_files, foreign_hint
from common.messages import warn
from common.nifti import case_name, is_nifti
from common.splits import natural_key

CHANNEL = "_0000"  # of the only channel, at the end of the scans' names in nnU-Net's data sets


@dataclass(frozen=True)
class Case:
    """One scan and its label, both files on disk; None for one that `list_files` did not find."""

    case_id: str
    image: Path | None
    label: Path | None


@dataclass(frozen=True)
class LabelledCase:
    """One scan and its label in a data set of several parts that may be partly labelled.

    Attributes:
        part: "train", "val" or "test"; "labels" in a folder of label maps alone.
        modality: "ct" or "mr"; None where it is not known.
        labelled: numbers that the case has labels for, present in the scan or not.
        image, label: None where the data set does not have the file.
    """

    name: str
    part: str
    modality: str | None
    labelled: tuple[int, ...]
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
        found = "imagesTr and labelsTr hold no scan (.nii.gz, .nii, .mgz, .nrrd)"
        raise ValueError(f"{folder}: {found}{foreign_hint(folder)}")
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

    A scan that nnU-Net calls case1_0000 is the case case1, unless there is a label case1_0000.

    Args:
        part: Tr for training, Va for validation (in AMOS22), Ts for the test, which mostly has no labels.

    Returns:
        cases in the natural order of their names, with None for the file that a case lacks; problems: a
        sentence for each file that is left out because it is one case with another file. Files in formats
        that are not read are named in a warning.
    """
    folders = {kind: Path(folder) / f"{kind}s{part}" for kind in ("image", "label")}
    paths = {
        kind: sorted(filter(is_nifti, inside.iterdir())) if inside.is_dir() else []
        for kind, inside in folders.items()
    }
    labels = set(map(case_name, paths["label"]))
    all_have_channel = all(case_name(path).endswith(CHANNEL) for path in paths["image"])
    files: dict[str, dict[str, Path]] = {}
    problems = []
    for kind, inside in folders.items():
        if foreign := foreign_files(inside.glob("[!.]*")):
            warn(f"{inside}: left out are {foreign}")
        for path in paths[kind]:
            name = case_name(path)
            short = name.removesuffix(CHANNEL)
            if kind == "image" and name not in labels and (short in labels or all_have_channel):
                name = short
            of_case = files.setdefault(name, {})
            if kind in of_case:
                problems.append(
                    f"{inside}: {of_case[kind].name} and {path.name} are the same case; move one away"
                )
            else:
                of_case[kind] = path
    names = sorted(files, key=natural_key)
    return [Case(name, files[name].get("image"), files[name].get("label")) for name in names], problems


def list_parts(folder: str | Path, parts: Mapping[str, str]) -> tuple[list[tuple[str, Case]], list[str]]:
    """(part, case) for what `list_files` finds of each part, one part after the other.

    Args:
        parts: {ending of the folders' names: name of the part}, such as {"Tr": "train"}.

    Returns:
        the cases; problems: those of `list_files`, and a sentence for each name that stands in two parts.
    """
    cases, problems = [], []
    part_of: dict[str, str] = {}
    for ending, part in parts.items():
        files, same = list_files(folder, ending)
        problems += same
        for case in files:
            if (other := part_of.setdefault(case.case_id, part)) != part:
                problems.append(
                    f"{folder}: {case.case_id} is a case of {other} and of {part}; remove one of them"
                )
            cases.append((part, case))
    return cases, problems


def list_labelled(
    folder: str | Path,
    parts: Mapping[str, str],
    names: Mapping[int, str],
    labelled: list[int] | None = None,
    *,
    data_set: str,
    spellings: Mapping[int, Collection[str]],
) -> tuple[list[LabelledCase], list[str]]:
    """Every case of a folder, complete or not, in natural order of the names, part by part.

    Args:
        parts: as of `list_parts`; names, data_set, spellings: as of `check_label_names`.
        labelled: numbers that all cases have labels for; None: see `labelled_numbers`.

    Returns:
        cases, with the modality that dataset.json tells; problems: as of `list_parts`.

    Raises:
        FileNotFoundError: no such folder, or no folder imagesTr in it.
        ValueError: dataset.json cannot be read, its labels are not those of the data set, or a number is
            none of `names`.
    """
    root = find_decathlon(folder)
    if root is None:
        others = ", ".join(f"{kind}s{end}/" for end in parts if end != "Tr" for kind in ("image", "label"))
        raise FileNotFoundError(
            f"--data_path {folder}: no folder imagesTr in it; expected {data_set}'s layout imagesTr/, "
            f"labelsTr/ and, if there are any, {others} and dataset.json{foreign_hint(folder)}"
        )
    notes, path = read_dataset_json(root), root / "dataset.json"
    check_label_names(notes, names, spellings, data_set, path)
    files, problems = list_parts(root, parts)
    cases = []
    for part, file in files:
        numbers = labelled_numbers(file.case_id, notes, labelled, names, path)
        cases.append(LabelledCase(file.case_id, part, modality_of(notes), numbers, file.image, file.label))
    return cases, problems


def list_label_maps(
    folder: str | Path, names: Mapping[int, str], labelled: list[int] | None = None
) -> list[LabelledCase]:
    """Every NIfTI file of a folder as a case of the part "labels", a label map without a scan.

    Args:
        names, labelled: as of `list_labelled`.
    """
    numbers = labelled_numbers("", {}, labelled, names, Path(folder))
    paths = sorted(filter(is_nifti, Path(folder).glob("*")), key=lambda path: natural_key(path.name))
    return [LabelledCase(case_name(path), "labels", None, numbers, None, path) for path in paths]


def read_dataset_json(folder: str | Path) -> dict:
    """The content of the folder's dataset.json; {} if there is no such file.

    Raises:
        ValueError: the file is not valid JSON, or what is read of it has another type.
    """
    path = Path(folder) / "dataset.json"
    expected = dict.fromkeys(("labels", "modality", "channel_names"), dict | None)
    return read_json(path, expected | {"labelled": dict | list | None}) if path.is_file() else {}


def label_names(notes: dict) -> dict[int, str]:
    """{number: name} of the "labels" of a dataset.json: the Decathlon has them by number, nnU-Net by name.

    Other entries, such as nnU-Net's regions of several numbers, are left out.
    """
    names = {}
    for key, value in (notes.get("labels") or {}).items():
        number, name = (str(key), value) if str(key).isdecimal() else (str(value), key)
        if number.isdecimal():
            names[int(number)] = str(name)
    return names


def channel_names(notes: dict) -> dict[int, str]:
    """{number: name} of the channels of 4-D scans, by "modality" or "channel_names" of a dataset.json.

    {} if it does not tell.

    Raises:
        ValueError: something else than a number stands for a channel.
    """
    channels = notes.get("modality") or notes.get("channel_names") or {}
    if wrong := [number for number in channels if not number.isdecimal()]:
        raise ValueError(f"dataset.json: channel {wrong[0]!r}; channels have the numbers 0, 1 and so on")
    return {int(number): str(name) for number, name in channels.items()}


def modality_of(notes: dict) -> str | None:
    """ "ct" or "mr" as "modality" or "channel_names" of a dataset.json say; None if they say neither."""
    text = " ".join(channel_names(notes).values()).upper()
    if "CT" in text:
        return "ct"
    return "mr" if re.search("MR|T1|T2|FLAIR", text) else None


def check_label_names(
    notes: dict, names: Mapping[int, str], spellings: Mapping[int, Collection[str]], data_set: str, path: Path
) -> None:
    """Refuse a dataset.json that calls a number by another name than the data set whose layout it has.

    Case, spaces and signs do not count. Numbers that `names` does not hold are passed over.

    Args:
        notes: its content; path: of the file, for error messages.
        names: {number: name} in the data set; spellings: {number: other names for the same}.
        data_set: its name, for error messages.

    Raises:
        ValueError: with the number, what it is called there, and what it is in the data set.
    """
    for number, name in label_names(notes).items():
        if number not in names:
            continue
        if _letters(name) not in map(_letters, (names[number], *spellings.get(number, ()))):
            raise ValueError(
                f"{path}: calls label {number} {name!r}, which is the {names[number]} in {data_set}; give "
                f"the labels {data_set}'s numbers, or correct the name in this file"
            )


def labelled_numbers(
    case_id: str, notes: dict, flag: list[int] | None, known: Collection[int], path: Path
) -> tuple[int, ...]:
    """What a case of a partly labelled data set was annotated with, whether the scan has it or not.

    Args:
        notes: content of dataset.json; path: of the file, for error messages.
        flag: numbers that --labelled gives for all cases. None: "labelled" of dataset.json, a list of numbers
            or {case: list}; else the numbers that its "labels" name; else all that are known.
        known: numbers of all labels that there may be.

    Raises:
        ValueError: no list of such numbers.
    """
    noted = notes.get("labelled")
    if flag is not None:
        numbers, where = flag, "--labelled"
    elif isinstance(noted, dict):
        numbers, where = noted.get(case_id), f'{path}: "labelled" of {case_id}'
    elif noted is not None:
        numbers, where = noted, f'{path}: "labelled"'
    else:
        numbers, where = [n for n in label_names(notes) if n in known] or list(known), str(path)
    is_list = isinstance(numbers, list) and len(numbers) > 0
    if not is_list or not all(type(n) is int and n in known for n in numbers):
        raise ValueError(
            f"{where}: expected numbers of labels from {min(known)} to {max(known)}, found {numbers}"
        )
    return tuple(sorted(set(numbers)))


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())
