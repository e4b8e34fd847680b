"""Folders that a task's preprocess.py wrote: their cases, and who is in which part."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import distributed
from common.files import check_keys, check_numbers, read_json
from common.hdf5 import CaseFile
from common.splits import PARTS, check_split, fold_split, patients_of, read_splits, split_by_patient


def read_cases(
    folder: str | Path, task: str, raw: str, expected: Mapping[str, Any], attributes: Mapping[str, Any]
) -> tuple[dict, dict[str, dict], dict[str, Path]]:
    """What preprocessing noted, its entry of each case, and the HDF5 file of each; the latter two by name.

    Args:
        folder: with preprocessing.json and cases/*.h5. A file without an entry was not finished; it is left
            out.
        task: folder of preprocess.py, for the advice.
        raw: the words of its command that name the raw data, for the advice.
        expected, attributes: {key: type} of each entry besides its name, and of the attributes of its HDF5
            file, as of `check_keys`.

    Raises:
        FileNotFoundError: no such folder, or it is not one of preprocess.py.
        ValueError: preprocessing.json is damaged, or a case is, which is better known before the training
            than in the middle of it.
    """
    folder = Path(folder)
    notes_file, files = folder / "preprocessing.json", sorted((folder / "cases").glob("*.h5"))
    if not notes_file.is_file() or not files:
        raise FileNotFoundError(
            f"{folder}: no preprocessed cases here (preprocessing.json, cases/*.h5). Make them with: "
            f"python {task}/preprocess.py {raw} --out {folder}"
        )
    advice = f"make it again with {task}/preprocess.py"
    notes = read_json(notes_file, {"cases": list, "spacing_mm": list}, advice=advice)
    notes["spacing_mm"] = check_numbers(notes["spacing_mm"], 3, f'{notes_file}: "spacing_mm"', above=0)
    for number, entry in enumerate(notes["cases"]):
        check_keys(entry, {"name": str, **expected}, f'{notes_file}: "cases", entry {number}', advice=advice)
    entries = {entry["name"]: entry for entry in notes.pop("cases")}
    found = {file.stem: file for file in files if file.stem in entries}
    for file in found.values():
        check_keys(CaseFile(file).attributes, attributes, f"{file}: attributes", advice=advice)
    return notes, entries, found


def own_split(folder: Path, names: set[str], known: set[str]) -> dict[str, list[str]] | None:
    """The split of `splits.json`, if the user wrote one into the folder, cut to `names`; else None.

    Args:
        names: cases that a run takes.
        known: all cases of the folder.

    Raises:
        ValueError: it names a case that the folder does not hold.
    """
    file = folder / "splits.json"
    if not file.is_file():
        return None
    split, _ = read_splits(file)
    named = [name for part in PARTS for name in split[part]]
    if unknown := [name for name in named if name not in known]:
        raise ValueError(f"{file}: names {', '.join(unknown[:5])}, which {folder} does not hold")
    unlisted = sorted(names - set(named))
    if unlisted and distributed.is_main():
        print(f"{file}: leaves out {len(unlisted)} case(s): {', '.join(unlisted[:5])} ...")
    return {part: [name for name in split[part] if name in names] for part in PARTS}


def choose_split(
    folder: Path,
    parts: dict[str, str],
    patients: dict[str, str],
    known: set[str],
    *,
    seed: int,
    folds: int | None = None,
    fold: int | None = None,
    validation: bool = True,
) -> dict[str, list[str]]:
    """Who is in which part.

    By folds if they are asked for, else by splits.json, else by the parts that the data set was published
    with, else drawn by patient.

    Args:
        parts: {case: its published part, "train", "val" or "test"; "" without one}; the cases of a run.
        patients: {case: patient}.
        known: names of all cases of the folder.
        folds, fold: see `fold_split`.
        validation: False trains on the validation part, too.

    Raises:
        ValueError: see `own_split`, `check_split`, `fold_split`; or only some cases have a part.
    """
    if folds is not None:
        split = fold_split(patients, folds=folds, fold=fold, seed=seed)
    elif own := own_split(folder, set(parts), known):
        split = own
    elif any(parts.values()):
        if without := [name for name, part in parts.items() if not part]:
            raise ValueError(
                f"{folder}: {', '.join(without[:5])} belong(s) to no part, the other cases do; write "
                f"{folder / 'splits.json'} with the lists train, val and test"
            )
        split = {part: [name for name, of in parts.items() if of == part] for part in PARTS}
    elif validation:
        split = split_by_patient(patients, seed=seed)
    else:
        split = {"train": list(parts), "val": [], "test": []}
    if not validation:
        split = {"train": split["train"] + split["val"], "val": [], "test": split["test"]}
    check_split(split, patients, folder)
    return split


class Opened(NamedTuple):
    """What `open_folders` finds.

    Attributes:
        cases: {name: CaseFile}; of several folders the names begin with that of the folder.
        patients: {name: patient}.
        split: {"train", "val", "test"}: names; patients of one part only.
        spacing_mm: size of the voxels, z y x.
        data_path: the folders, in one string.
    """

    cases: dict[str, CaseFile]
    patients: dict[str, str]
    split: dict[str, list[str]]
    spacing_mm: list[float]
    data_path: str


def open_folders(
    paths: Sequence[str | Path],
    task: str,
    raw: str,
    expected: Mapping[str, Any],
    attributes: Mapping[str, Any],
    *,
    wanted: Callable[[dict], bool] = lambda entry: True,
    wish: str = "",
    patient_pattern: str | None = None,
    **splitting,
) -> Opened:
    """Open one folder or several, whose cases train one network together.

    A folder whose cases all have the part "train" was published in one part: its validation part is drawn.

    Args:
        task, raw, expected, attributes: as of `read_cases`.
        wanted: whether a case takes part, by its entry, with its "part".
        wish: the flag that decides that, for the message where no case is left.
        patient_pattern: as of `patients_of`.
        splitting: the keyword arguments of `choose_split`.

    Raises:
        FileNotFoundError, ValueError: as `read_cases`, `patients_of`, `choose_split`; no case is wanted, none
            is left to train on, two folders have one name, or voxels of different sizes.
    """
    folders = [Path(path) for path in paths]
    listed = " ".join(map(str, paths))
    if len({folder.resolve().name for folder in folders}) < len(folders):
        raise ValueError(f"--data_path {listed}: two folders of one name; rename one")
    cases, patients, spacings = {}, {}, {}
    split: dict[str, list[str]] = {part: [] for part in PARTS}
    for folder in folders:
        notes, entries, files = read_cases(folder, task, raw, expected, attributes)
        spacings[folder] = notes["spacing_mm"]
        chosen = {name: entries[name] for name in files if wanted(entries[name])}
        if not chosen:
            raise ValueError(f"{folder}: {len(files)} cases, but none of {wish}")
        prefix = f"{folder.resolve().name}/" if len(folders) > 1 else ""
        of_case = patients_of(list(chosen), patient_pattern)
        has_parts = any(entry["part"] != "train" for entry in chosen.values())
        parts = {name: entry["part"] if has_parts else "" for name, entry in chosen.items()}
        for part, names in choose_split(folder, parts, of_case, set(entries), **splitting).items():
            split[part] += [prefix + name for name in names]
        patients |= {prefix + name: prefix + patient for name, patient in of_case.items()}
        cases |= {prefix + name: CaseFile(files[name]) for name in chosen}
    if len({tuple(spacing) for spacing in spacings.values()}) > 1:
        sizes = "; ".join(f"{folder}: {spacing}" for folder, spacing in spacings.items())
        raise ValueError(f"voxels of different sizes (mm, z y x): {sizes}; preprocess with one --spacing")
    if not split["train"]:
        raise ValueError(f"{listed}: no training case")
    data_path = " ".join(str(folder.resolve()) for folder in folders)
    return Opened(cases, patients, split, next(iter(spacings.values())), data_path)


def class_frequency(cases: Iterable[CaseFile], num_classes: int) -> np.ndarray:
    """(num_classes,) share of each class among the voxels of the cases that have labels for it; 0 for a class
    without any.

    Args:
        cases: whose attributes hold "labelled", a list of labels, and "voxels", {label as text: voxels}.
    """
    found, seen = np.zeros(num_classes), np.zeros(num_classes)
    for case in cases:
        voxels = {int(label): count for label, count in case.attributes["voxels"].items()}
        size = np.prod(case.shape)
        for label in case.attributes["labelled"]:
            found[label] += voxels.get(label, 0)
            seen[label] += size
        found[0] += size - sum(voxels.values())
        seen[0] += size
    return found / np.maximum(seen, 1)
