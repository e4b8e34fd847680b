"""Which files of a folder in VerSe's layout belong together, and how its two editions become one.

    verse19/dataset-01training/rawdata/sub-verse004/sub-verse004_ct.nii.gz
    verse19/dataset-01training/derivatives/sub-verse004/sub-verse004_seg-vert_msk.nii.gz
    verse19/dataset-01training/derivatives/sub-verse004/sub-verse004_seg-subreg_ctd.json    or seg-vb_ctd

The folders `verse19` and `dataset-01training` may be left out. Between the subject and the kind of file there
may be parts such as `_dir-sag` (orientation) and `_split-verse155` (one of several scans of a patient).
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.foreign import foreign_files, foreign_hint
from common.messages import warn
from common.splits import natural_key

PARTS = ("training", "validation", "test")
KINDS = {
    "image": r"_ct(_0000)?\.nii(\.gz)?$",
    "mask": r"_seg-vert_msk\.nii(\.gz)?$",
    "centroids": r"_seg-(subreg|vb)_ctd\.json$",
}


@dataclass(frozen=True)
class Case:
    """One scan of one patient.

    Attributes:
        subject: the patient, such as sub-verse004; what a split has to keep together.
        name: the scan, such as sub-verse004_dir-sag; different for each case.
        mask, centroids: None where the data set does not have the file.
        part: training, validation or test, None outside of a dataset-... folder.
        edition: 19, 20 or None if the folders do not tell.
    """

    subject: str
    name: str
    image: Path
    mask: Path | None = None
    centroids: Path | None = None
    part: str | None = None
    edition: int | None = None


def find_cases(folder: str | Path, editions: tuple[int, ...] = (19, 20)) -> list[Case]:
    """All scans of a folder by natural order of their names; two editions are merged.

    Args:
        folder: one edition (with dataset-01training, ... or with rawdata and derivatives), or the folder
            above verse19 and verse20.
        editions: which of verse19 and verse20 to take where both are.

    Raises:
        FileNotFoundError: the folder, `rawdata` in it, or the wanted edition is missing.
        ValueError: lists masks without a scan, two files of one kind for one scan, or patients in two parts
            of one edition.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; verse_spine/download.py fetches the data")
    roots = [folder] if (folder / "rawdata").is_dir() else []
    roots = roots or sorted(
        p.parent for depth in ("*", "*/*", "*/*/*") for p in folder.glob(f"{depth}/rawdata")
    )
    by_edition: dict[int | None, list[Case]] = {}
    for root in (
        root for root in roots if not any(p.startswith(".") for p in root.relative_to(folder).parts)
    ):
        edition = _edition(root)
        by_edition.setdefault(edition, []).extend(_cases_of(root, edition))
    if not any(by_edition.values()):
        raise FileNotFoundError(
            f"{folder}: no scan rawdata/sub-*/*_ct.nii.gz in it or in its dataset-... folders; give the "
            f"folder above dataset-01training, or that above verse19 and verse20{foreign_hint(folder)}"
        )
    for cases in by_edition.values():
        _check(cases, folder)
    unknown = by_edition.pop(None, [])
    if unknown and by_edition:
        raise ValueError(
            f"{folder}: {unknown[0].image} lies outside of the folders verse19 and verse20 beside it; give "
            "one edition, or move it into its edition's folder"
        )
    chosen = [by_edition.get(edition, []) for edition in (19, 20) if edition in editions]
    merged = merge_editions(*chosen) if len(chosen) == 2 else sum(chosen, [])
    cases = unknown or merged
    if not cases:
        raise FileNotFoundError(
            f"{folder}: holds the edition(s) {sorted(by_edition)}, not {sorted(editions)}"
        )
    return sorted(cases, key=lambda case: natural_key(case.name))


def merge_editions(cases19: list[Case], cases20: list[Case]) -> list[Case]:
    """The cases of both editions in one list, in which each scan is found once and each patient in one part.

    VerSe20 counts where the two differ: a scan that both have is taken from it, as its annotation is newer;
    and a patient that both have belongs, with all scans, to the part in which VerSe20 has the patient.
    (VerSe20 leaves out scans that VerSe19 holds, so only the two together are the whole data set.)
    """
    names = {case.name for case in cases20}
    parts = {case.subject: case.part for case in cases20}
    only19 = [
        replace(case, part=parts.get(case.subject, case.part)) for case in cases19 if case.name not in names
    ]
    return sorted([*only19, *cases20], key=lambda case: natural_key(case.name))


def _edition(root: Path) -> int | None:
    pattern = r"(?:dataset-)?verse-?(?:20)?(19|20)(?:training|validation|test)?"
    found = [re.fullmatch(pattern, part.lower()) for part in root.parts[-3:]]
    return next((int(match[1]) for match in reversed(found) if match), None)


def _part(root: Path) -> str | None:
    pattern = rf"(?:dataset-)?(?:verse\d+)?(?:0\d)?[-_]?({'|'.join(PARTS)})"
    match = re.fullmatch(pattern, root.name.lower())
    return match[1] if match else None


def _cases_of(root: Path, edition: int | None) -> list[Case]:
    files: dict[str, dict[str, Path]] = {}
    problems = []
    for folder, kinds in (("rawdata", ("image",)), ("derivatives", ("mask", "centroids"))):
        if foreign := foreign_files((root / folder).rglob("[!.]*")):
            warn(f"{root / folder}: left out are {foreign}")
        for path in sorted((root / folder).rglob("*")):
            for kind in kinds:
                match = re.search(KINDS[kind], path.name, re.IGNORECASE)
                if not match or path.name.startswith("."):  # macOS resource files are named ._...
                    continue
                of_scan = files.setdefault(path.name[: match.start()], {})
                if kind in of_scan and kind == "centroids":
                    continue  # `subreg` before `vb`: they sort that way
                if kind in of_scan:
                    problems.append(f"{of_scan[kind]} and {path} are the same")
                of_scan[kind] = path
    problems += [f"no scan for {of['mask']}" for of in files.values() if "mask" in of and "image" not in of]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"{root}: {'; '.join(problems[:10])}{more}. Fetch what is missing or move the files away"
        )
    return [
        Case(name.split("_")[0], name, part=_part(root), edition=edition, **of)
        for name, of in files.items()
        if "image" in of
    ]


def _check(cases: list[Case], folder: Path) -> None:
    places: dict[str, set] = {}
    for case in cases:
        places.setdefault(case.subject, set()).add(case.part)
    twice = [
        f"{subject} ({', '.join(map(str, parts))})" for subject, parts in places.items() if len(parts) > 1
    ]
    names = [case.name for case in cases]
    if twice or len(set(names)) < len(names):
        twice = twice or sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"{folder}: in more than one place: {', '.join(sorted(twice)[:10])}; a patient belongs to one "
            "part. Remove the copies"
        )
