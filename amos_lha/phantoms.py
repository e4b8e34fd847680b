"""Synthetic abdomens in AMOS22's layout, so that the demo and the tests need no download.

CT with the 15 organs at their usual places, sides and volumes, and what could be taken for them: bowel,
heart, muscles, bones. They model no disease; scores on them mean nothing for patients.
"""

from pathlib import Path

import numpy as np

from amos_lha.organs import ORGANS
from common.phantoms import (
    Canvas,
    PhantomCase,
    ellipsoid_mm,
    noisy_hu,
    oval_mm,
    voxel_axes_mm,
    write_data_set,
)

ORIENTATIONS = ("LAS", "LPS", "RAS")  # of the stored files, in turn
THICKNESS_MM = (5.0, 1.5, 5.0, 3.0)  # of the slices, in turn; most AMOS scans have 5 mm
ABSENT = {2: (4,), 4: (15,)}  # organs that the third and the fifth of five patients do not have

# Shapes in mm of an average body, RAS: z up from the kidneys' level, y to the front, x to the right.
# Chains of rounded tubes: (z, y, x, radius) at each joint.
CHAINS = {
    7: ((74, -14, -62, 27), (44, 24, -68, 29), (8, 52, -46, 23), (-6, 58, -10, 18), (0, 46, 20, 13)),
    8: ((165, -34, -12, 13), (40, -33, -9, 11.5), (-92, -30, -3, 9)),
    9: ((100, -8, 22, 12), (60, -16, 24, 12), (-20, -29, 19, 12), (-96, -30, 14, 11)),
    10: ((-28, 16, 36, 16), (-2, 26, 10, 11), (14, 18, -32, 13), (36, -14, -84, 11)),
    13: ((2, 42, 32, 11), (2, 24, 52, 11), (-46, 4, 54, 11), (-58, 0, 20, 10.5), (-52, 4, -22, 10)),
    4: ((6, 38, 52, 7), (-14, 58, 64, 15), (-22, 66, 67, 14)),
    5: ((165, -24, -3, 9), (112, -16, -8, 9.5), (80, 0, -34, 10)),
    11: ((62, -34, 30, 4), (34, -44, 40, 5.2), (58, -34, 31, 4.4), (32, -30, 42, 4.6)),
    12: ((58, -26, -32, 4.2), (30, -22, -46, 5), (56, -26, -33, 4.2), (30, -42, -38, 4.8)),
}
# Ellipsoids: (z, y, x) of the centre, half axes.
ELLIPSOIDS = {
    6: (((30, 8, 84), (78, 82, 66)), ((56, 44, 8), (30, 32, 86))),
    1: (((44, -32, -106), (58, 46, 30)),),
    2: (((-24, -46, 60), (54, 26, 27)),),
    3: (((-10, -46, -60), (56, 26, 27)),),
    14: (((-222, 36, 0), (33, 33, 42)),),
    15: (((-262, 22, 0), (21, 21, 27)), ((-204, -12, 4), (31, 23, 24))),  # prostate, uterus
}
ORDER = (6, 7, 1, 2, 3, 14, 10, 13, 15, 9, 8, 4, 5, 11, 12)  # the last one keeps a voxel that two would have
# By organ number: HU, their standard deviation between patients, and within an organ.
HU = (0, 115, 165, 165, 12, 48, 105, 40, 155, 135, 92, 74, 74, 52, 8, 68)
BETWEEN_HU = (0, 12, 22, 22, 7, 10, 14, 14, 22, 20, 12, 12, 12, 12, 6, 10)
WITHIN_HU = (0, 9, 18, 18, 4, 12, 10, 18, 6, 9, 15, 9, 9, 18, 4, 12)
COLON = (
    ((-118, -12, 100, 18), (-40, -8, 104, 20), (-32, 34, 96, 17), (-62, 72, 40, 15), (-60, 76, -40, 15)),
    ((-60, 76, -40, 15), (4, 36, -108, 16), (-50, -18, -112, 15), (-130, -12, -102, 15)),
    ((-130, -12, -102, 15), (-176, 4, -60, 14), (-196, -30, -10, 15), (-232, -58, 0, 16), (-290, -48, 0, 14)),
)


def _paint_body(rng: np.random.Generator, scan: Canvas) -> np.ndarray:
    """Everything but the organs; returns the distance to the cavity below the diaphragm, where organs lie."""
    z, y, x = scan.grid
    fat_mm = rng.uniform(8, 34)
    hips = 1 / (1 + np.exp((z + 170) / 18))  # 0 above the pelvis, 1 in it
    body_mm = oval_mm(y + 8, x, 118 + 0.7 * fat_mm, 156 + fat_mm, 2.3, 1 + 0.05 * hips)
    scan.add(body_mm, -104, 6)
    scan.add(body_mm + fat_mm * (1 - 0.3 * hips), 54, 9)
    cavity_mm = oval_mm(y - 4, x, 92, 136, 2.3, 1 - 0.38 * hips - 0.12 * np.clip((z - 90) / 60, 0, 1))
    scan.add(cavity_mm, -96, 9)
    for side in (-1, 1):  # muscles along the spine
        scan.add_chain([(160, -88, 30 * side, 21), (-190, -96, 30 * side, 19)], 52, 12)
        psoas = (10, -54, 34 * side, 11), (-130, -34, 48 * side, 21), (-250, 22, 80 * side, 18)
        scan.add_chain(psoas, 56, 8)

    # Lungs above the diaphragm, heart between them.
    dome = np.maximum(106 - 0.011 * (x - 62) ** 2, 97 - 0.011 * (x + 62) ** 2) - 0.011 * (y - 5) ** 2
    heart_mm = ellipsoid_mm((z, y, x), (138, 30, -28), (42, 46, 58))
    middle_mm = np.minimum(heart_mm, oval_mm(y + 30, x, 58, 27))
    scan.add(np.maximum(cavity_mm, 0.7 * (dome - z)), 40, 10)
    lung_mm = np.maximum(np.maximum(cavity_mm + 3, 0.7 * (dome + 2 - z)), -middle_mm)
    scan.add(lung_mm, rng.uniform(-870, -800), 30)
    scan.add(np.maximum(heart_mm + 3, dome - z), rng.uniform(110, 150), 8)

    _paint_bones(rng, scan, cavity_mm)
    _paint_bowel(rng, scan)
    return np.maximum(cavity_mm, 0.7 * (z - dome)) + 1.5


def _paint_bones(rng: np.random.Generator, scan: Canvas, cavity_mm: np.ndarray) -> None:
    """Spine with discs and canal, down to the sacrum, and the ribs around the cavity."""
    z, y, x = scan.grid
    spine_y = -64 + 9 * np.exp(-(((z + 80) / 70) ** 2))
    below_mm = -240 - z
    disc = np.abs((z / 34 + rng.uniform()) % 1 - 0.5) < 0.12
    vertebra_mm = np.maximum(oval_mm(y - spine_y, x, 18, 23), below_mm)
    scan.add(vertebra_mm, np.where(disc, 85, 430))
    scan.add(vertebra_mm + 3, np.where(disc, 80, rng.uniform(140, 240)), 25)  # marrow
    behind_mm = np.maximum(np.abs(y - spine_y + 34) - 4, np.abs(x) - np.where(disc, 12, 34))
    spinous_mm = np.maximum(np.abs(x) - 3.5, np.abs(y - spine_y + 46) - 11)
    scan.add(np.maximum(np.minimum(behind_mm, spinous_mm), below_mm), 400)
    scan.add(np.maximum(oval_mm(y - spine_y + 25, x, 7, 10), below_mm), 30)
    angle = np.arctan2(np.abs(x), -y)  # 0 at the back, pi at the front
    across_mm = np.abs((z + 36 * angle) / 27 % 1 - 0.5) * 27
    rib_mm = np.maximum(np.abs(cavity_mm - 6) - 4, across_mm - 6)
    scan.add(np.maximum(rib_mm, 42 * angle - 38 - z), rng.uniform(380, 600))


def _paint_bowel(rng: np.random.Generator, scan: Canvas) -> None:
    """Colon and loops of the small bowel, filled with more or less fluid, contrast agent and gas."""
    for part in COLON:
        scan.add_chain(part, rng.uniform(0, 60), 40)
        scan.add_chain(np.subtract(part, (0, -4, 0, 8)), rng.choice([-700.0, -300.0, 40.0]), 120)
    for _ in range(9):
        loop = [np.array([rng.uniform(-170, -50), rng.uniform(12, 66), rng.uniform(-80, 80)])]
        for _ in range(10):
            loop.append((loop[-1] + rng.normal(0, 26, 3)).clip((-182, 6, -84), (-44, 74, 84)))
        scan.add_chain([(*point, rng.uniform(9, 13)) for point in loop], rng.uniform(25, 75), 20)


def abdomen_phantom(
    seed: int,
    *,
    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0),
    absent: tuple[int, ...] = (),
    noise_hu: float = 14.0,
) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic CT from the lungs' bases to the hips; the same arguments give the same scan.

    Args:
        spacing_mm: z y x.
        absent: numbers of organs that the patient does not have.
        noise_hu: standard deviation of the noise; 0 for none.

    Returns:
        image: int16 HU in [-1024, 3071], (z, y, x) RAS+.
        label: uint8, same shape, AMOS's numbers.
    """
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.93, 1.06)
    top, bottom = rng.uniform(132, 148) * size, rng.uniform(-298, -288) * size
    extent = top - bottom, rng.uniform(290, 315), rng.uniform(390, 410)
    shape = [round(mm / s) for mm, s in zip(extent, spacing_mm, strict=True)]
    axes_mm = voxel_axes_mm(shape, spacing_mm, ((top + bottom) / 2, -4, 0))
    scan = Canvas(rng, [a / size for a in axes_mm], float(np.mean(spacing_mm)) / size)
    outside_mm = _paint_body(rng, scan)
    shapes = ELLIPSOIDS | {15: ELLIPSOIDS[15][:1] if rng.random() < 0.5 else ELLIPSOIDS[15][1:]}
    for organ in ORDER:
        hu, shift = rng.normal(HU[organ], BETWEEN_HU[organ]), rng.normal(0, 1.5, 3)
        growth = np.exp(rng.normal(0, 0.1 if organ == 14 else 0.05))  # bladders are more or less full
        if organ in absent:
            continue
        if organ in CHAINS:
            stations = np.array(CHAINS[organ]) * (1, 1, 1, growth) + (*shift, 0)
            scan.add_chain(stations, hu, WITHIN_HU[organ], organ)
            if organ == 7:  # swallowed air, at the front of a lying patient
                scan.add_chain(stations[:3] + (4, 12, 0, -17), -850.0)
            continue
        distance_mm = np.minimum.reduce(
            [ellipsoid_mm(scan.grid, c + shift, growth * np.array(half)) for c, half in shapes[organ]]
        )
        if organ in (2, 3):  # the hilum, with fat and vessels, towards the middle
            (z, y, x), _ = shapes[organ][0]
            hilum_mm = ellipsoid_mm(scan.grid, (z, y + 6, x - 25 * np.sign(x)), (17, 12, 15))
            distance_mm = np.maximum(distance_mm, -hilum_mm)
        scan.add(np.maximum(distance_mm, outside_mm), hu, WITHIN_HU[organ], organ)
    return noisy_hu(rng, scan.image, noise_hu, blur=0.6), scan.label


def write_amos_phantoms(
    folder: str | Path, num_train: int = 9, num_val: int = 3, seed: int = 0, *, in_plane_mm: float = 2.8
) -> Path:
    """Write abdomen phantoms as AMOS22 lays out its scans, and return the folder.

        folder/imagesTr/amos_0001.nii.gz, ...   int16 HU     folder/imagesVa/...   validation cases
        folder/labelsTr/amos_0001.nii.gz, ...   uint8        folder/labelsVa/...
        folder/dataset.json

    Patients differ in build, slices (5, 3 or 1.5 mm), stored orientation and origin; every fifth has no
    gallbladder, every fifth neither prostate nor uterus.

    Args:
        num_train, num_val: 1 or more; each case is another patient.
        in_plane_mm: size of a voxel within a slice, about; AMOS has 0.6 to 0.9.

    Raises:
        FileExistsError: as of `write_data_set`, which does not write twice.
    """

    def make(index: int) -> PhantomCase:
        rng = np.random.default_rng([seed, index])
        side_mm = in_plane_mm * rng.uniform(0.93, 1.07)
        spacing_mm = THICKNESS_MM[index % len(THICKNESS_MM)], side_mm, side_mm
        absent = ABSENT.get(index % 5, ())
        image, label = abdomen_phantom(int(rng.integers(2**32)), spacing_mm=spacing_mm, absent=absent)
        orientation = ORIENTATIONS[index % len(ORIENTATIONS)]
        origin_mm = rng.uniform(-300, 100, 3)
        return PhantomCase(f"amos_{1 + index:04d}", image, label, spacing_mm, origin_mm, orientation)

    contents = {"phantoms": [num_train, num_val], "seed": seed, "in_plane_mm": in_plane_mm}
    parts = ["Tr"] * num_train + ["Va"] * num_val
    return write_data_set(Path(folder), contents, "synthetic abdomens", parts, ORGANS, make)
