"""The preprocessed VerSe cases, and training items of both stages read straight from their HDF5 files."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from common.files import NPY_ERRORS, check_numbers, replacing
from common.hdf5 import CaseFile
from common.patches import draw_patch
from common.preprocessed import choose_split, read_cases
from verse_spine.heatmap import SmallGrid, make_target, small_grid, to_small_grid
from verse_spine.labels import map_labels

# Shares of the training patches: a random place of a random vertebra, the border of a vertebra, bright voxels
# of something else (ribs, pelvis, metal), the ends of the spine's box, anywhere in the box or in the scan.
STRATA = {"class": 0.45, "boundary": 0.15, "hard_negative": 0.15, "ends": 0.05, "box": 0.16, "uniform": 0.04}
UNIFORM = {"uniform": 1.0}

# VerSe's names of the parts; None: the case lies outside of its dataset-... folders.
PUBLISHED_PARTS = {"training": "train", "validation": "val", "test": "test", None: ""}


# What is noted of each case, in preprocessing.json and in its file.
ENTRY = {"subject": str, "part": str | None, "edition": int | None}
ATTRIBUTES = {"boxes": np.ndarray, "spacing_mm": list | tuple | np.ndarray}


class VerSe:
    """A folder written by preprocess.py: its cases by name, and who is in which part.

    Attributes:
        path: the folder.
        cases: {name: CaseFile}.
        split: {"train", "val", "test"}: case names; subjects of one part only.
        preprocessing: what preprocess.py noted, e.g. spacing_mm.
    """

    def __init__(self, path: str | Path, edition: int | None = None, seed: int = 42) -> None:
        """Open the folder. `edition` 19 keeps the scans that came with VerSe19 (and those of no edition); 20
        keeps all, since VerSe20's release leaves out the scans that it shares with VerSe19.

        Raises:
            FileNotFoundError: no such folder, or not one of preprocess.py.
            ValueError: no case of the edition, or a subject in two parts.
        """
        self.path = Path(path)
        self.preprocessing, self.entries, files = read_cases(
            path, "verse_spine", "--source <VerSe folder>", ENTRY, ATTRIBUTES
        )
        if "hu_range" in self.preprocessing:
            what = f'{self.path / "preprocessing.json"}: "hu_range"'
            check_numbers(self.preprocessing["hu_range"], 2, what)
        self.preprocessing["data_path"] = str(self.path.resolve())
        for name, entry in self.entries.items():
            if entry["part"] not in PUBLISHED_PARTS:
                raise ValueError(f"{path}: preprocessing.json: part {entry['part']!r} of {name} is unknown")
        chosen = {
            name: file
            for name, file in files.items()
            if edition != 19 or self.entries[name]["edition"] in (19, None)
        }
        if not chosen:
            raise ValueError(f"{path}: {len(files)} cases, but none of --dataset_edition {edition}")
        self.cases = {name: CaseFile(file) for name, file in chosen.items()}
        self.subjects = {name: self.entries[name]["subject"] for name in chosen}
        parts = {name: PUBLISHED_PARTS[self.entries[name]["part"]] for name in chosen}
        self.split = choose_split(self.path, parts, self.subjects, set(self.entries), seed=seed)


def spine_box(case: CaseFile, margin_mm: float | tuple = 0.0) -> tuple[np.ndarray, np.ndarray] | None:
    """(start, stop) of all vertebrae of a case, widened by a margin and inside the scan; None without any."""
    boxes = np.asarray(case.attributes["boxes"], int).reshape(-1, 7)[:, 1:]
    if len(boxes) == 0:
        return None
    margin = np.rint(np.divide(margin_mm, case.spacing_mm)).astype(int)
    start = np.clip(boxes[:, :3].min(0) - margin, 0, None)
    return start, np.minimum(boxes[:, 3:].max(0) + margin, case.shape)


# ---- stage 1: whole scans on the small grid ----


class SmallScan:
    """One case on the small grid.

    Attributes:
        image: float32 HU on the grid.
        occupancy: float32, share of vertebra in each voxel.
        boxes: (n, 6) of the vertebrae in voxels of the scan.
    """

    def __init__(self, case: CaseFile, shape: tuple[int, int, int], folder: Path) -> None:
        """Read from `folder`, or made from the case and stored there: takes minutes for a data set, once."""
        folder.mkdir(exist_ok=True)
        self.grid: SmallGrid = small_grid(case.shape, case.spacing_mm, shape)
        self.boxes = np.asarray(case.attributes["boxes"], int).reshape(-1, 7)[:, 1:]
        file = folder / f"{case.path.stem}_{'x'.join(map(str, shape))}_2.npz"
        stamp = [case.path.stat().st_size, case.path.stat().st_mtime_ns]
        if _stored(file, shape, stamp) is None:
            image = to_small_grid(case.image, self.grid)
            occupancy = np.zeros(shape, np.float32)
            if case.has_label:
                occupancy = to_small_grid(_Foreground(case.label), self.grid, fill=0)
            image, occupancy = np.rint(image).astype(np.int16), occupancy.astype(np.float16)
            with replacing(file) as partial:
                np.savez(partial, image=image, occupancy=occupancy, stamp=stamp)
        self.image, self.occupancy = (array.astype(np.float32) for array in _stored(file, shape, stamp))


def _stored(
    file: Path, shape: tuple[int, int, int], stamp: list[int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """(image, occupancy) of a small grid on disk; None if there is none, or a damaged or outdated one."""
    try:
        with np.load(file) as stored:
            image, occupancy = stored["image"], stored["occupancy"]
            is_whole = stored["stamp"].tolist() == stamp and image.shape == occupancy.shape == tuple(shape)
    except (*NPY_ERRORS, OSError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
        return None
    kinds = image.dtype == np.int16 and occupancy.dtype == np.float16
    return (image, occupancy) if is_whole and kinds and np.isfinite(occupancy).all() else None


class _Foreground:
    """A label data set read as 0 / 1, slice by slice."""

    def __init__(self, label) -> None:
        self.label, self.shape = label, label.shape

    def __getitem__(self, index):
        return (self.label[index] > 0).astype(np.float32)


class HeatmapDataset(Dataset):
    """Item (index, seed) -> image HU (1, d, h, w) int16, target (1, d, h, w) float32, seed.

    All items are held in memory: 5 MB for each case at 128 x 64 x 64.
    """

    def __init__(self, verse: VerSe, names: list[str], shape: tuple[int, int, int], target: str) -> None:
        folder = verse.path / "small_grids"
        bar = tqdm(names, "small grids", unit="case", disable=None, leave=False)
        self.names = names
        self.scans = [SmallScan(verse.cases[name], shape, folder) for name in bar]
        self.targets = [make_target(target, s.grid, s.boxes, s.occupancy) for s in self.scans]

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        index, seed = item
        image = torch.from_numpy(self.scans[index].image.astype(np.int16))[None]
        return image, torch.from_numpy(self.targets[index])[None], seed


# ---- stage 2: patches ----


class PatchDataset(Dataset):
    """Item (index, seed) -> image HU (1, d, h, w) int16, label (d, h, w) uint8, seed, stratum (str).

    The case is `index` modulo their number; everything else is drawn from the seed alone. No volume is ever
    read whole.
    """

    def __init__(
        self,
        verse: VerSe,
        names: list[str],
        patch_size: tuple[int, int, int],
        labels: str,
        *,
        strata: dict[str, float] | None = None,
        length: int | None = None,
    ) -> None:
        others = [reason for name in names if (reason := verse.entries[name].get("other_scheme"))]
        if others and labels != "binary":
            raise ValueError(
                f"--labels {labels}: {len(others)} case(s) have other numbers than VerSe's: {others[0]}"
            )
        self.cases = [verse.cases[name] for name in names]
        self.patch_size, self.labels = patch_size, labels
        self.strata = STRATA if strata is None else strata
        self.length = length or len(names)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, int, str]:
        index, seed = item
        case, rng = self.cases[index % len(self.cases)], np.random.default_rng(seed)
        box = spine_box(case, rng.uniform(20, 60))
        start, stratum = draw_patch(case, self.patch_size, self.strata, rng, box=box)
        image = case.read_image(start, self.patch_size)
        label = map_labels(case.read_label(start, self.patch_size), self.labels)
        return torch.from_numpy(image)[None], torch.from_numpy(label), seed, stratum
