"""Preprocessed cases for training: who is in which part, how grey values are scaled, and training patches.

Several data sets with labels of different organs may be opened together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from amos_lha.organs import NUM_CLASSES, ORGANS
from amos_lha.sampling import Sampler
from common.hdf5 import CaseFile
from common.intensity import Scaling, fingerprint
from common.preprocessed import choose_split, read_cases
from common.splits import PARTS, patients_of

MODALITIES = ("ct", "mr", "both")


class Amos:
    """One or more folders written by preprocess.py.

    Attributes:
        cases: {name: CaseFile}; of several folders the names begin with that of the folder.
        patients: {name: patient}.
        split: {"train", "val", "test"}: names; patients of one part only.
        preprocessing: what prediction has to do as well: spacing_mm; of the training cases modality, "ct",
            "mr" or "both", scaling, the fingerprint of the CT, None without CT, and labelled, the organs that
            any of them has labels for; data_path.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        modality: str = "both",
        *,
        seed: int = 42,
        folds: int | None = None,
        fold: int | None = None,
        validation: bool = True,
        patient_pattern: str | None = None,
    ) -> None:
        """Open the folders; the keyword arguments are those of `choose_split`.

        Args:
            modality: "ct" or "mr" leaves out the cases of the other one.
            patient_pattern: as of `patients_of`.

        Raises:
            FileNotFoundError, ValueError: see `read_cases` and `choose_split`; or no case of the modality, or
                two folders with voxels of different sizes.
        """
        folders = [Path(path) for path in paths]
        if len({folder.resolve().name for folder in folders}) < len(folders):
            raise ValueError(f"--data_path {' '.join(map(str, paths))}: two folders of one name; rename one")
        self.cases: dict[str, CaseFile] = {}
        self.patients: dict[str, str] = {}
        self.split: dict[str, list[str]] = {part: [] for part in PARTS}
        spacings = {}
        for folder in folders:
            notes, entries, files = read_cases(folder, "amos_lha", "--data_path <AMOS folder>")
            spacings[folder] = notes["spacing_mm"]
            chosen = {
                name: entries[name]
                for name in files
                if modality == "both" or entries[name]["modality"] == modality
            }
            if not chosen:
                raise ValueError(f"{folder}: {len(files)} cases, but none of --modality {modality}")
            patients = patients_of(list(chosen), patient_pattern)
            # A set without imagesVa and labelsTs was published in one part: its validation part is drawn.
            has_parts = any(entry["part"] != "train" for entry in chosen.values())
            split = choose_split(
                folder,
                {name: entry["part"] if has_parts else "" for name, entry in chosen.items()},
                patients,
                set(entries),
                seed=seed,
                folds=folds,
                fold=fold,
                validation=validation,
            )
            prefix = f"{folder.resolve().name}/" if len(folders) > 1 else ""
            for part in PARTS:
                self.split[part] += [prefix + name for name in split[part]]
            self.patients |= {prefix + name: prefix + patient for name, patient in patients.items()}
            self.cases |= {prefix + name: CaseFile(files[name]) for name in chosen}
        if len({tuple(spacing) for spacing in spacings.values()}) > 1:
            sizes = "; ".join(f"{folder}: {spacing}" for folder, spacing in spacings.items())
            raise ValueError(f"voxels of different sizes (mm, z y x): {sizes}; preprocess with one --spacing")
        if not self.split["train"]:
            raise ValueError(f"{' '.join(map(str, paths))}: no training case")
        training = [self.cases[name].attributes for name in self.split["train"]]
        modalities = {notes["modality"] for notes in training}
        self.preprocessing: dict[str, Any] = {
            "spacing_mm": next(iter(spacings.values())),
            "modality": modalities.pop() if len(modalities) == 1 else "both",
            "scaling": self._ct_scaling(),
            "labelled": sorted(set().union(*(notes["labelled"] for notes in training))),
            "data_path": " ".join(str(folder.resolve()) for folder in folders),
        }

    def _ct_scaling(self) -> list[float] | None:
        training = [self.cases[name].attributes for name in self.split["train"]]
        samples = [notes["foreground_sample"] for notes in training if notes["modality"] == "ct"]
        return list(fingerprint(samples)) if samples else None

    def class_frequency(self) -> Tensor:
        """(16,) share of each class among the voxels of the training cases that have labels for it."""
        found, seen = np.zeros(NUM_CLASSES), np.zeros(NUM_CLASSES)
        for name in self.split["train"]:
            case = self.cases[name]
            voxels = {int(organ): count for organ, count in case.attributes["voxels"].items()}
            size = np.prod(case.shape)
            for organ in case.attributes["labelled"]:
                found[organ] += voxels.get(organ, 0)
                seen[organ] += size
            found[0] += size - sum(voxels.values())
            seen[0] += size
        return torch.from_numpy(found / np.maximum(seen, 1)).float()


def case_scaling(case: CaseFile, preprocessing: dict) -> Scaling:
    """How the grey values of a case are scaled: MR by its own values, CT by the fingerprint of the training
    cases.

    Raises:
        ValueError: a CT, but no CT was trained on.
    """
    if case.attributes["modality"] == "mr":
        return Scaling(*case.attributes["scaling"])
    if preprocessing["scaling"] is None:
        raise ValueError(f"{case.path}: a CT, but there is no CT among the training cases")
    return Scaling(*preprocessing["scaling"])


def labelled_mask(organs: Sequence[int]) -> np.ndarray:
    """(16,) bool: the background and these organs."""
    mask = np.zeros(NUM_CLASSES, bool)
    mask[[0, *organs]] = True
    return mask


class PatchDataset(Dataset):
    """Item (index, seed) -> one training patch, as a dict.

    The case is `index` modulo their number, unless the sampler draws another; everything else is drawn from
    the seed. No volume is ever read whole.

    The dict: image (1, d, h, w) float32 grey values; label (d, h, w) uint8; scaling (4,); labelled (16,)
    bool; case, its number; seed; stratum; organ, the name of that which the patch was drawn for, or "none".
    """

    def __init__(
        self,
        data: Amos,
        names: Sequence[str],
        patch_size: Sequence[int],
        shares: dict[str, float],
        length: int,
    ) -> None:
        self.cases = [data.cases[name] for name in names]
        self.patch_size, self.length = tuple(patch_size), length
        self.sampler = Sampler(self.cases, self.patch_size, shares)
        self.scalings = torch.tensor([case_scaling(case, data.preprocessing) for case in self.cases])
        self.labelled = [labelled_mask(case.attributes["labelled"]) for case in self.cases]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, seed = item
        drawn = self.sampler.draw(index % len(self.cases), np.random.default_rng(seed))
        case = self.cases[drawn.case]
        return {
            "image": torch.from_numpy(case.read_image(drawn.start, self.patch_size).astype(np.float32))[None],
            "label": torch.from_numpy(case.read_label(drawn.start, self.patch_size)),
            "scaling": self.scalings[drawn.case],
            "labelled": torch.from_numpy(self.labelled[drawn.case]),
            "case": drawn.case,
            "seed": seed,
            "stratum": drawn.stratum,
            "organ": ORGANS.get(drawn.organ, "none"),
        }
