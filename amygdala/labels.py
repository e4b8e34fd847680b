"""From the numbers of a label file to the labels 1 and 2."""

import contextlib
from argparse import ArgumentParser

import numpy as np

from amygdala.structures import DataSet
from common.files import listed
from common.label_measures import numbers_in
from common.nifti import Scan
from common.sides import split_sides

ASEG = {18: 1, 54: 2}  # FreeSurfer's, FastSurfer's and SynthSeg's numbers of the left and the right amygdala
LABEL_MAPS = ("auto", "aseg", "manual", "one_label")


def add_label_map_flag(parser: ArgumentParser, files: str) -> None:
    """--label_map; `files` are those whose numbers it tells the meaning of."""
    parser.add_argument(
        "--label_map",
        default="auto",
        metavar="MAP",
        help=f"what the numbers in {files} mean: aseg (FreeSurfer's 18 left, 54 right), manual (1 and 2), "
        "one_label (one number for both sides, which are told by their place), a map such as 1=32,2=31 "
        "(label 1 has the number 32 in the files), or auto, which goes by the numbers found in each file",
    )


def parse_label_map(text: str, data_set: DataSet) -> str | dict[int, int]:
    """The value of --label_map: a word of LABEL_MAPS, or {number in the files: label} of 1=32,2=31.

    Raises:
        ValueError: neither, or a word that does not suit the data set.
    """
    if text in LABEL_MAPS:
        if text in ("aseg", "one_label") and not data_set.sides:
            names = " and ".join(data_set.structures.names.values())
            raise ValueError(f"--label_map {text}: tells left from right, not {names}; choose manual")
        return text
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    if all(label.strip().isdecimal() and number.strip().isdecimal() for label, number in pairs):
        mapping = {int(number): int(label) for label, number in pairs}
        if sorted(mapping.values()) == [1, 2] and 0 not in mapping:
            return mapping
    raise ValueError(
        f"--label_map {text}: expected {', '.join(LABEL_MAPS)}, or which numbers of the files are the labels "
        "1 and 2, such as 1=32,2=31"
    )


def map_labels(
    drawn: Scan, scan: Scan | None, label_map: str | dict[int, int], data_set: DataSet
) -> np.ndarray:
    """(z, y, x) uint8 with the labels 1 and 2 of a label file.

    "auto" goes by the numbers in the file: 18 and 54 are FreeSurfer's, 1 and 2 are taken as they are, and the
    sides of a single number are told by their place. A map of FreeSurfer or of one's own shows many
    structures, of which the others are left out.

    Args:
        drawn: whole numbers, on the grid of the scan.
        scan: of the head; None: sides are told by the pieces' distance alone, see `split_sides`.
        label_map: as `parse_label_map` returns it.

    Raises:
        ValueError: numbers outside the map, nothing is labelled, or sides that cannot be told; with the file.
    """
    try:
        return _mapped(drawn, scan, label_map, data_set)
    except ValueError as error:
        raise ValueError(f"{drawn.path}: {error}") from error


def map_mask(mask: Scan, is_truth: bool, label_map: str | dict[int, int], data_set: DataSet) -> np.ndarray:
    """As `map_labels`, of a mask that is scored: there may be nothing in it, or one side only.

    A `label_map` is that of the true masks; predictions may hold 1 and 2, or FreeSurfer's numbers.
    """
    found, label_map = numbers_in(mask.array), label_map if is_truth else "auto"
    if label_map == "auto" and found == [1] and is_truth and data_set.sides:
        with contextlib.suppress(ValueError):  # else it is the left side alone
            return map_labels(mask, None, "one_label", data_set)
    if label_map == "auto" and found == [1]:
        label_map = "manual"
    return map_labels(mask, None, label_map, data_set) if found else mask.array


def _mapped(
    label_file: Scan, scan: Scan | None, label_map: str | dict[int, int], data_set: DataSet
) -> np.ndarray:
    drawn = label_file.array
    found = numbers_in(drawn)
    if not found:
        raise ValueError("nothing is labelled in it; draw the label, or move the case away")
    if label_map == "auto":
        label_map = _map_of(found, data_set)
    if label_map == "one_label":
        if len(found) > 1:
            raise ValueError(f"holds the labels {listed(found)}; --label_map one_label expects a single one")
        return split_sides(drawn > 0, label_file.affine, scan)
    if label_map == "manual":
        if outside := [number for number in found if number not in (1, 2)]:
            raise ValueError(f"label value(s) {listed(outside)} outside the map; expected 1 and 2 only")
        return drawn.astype(np.uint8)
    mapping = ASEG if label_map == "aseg" else label_map
    if not set(mapping) & set(found):
        raise ValueError(f"holds none of {listed(list(mapping))}; found {listed(found)}")
    new_numbers = np.zeros(max(*found, *mapping) + 1, np.uint8)
    for number, label in mapping.items():
        new_numbers[number] = label
    return new_numbers[drawn]


def _map_of(found: list[int], data_set: DataSet) -> str:
    if data_set.sides and (set(ASEG) <= set(found) or set(found) <= set(ASEG)):
        return "aseg"
    if set(found) <= {1, 2} and (2 in found or not data_set.sides):
        return "manual"
    if data_set.sides and len(found) == 1:
        return "one_label"
    raise ValueError(
        f"label value(s) {listed(found)} fit no label map; say with --label_map which numbers the labels "
        "have: aseg, or one such as 1=32,2=31"
    )
