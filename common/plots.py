"""Pictures: training curves, overlays, panels. matplotlib and OpenCV are imported on use."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.conversion import failure_reason
from common.files import printable, replacing
from common.messages import warn

TRUTH_COLOR, PRED_COLOR = (0, 200, 80), (230, 30, 30)  # RGB
NUM_COLORS, MOST_INSIDE = 10, 6  # lines with colours of their own; those whose legend covers no line


@contextlib.contextmanager
def costs_the_picture(name: str) -> Iterator[None]:
    """Whatever goes wrong while a picture is drawn costs only the picture; a line names it and says why."""
    try:
        yield
    except Exception as error:
        warn(f"{name} is left out: {failure_reason(error)}")


def save_curves(
    path: str | Path,
    rows: list[dict],
    panels: dict[str, list[str]],
    names: Mapping[str, str] | None = None,
    *,
    only_above_0: bool = False,
    x: str = "epoch",
) -> None:
    """One panel for each title: the named columns of `rows` over their column `x`; the file is replaced in
    one step.

    Args:
        rows: one dict for each epoch, or other `x`; values float (NaN leaves a gap).
        panels: {title: [column, ...]}; the legend of more than six columns stands beside the panel.
        names: {column: what the legend calls it}; None, or a column that is not in it: its own name.
        only_above_0: leave out columns that are 0 or NaN in every row, and panels without any other.
    """
    with costs_the_picture(Path(path).name):
        from matplotlib import colormaps

        if only_above_0:
            panels = {
                title: [column for column in columns if any(row[column] > 0 for row in rows)]
                for title, columns in panels.items()
            }
            panels = {title: columns for title, columns in panels.items() if columns}
        figure, axes = new_figure(1, len(panels), (4.2 * len(panels), 3.2))
        for axis, (title, columns) in zip(axes.flat, panels.items(), strict=True):
            if len(columns) > NUM_COLORS:  # else lines would share one
                axis.set_prop_cycle(color=colormaps["tab20"].colors)
            for column in columns:
                # A dot as well: a single epoch draws no line.
                name = (names or {}).get(column, column)
                axis.plot([r[x] for r in rows], [r[column] for r in rows], marker=".", label=name)
            axis.set_title(title)
            axis.set_xlabel(x)
            if x == "epoch":
                axis.xaxis.get_major_locator().set_params(integer=True)  # no fifths of an epoch
            axis.grid(alpha=0.3)
            if len(columns) > MOST_INSIDE:
                axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
            elif len(columns) > 1:
                axis.legend()
        save_figure(figure, path)


def overlay(image: np.ndarray, mask: np.ndarray, color: tuple = PRED_COLOR, alpha: float = 0.4) -> np.ndarray:
    """(h, w) uint8 image with a (h, w) mask in colour over it -> (h, w, 3) uint8 RGB."""
    rgb = np.repeat(image[..., None], 3, axis=-1).astype(np.float32)
    inside = mask.astype(bool)
    rgb[inside] = (1 - alpha) * rgb[inside] + alpha * np.asarray(color, np.float32)
    return rgb.round().astype(np.uint8)


def heat_picture(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """Slice uint8 (H, W) or (H, W, 3) with a map in [0, 1] over it, from blue to red -> RGB uint8."""
    from matplotlib import colormaps

    grey = image if image.ndim == 3 else image[..., None]
    picture = grey / 255 + colormaps["jet"](cam)[..., :3]
    return np.rint(255 * picture / picture.max()).astype(np.uint8)


def outline(rgb: np.ndarray, mask: np.ndarray, color: tuple, dashed: bool = False) -> np.ndarray:
    """`rgb` (h, w, 3) with the one-pixel border of `mask` drawn in colour, whole or dashed; a copy."""
    from scipy import ndimage

    rgb = rgb.copy()
    mask = mask.astype(bool)
    border = mask & ~ndimage.binary_erosion(mask)
    if dashed:  # three pixels with and three without
        border &= np.indices(mask.shape).sum(axis=0) % 6 < 3
    rgb[border] = color
    return rgb


def save_panels(
    path: str | Path,
    rows: list[list[np.ndarray]],
    titles: list[list[str]],
    height: float = 2.6,
    legend: Mapping[str, Sequence[int]] | None = None,
    edges: Sequence[Sequence[str]] | None = None,
) -> None:
    """A grid of images, (h, w) grey uint8 or (h, w, 3) RGB, each with its title.

    `height` of an image is in inches; `legend` is {name: RGB}, drawn in a column on the right; `edges` has
    for each image two letters that stand at its left and at its right edge, such as "RL".
    """
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    columns = max(len(row) for row in rows) + bool(legend)
    shares = [max((image.shape[0] / image.shape[1] for image in row), default=1) for row in rows]
    heights = [height * min(share, 1) + 0.25 for share in shares]  # a row of wide images is low
    figure, axes = new_figure(len(rows), columns, (height * columns, sum(heights)), heights)
    if legend:
        handles = [Patch(color=np.divide(rgb, 255), label=name) for name, rgb in legend.items()]
        axes[0, -1].legend(handles=handles, loc="upper left", fontsize=8, frameon=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis_row, images, names in zip(axes, rows, titles, strict=True):
        for axis, image, name in zip(axis_row, images, names, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(printable(name), fontsize=8, parse_math=False)  # a name may hold $
    for axis_row, letters_row in zip(axes, edges or (), strict=False):
        for axis, letters in zip(axis_row, letters_row, strict=False):
            for letter, place, side in zip(letters, (0.02, 0.98), ("left", "right"), strict=True):
                look = {"ha": side, "va": "center", "color": "white", "fontsize": 8}
                look["path_effects"] = [withStroke(linewidth=2, foreground="black")]  # white on white tissue
                axis.text(place, 0.5, letter, transform=axis.transAxes, **look)
    save_figure(figure, path)


def save_figure(figure, path: str | Path) -> None:
    """Write a matplotlib figure as PNG in one step, so that a viewer never opens half a picture."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def new_figure(rows: int, columns: int, size: tuple[float, float], heights: Sequence[float] | None = None):
    """(figure, 2-D array of axes), `size` in inches; no pyplot, hence no display and no global state.

    `heights` of the rows, in any unit; None: all alike.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="tight")
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
