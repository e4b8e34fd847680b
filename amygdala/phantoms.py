"""Synthetic T1 heads in the layout that preprocess.py reads, so that the demo and the tests need no download.

Scalp, skull, folded grey and white matter, ventricles, hippocampi, cerebellum, eyes, and two amygdalae at
their places, of 1.0 to 1.9 mL; two sites whose scanners differ. They model no disease and no variant; scores
on them mean nothing for patients.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.phantoms import Canvas, PhantomCase, ellipsoid_mm, smooth_field, voxel_axes_mm, write_data_set

FIELD_MM = (172.0, 208.0, 176.0)  # z y x
NUMBERS = {1: "left amygdala", 2: "right amygdala", 18: "left amygdala", 54: "right amygdala"}
ORIENTATIONS = ("LIA", "RAS", "LAS", "LPS")  # of the stored files, in turn; FreeSurfer's first


class Site(NamedTuple):
    """A scanner and how its scans are labelled: grey values by tissue, and what disturbs them.

    Attributes:
        bias: largest share by which grey values vary slowly over the head.
        noise: standard deviation, as a share of the white matter's value.
        blur: sigma in voxels.
        labels: numbers of the left and the right amygdala in the label files.
        stripped: whether every second scan shows the brain only.
    """

    white: float
    grey: float
    fluid: float
    fat: float
    bias: float
    noise: float
    blur: float
    labels: tuple[int, int]
    stripped: bool


SITES = {
    "north": Site(720, 500, 150, 880, bias=0.15, noise=0.03, blur=0.3, labels=(1, 2), stripped=False),
    "south": Site(210, 150, 60, 190, bias=0.35, noise=0.05, blur=0.5, labels=(18, 54), stripped=True),
}
BONE = 0.12  # of the white matter's value
AMYGDALA_MM = (7.0, 8.0, 6.2)  # half axes z y x of an average one: 1,450 mm3
PLACE_MM = (-26.0, 14.0, 23.0)  # its middle, z y x from that of the brain; x to the right for the right one
VOLUME_MM3 = (1050.0, 1850.0)


def head_phantom(
    seed: int, site: str = "north", *, spacing_mm: tuple[float, float, float] = (2, 2, 2), stripped=False
) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic T1 of a head; the same arguments give the same scan.

    Args:
        site: a key of SITES.
        spacing_mm: z y x.
        stripped: blank everything but the brain, as skull stripping does.

    Returns:
        image: int16, 0 and more, (z, y, x) RAS+.
        label: uint8, same shape: 1 left amygdala, 2 right amygdala.
    """
    rng, scanner = np.random.default_rng(seed), SITES[site]
    shape = [round(mm / s) for mm, s in zip(FIELD_MM, spacing_mm, strict=True)]
    # The head lies a little elsewhere in each scan.
    axes_mm = voxel_axes_mm(shape, spacing_mm, rng.uniform(-6, 6, 3))
    scan = Canvas(rng, axes_mm, float(np.mean(spacing_mm)), bend_mm=1.5)
    scan.image[:] = 0
    z, y, x = scan.grid
    size = np.exp(rng.normal(0, 0.04))
    brain_mm = ellipsoid_mm((z, y, x), (0, 0, 0), size * np.array((60, 80, 65)))
    for side in (-1, 1):  # the temporal lobes reach below the rest
        lobe_mm = ellipsoid_mm((z, y, x), (-26, 8, 36 * side), size * np.array((22, 42, 24)))
        brain_mm = np.minimum(brain_mm, lobe_mm)
    _paint_head(rng, scan, scanner, brain_mm)
    in_brain = _paint_brain(rng, scan, scanner, brain_mm, size)
    for label, side in ((1, -1), (2, 1)):
        _paint_amygdala(rng, scan, scanner, label, side, size)
    return _scanned(rng, scan, scanner, in_brain if stripped else None), scan.label


def _paint_head(rng: np.random.Generator, scan: Canvas, scanner: Site, brain_mm: np.ndarray) -> None:
    """Neck, scalp, skull, eyes, and the fluid around the brain."""
    scalp_mm = rng.uniform(4, 9)
    scan.add_chain([(-40, -20, 0, 52), (-140, -30, 0, 55)], 0.7 * scanner.grey, 0.1 * scanner.grey)
    scan.add(brain_mm - 10 - scalp_mm, scanner.fat, 0.15 * scanner.fat)
    scan.add(brain_mm - 10, BONE * scanner.white, 0.04 * scanner.white)
    scan.add(brain_mm - 3, scanner.fluid)
    for side in (-1, 1):
        eye_mm = ellipsoid_mm(scan.grid, (-32, 86, 32 * side), (12, 12, 12))
        scan.add(eye_mm - 5, scanner.fat)
        scan.add(eye_mm, scanner.fluid)


def _paint_brain(
    rng: np.random.Generator, scan: Canvas, scanner: Site, brain_mm: np.ndarray, size: float
) -> np.ndarray:
    """Everything inside but the amygdalae; returns where the brain is."""
    z, y, x = scan.grid
    folds = smooth_field(rng, scan.axes_mm, 8)
    scan.add(np.maximum(brain_mm, 1.5 - np.abs(x)), scanner.grey, 0.05 * scanner.grey)
    white_mm = np.maximum(brain_mm + 7 + 5 * folds, 3 - np.abs(x))
    scan.add(white_mm, scanner.white, 0.03 * scanner.white)
    cerebellum_mm = ellipsoid_mm((z, y, x), (-46, -44, 0), (24, 28, 46))
    scan.add(cerebellum_mm - 2, scanner.fluid)
    scan.add(cerebellum_mm, 0.5 * (scanner.grey + scanner.white), 0.1 * scanner.grey)
    scan.add_chain([(0, -18, 0, 15), (-40, -14, 0, 13), (-110, -34, 0, 9)], scanner.white)
    ventricle = rng.uniform(3.5, 7.5)
    for side in (-1, 1):
        scan.add_chain(
            [(20, 32, 9 * side, ventricle), (22, -10, 12 * side, ventricle), (6, -38, 22 * side, ventricle)],
            scanner.fluid,
        )
        scan.add_chain(
            [(2, 8, 18 * side, 9), (2, -14, 16 * side, 10)], 0.6 * scanner.grey + 0.4 * scanner.white
        )
        scan.add_chain([(-22, 16, 14 * side, 4), (-26, -2, 12 * side, 4)], scanner.fluid)  # cistern
        stations = (-30, 2, 26 * side, 6.5), (-26, -14, 28 * side, 6), (-14, -28, 26 * side, 5)  # hippocampus
        scan.add_chain(np.multiply(stations, (size, size, size, 1)), scanner.grey, 0.05 * scanner.grey)
    return np.minimum(brain_mm, cerebellum_mm) < 3


def _paint_amygdala(
    rng: np.random.Generator, scan: Canvas, scanner: Site, label: int, side: int, size: float
) -> None:
    half = AMYGDALA_MM * np.exp(rng.normal(0, 0.05, 3))
    volume_mm3 = 4 / 3 * np.pi * np.prod(half)
    half *= (np.clip(volume_mm3, *VOLUME_MM3) / volume_mm3) ** (1 / 3)
    centre = size * np.array(PLACE_MM) * (1, 1, side) + rng.normal(0, 1, 3)
    distance_mm = ellipsoid_mm(scan.grid, centre, half)
    scan.add(distance_mm - 1.5, scanner.white)  # a thin border, as of the hippocampus
    scan.add(distance_mm, 0.96 * scanner.grey, 0.04 * scanner.grey, label)


def _scanned(rng: np.random.Generator, scan: Canvas, scanner: Site, inside: np.ndarray | None) -> np.ndarray:
    """The image as it is stored: bias field, blur, and the noise of a magnitude image; int16."""
    bias = smooth_field(rng, scan.axes_mm, 90)
    image = ndimage.gaussian_filter(scan.image, scanner.blur) * (1 + scanner.bias * np.tanh(bias))
    noise = scanner.noise * scanner.white * rng.standard_normal((2, *image.shape), np.float32)
    image = np.hypot(image + noise[0], noise[1])
    if inside is not None:
        image[~inside] = 0
    return np.rint(image).astype(np.int16)


def write_head_phantoms(
    folder: str | Path, num_train: int = 8, num_test: int = 2, seed: int = 0, *, voxel_mm: float = 2.0
) -> Path:
    """Write head phantoms in the layout that preprocess.py reads, and return the folder.

        folder/imagesTr/sub-01.nii.gz, ...   int16          folder/imagesTs/...   test cases
        folder/labelsTr/sub-01.nii.gz, ...   uint8          folder/labelsTs/...
        folder/participants.tsv              subject and site

    Sites alternate. Their labels are 1 and 2 or FreeSurfer's 18 and 54; every second scan of the second site
    is skull-stripped; the stored orientation and the origin differ.

    Args:
        num_train, num_test: each case is another subject.
        voxel_mm: side of a voxel, about.

    Raises:
        FileExistsError: as of `write_data_set`, which does not write twice.
    """
    names = list(SITES)
    site_of = [names[index % len(names)] for index in range(num_train + num_test)]

    def make(index: int) -> PhantomCase:
        rng, site = np.random.default_rng([seed, index]), site_of[index]
        spacing_mm = tuple((voxel_mm * rng.uniform(0.95, 1.05, 3)).tolist())
        stripped = SITES[site].stripped and index // len(names) % 2 == 1
        image, label = head_phantom(int(rng.integers(2**32)), site, spacing_mm=spacing_mm, stripped=stripped)
        label = np.array([0, *SITES[site].labels], np.uint8)[label]
        origin_mm = np.array([-88.0, -104, -86]) + rng.uniform(-20, 20, 3)  # x y z
        orientation = ORIENTATIONS[index % len(ORIENTATIONS)]
        return PhantomCase(f"sub-{1 + index:02d}", image, label, spacing_mm, origin_mm, orientation)

    contents = {"phantoms": [num_train, num_test], "seed": seed, "voxel_mm": voxel_mm}
    parts = ["Tr"] * num_train + ["Ts"] * num_test
    table = ["participant_id\tsite", *(f"sub-{1 + index:02d}\t{site}" for index, site in enumerate(site_of))]
    files = {"participants.tsv": "\n".join(table) + "\n"}
    return write_data_set(Path(folder), contents, "synthetic heads", parts, NUMBERS, make, "MRI", files)
