"""Preprocessed cases for training: who is in which part, and training patches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from amygdala.head import add_surroundings
from amygdala.structures import DATASETS, NUM_CLASSES
from common.hdf5 import CaseFile
from common.preprocessed import read_cases
from common.splits import check_split, folds_of, hold_out, leave_group_out

# What is noted of each case, in preprocessing.json and in its file.
ENTRY = {"subject": str, "site": str, "part": str}
ATTRIBUTES = {"centre": np.ndarray | list, "spacing_mm": list | tuple | np.ndarray}


class Cohort:
    """A folder written by preprocess.py.

    Attributes:
        dataset: "Amygdala" or "Hippocampus".
        cases: {name: CaseFile}.
        subjects, sites: {name: subject}, {name: site}.
        split: {"train", "val", "test"}: names; subjects of one part only.
        preprocessing: what prediction has to know as well: spacing_mm, dataset, data_path.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dataset: str | None = None,
        seed: int = 0,
        folds: int = 5,
        fold: int | None = None,
        validation: bool = True,
        leave_site_out: str | None = None,
    ) -> None:
        """Open the folder and divide its subjects.

        With `fold` or `leave_site_out` the published test cases are left alone, and the training cases are
        divided; see `stratified_folds` and `leave_group_out`. With neither the published parts hold. Where
        there is a test part, some subjects of the others choose the best epoch; see `hold_out`. The folds of
        a `folds.json` in the folder, a list of lists of names, count instead of drawn ones.

        Args:
            dataset: the data set that is expected; None takes any.
            fold: number of the fold that is held out for the test.
            validation: False trains on the validation part, too.
            leave_site_out: the site that is held out for the test.

        Raises:
            FileNotFoundError, ValueError: see `read_cases` and the functions named above; or a folder of
                another data set.
        """
        folder = Path(path)
        raw = f"--dataset {dataset or 'Amygdala'} --source <folder>"
        notes, entries, files = read_cases(folder, "amygdala", raw, ENTRY, ATTRIBUTES)
        self.dataset = str(notes.get("dataset"))
        if self.dataset not in DATASETS or dataset not in (None, self.dataset):
            wanted = dataset or " or ".join(DATASETS)
            raise ValueError(f"{folder}: holds {self.dataset}, not {wanted}; choose another --data_path")
        if fold is not None and leave_site_out is not None:
            raise ValueError("--fold and --leave_site_out exclude each other; give one of them")
        self.cases = {name: CaseFile(file) for name, file in files.items()}
        self.subjects = {name: entries[name]["subject"] for name in files}
        self.sites = {name: entries[name]["site"] for name in files}
        self.preprocessing: dict[str, Any] = {
            "spacing_mm": notes["spacing_mm"],
            "dataset": self.dataset,
            "data_path": str(folder.resolve()),
        }
        train = [name for name in files if entries[name]["part"] == "train"]
        test = [name for name in files if entries[name]["part"] == "test"]
        val: list[str] = []
        subjects, sites = ({name: of[name] for name in train} for of in (self.subjects, self.sites))
        if leave_site_out is not None:
            train, test = leave_group_out(subjects, sites, leave_site_out)
        elif fold is not None:
            parts = folds_of(folder, subjects, sites, folds=folds, seed=seed)
            if not 0 <= fold < len(parts):
                raise ValueError(f"--fold {fold}: with {len(parts)} folds choose 0 to {len(parts) - 1}")
            test = parts[fold]
            train = [name for name in train if name not in set(test)]
        if validation and test:
            rest, rest_sites = ({name: of[name] for name in train} for of in (subjects, sites))
            train, val = hold_out(rest, rest_sites, seed=seed)
        self.split = {"train": train, "val": val, "test": test}
        check_split(self.split, self.subjects, folder)


class PatchDataset(Dataset):
    """Item (index, seed) -> one training patch, as a dict; the case is `index` modulo their number.

    The patch lies around the middle of what is labelled in scans of whole heads, around that of the volume in
    crops; it is moved at random by up to `jitter` voxels along each axis. No volume is ever read whole.

    With the probability `surroundings` what skull stripping has blanked is filled, see `add_surroundings`.

    The dict: image (1, d, h, w) float32 grey values; label (d, h, w) uint8; case, its number; seed.
    """

    def __init__(
        self,
        cohort: Cohort,
        names: Sequence[str],
        patch_size: Sequence[int],
        length: int,
        *,
        jitter: int = 8,
        surroundings: float = 0.0,
    ) -> None:
        self.cases = [cohort.cases[name] for name in names]
        self.patch_size, self.length, self.jitter = tuple(patch_size), length, jitter
        self.localised, self.surroundings = DATASETS[cohort.dataset].localised, surroundings

    def __len__(self) -> int:
        return self.length

    def start(self, case: CaseFile, seed: int) -> tuple[int, int, int]:
        """First voxel of the patch, z y x; it may lie outside the volume."""
        middle = case.attributes["centre"] if self.localised else np.subtract(case.shape, 1) / 2
        moved = np.random.default_rng(seed).integers(-self.jitter, self.jitter + 1, 3)
        z, y, x = np.rint(middle - np.subtract(self.patch_size, 1) / 2).astype(int) + moved
        return int(z), int(y), int(x)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, seed = item
        number = index % len(self.cases)
        case = self.cases[number]
        start = self.start(case, seed)
        image = case.read_image(start, self.patch_size).astype(np.float32)
        rng = np.random.default_rng([seed, 1])
        if self.localised and rng.random() < self.surroundings:
            image = add_surroundings(image, float(np.mean(case.spacing_mm)), rng)
        return {
            "image": torch.from_numpy(image)[None],
            "label": torch.from_numpy(case.read_label(start, self.patch_size, NUM_CLASSES)),
            "case": number,
            "seed": seed,
        }
