"""What is wrong with a data set of scans and labels, told before hours are spent on it.

Problems make a data set unfit: a file that is missing, unreadable or on another grid, numbers that are no
labels, the same content twice, what lies on the wrong side. Remarks are worth a look: specks of a few voxels,
very thin scans, CT whose values do not look like HU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.conversion import failure_reason
from common.files import make_folder
from common.hu import why_not_hu
from common.label_measures import LabelMeasure, measure_labels, why_not_labels
from common.nifti import load_label, load_nifti
from common.pairs import content_hash, why_not_a_pair, why_too_thin
from common.tables import write_table


@dataclass
class Checked:
    """What one case holds, and what is wrong with it.

    Attributes:
        row: its row of the table: shape, voxel size, orientation, labels; more may be added.
        problems, remarks: sentences.
        present: numbers of the labels in its label map; labelled: of those it was annotated with.
        hashes: of the content of its "scan" and "label", as far as they can be read.
    """

    row: dict
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    labelled: Sequence[int] = ()
    hashes: dict[str, str] = field(default_factory=dict)


def check_case(
    image: Path | None,
    label: Path | None,
    names: Mapping[int, str],
    *,
    labelled: Sequence[int],
    needs: Sequence[str] = ("scan", "label"),
    right_and_left: Sequence[tuple[int, int]] = (),
    speck_voxels: int = 10,
    is_ct: bool = False,
) -> Checked:
    """Check one case; each of its files is read once, and whatever is wrong with it becomes a sentence.

    Args:
        image, label: NIfTI files; None for one that the data set does not have.
        names: {number: name} of all labels of the data set.
        labelled: those that this case was annotated with; none of them need be present.
        needs: which of the two files the case has to have.
        right_and_left: pairs of labels of which the first lies to the right of the second in every patient.
        speck_voxels: see `specks`.
        is_ct: whether the values must look like HU.
    """
    checked = Checked({}, labelled=labelled if label is not None else ())
    if image is None and "scan" in needs:
        checked.problems.append(f"{label}: a label without a scan of that name")
    if label is None and "label" in needs:
        checked.problems.append(f"{image}: a scan without a label of that name")
    scan = _read(load_nifti, image, checked)
    target = _read(load_label, label, checked)
    if scan is not None:
        checked.hashes["scan"] = content_hash(scan.array)
        suspicions = (why_too_thin(scan), why_not_hu(scan.array) if is_ct else "")
        checked.remarks += [text for text in suspicions if text]
    if scan is not None and target is not None and (difference := why_not_a_pair(scan, target)):
        checked.problems.append(difference)
    if target is not None:
        if unknown := why_not_labels(target.array, names, labelled):
            checked.problems.append(f"{label}: {unknown}")
        measures = {n: m for n, m in measure_labels(target.array).items() if n in names}
        checked.present = sorted(measures)
        if measures:  # empty maps are all the same
            checked.hashes["label"] = content_hash(target.array)
        checked.problems += wrong_sides(measures, target.affine, names, right_and_left)
        checked.remarks += specks(measures, names, speck_voxels)
    known = scan if scan is not None else target
    shape, spacing_mm = (known.shape, known.spacing_mm) if known else ((None,) * 3, (None,) * 3)
    checked.row |= {f"shape_{axis}": n for axis, n in zip("zyx", shape, strict=True)}
    checked.row |= {f"spacing_{axis}_mm": mm for axis, mm in zip("zyx", spacing_mm, strict=True)}
    checked.row["orientation"] = known.orientation if known else None
    checked.row["labels"] = " ".join(map(str, checked.present))
    return checked


def _read(load, path: Path | None, checked: Checked):
    """The file, or None if there is none or it cannot be read; the reason goes to the problems."""
    if path is None:
        return None
    try:
        return load(path)
    except (ValueError, OSError) as error:
        checked.problems.append(failure_reason(error))
        return None


def wrong_sides(
    measures: Mapping[int, LabelMeasure],
    affine: np.ndarray,
    names: Mapping[int, str],
    right_and_left: Sequence[tuple[int, int]],
) -> list[str]:
    """A sentence if a label lies left of one that it should lie right of; empty if none does.

    Args:
        measures: of the labels of a map (z, y, x) in RAS+; affine: (4, 4) of it, voxel (x, y, z) to mm.
        right_and_left: see `check_case`; pairs of which one is absent tell nothing.
    """
    right_mm = {n: float((affine @ [*m.centre[::-1], 1.0])[0]) for n, m in measures.items()}
    pairs = [(a, b) for a, b in right_and_left if a in right_mm and b in right_mm]
    wrong = [(a, b) for a, b in pairs if right_mm[a] < right_mm[b]]
    if not wrong:
        return []
    listed = ", ".join(f"{names[a]} left of {names[b]}" for a, b in wrong)
    cause = "two labels are exchanged"
    if len(wrong) == len(pairs):
        cause = "the file is mirrored, its labels are exchanged, or the patient has situs inversus"
    return [f"on the wrong side: {listed}: {cause}"]


def specks(measures: Mapping[int, LabelMeasure], names: Mapping[int, str], speck_voxels: int) -> list[str]:
    """A sentence for each label with parts below `speck_voxels` beside its largest, or so small itself."""
    sentences = []
    for n, measure in measures.items():
        small = measure.specks(speck_voxels)
        if measure.pieces[0] < speck_voxels:
            sentences.append(f"{names[n]}: {measure.voxels} voxel(s) in all")
        elif small:
            sentences.append(f"{names[n]}: {len(small)} speck(s) of up to {max(small)} voxel(s)")
    return sentences


def note_duplicates(checked: Mapping[str, Checked]) -> None:
    """Add a problem to each case, by its title, whose scan or label has the content of an earlier one."""
    first: dict[tuple[str, str], str] = {}
    for title, case in checked.items():
        for content in case.hashes.items():
            if (other := first.setdefault(content, title)) != title:
                case.problems.append(f"its {content[0]} is the same as that of {other}")


def report(
    checked: Mapping[str, Checked], problems: Sequence[str], names: Mapping[int, str], out: str | Path | None
) -> int:
    """Print voxel sizes, how often each label is present, remarks and problems; returns how many problems.

    Args:
        checked: {title of a case: what was found}; duplicates are noted here.
        problems: sentences about the data set as a whole.
        names: {number: name} of the labels as they are to be printed.
        out: folder that check.csv is written to, with a row for each case; None = no table.
    """
    note_duplicates(checked)
    _print_summary(list(checked.values()), names)
    remarks = [f"{title}: {text}" for title, case in checked.items() for text in case.remarks]
    problems = [*problems, *(f"{title}: {text}" for title, case in checked.items() for text in case.problems)]
    if out and checked:
        texts = [
            {"problems": "; ".join(c.problems), "remarks": "; ".join(c.remarks)} for c in checked.values()
        ]
        rows = [case.row | text for case, text in zip(checked.values(), texts, strict=True)]
        write_table(make_folder(out) / "check.csv", rows)
    for kind, lines in (("remark(s)", remarks), ("problem(s)", problems)):
        print(f"{len(lines)} {kind}{':' if lines else ''}")
        for line in lines:
            print(f"  {line}")
    return len(problems)


def _print_summary(checked: Sequence[Checked], names: Mapping[int, str]) -> None:
    sizes = [[c.row[f"spacing_{axis}_mm"] for axis in "zyx"] for c in checked if c.row["shape_z"]]
    if sizes:
        print("voxel size in mm: lowest, median, highest")
        columns = [*np.transpose(sizes), np.max(sizes, axis=1)]
        for name, mm in zip(
            ("z", "y", "x", "slice thickness (the largest of the three)"), columns, strict=True
        ):
            print(f"  {name}: {mm.min():.3g}, {np.median(mm):.3g}, {mm.max():.3g}")
    print("label: cases in which it is present, of those in which it is labelled")
    for n, name in names.items():
        labelled = [case for case in checked if n in case.labelled]
        print(f"  {n:2} {name}: {sum(n in case.present for case in labelled)} of {len(labelled)}")
