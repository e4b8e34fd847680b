"""Which patch to train on next: small organs, borders and what the network does badly come more often."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amos_lha.organs import GROUPS, NUM_CLASSES
from common.distributed import gather, rank, world_size
from common.hdf5 import CaseFile
from common.patches import Triple, start_near, uniform_start

# Shares of the training patches by --sampling. They are centred near a voxel of: a small organ, any organ
# (each that the case has is as likely as the others), the border of an organ, an organ of a case that the
# network segments badly; or they lie anywhere. With 40 % small organs and 10 % anywhere small ones came out a
# little better, medium ones much worse (benchmarks/results/organ_training.md).
SAMPLING = {
    "smart": {"small": 0.30, "any": 0.20, "boundary": 0.10, "hard": 0.15, "uniform": 0.25},
    "original": {"small": 0.7, "boundary": 0.2, "uniform": 0.1},
    "uniform": {"uniform": 1.0},
}
STRATA = ("small", "any", "boundary", "hard", "uniform")
# The voxel may lie almost anywhere in the patch. In the middle of it, as with 0.25, the outer parts of the
# body would rarely be seen, and large organs suffer.
JITTER = 0.45
MEMORY = 0.9  # share of the old error that stays when an organ of a case has been seen again
FIRST_ERROR = 0.5


class Draw(NamedTuple):
    """One training patch: number of its case, first voxel (z y x), why it was drawn, and for which organ
    (0 = none)."""

    case: int
    start: Triple
    stratum: str
    organ: int


class Difficulty:
    """How badly each organ of each case is segmented: 1 - Dice in the training patches, a moving average.

    Errors of an epoch count from the next one on: what workers draw then depends neither on how far ahead of
    the network they are nor on where a run was stopped.

    Attributes:
        probability: (cases, classes) in memory that the data workers share, with sum 1: how likely an organ
            of a case is drawn, in proportion to the square of its error; 0 where the case does not have it.
    """

    def __init__(self, present: np.ndarray) -> None:
        """`present` (cases, classes) bool: which organs the cases have."""
        self.present = torch.from_numpy(present)
        self.error = torch.full(present.shape, FIRST_ERROR)
        self.probability = torch.zeros(present.shape, dtype=torch.float64).share_memory_()
        self._seen: list[tuple[Tensor, Tensor]] = []  # of this epoch, still on their device
        self._share()

    def add(self, cases: Tensor, errors: Tensor) -> None:
        """Note errors (N, classes) of patches of the cases with these numbers (N,); NaN: not in the patch."""
        self._seen.append((cases, errors.detach()))

    def end_epoch(self) -> None:
        """Bring the averages up to date, from the patches of all processes."""
        before = self.error.clone()
        self._collect()
        # Not all_sum: NCCL sums on graphics cards only, and this lies in the memory that workers share.
        self.error = (before + sum(gather(self.error - before))).clamp(0, 1)
        self._share()

    def state_dict(self) -> dict:
        seen = [[cases.cpu(), errors.float().cpu()] for cases, errors in self._seen]
        return {"error": self.error, "seen": gather(seen)}  # of every process

    def load_state_dict(self, state: dict) -> None:
        self.error.copy_(state["error"])
        seen = state["seen"]
        if len(seen) != world_size():  # the run goes on with another number of processes
            seen = [sum(seen, []), *([] for _ in range(world_size() - 1))]
        self._seen = [(cases, errors) for cases, errors in seen[rank()]]
        self._share()

    def _collect(self) -> None:
        for cases, errors in self._seen:
            for case, error in zip(cases.tolist(), errors.float().cpu(), strict=True):
                was = self.error[case]
                self.error[case] = torch.where(error.isnan(), was, MEMORY * was + (1 - MEMORY) * error)
        self._seen.clear()

    def _share(self) -> None:
        weight = self.error.double().square() * self.present
        self.probability.copy_(weight / weight.sum().clamp(min=1e-12))


class Sampler:
    """Draws patches from the location index of the cases, never from their volumes.

    Args:
        cases: preprocessed cases.
        patch_size: z y x.
        shares: {stratum: share}, see SAMPLING.
    """

    def __init__(
        self, cases: Sequence[CaseFile], patch_size: Sequence[int], shares: dict[str, float]
    ) -> None:
        self.cases, self.patch_size, self.shares = cases, patch_size, shares
        self.present = np.zeros((len(cases), NUM_CLASSES), bool)
        for row, case in zip(self.present, cases, strict=True):
            row[[int(organ) for organ in case.attributes["voxels"]]] = True
        self.difficulty = Difficulty(self.present)

    def draw(self, case: int, rng: np.random.Generator) -> Draw:
        """A patch of this case or, for the stratum "hard", of whichever case is hard.

        A case without small organs gets a patch of any of its organs instead, one without organs a uniform
        one.
        """
        stratum = str(rng.choice(list(self.shares), p=list(self.shares.values())))
        if stratum == "hard":
            flat = self.difficulty.probability.numpy().ravel()
            if flat.any():
                place = min(int(np.searchsorted(flat.cumsum(), rng.random(), side="right")), flat.size - 1)
                case, organ = divmod(place, NUM_CLASSES)
                return self._near(case, organ, stratum, rng)
        organs = np.flatnonzero(self.present[case])
        if stratum == "small":
            small = np.intersect1d(organs, GROUPS["small"])
            organs, stratum = (small, stratum) if len(small) else (organs, "any")
        if stratum == "uniform" or len(organs) == 0:
            volume = self.cases[case].shape
            return Draw(case, uniform_start(self.patch_size, volume, rng), "uniform", 0)
        return self._near(case, int(rng.choice(organs)), stratum, rng)

    def _near(self, case: int, organ: int, stratum: str, rng: np.random.Generator) -> Draw:
        file = self.cases[case]
        places = file.locations(f"boundary_{organ}") if stratum == "boundary" else ()
        if len(places) == 0:  # no border: the organ fills the volume
            places = file.locations(f"class_{organ}")
        place = places[rng.integers(len(places))]
        start = start_near(place, self.patch_size, file.shape, rng, jitter=JITTER)
        return Draw(case, start, stratum, organ)
