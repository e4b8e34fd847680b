"""Pictures of three-dimensional structures as files: views side by side, turntables, errors in mm."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import printable, replacing
from common.mesh import check_labels
from common.plots import save_figure
from common.render import Scene, drawn_grid, make_scene, render_scene, scene_of
from common.volumes import box_of, resample

MISSED = (60, 120, 255)  # RGB of what a prediction leaves out
SIDES = {"front": 0, "left side": 90, "back": 180}  # degrees, see `render_scene`
PIXELS_PER_INCH = 100  # of `save_figure`
TURNTABLE_ELEVATION_DEG = 10.0
FRAME_S = 0.1  # how long a turntable shows each frame


def save_pictures(
    path: str | Path, pictures: Sequence[np.ndarray], titles: Sequence[str], bar: tuple | None = None
) -> None:
    """Save pictures side by side, each with a title above it; they are not scaled.

    Args:
        pictures: (h, w, 3) uint8, all of one height.
        bar: (colour map, highest value, label) of a colour bar on the right.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    top, gap, right = 30, 24, 90 if bar else 0
    height, width = pictures[0].shape[0], sum(p.shape[1] + gap for p in pictures) + gap
    total = np.array([width + right, height + top + gap])
    figure = Figure(figsize=tuple(total / PIXELS_PER_INCH))
    left = gap
    for picture, title in zip(pictures, titles, strict=True):
        place = [left, gap, picture.shape[1], height] / np.tile(total, 2)
        axis = figure.add_axes(place)
        axis.imshow(picture, interpolation="nearest", aspect="auto")
        axis.axis("off")
        axis.set_title(printable(title), fontsize=11, parse_math=False)
        left += picture.shape[1] + gap
    if bar:
        axis = figure.add_axes([left, gap + height * 0.2, 14, height * 0.6] / np.tile(total, 2))
        figure.colorbar(ScalarMappable(Normalize(0, bar[1]), bar[0]), cax=axis, extend="max", label=bar[2])
    save_figure(figure, path)


def trimmed(pictures: Sequence[np.ndarray], margin: int = 8) -> list[np.ndarray]:
    """The pictures without their white margins: columns are cut from each, rows only where all are white.

    Args:
        margin: white pixels that stay on each side.
    """
    rows = np.any([(p < 255).any(axis=(1, 2)) for p in pictures], axis=0).nonzero()[0]
    top, bottom = (max(rows[0] - margin, 0), rows[-1] + 1 + margin) if len(rows) else (0, None)
    result = []
    for picture in pictures:
        columns = (picture < 255).any(axis=(0, 2)).nonzero()[0]
        left, right = (max(columns[0] - margin, 0), columns[-1] + 1 + margin) if len(columns) else (0, None)
        result.append(picture[top:bottom, left:right])
    return result


def save_sides(
    path: str | Path,
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    colors: np.ndarray,
    height: int = 800,
) -> None:
    """Save a label map seen from the front, the left side and the back, side by side.

    Args:
        labels, spacing_mm, colors: as `make_scene`.
        height: of the pictures in pixels, before white margins are cut off.
    """
    scene = make_scene(labels, spacing_mm, colors)
    pictures = [render_scene(scene, angle, 0, (height, height)) for angle in SIDES.values()]
    save_pictures(path, trimmed(pictures), list(SIDES))


def save_turntable(
    path: str | Path,
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    colors: np.ndarray,
    frames: int = 36,
    size: tuple[int, int] = (420, 240),
) -> None:
    """Save an animated GIF of a full turn that repeats for ever; 36 frames of a spine have 0.5 to 0.8 MB.

    Args:
        labels, spacing_mm, colors: as `make_scene`.
        size: (h, w) pixels.
    """
    from PIL import Image

    scene = make_scene(labels, spacing_mm, colors, voxel_mm=1.5)  # coarser: the pictures are small
    angles = [360 * i / frames for i in range(frames)]
    pictures = [render_scene(scene, angle, TURNTABLE_ELEVATION_DEG, size) for angle in angles]
    # All frames share a palette, or colours would flicker; LZW cannot compress dithered pictures.
    sheet = Image.fromarray(np.concatenate(pictures[:: max(1, frames // 6)], axis=1))
    palette = sheet.quantize(256)
    images = [Image.fromarray(p).quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    with replacing(path) as partial:
        images[0].save(
            partial,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=round(FRAME_S * 1000),
            loop=0,
        )


def save_views(
    stem: Path,
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    colors: np.ndarray,
    height: int = 800,
    frames: int = 36,
    size: tuple[int, int] = (420, 240),
) -> list[Path]:
    """Write <stem>_3d.png of `save_sides` and <stem>_turntable.gif of `save_turntable`, neither if all is 0.

    Args:
        stem: path with the beginning of the names, such as out/case for out/case_3d.png.

    Returns:
        The files written.
    """
    if not labels.any():
        return []
    sides, turntable = (stem.with_name(f"{stem.name}_{kind}") for kind in ("3d.png", "turntable.gif"))
    save_sides(sides, labels, spacing_mm, colors=colors, height=height)
    save_turntable(turntable, labels, spacing_mm, colors=colors, frames=frames, size=size)
    return [sides, turntable]


def save_triptych(
    path: str | Path,
    target: np.ndarray,
    pred: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    colors: np.ndarray,
    azimuth_deg: float = 90.0,
    highest_mm: float = 5.0,
    missed_mm: float = 2.0,
    height: int = 800,
) -> None:
    """Save three pictures: the truth, the prediction, and the prediction coloured by its error in mm.

    The error is the distance to the true surface. It takes all labels together as one structure; a wrong
    label shows in the colours of the first two pictures. Voxels of the truth that are farther than
    `missed_mm` from the prediction are added to it in blue.

    Args:
        target, pred: (z, y, x) of one shape, bool or integers.
        colors: as `make_scene`, for the labels of both.
        azimuth_deg: as `render_scene`.
        highest_mm: where the colour scale ends; larger distances have its last colour.
        missed_mm: at least 1.5 drawn voxels are taken.

    Raises:
        ValueError: the shapes differ, both masks are empty, and as `make_scene`.
    """
    if target.shape != pred.shape:
        raise ValueError(f"{path}: target {target.shape} and prediction {pred.shape} are not of one shape")
    check_labels(target, spacing_mm)
    check_labels(pred, spacing_mm)
    both = np.minimum(target, 1) | np.minimum(pred, 1)
    if (box := box_of(both)) is None:
        raise ValueError(f"{path}: neither the target nor the prediction holds a voxel")
    scenes = [make_scene(m, spacing_mm, colors, box=box) for m in (target, pred)]
    wrong, color_map = _error_scene(
        *(m[tuple(map(slice, *box))] > 0 for m in (target, pred)), spacing_mm, highest_mm, missed_mm
    )
    size = (height, height)
    pictures = [render_scene(scene, azimuth_deg, 0, size) for scene in (*scenes, wrong)]
    titles = ("truth", "prediction", "error (blue: missed)")
    save_pictures(
        path, trimmed(pictures), titles, (color_map, highest_mm, "distance to the true surface, mm")
    )


def _error_scene(
    target: np.ndarray, pred: np.ndarray, spacing_mm: Sequence[float], highest_mm: float, missed_mm: float
) -> tuple[Scene, object]:
    """(the prediction coloured by its distance to the truth with missed parts in blue, the colour map)."""
    import matplotlib
    from scipy import ndimage

    shape, drawn_mm = drawn_grid(target.shape, spacing_mm, 1.0)
    truth, found = (resample(m, shape) for m in (target, pred))
    inside = truth >= 0.5
    edge = inside & ~ndimage.binary_erosion(inside)
    off_mm = ndimage.distance_transform_edt(~edge, drawn_mm) if edge.any() else np.full(shape, np.inf)
    color_map = matplotlib.colormaps["YlOrRd"]
    table = np.rint(color_map(np.arange(256))[:, :3] * 255).astype(np.uint8)
    rgb = table[np.rint(np.clip(off_mm / highest_mm, 0, 1) * 255).astype(np.uint8)]
    if (found >= 0.5).any():
        limit_mm = max(missed_mm, 1.5 * max(drawn_mm))
        inside &= ndimage.distance_transform_edt(found < 0.5, drawn_mm) > limit_mm
    rgb[inside] = MISSED
    density = np.maximum(found, np.where(inside, truth, 0))
    weight = np.where(density >= 0.5, np.uint8(255), np.uint8(1))
    return scene_of(density, np.divide(shape, target.shape), rgb, weight, drawn_mm), color_map
