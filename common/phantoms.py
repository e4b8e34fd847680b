"""What the synthetic scans of the tasks have in common: shapes, paint, noise, and a folder written whole.

A shape is given by distances in mm that are negative inside. `axes_mm` are three arrays with the centres of
the voxels along z, y and x in mm; `np.ix_(*axes_mm)` makes an open grid of them.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import EllipsisType, ModuleType
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from common.files import make_folder, read_json
from common.nifti import write_nifti

LOWEST_HU, HIGHEST_HU = -1024, 3071  # what a CT scanner stores


# ---- shapes ----


def voxel_axes_mm(
    shape: Sequence[int], spacing_mm: Sequence[float], middle_mm: Sequence[float] = (0.0, 0.0, 0.0)
) -> list[np.ndarray]:
    """Centres of the voxels along z, y and x, float32; `middle_mm` is the position of the volume's middle."""
    return [
        np.float32((np.arange(n) - (n - 1) / 2) * s + m)
        for n, s, m in zip(shape, spacing_mm, middle_mm, strict=True)
    ]


def box_between(
    axes_mm: Sequence[np.ndarray], low_mm: Sequence[float], high_mm: Sequence[float], margin: int = 0
) -> tuple[slice, ...]:
    """Slices of the voxels whose centres lie from `low_mm` to `high_mm` (z y x), and of `margin` more voxels
    on each side. They may be empty."""
    ends = [np.searchsorted(a, (low, high)) for a, low, high in zip(axes_mm, low_mm, high_mm, strict=True)]
    return tuple(slice(max(int(first) - margin, 0), int(last) + margin) for first, last in ends)


def oval_mm(
    y: np.ndarray,
    x: np.ndarray,
    half_y: float | np.ndarray,
    half_x: float | np.ndarray,
    power: float = 2.0,
    scale: float | np.ndarray = 1.0,
) -> np.ndarray:
    """Distance to an oval column along the rays from its axis.

    Args:
        y, x: coordinates from the axis in mm, arrays that broadcast.
        half_y, half_x: half axes in mm.
        power: 2 for an ellipse; higher ones approach a rectangle.
        scale: factor on both half axes, such as one for each slice.
    """
    radius = np.hypot(y, x) + 1e-3
    outline = np.abs(y / half_y) ** power + np.abs(x / half_x) ** power
    return radius * (1 - scale * np.maximum(outline, 1e-6) ** (-1 / power))


def tube_mm(
    points: Sequence[np.ndarray],
    start: Sequence[float],
    end: Sequence[float],
    radius: float,
    end_radius: float | None = None,
) -> np.ndarray:
    """Distance to a rounded tube between two points, which may taper from `radius` to `end_radius`.

    Args:
        points: coordinates in mm, one array for each axis, that broadcast; two or three of them.
        start, end: coordinates of both ends in the same order.
    """
    end_radius = radius if end_radius is None else end_radius
    axis = [float(e - s) for s, e in zip(start, end, strict=True)]
    offsets = [p - float(s) for p, s in zip(points, start, strict=True)]
    along = sum(o * a for o, a in zip(offsets, axis, strict=True)) / (sum(a * a for a in axis) + 1e-6)
    along = along.clip(0, 1)
    squares = sum((o - along * a) ** 2 for o, a in zip(offsets, axis, strict=True))
    return np.sqrt(squares) - radius - along * (end_radius - radius)


def ellipsoid_mm(points: Sequence[np.ndarray], centre: Sequence[float], half: Sequence[float]) -> np.ndarray:
    """About the distance to an ellipsoid; exact on its outline.

    Args:
        points: coordinates in mm, one array for each axis, that broadcast.
        centre, half: its middle and its half axes in the same order.
    """
    squares = sum(((p - c) / h) ** 2 for p, c, h in zip(points, centre, half, strict=True))
    return (np.sqrt(squares) - 1) * float(np.prod(half)) ** (1 / 3)


# ---- voxels ----


def smooth_field(rng: np.random.Generator, axes_mm: Sequence[np.ndarray], scale_mm: float) -> np.ndarray:
    """Random values (z, y, x) float32 that vary over `scale_mm`; mean 0, standard deviation 1."""
    knots = [np.arange(a[0] - scale_mm, a[-1] + 2 * scale_mm, scale_mm) for a in axes_mm]
    field = rng.standard_normal([len(k) for k in knots], np.float32)
    for axis, places in zip(axes_mm, knots, strict=True):
        weights = np.exp(-(((axis[:, None] - places) / (0.7 * scale_mm)) ** 2))
        weights /= weights.sum(1, keepdims=True)
        field = np.tensordot(field, np.float32(weights), (0, 1))  # the axis done moves to the end
    return (field - field.mean()) / field.std()


def paint(image: np.ndarray, distance_mm: np.ndarray, hu: float | np.ndarray, edge_mm: float) -> None:
    """Blend `hu` into `image` in place where the distance is negative, over an edge `edge_mm` wide."""
    image += (hu - image) * np.clip(0.5 - distance_mm / edge_mm, 0, 1)


def noisy_hu(
    rng: np.random.Generator, image: np.ndarray, noise_hu: float, blur: float | Sequence[float]
) -> np.ndarray:
    """The scan as it is stored: noise added, cut to what a scanner stores, rounded; int16.

    Args:
        noise_hu: standard deviation of the noise; 0 for none.
        blur: sigma in voxels of the filter that correlates the noise of neighbours.
    """
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), blur)
    image = image + noise * (noise_hu / noise.std())
    return np.rint(image.clip(LOWEST_HU, HIGHEST_HU)).astype(np.int16)


class Canvas:
    """A scan that is painted: image in HU, at first air, and label; both (z, y, x).

    Attributes:
        grid: the z, y and x in mm of each voxel in the body that is drawn, which a smooth random field bends.
        texture: unevenness of a tissue, of standard deviation 1.

    Args:
        axes_mm: centres of the voxels along z, y and x in mm.
        edge_mm: width of an edge; about the size of a voxel.
        bend_mm: standard deviation of the bending, which varies over 90 mm.
    """

    def __init__(
        self, rng: np.random.Generator, axes_mm: Sequence[np.ndarray], edge_mm: float, bend_mm: float = 4.0
    ) -> None:
        shape = [len(a) for a in axes_mm]
        self.axes_mm, self.edge_mm, self.bend_mm = axes_mm, edge_mm, bend_mm
        self.image, self.label = np.full(shape, -1000, np.float32), np.zeros(shape, np.uint8)
        self.grid = [g + bend_mm * smooth_field(rng, axes_mm, 90) for g in np.ix_(*axes_mm)]
        self.texture = smooth_field(rng, axes_mm, 7)

    def add(
        self,
        distance_mm: np.ndarray,
        hu: float | np.ndarray,
        within_hu: float = 0.0,
        label: int = 0,
        box: tuple[slice, ...] | EllipsisType = ...,
    ) -> None:
        """Paint the inside of a shape.

        Args:
            distance_mm: to the shape, of the voxels in `box`.
            within_hu: standard deviation of the HU inside it.
            label: number that its inside gets in the label; 0 = the label stays as it is.
        """
        paint(self.image[box], distance_mm, hu + within_hu * self.texture[box], self.edge_mm)
        if label:
            self.label[box][distance_mm < 0] = label

    def add_chain(
        self, stations: Sequence[Sequence[float]], hu: float, within_hu: float = 0.0, label: int = 0
    ) -> None:
        """Paint a chain of rounded tubes through `stations` of (z, y, x, radius) in mm; else as `add`."""
        points, radii = np.split(np.asarray(stations, float), [3], axis=1)
        reach = radii + 4.5 * self.bend_mm + self.edge_mm
        box = box_between(self.axes_mm, (points - reach).min(0), (points + reach).max(0))
        if self.label[box].size:
            grid, pairs = [g[box] for g in self.grid], zip(stations, stations[1:], strict=False)
            tubes = [tube_mm(grid, a[:3], b[:3], a[3], b[3]) for a, b in pairs]
            self.add(np.minimum.reduce(tubes), hu, within_hu, label, box)


# ---- folders ----


def write_pair(
    root: Path,
    part: str,
    name: str,
    image: np.ndarray,
    label: np.ndarray,
    spacing_mm: Sequence[float],
    origin_mm: Sequence[float],
    orientation: str,
) -> dict[str, str]:
    """Write images<part>/<name>.nii.gz and labels<part>/<name>.nii.gz; returns their entry of dataset.json.

    Args:
        image, label: (z, y, x); spacing_mm: z y x; the rest as of `write_nifti`.
    """
    entry = {}
    for kind, array in (("image", image), ("label", label)):
        path = root / f"{kind}s{part}" / f"{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        write_nifti(path, array, spacing_mm, origin_mm=tuple(origin_mm), orientation=orientation)
        entry[kind] = f"./{path.relative_to(root).as_posix()}"
    return entry


class PhantomCase(NamedTuple):
    """A scan and its label, for `write_pair`."""

    name: str
    image: np.ndarray
    label: np.ndarray
    spacing_mm: Sequence[float]
    origin_mm: Sequence[float]
    orientation: str


def write_data_set(
    folder: Path,
    contents: dict,
    name: str,
    parts: Sequence[str],
    labels: Mapping[int, str],
    make: Callable[[int], PhantomCase],
    modality: str = "CT",
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write phantoms in the Decathlon's layout with its dataset.json; returns the folder.

    The folder appears when it is complete; if it is there already, nothing is done.

    Args:
        contents: what decides how they come out, noted in phantoms.json.
        name: of the data set.
        parts: of the cases: Tr for training, Va for validation, Ts for the test.
        labels: {number: name}, without the background.
        make: number of a case from 0 on -> the case.
        files: {name: content} of further text files.

    Raises:
        FileExistsError: the folder holds something else, or phantoms of other contents.
    """
    if already_written(folder, "phantoms.json", contents):
        return folder
    listed: dict[str, list] = {"Tr": [], "Va": [], "Ts": []}
    with new_folder(folder) as root:
        for index, part in enumerate(tqdm(parts, desc="phantoms", unit="case", disable=None)):
            listed[part].append(write_pair(root, part, *make(index)))
        notes = {"name": name, "modality": {"0": modality}, "numTraining": len(listed["Tr"])}
        notes["labels"] = {"0": "background"} | {str(number): label for number, label in labels.items()}
        test = [entry["image"] for entry in listed["Ts"]]
        notes |= {"training": listed["Tr"], "validation": listed["Va"], "test": test}
        for file_name, content in (files or {}).items():
            (root / file_name).write_text(content, encoding="utf8")
        (root / "dataset.json").write_text(json.dumps(notes, indent=1) + "\n")
        (root / "phantoms.json").write_text(json.dumps(contents) + "\n")
    return folder


def already_written(folder: Path, index_name: str, contents: dict) -> bool:
    """Whether `folder` holds the phantoms that `contents` describe, by its file `index_name` (JSON).

    Raises:
        FileExistsError: it holds something else, or phantoms of other arguments.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    index = folder / index_name
    with suppress(ValueError, FileNotFoundError):  # damaged: not what is wanted
        if read_json(index) == contents:
            return True
    description = contents.get("description", contents)
    raise FileExistsError(
        f"{folder}: holds something else than {description}; remove it or name another folder"
    )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write to; it becomes `folder` when the block ends without an error.

    `folder` may be there if it is empty. After an error nothing is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.partial_") as partial:
        root = Path(partial) / folder.name
        root.mkdir()
        yield root
        if folder.exists():
            folder.rmdir()
        root.rename(folder)


def prepare_demo(
    source: Path,
    out: Path,
    make: Callable[[], dict[str, str]],
    flags: Sequence[str],
    modules: Sequence[ModuleType],
) -> Path:
    """Call `make`, unless its result is there already; what other flags or other code made is made anew.

    Args:
        source, out: folders side by side, of phantoms and of what they are converted to; both are removed
            where they are out of date. The file made_by.txt beside them tells.
        make: writes both; what it finished before it was stopped it need not do again. Returns {failed case:
            reason}.
        flags: of the conversion.
        modules: the task's code that decides how the phantoms come out.

    Returns:
        `out`.

    Raises:
        ValueError: a case failed.
    """
    code = [Path(file).read_bytes() for file in (__file__, *(module.__file__ for module in modules))]
    made_by = hashlib.sha256(b"".join([*code, *map(str.encode, flags)])).hexdigest()
    note = make_folder(out.parent) / "made_by.txt"
    found = note.read_text(errors="replace").split() if note.is_file() else []
    if found == [made_by, "complete"]:
        return out
    if made_by not in found:
        for folder in (source, out):
            shutil.rmtree(folder, ignore_errors=True)
        note.write_text(f"{made_by}\n")
    if failed := make():
        reason = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise ValueError(f"{source}: the phantoms could not be converted; delete {out.parent} ({reason})")
    note.write_text(f"{made_by} complete\n")
    return out
