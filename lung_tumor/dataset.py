"""Slices on disk and the training data set made of them.

    <data_path>/images/<volume>_slice_NNNN.png    8-bit grey
    <data_path>/labels/<same name>                0 / 255 (0 / 1 is understood)
    <data_path>/dataset.json                      window_hu, pixel_mm and how the slices were made
    <data_path>/volumes.json                      geometry of each volume, to go back to its scan
    <data_path>/splits.json                       train, val, test volumes and the patient of each
    <data_path>/cache/                            slices at the training size as one uint8 array, made here

A plain folder with images/ and labels/ works as well; splits.json is then drawn once and written.
"""

import atexit
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from common import distributed
from common.files import check_numbers, check_room, open_npy, public_folder, read_json, read_mapped
from common.hu import check_window
from common.messages import warn
from common.splits import (
    check_split,
    fold_split,
    natural_key,
    patients_of,
    read_splits,
    save_splits,
    split_by_patient,
)
from lung_tumor.slice_files import SliceFile, list_slices, read_notes, read_volumes, training_slices
from lung_tumor.slices import fit_to_square, normalise, read_image, read_mask

LIKELY_PATIENT = r"(.+?)[_-]\d+"  # the image of a patient: p07_012


def load_splits(
    data_path: str | Path, slices: list[SliceFile], seed: int, pattern: str | None = None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """splits.json of the data set, drawn 80/20 by patient and written if there is none.

    Args:
        pattern: of --patient_pattern, as of `patients_of`. None: each volume is a patient, and of a plain
            folder of images those whose names differ in a last _<number> only are of one.

    Raises:
        ValueError: a patient in two parts, a volume that has no slices, or a splits.json of other patients.
    """
    path = Path(data_path) / "splits.json"
    volumes = {s.volume for s in slices}
    names = sorted(volumes, key=natural_key)
    if path.is_file():
        split, patients = read_splits(path)
    else:  # the same in every process, and one of them writes it
        patients = patients_of(names, pattern) if pattern else likely_patients(names, len(slices))
        split = split_by_patient(patients, seed=seed)
        if distributed.is_main():
            save_splits(path, split, patients, seed)
    if pattern and patients != patients_of(list(patients), pattern):
        raise ValueError(
            f"{path}: was drawn with other patients than --patient_pattern {pattern!r} finds; delete it, so "
            "that a new split is drawn, or leave the flag out"
        )
    if distributed.is_main():
        if len(volumes) > 3 and len(slices) == len(volumes) == len(set(patients.values())):
            warn(
                f"{data_path}: every image counts as a patient of its own. If some are of one "
                "patient, scores will be too good; say with --patient_pattern where their names tell the "
                "patient, and delete splits.json"
            )
        if left_out := sorted(volumes - set(patients), key=natural_key):
            warn(f"{path} leaves out {len(left_out)} volume(s), first {left_out[0]}")
    missing = [v for part in split.values() for v in part if v not in volumes]
    if missing:
        raise ValueError(f"{path}: names volume {missing[0]}, of which there is no slice under {data_path}")
    return split, patients


def pixel_notes(data_path: str | Path) -> dict:
    """window_hu and pixel_mm of dataset.json; each None if unknown.

    Raises:
        ValueError: no window, or no size.
    """
    notes, path = read_notes(data_path, "dataset.json"), Path(data_path) / "dataset.json"
    check_window(notes.get("window_hu"), f'{path}: "window_hu"')
    if (pixel_mm := notes.get("pixel_mm")) is not None:
        check_numbers([pixel_mm], 1, f'{path}: "pixel_mm"')
    return {"window_hu": notes.get("window_hu"), "pixel_mm": pixel_mm}


def likely_patients(names: list[str], num_slices: int) -> dict[str, str]:
    """{volume: patient}: of single images called <patient>_<number> the patient, else each volume itself.

    Two patients or fewer are no patients but, most likely, one word in front of all numbers.
    """
    if num_slices == len(names) and all(re.fullmatch(LIKELY_PATIENT, name) for name in names):
        patients = patients_of(names, LIKELY_PATIENT)
        if 2 < (count := len(set(patients.values()))) < len(names):
            if distributed.is_main():
                print(
                    f"{len(names)} images of {count} patients, by their names <patient>_<number>; "
                    "--patient_pattern '(.+)' makes each image a patient of its own"
                )
            return patients
    return patients_of(names)


def open_data(
    data_path: str | Path,
    size: int,
    seed: int,
    folds: int | None = None,
    fold: int | None = None,
    patient_pattern: str | None = None,
) -> tuple["PackedSlices", dict[str, list[str]], dict]:
    """(slices chosen for training, packed; the split; what a checkpoint must know of the preprocessing).

    That is: window_hu and pixel_mm of the data set (None if unknown), `scale` as of `common_scale`, and
    data_path. Prediction shows the network its slices by them.

    Raises:
        FileNotFoundError, ValueError: see `list_slices`, `load_splits`, `pack_slices`; or a part without
        tumour.
    """
    if size < 16:
        raise ValueError(f"--image_size {size}: the network halves it four times, so at least 16")
    notes = [(Path(data_path) / name).is_file() for name in ("volumes.json", "dataset.json")]
    if notes == [True, False]:  # the second is written last
        raise ValueError(f"{data_path}: its conversion is unfinished; run lung_tumor/preprocess.py again")
    entries = read_volumes(data_path)
    slices = training_slices(list_slices(data_path), entries)
    split, patients = load_splits(data_path, slices, seed, patient_pattern)
    if fold is not None:
        split = fold_split(patients, folds=folds or 0, fold=fold, seed=seed)
        check_split(split, patients)
    scale = common_scale(entries, size)
    packed = pack_slices(data_path, slices, size, scale)
    if (lost := packed.tumour_cut_off) and distributed.is_main():
        reason = f"lie outside of the squares of {size} pixels; a larger --image_size shows more"
        warn(f"{100 * lost:.2f} % of the tumour in the training slices {reason}")
    for part in ("train", "val"):
        indices = packed.indices(split[part])
        if not any(packed.labels[i].any() for i in indices):
            raise ValueError(
                f"{data_path}: no tumour pixel in the {len(indices)} slices of the part '{part}', which "
                "needs both classes. Check the labels, or draw another split (preprocess.py --val_cases)"
            )
    preprocessing = pixel_notes(data_path) | {
        "scale": scale,
        "data_path": str(Path(data_path).resolve()),
    }
    return packed, split, preprocessing


def common_scale(volumes: dict, size: int) -> float | None:
    """Network pixels for a pixel of a slice, one number for all so that the network sees one pixel size.

    1, or less where the median slice of the volumes does not fit into `size` pixels. Larger slices are then
    cut in training (see `fit_to_square`): what lies out there is table and air, while a scale that lets the
    largest of all fit would cost every tumour pixels. Up to 5 % are cut rather than resampled. None, so that
    each slice is scaled to fill the square, if `volumes` (volumes.json) is {} or from an earlier version,
    where pixels differ from volume to volume.
    """
    if not volumes or any("slice_shape" not in entry for entry in volumes.values()):
        return None
    sides = sorted(max(entry["slice_shape"]) for entry in volumes.values())
    scale = size / sides[len(sides) // 2]  # of two in the middle the larger
    return scale if scale < 0.95 else 1.0


@dataclass
class PackedSlices:
    """All slices of a data set at one size, memory-mapped: no decoding and no resizing during training.

    Measured at 512 x 512: see benchmarks/slice_loading.py.

    Attributes:
        images, labels: (n, size, size) uint8, labels 0/1.
        volumes: volume of each slice.
        num_unclean: masks that held other values than 0/1 or 0/255.
        tumour_cut_off: share of the tumour's pixels that lie outside of the squares.
    """

    images: np.ndarray
    labels: np.ndarray
    volumes: list[str]
    num_unclean: int
    tumour_cut_off: float = 0.0

    def __getstate__(self) -> dict:
        # A spawned worker maps the files again; pickling a memory map would send it all of the data.
        return {k: Path(v.filename) if isinstance(v, np.memmap) else v for k, v in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, np.load(value, mmap_mode="r") if isinstance(value, Path) else value)

    def indices(self, volumes: list[str]) -> np.ndarray:
        """Positions of all slices of these volumes."""
        chosen = set(volumes)
        return np.array([i for i, v in enumerate(self.volumes) if v in chosen], dtype=np.int64)


def pack_slices(
    data_path: str | Path, slices: list[SliceFile], size: int, scale: float | None = None
) -> PackedSlices:
    """Decode every slice once into two .npy files under <data_path>/cache and map them.

    Args:
        size, scale: of `fit_to_square`.

    The cache is named by a hash of all file names, sizes and times, so a changed data set makes a new one and
    old ones are removed. If the folder cannot be written, a temporary folder is used, with a message.

    Raises:
        ValueError: an image and its label differ in shape, or a file is not an image or a mask.
    """
    stamp = hashlib.sha256(f"version 2 {size} {scale}".encode())
    for files in slices:
        for path in (files.image, files.label):
            stat = path.stat()
            stamp.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    name = f"slices_{size}_{stamp.hexdigest()[:16]}"
    cache = Path(data_path) / "cache"
    folder = cache / name
    packed = _read_packed(folder, slices, size)
    if packed is None:
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        try:
            cache.mkdir(exist_ok=True)
            partial = public_folder(cache)
        except OSError as error:
            partial = folder = Path(tempfile.mkdtemp(prefix="lung_tumor_"))
            atexit.register(shutil.rmtree, partial, ignore_errors=True)
            print(
                f"{cache}: cannot be written ({error.strerror}); slices are packed into {folder} for this run"
            )
        try:
            _write_packed(partial, slices, size, scale)
            if folder != partial:
                _publish(partial, folder, size)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        packed = _read_packed(folder, slices, size)
    if packed is None:
        raise OSError(f"{folder}: cannot be read although it was written just now; is the disk all right?")
    return packed


def _read_packed(folder: Path, slices: list[SliceFile], size: int) -> PackedSlices | None:
    """A cache mapped into memory; None if there is none, or it is cut off or otherwise damaged."""
    try:
        info = read_json(folder / "info.json", {"num_unclean": int, "tumour_cut_off": float | int})
        images, labels = map(open_npy, (folder / "images.npy", folder / "labels.npy"))
    except (OSError, ValueError):
        return None
    if any(a.shape != (len(slices), size, size) or a.dtype != np.uint8 for a in (images, labels)):
        return None
    volumes = [s.volume for s in slices]
    return PackedSlices(images, labels, volumes, info["num_unclean"], info["tumour_cut_off"])


def _publish(partial: Path, folder: Path, size: int) -> None:
    """Give a finished cache its name, unless another run was faster, and remove what it replaces."""
    try:
        os.replace(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial, ignore_errors=True)
    for old in folder.parent.iterdir():
        # Another run may be packing right now: leave what is less than a day old.
        abandoned = old.name.startswith("partial_") and time.time() - old.stat().st_mtime > 86400
        if abandoned or (old.name.startswith(f"slices_{size}_") and old != folder):
            shutil.rmtree(old, ignore_errors=True)


def _write_packed(folder: Path, slices: list[SliceFile], size: int, scale: float | None) -> None:
    shape = (len(slices), size, size)
    check_room(folder.parent, 2 * len(slices) * size * size, "the cache of slices")
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, shape)
    num_unclean, tumour_pixels = 0, 0
    for i, files in enumerate(tqdm(slices, "packing slices", unit="slice", disable=None, leave=False)):
        image = read_image(files.image)
        mask, is_clean = read_mask(files.label)
        if image.shape != mask.shape:
            raise ValueError(
                f"{files.image.name}: image {image.shape} and label {mask.shape} differ in shape; "
                "run lung_tumor/preprocess.py again or remove the pair"
            )
        images[i] = fit_to_square(image, size, scale, cut=True)
        labels[i] = fit_to_square(mask, size, scale, cut=True, is_mask=True)
        num_unclean += not is_clean
        tumour_pixels += int(fit_to_square(mask, size, scale, is_mask=True).sum())
    images.flush()
    labels.flush()
    cut_off = (tumour_pixels - int(labels.sum(dtype=np.int64))) / max(1, tumour_pixels)
    info = {"num_unclean": num_unclean, "tumour_cut_off": cut_off}
    (folder / "info.json").write_text(json.dumps(info), encoding="utf8")


class SliceDataset(Dataset):
    """Slices of the given volumes as (image, target): float32 (1, size, size) in [-1, 1], int64 (size, size).

    Args:
        packed: from `pack_slices`.
        volumes: names of the volumes whose slices belong to this data set.
        augment: a function (image uint8, mask uint8, seed) -> (image, mask), or None. With it, items are
            asked for by pairs (index, seed), as `common.distributed.EpochSampler` draws them.
    """

    def __init__(
        self, packed: PackedSlices, volumes: list[str], augment: Callable[..., tuple] | None = None
    ) -> None:
        self.packed, self.augment = packed, augment
        self.indices = packed.indices(volumes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        position = self.indices[index]
        image, mask = (read_mapped(a, position) for a in (self.packed.images, self.packed.labels))
        if self.augment is not None:
            image, mask = self.augment(image, mask, seed)
        return normalise(image).unsqueeze(0), torch.from_numpy(mask.astype(np.int64))
