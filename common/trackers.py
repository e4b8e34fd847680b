"""Curves and pictures of a run elsewhere: Weights & Biases, TensorBoard; both are imported on use."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import distributed
from common.plots import costs_the_picture


def open_wandb(project: str, name: str, config: dict) -> Any:
    """A Weights & Biases run, None on all ranks but 0; wandb is imported here only.

    Raises:
        SystemExit: wandb is not installed.
    """
    if not distributed.is_main():
        return None
    try:
        import wandb
    except ImportError as error:
        raise SystemExit("--use_wandb needs the wandb package: pip install wandb") from error
    return wandb.init(project=project, name=name, config=config)


def open_tensorboard(folder: str | Path, first_epoch: int, log: Callable[[str], None]) -> Any:
    """A writer of TensorBoard's curves, None on all ranks but 0 or if tensorboard is not installed.

    Args:
        first_epoch: what an earlier, broken-off run has written from this epoch on does not count.
    """
    if not distributed.is_main():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log(f"no curves in {folder}; they need: pip install tensorboard. metrics.csv has all numbers")
        return None
    return SummaryWriter(str(folder), purge_step=first_epoch)


class Trackers:
    """Where else the rows of metrics.csv go, epoch by epoch: none, one or both of the two."""

    def __init__(
        self,
        folder: Path,
        config: dict,
        first_epoch: int,
        log: Callable[[str], None],
        wandb_project: str | None,
        tensorboard: str | Path | None,
    ) -> None:
        """`folder` of the run, whose name is that of the run; `log` gets a line if a package is missing."""
        self.wandb = open_wandb(wandb_project, folder.name, config) if wandb_project else None
        self.tensorboard = open_tensorboard(tensorboard, first_epoch, log) if tensorboard else None

    def add(self, row: dict) -> None:
        """One epoch: {column: number}, with "epoch"."""
        if self.wandb:
            self.wandb.log(row)
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, row["epoch"])
            self.tensorboard.flush()

    def add_images(self, name: str, rows: Iterable[Sequence[np.ndarray]], epoch: int) -> None:
        """A grid of pictures for TensorBoard, which is all that shows them.

        Args:
            rows: from the top down, each with pictures uint8 (h, w, 3) from left to right, all of one shape.
                It is only gone through if TensorBoard is there: pictures that a generator makes on the way
                cost nothing without it. None at all: nothing is written.
        """
        if not self.tensorboard:
            return
        with costs_the_picture(f"{name} for TensorBoard"):
            if lines := [np.concatenate(list(row), axis=1) for row in rows]:
                self.tensorboard.add_image(name, np.concatenate(lines), epoch, dataformats="HWC")
                self.tensorboard.flush()

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()
