"""Learning rate as a plain function of the share of the run that is done."""

import math

SCHEDULES = ("cosine_annealing", "warmup_cosine", "reduce_on_plateau", "poly", "warmup_poly", "constant")


def learning_rate(
    schedule: str,
    progress: float,
    lr: float,
    min_lr: float = 0.0,
    warmup: float = 0.0,
    plateau_drops: int = 0,
) -> float:
    """The learning rate at a moment of the run.

    Args:
        schedule: cosine_annealing (half a cosine from `lr` to `min_lr`), warmup_cosine (linear from 0 to `lr`
            during the share `warmup`, then the cosine over the rest), reduce_on_plateau (halved
            `plateau_drops` times), poly (`lr` times (1 - progress)^0.9, as in nnU-Net), warmup_poly (linear
            from 0 to `lr` during the share `warmup`, then `lr` times (1 - progress), which begins lower than
            the warm-up has ended, as in AFA, CVPR 2022), constant.
        progress: share of the epochs or of the time budget that is done, 0 to 1.
        lr: the highest rate.
        min_lr: the lowest rate.
        warmup: share of the run, for warmup_cosine and warmup_poly.
        plateau_drops: see the function of this name; for reduce_on_plateau.

    Raises:
        ValueError: an unknown schedule.

    Source: cosine, Loshchilov and Hutter 2017, SGDR, arXiv:1608.03983.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return lr
    if schedule == "reduce_on_plateau":
        return max(lr * 0.5**plateau_drops, min_lr)
    if schedule == "poly":
        return max(lr * (1 - progress) ** 0.9, min_lr)
    if schedule == "warmup_poly":
        return max(lr * (progress / warmup if progress < warmup else 1 - progress), min_lr)
    if schedule == "warmup_cosine":
        if progress < warmup:
            return max(lr * progress / warmup, min_lr)
        progress = (progress - warmup) / max(1 - warmup, 1e-12)
    elif schedule != "cosine_annealing":
        raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def plateau_drops(scores: list[float], patience: int) -> int:
    """How often more than `patience` epochs in a row did not bring a better score.

    Each drop restarts the count, as in torch's ReduceLROnPlateau without a threshold.

    Args:
        scores: of all epochs so far; higher is better.
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
