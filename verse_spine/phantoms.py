"""Synthetic CT of the spine in VerSe's layout, so that the demo and the tests need no download.

Twenty-four vertebrae of plain shapes along a curved spine, and what a threshold would take for vertebrae too:
ribs, sacrum, pelvis, skull, contrast agent, screws. It does not model any disease; scores on it mean nothing
for patients.
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.nifti import load_nifti, write_nifti
from common.phantoms import already_written, new_folder, noisy_hu, voxel_axes_mm
from verse_spine.anatomy import (
    lay_out,
    paint_other_bones,
    paint_screws,
    paint_soft_tissue,
    paint_vertebrae,
)
from verse_spine.labels import centroids_to_voxels, write_centroids

ORIENTATIONS = ("PIR", "LPS", "RAS", "LAS", "PIL")  # of the stored files, in turn
LEVELS = ((8, 19), (16, 24), (1, 12), (13, 24), (3, 15), (19, 24), (11, 22), (1, 7))  # shown, in turn
PARTS = ("dataset-01training", "dataset-02validation", "dataset-03test")


def spine_phantom(
    seed: int,
    *,
    spacing_mm: tuple[float, float, float] = (2.5, 2.5, 2.5),
    levels: tuple[int, int] = (1, 24),
    field_mm: tuple[float, float] = (150.0, 140.0),
    variant: str = "normal",
    metal: bool = False,
    noise_hu: float = 30.0,
) -> tuple[np.ndarray, np.ndarray, dict[int, tuple[float, float, float]]]:
    """A synthetic CT of the spine; the same arguments give the same scan.

    Args:
        spacing_mm: z y x.
        levels: first and last vertebra in the scan, 1 (C1) to 24 (L5); parts of the next ones are in it too.
        field_mm: field of view, y x, around the vertebrae; larger along y where a curved spine needs it.
        variant: normal, T13 (a thirteenth thoracic vertebra, number 28) or L6 (number 25).
        metal: pedicle screws and rods over four vertebrae.
        noise_hu: standard deviation of the noise; 0 for none.

    Returns:
        image: int16 HU in [-1024, 3071], (z, y, x) RAS+.
        label: uint8, same shape, VerSe's numbers; ribs, sacrum, pelvis and skull are 0.
        centres_mm: {number: body centre, (z, y, x) mm with 0 at voxel 0} of the vertebrae whose centre is in
            the scan.

    Raises:
        ValueError: levels that are not 1 <= first <= last <= 24, or an unknown variant.
    """
    first, last = levels
    if not 1 <= first <= last <= 24 or variant not in ("normal", "T13", "L6"):
        raise ValueError(
            f"spine_phantom: levels {tuple(levels)} and variant {variant!r}; levels are the first and the "
            "last vertebra, 1 to 24, variants normal, T13 and L6"
        )
    rng = np.random.default_rng(seed)
    labels, sizes, frames, size = lay_out(rng, variant)
    shown = [
        frame
        for label, frame in zip(labels, frames, strict=False)
        if first <= (19 if label == 28 else min(label, 24)) <= last
    ]
    margin = rng.uniform(12, 26, 2) * size  # half a vertebra more or less
    centres = np.array([frame.centre for frame in shown])
    high = centres[0, 0] + margin[0] + (8 if first == 1 else 0)
    low = centres[-1, 0] - margin[1]
    behind, front = centres[:, 1].min() - 58 * size, centres[:, 1].max() + 32 * size
    extent = high - low, max(field_mm[0], front - behind), field_mm[1]
    middle = (high + low) / 2, (front + behind) / 2, (centres[:, 2].max() + centres[:, 2].min()) / 2
    shape = [max(round(mm / s), 4) for mm, s in zip(extent, spacing_mm, strict=True)]
    axes_mm = voxel_axes_mm(shape, spacing_mm, middle)
    image, edge_mm = np.full(shape, -1000, np.float32), float(np.mean(spacing_mm))
    paint_soft_tissue(rng, image, axes_mm, sizes, frames, size, edge_mm)
    paint_other_bones(rng, image, axes_mm, labels, sizes, frames, size, edge_mm)
    label = paint_vertebrae(rng, image, axes_mm, labels, sizes, frames, size, edge_mm)
    if metal:
        paint_screws(rng, image, axes_mm, sizes, frames, size, edge_mm)
    centres_mm = {}
    for number, frame in zip(labels, frames, strict=False):
        place = tuple(float(c - a[0]) for c, a in zip(frame.centre, axes_mm, strict=True))
        if all(-s / 2 <= p < (n - 0.5) * s for p, n, s in zip(place, shape, spacing_mm, strict=True)):
            centres_mm[number] = place
    return noisy_hu(rng, image, noise_hu, blur=0.5), label, centres_mm


def write_verse_phantoms(
    folder: str | Path,
    num_cases: int = 20,
    seed: int = 0,
    *,
    spacing_scale: float = 1.0,
    full_spine: bool = False,
) -> Path:
    """Write spine phantoms as VerSe lays out its scans, 60 % training, 20 % validation, 20 % test.

        folder/dataset-01training/rawdata/sub-verse801/sub-verse801_dir-ax_ct.nii.gz                 int16 HU
        folder/dataset-01training/derivatives/sub-verse801/sub-verse801_dir-ax_seg-vert_msk.nii.gz   uint8
        folder/dataset-01training/derivatives/sub-verse801/sub-verse801_dir-ax_seg-subreg_ctd.json

    Cases differ in the vertebrae shown, voxels (axial: thick along z, sagittal: along x, or even), stored
    orientation, origin and name parts (`_dir-ax_`, `_dir-sag_`, `_split-`); every fifth centroid file is a
    `seg-vb_ctd`, some scans hold screws, a T13 or an L6. The folder appears when it is complete; if it is
    there already, nothing is done.

    Args:
        num_cases: 3 or more; each is another patient, numbered from 801.
        spacing_scale: 1 gives voxels of 2.2 to 3.3 mm, about 110 x 55 x 50 of them; 0.4 those of real scans.
        full_spine: show C1 to L5 in every case.

    Raises:
        ValueError: fewer than 3 cases.
        FileExistsError: the folder holds something else, or phantoms of other arguments.
    """
    folder = Path(folder)
    if num_cases < 3:
        raise ValueError(f"write_verse_phantoms: num_cases is {num_cases}; each of the three parts needs one")
    contents = {"phantoms": num_cases, "seed": seed, "spacing_scale": spacing_scale, "full_spine": full_spine}
    if already_written(folder, "phantoms.json", contents):
        return folder
    with new_folder(folder) as root:
        num_other = max(round(0.2 * num_cases), 1)  # validation, and as many for the test
        for index in tqdm(range(num_cases), desc="phantoms", unit="case", disable=None):
            part = PARTS[max(0, 1 + (index - (num_cases - 2 * num_other)) // num_other)]
            _write_case(root / part, index, np.random.default_rng([seed, index]), spacing_scale, full_spine)
        (root / "phantoms.json").write_text(json.dumps(contents) + "\n")
    return folder


def _write_case(part: Path, index: int, rng, spacing_scale: float, full_spine: bool) -> None:
    subject, style = f"sub-verse{801 + index}", ("_dir-ax", "_dir-sag", "", "_dir-iso")[index % 4]
    fine, thick = spacing_scale * rng.uniform(2.2, 2.5), spacing_scale * rng.uniform(2.8, 3.3)
    spacing_mm = {"_dir-ax": (thick, fine, fine), "_dir-sag": (fine, fine, thick)}.get(style, (fine,) * 3)
    image, label, centres = spine_phantom(
        int(rng.integers(2**32)),
        spacing_mm=spacing_mm,
        levels=(1, 24) if full_spine else LEVELS[index % len(LEVELS)],
        field_mm=(130.0, 125.0),
        variant={5: "L6", 8: "T13"}.get(index % 10, "normal"),
        metal=index % 6 == 3,
    )
    name = subject + style + (f"_split-verse{901 + index}" if index % 7 == 4 else "")
    raw, derived = part / "rawdata" / subject, part / "derivatives" / subject
    raw.mkdir(parents=True)
    derived.mkdir(parents=True)
    origin_mm = rng.uniform(-300, 100, 3)  # x, y, z
    orientation = ORIENTATIONS[index % len(ORIENTATIONS)]
    for path, array in (
        (raw / f"{name}_ct.nii.gz", image),
        (derived / f"{name}_seg-vert_msk.nii.gz", label),
    ):
        write_nifti(path, array, spacing_mm, origin_mm=tuple(origin_mm), orientation=orientation)
    in_space = {n: tuple(float(v) for v in np.add(c, origin_mm[::-1])) for n, c in centres.items()}
    scan = load_nifti(derived / f"{name}_seg-vert_msk.nii.gz")
    kind = "vb" if index % 5 == 4 else "subreg"
    write_centroids(derived / f"{name}_seg-{kind}_ctd.json", centroids_to_voxels(in_space, scan))
