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
from common.losses import labelled_mask
from common.preprocessed import class_frequency, open_folders

MODALITIES = ("ct", "mr", "both")


class Amos:
    """One or more folders written by preprocess.py.

    Attributes:
        cases, patients, split: as of `Opened`.
        preprocessing: what prediction has to do as well: spacing_mm; of the training cases modality, "ct",
            "mr" or "both", scaling, the fingerprint of the CT, None without CT, and labelled, the organs that
            any of them has labels for; data_path.
    """

    def __init__(
        self, paths: Sequence[str | Path], modality: str = "both", *, seed: int = 42, **options
    ) -> None:
        """Open the folders; `modality` "ct" or "mr" leaves out the cases of the other one.

        Args:
            options: patient_pattern and the keyword arguments of `choose_split`.

        Raises:
            FileNotFoundError, ValueError: see `open_folders`.
        """
        opened = open_folders(
            paths,
            "amos_lha",
            "--data_path <AMOS folder>",
            {"modality": str, "part": str},
            {"modality": str, "labelled": list, "voxels": dict, "scaling": list | None},
            wanted=lambda entry: modality in ("both", entry["modality"]),
            wish=f"--modality {modality}",
            seed=seed,
            **options,
        )
        self.cases, self.patients, self.split = opened.cases, opened.patients, opened.split
        training = [self.cases[name].attributes for name in self.split["train"]]
        modalities = {notes["modality"] for notes in training}
        samples = [notes["foreground_sample"] for notes in training if notes["modality"] == "ct"]
        self.preprocessing: dict[str, Any] = {
            "spacing_mm": opened.spacing_mm,
            "modality": modalities.pop() if len(modalities) == 1 else "both",
            "scaling": list(fingerprint(samples)) if samples else None,
            "labelled": sorted(set().union(*(notes["labelled"] for notes in training))),
            "data_path": opened.data_path,
        }

    def class_frequency(self) -> Tensor:
        """(16,) share of each class among the voxels of the training cases that have labels for it."""
        cases = (self.cases[name] for name in self.split["train"])
        return torch.from_numpy(class_frequency(cases, NUM_CLASSES)).float()


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
        self.labelled = [labelled_mask(NUM_CLASSES, case.attributes["labelled"]) for case in self.cases]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, seed = item
        drawn = self.sampler.draw(index % len(self.cases), np.random.default_rng(seed))
        case = self.cases[drawn.case]
        return {
            "image": torch.from_numpy(case.read_image(drawn.start, self.patch_size).astype(np.float32))[None],
            "label": torch.from_numpy(case.read_label(drawn.start, self.patch_size, NUM_CLASSES)),
            "scaling": self.scalings[drawn.case],
            "labelled": self.labelled[drawn.case],
            "case": drawn.case,
            "seed": seed,
            "stratum": drawn.stratum,
            "organ": ORGANS.get(drawn.organ, "none"),
        }
