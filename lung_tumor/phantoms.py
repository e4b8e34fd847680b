"""Synthetic chest CT with lung tumours in the Decathlon's layout, so that the demo needs no download.

They imitate what a slice-wise tumour network meets in Medical Segmentation Decathlon Task06 (Antonelli et al.
2022, arXiv:2106.05735): tumours, vessels, heart and chest wall have the same density, so that shape and
neighbourhood decide and no threshold does. They model no disease; scores on them mean nothing for patients.
"""

import json
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from common.phantoms import (
    already_written,
    box_between,
    new_folder,
    noisy_hu,
    oval_mm,
    paint,
    tube_mm,
    voxel_axes_mm,
    write_pair,
)

ORIENTATIONS = ("LPS", "RAS", "LAS")  # of the stored files, in turn
TUMOUR_DIAMETER_MM = (4.0, 38.0)
MAIN_TUMOUR_DIAMETER_MM = (17.0, 38.0)  # the first of each patient: 15 mm are left of it beside the pleura
PLEURA_MM = 3.0  # the farthest that a tumour reaches out of the lung
MIN_FIELD_MM = (120.0, 240.0, 240.0)  # z y x; the organs of a smaller chest leave no room for the tumours


def _offsets(axes_mm, box, centre_mm):
    """Open grid of the distances of a box's voxels from a point along z, y, x, in mm."""
    return np.ix_(*(a[part] - np.float32(c) for a, part, c in zip(axes_mm, box, centre_mm, strict=True)))


def _paint_tube(image, axes_mm, start, end, start_radius, end_radius, hu, edge_mm, gate=None) -> None:
    """Paint a tapering tube between two points (z y x in mm); `gate` in [0, 1] (Z, Y, X) weakens it."""
    margin_mm = max(start_radius, end_radius) + edge_mm
    box = box_between(axes_mm, np.minimum(start, end) - margin_mm, np.maximum(start, end) + margin_mm)
    if not image[box].size:
        return
    grid = np.ix_(*(a[part] for a, part in zip(axes_mm, box, strict=True)))
    filled = np.clip(0.5 - tube_mm(grid, start, end, start_radius, end_radius) / edge_mm, 0, 1)
    # A tube thinner than a voxel fills only a part of it.
    filled *= min(1.0, (start_radius + end_radius) / edge_mm)
    image[box] += (hu - image[box]) * (filled if gate is None else filled * gate[box])


def _paint_bones(rng, image, grid, cage_mm, cage_y, spine_y, size, edge_mm) -> None:
    z, y, x = grid
    below_middle_mm = 150 * (0.55 - (z - z.min()) / np.ptp(z))
    angle = np.arctan2(np.abs(x), -y)  # 0 at the back, pi at the front
    disc = np.abs((z / (25 * size) + rng.uniform()) % 1 - 0.5) < 0.12

    vertebra = oval_mm(y - spine_y + 4 * size, x, 13 * size, 17 * size)
    paint(image, vertebra, np.where(disc, 90, 520), edge_mm)
    paint(image, vertebra + 3 * size, np.where(disc, 80, rng.uniform(150, 260)), edge_mm)  # marrow
    transverse = np.maximum(np.abs(y - spine_y + 25 * size) - 4, np.abs(x) - np.where(disc, 10, 30) * size)
    spinous = np.maximum(np.abs(x) - 3 * size, np.abs(y - spine_y + 36 * size) - 11 * size)
    paint(image, np.minimum(transverse, spinous), 420.0, edge_mm)
    paint(image, oval_mm(y - spine_y + 22 * size, x, 7 * size, 9 * size), 25.0, edge_mm)  # canal

    pitch = rng.uniform(22, 28)
    rise = z + 36 * angle + 4 * (x > 0)  # ribs fall by 36 mm a radian to the front
    across = np.abs(rise / pitch % 1 - 0.5) * pitch
    rib = np.maximum(np.abs(cage_mm - 6 * size) - 3.5 * size, across - 5.5)
    paint(image, np.maximum(rib, np.abs(angle - 1.45) * 70 - 84), rng.uniform(450, 750), edge_mm)
    blade = np.maximum(np.abs(cage_mm - 21 * size) - 2, np.abs(angle - 0.9) * 70 - 30)
    paint(image, np.maximum(blade, below_middle_mm), rng.uniform(350, 600), edge_mm)
    sternum = oval_mm(y - cage_y - 7 * size, x, 6 * size, 17 * size)
    paint(image, np.maximum(sternum, np.abs(below_middle_mm) - 45), 260.0, edge_mm)


def _paint_vessel_tree(rng, image, axes_mm, lung_mm, root_mm, num_targets, edge_mm) -> None:
    """Paint a tree from the hilum to random points of a lung; `lung_mm` is the distance to the lung."""
    picked = rng.choice(np.argwhere(lung_mm < -4), num_targets)
    targets = np.stack([a[index] for a, index in zip(axes_mm, picked.T, strict=True)], 1)
    # z counts less, so that many vessels run along z and cross a slice as round spots, as small tumours do
    weights = np.array([0.55, 1.0, 1.0])
    targets = targets[np.argsort(np.linalg.norm((targets - root_mm) * weights, axis=1))]
    nodes, parents = np.tile(root_mm, (1 + 2 * num_targets, 1)), np.zeros(1 + 2 * num_targets, int)
    for count, target in zip(range(1, len(nodes), 2), targets, strict=True):
        nearest = np.argmin((((nodes[:count] - target) * weights) ** 2).sum(1))
        bend = rng.normal(0, 0.08, 3) * np.linalg.norm(target - nodes[nearest])
        nodes[count], nodes[count + 1] = (nodes[nearest] + target) / 2 + bend, target
        parents[count], parents[count + 1] = nearest, count
    load = np.ones(len(nodes))
    for child in range(len(nodes) - 1, 0, -1):
        load[parents[child]] += load[child]
    radii = np.minimum(rng.uniform(0.8, 1.1) * load ** (1 / 3), 6.0)  # mm; Murray 1926: cubes of radii add up
    gate, hu = np.clip(-lung_mm / edge_mm, 0, 1), rng.uniform(5, 60)
    for child in range(1, len(nodes)):
        start_radius = min(radii[parents[child]], 1.3 * radii[child])
        ends = nodes[parents[child]], nodes[child]
        _paint_tube(image, axes_mm, *ends, start_radius, radii[child], hu, edge_mm, gate)


def _paint_chest(rng, axes_mm, half_x, edge_mm) -> tuple[np.ndarray, np.ndarray]:
    """A chest without tumours: HU (Z, Y, X) float32, and the distance to the lungs' outline, of that shape.

    Args:
        axes_mm: voxel centres along z, y, x; y and x are zero in the middle of the body.
        half_x: half the width of the body in mm.
    """
    z, y, x = grid = np.ix_(*axes_mm)
    height, size = np.ptp(z), half_x / 150  # 150 mm: half the width of a slim grown-up
    bottom, level, right = z.min(), (z - z.min()) / height, x > 0
    texture = rng.standard_normal([len(a) for a in axes_mm], np.float32)
    texture = ndimage.gaussian_filter(texture, (1.0, 2.5, 2.5))
    texture /= texture.std()

    half_y, fat_mm = rng.uniform(0.66, 0.74) * half_x, rng.uniform(5, 17) * size
    image = np.full(texture.shape, -1000, np.float32)
    table = np.abs(y + half_y + rng.uniform(10, 15) - x**2 / rng.uniform(700, 1400)) - 2
    paint(image, table, rng.uniform(-350, -50), edge_mm)
    scale = 1 + 0.02 * np.sin(3 * level + rng.uniform(0, 6))
    body_mm = oval_mm(y - 5 * size, x, half_y, half_x, 2.3, scale)
    paint(image, body_mm, -100 + 8 * texture, edge_mm)
    paint(image, body_mm + fat_mm, 45 + 6 * texture, edge_mm)

    # Rib cage, filled with mediastinal fat and muscle.
    cage_y, cage_x = half_y - fat_mm - 20 * size, half_x - fat_mm - 22 * size
    scale = 1 - 0.42 * np.clip((level - 0.55) / 0.45, 0, 1) ** 1.6
    cage_mm = oval_mm(y, x, cage_y, cage_x, 2.2, scale)
    paint(image, np.abs(cage_mm - 14 * size) - 1.5, -70.0, 2 * edge_mm)  # fat between muscles
    paint(image, cage_mm, np.clip(-20 + 50 * texture, -95, 40), edge_mm)

    # Lungs: what mediastinum, heart, spine and diaphragm leave free in the cage.
    across2 = ((x - np.where(right, 0.5, -0.5) * cage_x) / (0.5 * cage_x)) ** 2
    dome_level = np.where(right, 0.30, 0.26) + rng.uniform(-0.05, 0.05)
    dome = bottom + height * (dome_level - 0.22 * (across2 + (y / cage_y - 0.3) ** 2))
    apex = bottom + height * (rng.uniform(0.92, 0.98) - 0.2 * (across2 + (y / cage_y + 0.2) ** 2))
    middle_mm = oval_mm(y, x + 3 * size, cage_y * 1.02, rng.uniform(26, 32) * size)
    heart_z, heart_y, heart_x = bottom + rng.uniform(0.34, 0.4) * height, y - 0.2 * cage_y, x + 22 * size
    tilt = rng.uniform(0.4, 0.8)  # radians, of the heart's long axis, from left to front
    cos, sin = np.cos(tilt), np.sin(tilt)
    half_z, half_short, half_long = rng.uniform(0.9, 1.1, 3) * (0.24 * height, 43 * size, 56 * size)
    heart_mm = ((z - heart_z) / half_z) ** 2 + ((sin * heart_x + cos * heart_y) / half_short) ** 2
    heart_mm = half_short * (np.sqrt(heart_mm + ((cos * heart_x - sin * heart_y) / half_long) ** 2) - 1)
    spine_y = -cage_y + 16 * size
    solid_mm = np.minimum(middle_mm, oval_mm(y - spine_y, x, 21 * size, 24 * size))
    lung_mm = np.maximum(cage_mm + 1.5, -np.minimum(solid_mm, heart_mm))
    lung_mm = np.maximum(lung_mm, 0.6 * np.maximum(dome - z, z - apex))  # 0.6: cosine of the usual slope
    organs_hu = np.where(right, 62, 48) + 6 * texture  # liver; spleen and stomach
    paint(image, np.maximum(cage_mm + 3, 0.6 * (z - dome)), organs_hu, edge_mm)
    paint(image, heart_mm, rng.uniform(40, 60) + 4 * texture, edge_mm)
    lung_hu = rng.uniform(-880, -840) - 0.35 * y + 12 * texture  # the dependent side is denser
    paint(image, lung_mm, lung_hu, edge_mm)

    # Aorta, pulmonary arteries and airways, then the branching vessels of each lung.
    arch, carina = bottom + 0.74 * height, bottom + 0.62 * height
    back, front = (spine_y + 24 * size, -20 * size), (0.3 * cage_y, 6 * size)  # y, x of the aorta's limbs
    hila, blood_hu = [(carina - 12, -4 * size, side * 30 * size) for side in (-1, 1)], rng.uniform(40, 60)
    arteries = [((bottom - 9, *back), (arch, *back), 12), ((heart_z, *front), (arch, *front), 14)]
    arteries += [((arch, *back), (arch, *front), 13), (*(np.add(h, (0, 18 * size, 0)) for h in hila), 11)]
    for start, end, radius in arteries:
        _paint_tube(image, axes_mm, start, end, radius * size, radius * size, blood_hu, edge_mm)
    split = (carina, -4 * size, 2 * size)
    for hilum, of_side in zip(hila, (~right, right), strict=True):
        for root in (hilum, np.add(hilum, (0, 12 * size, 0))):
            one_lung_mm, num_targets = np.where(of_side, lung_mm, 99), int(rng.integers(45, 75))
            _paint_vessel_tree(rng, image, axes_mm, one_lung_mm, root, num_targets, edge_mm)
        _paint_tube(image, axes_mm, split, hilum, 6.5 * size, 5 * size, -970.0, edge_mm)
    _paint_tube(image, axes_mm, split, np.add(split, (height, 0, 0)), 8 * size, 8 * size, -985.0, edge_mm)
    _paint_bones(rng, image, grid, cage_mm, cage_y, spine_y, size, edge_mm)
    return image, lung_mm


def _paint_tumours(rng, image, axes_mm, lung_mm, spacing_mm) -> np.ndarray:
    """Paint one to three tumours into the lungs and return their label (Z, Y, X) uint8."""
    label, free_mm = np.zeros(image.shape, np.uint8), np.full(image.shape, np.inf, np.float32)
    for index in range(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2])):
        limits_mm = TUMOUR_DIAMETER_MM if index else MAIN_TUMOUR_DIAMETER_MM
        radius = float(np.exp(rng.uniform(*np.log(limits_mm)))) / 2
        # A depth of 0.7 radii keeps a tumour nearly whole; every third one is put at the pleura.
        wanted = (-lung_mm >= 0.7 * radius) & (free_mm > 1.3 * radius + 10)
        wanted &= -lung_mm <= (radius if rng.uniform() < 0.35 else np.inf)
        places = np.argwhere(wanted)
        if len(places) == 0:
            if index > 0:
                continue
            places = np.argwhere(lung_mm == lung_mm.min())
        centre = np.array([a[i] for a, i in zip(axes_mm, rng.choice(places), strict=True)])
        centre += rng.uniform(-0.5, 0.5, 3) * spacing_mm
        box = box_between(axes_mm, centre - 1.4 * radius, centre + 1.4 * radius, margin=1)
        offsets = _offsets(axes_mm, box, centre)
        distance = np.sqrt(sum(o**2 for o in offsets)) + np.float32(1e-3)
        # An uneven outline: a few plane waves over the directions seen from the centre.
        bumps = 0
        for wave, phase in zip(rng.normal(0, 2.5, (5, 3)), rng.uniform(0, 2 * np.pi, 5), strict=True):
            bumps += np.sin(sum(w * o for w, o in zip(wave, offsets, strict=True)) / distance + phase)
        outside_mm = distance - radius * (1 + rng.uniform(0.02, 0.06) * bumps)
        outside_mm = np.maximum(outside_mm, lung_mm[box] - PLEURA_MM)
        # The edge is a voxel wide along each direction: wider along z than in the slice.
        edge_mm = np.sqrt(sum((o * s) ** 2 for o, s in zip(offsets, spacing_mm, strict=True))) / distance
        filled = np.clip(0.5 - outside_mm / np.maximum(edge_mm, min(spacing_mm)), 0, 1)
        core = filled.argmax()
        filled.flat[core] = max(filled.flat[core], 0.5)  # a tumour cannot get lost between the voxels
        image[box] += (rng.uniform(10, 80) - image[box]) * filled
        label[box] |= filled >= 0.5
        offsets = _offsets(axes_mm, (slice(None),) * 3, centre)
        free_mm = np.minimum(free_mm, np.sqrt(sum(o**2 for o in offsets)) - 1.3 * radius)
    return label


def chest_phantom(
    seed: int,
    shape: tuple[int, int, int] = (36, 128, 128),
    spacing_mm: tuple[float, float, float] = (5.0, 2.7, 2.7),
    noise_hu: float = 25.0,
) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic chest CT with one to three lung tumours; the same arguments give the same scan.

    The body fills the slice and the lungs fill the scan, whatever the field of view. At least one tumour has
    a diameter of 15 mm or more, the others of 4 mm or more; edges are about one voxel wide.

    Args:
        shape: z y x, voxels.
        spacing_mm: z y x.
        noise_hu: standard deviation of the noise, which is correlated in the slice; 0 for none.

    Returns:
        image: int16 HU in [-1024, 3071], (z, y, x) RAS+ (z up, y to the front, x to the patient's right).
        label: uint8 of the same shape, 1 where at least half of a voxel is tumour; never empty.

    Raises:
        ValueError: the field of view is smaller than 120 x 240 x 240 mm.
    """
    field_mm = [n * s for n, s in zip(shape, spacing_mm, strict=True)]
    if any(have < need for have, need in zip(field_mm, MIN_FIELD_MM, strict=True)):
        raise ValueError(
            f"chest_phantom: shape {tuple(shape)} at {tuple(spacing_mm)} mm covers "
            f"{' x '.join(f'{mm:g}' for mm in field_mm)} mm (z y x), a chest needs at least "
            f"{' x '.join(f'{mm:g}' for mm in MIN_FIELD_MM)}; use more voxels or a larger spacing"
        )
    rng = np.random.default_rng(seed)
    axes_mm = voxel_axes_mm(shape, spacing_mm)
    half_x = rng.uniform(0.84, 0.93) * min(field_mm[2], field_mm[1] / 0.8) / 2
    axes_mm[1] -= rng.uniform(0.0, 0.06) * half_x
    axes_mm[2] -= rng.uniform(-0.06, 0.06) * half_x
    image, lung_mm = _paint_chest(rng, axes_mm, half_x, edge_mm=(spacing_mm[1] + spacing_mm[2]) / 2)
    label = _paint_tumours(rng, image, axes_mm, lung_mm, spacing_mm)
    image = ndimage.gaussian_filter(image, (0.4, 0.45, 0.45))  # slice profile and point spread
    return noisy_hu(rng, image, noise_hu, blur=(0, 0.7, 0.7)), label


def write_chest_phantoms(
    folder: str | Path, num_cases: int = 20, seed: int = 0, shape: tuple[int, int, int] = (36, 128, 128)
) -> Path:
    """Write chest phantoms as the Medical Segmentation Decathlon lays out Task06_Lung; return the folder.

        folder/dataset.json
        folder/imagesTr/lung_001.nii.gz   int16 HU
        folder/labelsTr/lung_001.nii.gz   uint8, 0 background, 1 cancer

    Cases differ in the number of slices (84 to 122 % of shape[0]), in coverage (135-180 mm along z, 307-384
    mm in the slice; by default voxels of 3-6 mm and 2.4-3.0 mm), in stored orientation and origin. The folder
    appears when it is complete; if it is there already, nothing is done.

    Args:
        num_cases: 1 or more.
        shape: z y x, voxels; z before its variation.

    Raises:
        ValueError: num_cases < 1.
        FileExistsError: the folder holds something else, or phantoms of other arguments.
    """
    folder = Path(folder)
    if num_cases < 1:
        raise ValueError(f"write_chest_phantoms: num_cases is {num_cases}, at least 1 is needed")
    names = [f"lung_{index + 1:03d}" for index in range(num_cases)]
    contents = {
        "name": "Lung",
        "description": f"{num_cases} synthetic chest CTs, seed {seed}, shape {tuple(shape)}",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "cancer"},
        "numTraining": num_cases,
        "numTest": 0,
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names
        ],
        "test": [],
    }
    if already_written(folder, "dataset.json", contents):
        return folder
    with new_folder(folder) as root:
        for index, name in enumerate(tqdm(names, desc="phantoms", unit="case", disable=None)):
            rng = np.random.default_rng([seed, index])
            num_slices = round(shape[0] * rng.uniform(0.84, 1.22))
            in_plane_mm = rng.uniform(307, 384) / shape[2]
            spacing_mm = (rng.uniform(135, 180) / num_slices, in_plane_mm, in_plane_mm)
            image, label = chest_phantom(int(rng.integers(2**32)), (num_slices, *shape[1:]), spacing_mm)
            origin_mm, orientation = rng.uniform(-300, 100, 3), ORIENTATIONS[index % 3]
            write_pair(root, "Tr", name, image, label, spacing_mm, origin_mm, orientation)
        (root / "dataset.json").write_text(json.dumps(contents, indent=2) + "\n")
    return folder
