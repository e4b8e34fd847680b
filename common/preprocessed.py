"""A folder that a task's preprocess.py wrote: its cases, and who is in which part."""

from pathlib import Path

from common import distributed
from common.files import read_json
from common.splits import PARTS, check_split, fold_split, read_splits, split_by_patient


def read_cases(folder: str | Path, task: str, raw: str) -> tuple[dict, dict[str, dict], dict[str, Path]]:
    """What preprocessing noted, its entry of each case, and the HDF5 file of each; the latter two by name.

    Args:
        folder: with preprocessing.json and cases/*.h5. A file without an entry was not finished; it is left
            out.
        task: folder of preprocess.py, for the advice.
        raw: the words of its command that name the raw data, for the advice.

    Raises:
        FileNotFoundError: no such folder, or it is not one of preprocess.py.
        ValueError: preprocessing.json is damaged.
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
    entries = {entry["name"]: entry for entry in notes.pop("cases")}
    return notes, entries, {file.stem: file for file in files if file.stem in entries}


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
