"""The 15 organs of AMOS22: their numbers, size groups, colours, tolerances, and which are two sides."""

import numpy as np

from common.class_metrics import Structures

# AMOS's numbers. Its dataset.json spells 8 "arota" and calls 9 "postcava".
ORGANS = {
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",
    5: "esophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "inferior vena cava",
    10: "pancreas",
    11: "right adrenal gland",
    12: "left adrenal gland",
    13: "duodenum",
    14: "bladder",
    15: "prostate/uterus",
}
NUM_CLASSES = 1 + len(ORGANS)  # with the background
SPLEEN, LIVER = 1, 6
WINDOW_HU = (-160, 240)  # of pictures: soft tissue, level 40, width 400

# By size and difficulty: what has a median volume below 75 mL, or of 190 mL and more; the kidneys, a little
# smaller, are as easy as what is large.
GROUPS = {
    "small": (4, 5, 11, 12, 13),
    "medium": (8, 9, 10, 14, 15),
    "large": (1, 2, 3, 6, 7),
}

# Labels that change places when left and right are exchanged.
SIDES = ((2, 3), (11, 12))

# Of the first only the largest piece is right; the second are long and thin, so that networks tear them.
# Neither holds stomach (7) and duodenum (13), which gas and food part: small pieces are often right.
COMPACT = (1, 2, 3, 4, 6, 11, 12, 14, 15)
PARTED = (5, 8, 9, 10)

# Surface distance in mm that counts as agreement: those of the FLARE challenge; bladder and prostate/uterus,
# which FLARE does not have, are ours.
TOLERANCES_MM = {
    1: 3.0,
    2: 3.0,
    3: 3.0,
    4: 2.0,
    5: 3.0,
    6: 5.0,
    7: 5.0,
    8: 2.0,
    9: 2.0,
    10: 5.0,
    11: 2.0,
    12: 2.0,
    13: 7.0,
    14: 3.0,
    15: 5.0,
}

# RGB by organ number; the first is the background.
COLORS = np.array(
    [
        (0, 0, 0),
        (235, 125, 40),
        (60, 120, 220),
        (70, 200, 230),
        (60, 170, 70),
        (250, 200, 60),
        (160, 90, 50),
        (240, 140, 180),
        (230, 30, 30),
        (40, 60, 160),
        (250, 240, 130),
        (110, 40, 160),
        (245, 120, 245),
        (140, 200, 90),
        (120, 220, 180),
        (180, 160, 220),
    ],
    np.uint8,
)


STRUCTURES = Structures(ORGANS, COLORS, GROUPS, TOLERANCES_MM)


def group_of(organ: int) -> str:
    """The size group of an organ number."""
    return next(name for name, organs in GROUPS.items() if organ in organs)
