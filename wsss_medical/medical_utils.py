"""Start-up helpers under the names and signatures that scripts of the AFA family call them by."""

import logging
import sys
import time
from datetime import timedelta

import torch

from common import distributed, hardware, runs


def get_device(local_rank: int = 0, force_cpu: bool = False) -> torch.device:
    """CUDA (card `local_rank`, made the current one), else MPS, else the CPU; `force_cpu` wins.

    Raises:
        ValueError: the installed torch cannot drive the card; says what to install.
    """
    device = hardware.start_device("cpu" if force_cpu else "auto", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def setup_seed(seed: int) -> None:
    """Seed Python, NumPy, torch and all cards, and restrict CUDA to repeatable kernels."""
    runs.seed_everything(seed, deterministic=True)


def setup_logger(filename: str = "train.log") -> None:
    """The root logger writes INFO and above to `filename` and to the console, on rank 0 only.

    Handlers of earlier calls are replaced, so that no line appears twice.
    """
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if distributed.is_main():
        handlers = [logging.FileHandler(filename, encoding="utf8"), logging.StreamHandler(sys.stdout)]
    layout = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=layout, handlers=handlers, force=True)


def cal_eta(time0: float, cur_iter: int, total_iter: int) -> tuple[str, str]:
    """Time since `time0` (seconds since 1970) and time that is left, as texts like "0:12:07".

    The rest is the elapsed time times (total - current) / current; "unknown" before the first iteration.
    """
    elapsed = int(time.time() - time0)
    if cur_iter <= 0:
        return str(timedelta(seconds=elapsed)), "unknown"
    left = int(elapsed * (total_iter - cur_iter) / cur_iter)
    return str(timedelta(seconds=elapsed)), str(timedelta(seconds=left))
