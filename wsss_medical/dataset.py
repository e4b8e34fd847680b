"""Slices on disk, their split by patient, and the data sets made of them.

<root>/imageSlice/LASC_001_012_1.npy   patient, slice, label: 1 if it shows what is looked for
<root>/maskSlice/<same name>           0 / 1, for evaluation only; may be missing
<root>/slices.json                     how the slices were made
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common.augment2d import draw_move, vary_grey
from common.files import open_npy
from common.pixel_labels import IGNORE
from common.slices import read_npy_mask, robust_read_npy
from common.splits import PARTS, cut_in_order, natural_key

IMAGES, MASKS = "imageSlice", "maskSlice"
DEMO = Path("data/demo/wsss_medical")  # what --data_path demo means: volumes/ and slices/
PUBLISHED = " (LASC as published has 6776 slices, BraTS 75020)"
SUGGESTED = (0.2, 0.35)  # of the patients: where the test part and the validation part end


def patient_of(stem: str) -> str:
    """'BRATS_001_012_1' -> 'BRATS_001'. A name without the number of a slice is a patient of its own."""
    rest = stem.rpartition("_")[0]
    patient, _, number = rest.rpartition("_")
    return patient if patient and number.isdecimal() else rest


def load_cls_labels_from_filenames(name_list: Sequence[str]) -> np.ndarray:
    """The label behind the last _ of each name, with or without .npy: int64 (n,) of 0 and 1."""
    labels = []
    for name in name_list:
        rest, _, label = name.removesuffix(".npy").rpartition("_")
        if not rest or label not in ("0", "1"):
            raise ValueError(f"slice {name}: its name does not end in _0 or _1, which is the slice's label")
        labels.append(int(label))
    return np.array(labels, np.int64)


def find_root(root_dir: str | Path) -> Path:
    """The folder that holds imageSlice/, BraTS being the same as BRATS."""
    root = Path(root_dir)
    same = [root, *(root.parent.iterdir() if root.parent.is_dir() else ())]
    for folder in same:
        if folder.name.lower() == root.name.lower() and (folder / IMAGES).is_dir():
            return folder
    raise FileNotFoundError(
        f"{root}: no folder {IMAGES}/ in it; make it with wsss_medical/preprocess.py --out {root}, or try "
        "--data_path demo"
    )


def list_names(root_dir: str | Path) -> list[str]:
    """Names of all slices without .npy, in the order in which a split by index counts them.

    That is the order of the characters, but numbers count as numbers where that leaves the patients in their
    order. Hidden files are passed over.
    """
    names = sorted(p.stem for p in (find_root(root_dir) / IMAGES).glob("*.npy") if p.name[0] != ".")
    if not names:
        raise ValueError(f"{root_dir}: {IMAGES}/ holds no .npy file; run wsss_medical/preprocess.py")
    load_cls_labels_from_filenames(names)
    natural = sorted(names, key=natural_key)
    orders = [list(dict.fromkeys(map(patient_of, each))) for each in (names, natural)]
    return natural if orders[0] == orders[1] else names


def split_slices(names: Sequence[str], slice_split: Sequence[float]) -> dict[str, list[str]]:
    """test = names[:a], val = names[a:b], train = names[b:], as {"train", "val", "test"}.

    Names are in the order of `list_names`, a and b as of `cut_in_order`. A part that has slices of one kind
    only is refused.
    """
    patients = [patient_of(name) for name in names]
    a, b = cut_in_order(patients, slice_split, flag="slice_split", advice=PUBLISHED)
    split = {"train": list(names[b:]), "val": list(names[a:b]), "test": list(names[:a])}
    for part, stems in split.items():
        positives = load_cls_labels_from_filenames(stems).sum()
        if positives in (0, len(stems)) and (stems or part != "test"):
            found = f"{len(stems)} slices, {positives} of them positive"
            raise ValueError(
                f"slice_split {list(slice_split)}: the part '{part}' has {found}; it needs both kinds"
            )
    return split


def suggested_split(names: Sequence[str]) -> list[int] | None:
    """a and b of `split_slices` between patients, near SUGGESTED; None if there is no such split."""
    try:
        split = split_slices(names, SUGGESTED)
    except ValueError:
        return None
    return [len(split["test"]), len(split["test"]) + len(split["val"])]


def split_lines(split: dict[str, list[str]]) -> list[str]:
    """A table for the log: slices, patients and positive slices of each part."""
    lines = [f"{'part':<6}{'slices':>8}{'patients':>10}{'positive':>10}"]
    for part in PARTS:
        patients, labels = set(map(patient_of, split[part])), load_cls_labels_from_filenames(split[part])
        lines.append(f"{part:<6}{len(labels):>8}{len(patients):>10}{labels.sum():>10}")
    return lines


def load_slice_list(root_dir: str | Path, split: str, slice_split: Sequence[float]) -> list[str]:
    """Names of the slices of "train", "val" or "test"; of "all"."""
    names = list_names(root_dir)
    return names if split == "all" else split_slices(names, slice_split)[split]


class MedicalSliceDataset(Dataset):
    """Slices of a folder by name.

    Attributes:
        names: without .npy.
        labels: int64 (n,).
        has_masks: whether every slice has its mask.
    """

    def __init__(self, root_dir: str | Path, names: Sequence[str]) -> None:
        self.root, self.names = find_root(root_dir), list(names)
        self.labels = load_cls_labels_from_filenames(self.names)
        self.has_masks = all((self.root / MASKS / f"{name}.npy").is_file() for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3)."""
        return robust_read_npy(self.root / IMAGES / f"{self.names[i]}.npy")

    def read_mask(self, i: int, shape: Sequence[int] | None = None) -> np.ndarray | None:
        """uint8 (h, w) of 0 and 1, as of `read_npy_mask`; None if there is no mask."""
        path = self.root / MASKS / f"{self.names[i]}.npy"
        return read_npy_mask(path, shape) if path.is_file() else None

    def item(self, i: int, image: np.ndarray) -> dict:
        """name, image uint8 (3, h, w), label float32 (1,)."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"name": self.names[i], "image": pixels, "label": torch.tensor([float(self.labels[i])])}


class MedicalClsValDataset(MedicalSliceDataset):
    """Slices at their own size: `item`, with mask uint8 (h, w) where there is one."""

    def __getitem__(self, i: int) -> dict:
        item = self.item(i, self.read(i))
        mask = self.read_mask(i, item["image"].shape[1:])
        return item if mask is None else item | {"mask": torch.from_numpy(mask)}


class MedicalClsDataset(MedicalSliceDataset):
    """Training slices scaled, flipped and cut to squares: `item`, with box int64 (4,), y0 y1 x0 x1 of the
    slice in its square. Outside of it is 0. With `targets` also target uint8 (crop_size, crop_size).

    Items are asked for by pairs (index, seed), as `common.distributed.EpochSampler` draws them; all that is
    random comes from the seed.

    Args:
        crop_size: side of the squares in pixels.
        length: number of items, where a sampler is to count iterations; indices wrap around the slices.
        scale_range, flip, rotate_deg: as of `draw_move`.
        grey_values: whether contrast, brightness and gamma vary, as they do between patients.
        targets: folder of labels of pixels, <name>.npy with 0, 1 and 255 = unknown, as outside of the slice.
    """

    def __init__(
        self,
        root_dir: str | Path,
        names: Sequence[str],
        crop_size: int,
        *,
        length: int | None = None,
        scale_range: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        rotate_deg: float = 0.0,
        grey_values: bool = False,
        targets: Path | None = None,
    ) -> None:
        super().__init__(root_dir, names)
        self.crop_size, self.grey_values, self.targets = crop_size, grey_values, targets
        self.ranges = {"scale_range": scale_range, "flip": flip, "rotate_deg": rotate_deg}
        self.length = length or len(self.names)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, rng = key[0] % len(self.names), np.random.default_rng(key[1])
        image = self.read(index)
        move = draw_move(image.shape, self.crop_size, rng, **self.ranges)
        square = move.applied(image)
        if self.grey_values:
            contrast, gamma = rng.uniform(0.7, 1.4), np.exp(rng.uniform(-0.7, 0.7))
            square = vary_grey(square, contrast, gamma, rng.uniform(-0.15, 0.15))
        item = self.item(index, square) | {"box": torch.tensor(move.box)}
        if self.targets is None:
            return item
        if self.targets == self.root / MASKS:  # in which 255 is the structure
            labels = self.read_mask(index, image.shape[:2])
        else:
            labels = np.array(open_npy(self.targets / f"{self.names[index]}.npy"))
        return item | {"target": torch.from_numpy(move.applied(labels, IGNORE, is_mask=True))}
