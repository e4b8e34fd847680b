"""The structures that this task segments in T1 MRI, by data set."""

from argparse import ArgumentParser
from typing import NamedTuple

import numpy as np

from common.class_metrics import Structures

NUM_CLASSES = 3  # both data sets have two labels, and the background


class DataSet(NamedTuple):
    """What is particular to a data set.

    Attributes:
        structures: names and colours of its labels 1 and 2.
        sides: pairs of labels that change places when left and right are exchanged.
        localised: whether the scans show whole heads, in which a small network finds the structures first.
        volume_mm3: of one label: below the first and above the second a volume is hardly that of an adult.
    """

    structures: Structures
    sides: tuple[tuple[int, int], ...]
    localised: bool
    volume_mm3: tuple[float, float]


COLORS = np.array([(0, 0, 0), (235, 90, 60), (60, 140, 235)], np.uint8)  # RGB by label

DATASETS = {
    # Drawn by hand an amygdala of an adult has 800 to 2,000 mm3, by FreeSurfer up to 2,500.
    "Amygdala": DataSet(
        Structures({1: "left amygdala", 2: "right amygdala"}, COLORS, nsd_mm=(0.5, 1.0)),
        sides=((1, 2),),
        localised=True,
        volume_mm3=(500, 3000),
    ),
    "Hippocampus": DataSet(
        Structures({1: "anterior hippocampus", 2: "posterior hippocampus"}, COLORS, nsd_mm=(0.5, 1.0)),
        sides=(),
        localised=False,
        volume_mm3=(500, 4000),
    ),
}


def side_columns(dataset: DataSet) -> dict[int, str]:
    """{label: its column in volumes.csv}: left_mm3 and right_mm3 where the labels are the two sides."""
    names = dataset.structures.names.items()
    words = {label: name.split()[:1] if dataset.sides else name.split() for label, name in names}
    return {label: f"{'_'.join(of_label)}_mm3" for label, of_label in words.items()}


def add_dataset_flag(parser: ArgumentParser) -> None:
    """--dataset of the scripts of this task."""
    parser.add_argument(
        "--dataset",
        choices=list(DATASETS),
        default="Amygdala",
        help="what the labels 1 and 2 are: left and right Amygdala, or anterior and posterior Hippocampus",
    )
