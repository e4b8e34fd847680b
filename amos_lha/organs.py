"""The 15 organs of AMOS22: their numbers, size groups, colours, tolerances, and which are two sides."""

from typing import NamedTuple

import numpy as np

from common.class_metrics import Structures


class Organ(NamedTuple):
    """What is known of an organ beforehand.

    Attributes:
        group: by size and difficulty: small = a median volume below 75 mL, large = 190 mL and more, and the
            kidneys, which are a little smaller but as easy.
        pieces: which pieces of a prediction are right: "one" = the largest; "long" = also others, since
            networks tear what is long and thin; "any", where gas and food part an organ.
        tolerance_mm: distance between surfaces that counts as agreement: those of the FLARE challenge;
            bladder and prostate/uterus, which FLARE does not have, are ours.
        color: RGB of pictures.
    """

    name: str
    group: str
    pieces: str
    tolerance_mm: float
    color: tuple[int, int, int]


# By AMOS's numbers. Its dataset.json spells 8 "arota" and calls 9 "postcava".
TABLE = {
    1: Organ("spleen", "large", "one", 3.0, (235, 125, 40)),
    2: Organ("right kidney", "large", "one", 3.0, (60, 120, 220)),
    3: Organ("left kidney", "large", "one", 3.0, (70, 200, 230)),
    4: Organ("gallbladder", "small", "one", 2.0, (60, 170, 70)),
    5: Organ("esophagus", "small", "long", 3.0, (250, 200, 60)),
    6: Organ("liver", "large", "one", 5.0, (160, 90, 50)),
    7: Organ("stomach", "large", "any", 5.0, (240, 140, 180)),
    8: Organ("aorta", "medium", "long", 2.0, (230, 30, 30)),
    9: Organ("inferior vena cava", "medium", "long", 2.0, (40, 60, 160)),
    10: Organ("pancreas", "medium", "long", 5.0, (250, 240, 130)),
    11: Organ("right adrenal gland", "small", "one", 2.0, (110, 40, 160)),
    12: Organ("left adrenal gland", "small", "one", 2.0, (245, 120, 245)),
    13: Organ("duodenum", "small", "any", 7.0, (140, 200, 90)),
    14: Organ("bladder", "medium", "one", 3.0, (120, 220, 180)),
    15: Organ("prostate/uterus", "medium", "one", 5.0, (180, 160, 220)),
}
NUM_CLASSES = 1 + len(TABLE)  # with the background
SPLEEN, LIVER = 1, 6
SIDES = ((2, 3), (11, 12))  # labels that change places when left and right are exchanged
WINDOW_HU = (-160, 240)  # of pictures: soft tissue, level 40, width 400

ORGANS = {number: organ.name for number, organ in TABLE.items()}
GROUPS = {
    group: tuple(number for number, organ in TABLE.items() if organ.group == group)
    for group in ("small", "medium", "large")
}
COMPACT, PARTED = (
    tuple(number for number, organ in TABLE.items() if organ.pieces == pieces) for pieces in ("one", "long")
)
TOLERANCES_MM = {number: organ.tolerance_mm for number, organ in TABLE.items()}
COLORS = np.array([(0, 0, 0), *(organ.color for organ in TABLE.values())], np.uint8)  # background first
STRUCTURES = Structures(ORGANS, COLORS, GROUPS, TOLERANCES_MM)


def group_of(organ: int) -> str:
    """The size group of an organ number."""
    return TABLE[organ].group
