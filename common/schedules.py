"""Learning rate as a plain function of the share of the run that is done."""

import math

SCHEDULES = ("cosine_annealing", "warmup_cosine", "reduce_on_plateau", "constant")


def learning_rate(
    schedule: str,
    progress: float,
    lr: float,
    min_lr: float = 0.0,
    warmup: float = 0.0,
    plateau_drops: int = 0,
) -> float:
    """Learning rate at `progress`, the share of epochs or of the time budget that is done, 0..1.

    Args:
        schedule: cosine_annealing (half a cosine from `lr` to `min_lr`), warmup_cosine (linear up to `lr`
            during the share `warmup`, then the cosine over the rest), reduce_on_plateau (halved
            `plateau_drops` times, not below `min_lr`), constant.

    Source: cosine, Loshchilov and Hutter 2017, SGDR, arXiv:1608.03983.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return lr
    if schedule == "reduce_on_plateau":
        return max(lr * 0.5**plateau_drops, min_lr)
    if schedule == "warmup_cosine":
        if progress < warmup:
            return max(lr * progress / warmup, min_lr)
        progress = (progress - warmup) / max(1 - warmup, 1e-12)
    elif schedule != "cosine_annealing":
        raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def plateau_drops(scores: list[float], patience: int) -> int:
    """How often more than `patience` epochs in a row brought no better score; each drop restarts the count.

    Like torch's ReduceLROnPlateau without threshold.
    """
    best, waited, drops = -math.inf, 0, 0
    for score in scores:
        if score > best:
            best, waited = score, 0
        else:
            waited += 1
        if waited > patience:
            waited, drops = 0, drops + 1
    return drops
