"""Pictures in three dimensions of a spine's mask: views, turntable, web page, errors, curved plane.

    python verse_spine/views.py --mask mask.nii.gz
    python verse_spine/views.py --mask mask.nii.gz --target truth.nii.gz --image scan.nii.gz --out pictures

For the mask <name>.nii.gz it writes <name>_3d.png (front, left side, back), <name>_turntable.gif and
<name>_mesh.html (to turn in a browser, offline); with --target also <name>_error.png (truth, prediction and
distance in mm), with --image also <name>_curved.png (straightened planes along the vertebral bodies). A
graphics card is not needed.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import views
from common.config import make_parser, parse_args, run_script
from common.faults import ending_in_a_sentence
from common.files import make_folder
from common.mesh import save_html, split_mesh, surface_mesh
from common.nifti import case_name, load_label, load_nifti
from common.nifti_forms import grid_difference
from common.planes import color_overlay, grey_picture
from common.render import label_colors
from verse_spine.curved import curved_planar
from verse_spine.labels import LABEL_NAMES, body_centres
from verse_spine.pictures import LABEL_COLORS, WINDOW_HU
from verse_spine.segment import count_bodies

HEIGHT = 800  # of the pictures, in pixels
FRAMES = 36  # of the turntable
MIN_DROP_MM = 8.0  # the least by which the centre of a body lies below that of the next one
NUM_REGIONS = 3  # a mask without a higher label holds classes (binary or region3) and not levels


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--mask", required=True, help="mask to draw (NIfTI), with VerSe's numbers or with classes"
    )
    parser.add_argument(
        "--target", help="true mask (NIfTI) on the same grid; needed for the picture of the error in mm"
    )
    parser.add_argument("--image", help="CT (NIfTI) on the same grid; needed for the straightened planes")
    parser.add_argument("--out", help="folder that the pictures are written to; default: that of the mask")
    return parser


def save_views(
    stem: str | Path,
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    target: np.ndarray | None = None,
    image: np.ndarray | None = None,
) -> list[Path]:
    """Write all pictures that the arguments allow; see the head of this file.

    Args:
        stem: path with the beginning of the names, such as out/case for out/case_3d.png.
        labels: (z, y, x) RAS+, VerSe's numbers or classes; uint8 or another integer type.
        spacing_mm: z y x.
        target: true labels on the same grid.
        image: HU on the same grid.

    Returns:
        The files written. For an empty mask only the error is drawn; the curve needs at least two bodies.
    """
    stem = Path(stem)
    paths = {kind: stem.with_name(f"{stem.name}_{kind}") for kind in ("mesh.html", "error.png", "curved.png")}
    written = []
    if labels.any():
        colors = label_colors(labels, LABEL_COLORS)
        size = (HEIGHT // 2, HEIGHT * 3 // 10)  # of the turntable
        written += views.save_views(
            stem, labels, spacing_mm, colors=colors, height=HEIGHT, frames=FRAMES, size=size
        )
        parts = split_mesh(*surface_mesh(labels, spacing_mm))
        meshes = [(_name(n, labels), colors[n], *mesh) for n, mesh in parts.items()]
        save_html(paths["mesh.html"], meshes, stem.name)
        written.append(paths["mesh.html"])
    if target is not None and (target.any() or labels.any()):
        colors = label_colors(max(labels, target, key=np.max), LABEL_COLORS)
        views.save_triptych(paths["error.png"], target, labels, spacing_mm, colors=colors, height=HEIGHT)
        written.append(paths["error.png"])
    if image is not None and len(points := body_points(labels, spacing_mm)) > 1:
        save_curved(paths["curved.png"], image, labels, points, spacing_mm)
        written.append(paths["curved.png"])
    return written


def _name(label: int, labels: np.ndarray) -> str:
    if labels.max() > NUM_REGIONS:
        return LABEL_NAMES.get(label, f"label {label}")
    return "vertebrae" if labels.max() == 1 else f"label {label}"


def body_points(labels: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """(n, 3) voxels z y x of the vertebral bodies' centres, from head to foot."""
    if labels.max() <= NUM_REGIONS:
        points = count_bodies(labels, spacing_mm)
        return points[_longest_chain(points * spacing_mm)]
    centres = body_centres(labels, np.diag([*spacing_mm[::-1], 1.0]))
    # C1 does not have a body, and of a vertebra that the scan cuts the body may be missing.
    cut = {1, *np.unique(labels[[0, -1]]).tolist()}
    if len(centres.keys() - cut) > 1:
        centres = {label: place for label, place in centres.items() if label not in cut}
    points = np.array(list(centres.values())).reshape(-1, 3) / spacing_mm
    return points[np.argsort(-points[:, 0])]


def _longest_chain(points_mm: np.ndarray) -> list[int]:
    """Indices of the longest chain of points from head to foot, in which each point lies below the one before
    at less than 45 degrees; of chains of one length the straightest.

    It leaves out pieces of arches that were counted as bodies.
    """
    best: list[tuple[float, list[int]]] = []  # (score, chain) of the best chain that ends at each point
    for i, point in enumerate(points_mm):
        score, chain = 0.0, []
        for before, (its_score, its_chain) in zip(points_mm[:i], best, strict=True):
            drop, aside = before[0] - point[0], float(np.hypot(*(before - point)[1:]))
            if drop >= MIN_DROP_MM and aside < drop and its_score - aside / 1000 > score:
                score, chain = its_score - aside / 1000, its_chain
        best.append((score + 1, [*chain, i]))
    return max(best, default=(0, []))[1]


def save_curved(
    path: Path, image: np.ndarray, labels: np.ndarray, points: np.ndarray, spacing_mm: Sequence[float]
) -> None:
    """Straightened sagittal and coronal planes through the bodies, the scan alone and with the mask."""
    pictures, titles = [], []
    for plane in ("sagittal", "coronal"):
        straight = curved_planar(image, points, spacing_mm, 55, plane=plane, pixel_mm=0.5)
        mask = curved_planar(labels, points, spacing_mm, 55, plane=plane, pixel_mm=0.5, order=0, fill=0)
        grey = grey_picture(straight, WINDOW_HU)
        pictures += [np.repeat(grey[..., None], 3, -1), color_overlay(grey, mask, LABEL_COLORS, 0.45)]
        titles += [f"{plane}, straightened", "with the mask"]
    views.save_pictures(path, pictures, titles)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with ending_in_a_sentence():
        mask = load_label(args.mask)
        target = load_label(args.target) if args.target else None
        image = load_nifti(args.image) if args.image else None
        for other in (target, image):
            if other is not None and (difference := grid_difference(other, mask)):
                raise ValueError(
                    f"{other.path} is not on the grid of {mask.path} ({difference}); resample one"
                )
        out = Path(args.out) if args.out else mask.path.parent
        make_folder(out)
        written = save_views(
            out / case_name(mask.path),
            mask.array,
            mask.spacing_mm,
            target=None if target is None else target.array,
            image=None if image is None else image.array,
        )
    for path in written:
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    if not written:
        print(f"{mask.path}: the mask is empty, nothing to draw")
    return 0


if __name__ == "__main__":
    run_script(main)
