"""Flags that scripts of several tasks have, with one meaning; see also `add_run_flags`."""

import argparse
import os
from collections.abc import Sequence

from common.config import Switch, fraction, non_negative_float, non_negative_int, positive_float, positive_int
from common.optimizers import OPTIMIZERS


def add_fold_flags(group: argparse._ArgumentGroup) -> None:
    """--folds and --fold; see `check_fold_flags`."""
    group.add_argument(
        "--folds",
        type=positive_int,
        help="number of parts, 3 or more, into which cross-validation divides the patients; give --fold as "
        "well",
    )
    group.add_argument(
        "--fold",
        help="part to hold out in this run, 0 to folds - 1; all = one run after the other, for every part",
    )


def add_patient_pattern_flag(group: argparse._ActionsContainer, consequence: str) -> None:
    """--patient_pattern, see `patients_of`; `consequence` is what follows where a patient has several scans,
    such as "which must stand in one part"."""
    group.add_argument(
        "--patient_pattern",
        help="regular expression whose group finds the patient in the name of a case, such as 'p([0-9]+)'; "
        f"needed where a patient has several scans, {consequence}",
    )


def add_train_on_validation_flag(group: argparse._ArgumentGroup) -> None:
    """--validation and --no-validation."""
    group.add_argument(
        "--validation",
        action=Switch,
        default=True,
        help="keep the validation part out of the training, to choose the best epoch by it; --no-validation "
        "trains on it too and takes the weights of the last epoch, for final models and small data sets",
    )


def add_patches_flag(group: argparse._ArgumentGroup, default: int) -> None:
    """--patches."""
    group.add_argument(
        "--patches",
        type=positive_int,
        default=default,
        help="number of patches in an epoch, shared evenly by the training scans, and at least one of each",
    )


def add_patch_size_flag(
    group: argparse._ArgumentGroup, default: tuple[int, int, int], advice: str, *names: str
) -> None:
    """--patch_size and its further `names`.

    Args:
        default: z y x.
        advice: what a patch is and which sizes to choose.
    """
    group.add_argument(
        "--patch_size",
        *names,
        type=positive_int,
        nargs=3,
        default=list(default),
        metavar=("Z", "Y", "X"),
        help=f"size in voxels, z y x, of what the network sees at a time: {advice}; memory grows with their "
        "product",
    )


def add_model_flags(
    group: argparse._ArgumentGroup, models: Sequence[str], feature_sizes: Sequence[int]
) -> None:
    """--model, by default the first one, and --feature_size of SwinUNetR, by default the middle one."""
    group.add_argument(
        "--model",
        choices=models,
        default=models[0],
        help="network to train; the README compares their parameters and memory",
    )
    group.add_argument(
        "--feature_size",
        type=int,
        choices=feature_sizes,
        default=feature_sizes[len(feature_sizes) // 2],
        help="number of channels of the first level of SwinUNetR, doubled at each deeper level; 48 takes "
        "four times the weights of 24",
    )


def add_deep_supervision_flag(group: argparse._ArgumentGroup, default: bool) -> None:
    """--deep_supervision."""
    group.add_argument(
        "--deep_supervision",
        action=Switch,
        default=default,
        help="in training also predict at a half, a quarter and an eighth of the resolution, and add the "
        "losses of these predictions",
    )


def add_optimizer_flags(group: argparse._ArgumentGroup, schedules: Sequence[str]) -> None:
    """--optimizer for `make_optimizer`, and the flags of `add_schedule_flags`."""
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="optimiser: adamw with --lr 0.001, or sgd with Nesterov momentum 0.99, which goes with "
        "--lr 0.01, --schedule poly and --grad_clip 12",
    )
    add_schedule_flags(group, schedules, 1e-3)


def add_schedule_flags(group: argparse._ArgumentGroup, schedules: Sequence[str], lr: float) -> None:
    """--lr, by default `lr`, and --schedule, by default the first of `schedules`."""
    meanings = {
        "warmup_cosine": "rises during the first 5 %% of the run, then half a cosine",
        "cosine_annealing": "half a cosine without that rise",
        "poly": "as (1 - share of the run) to the power 0.9",
        "constant": "it does not fall",
    }
    group.add_argument("--lr", type=positive_float, default=lr, help="highest learning rate of the run")
    group.add_argument(
        "--schedule",
        choices=schedules,
        default=schedules[0],
        help=f"how the learning rate falls: {', '.join(f'{name} = {meanings[name]}' for name in schedules)}",
    )


def add_update_flags(
    group: argparse._ArgumentGroup, things: str, *, batch_size: int, accumulate: int, weight_decay: float
) -> None:
    """--batch_size, --accumulate, --weight_decay and --grad_clip.

    Args:
        things: what a batch is made of, such as "patches".
        batch_size, accumulate, weight_decay: defaults.
    """
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=batch_size,
        help=f"number of {things} that each process computes at a time; if memory runs out, halve it and "
        "double --accumulate, which keeps the effective batch",
    )
    group.add_argument(
        "--accumulate",
        type=positive_int,
        default=accumulate,
        help="number of batches whose gradients are added up for one update of the weights, so that a "
        "small card trains with a large effective batch: this times --batch_size times the number of "
        "processes",
    )
    group.add_argument(
        "--weight_decay",
        type=non_negative_float,
        default=weight_decay,
        help="share of each weight, times the learning rate, that is taken away at every update; keeps the "
        "weights small",
    )
    group.add_argument(
        "--grad_clip",
        type=non_negative_float,
        default=1.0,
        help="largest norm of the gradient of an update; a larger gradient is scaled down to it, so that "
        "one odd batch does little harm; 0 = no limit",
    )


def add_ema_flags(group: argparse._ArgumentGroup, *, ema: bool, decay: float) -> None:
    """--ema and --ema_decay, with these defaults."""
    group.add_argument(
        "--ema",
        action=Switch,
        default=ema,
        help="validate and save a moving average of the weights instead of the latest ones; its scores "
        "swing less from epoch to epoch",
    )
    group.add_argument(
        "--ema_decay",
        type=fraction,
        default=decay,
        help=f"share of the old average, 0 to 1, that an update leaves: {decay:g} averages about the last "
        f"{round(1 / (1 - decay)):,} updates",
    )


def add_augmentation_flags(
    group: argparse._ArgumentGroup, things: str, *, rotation: str, shares: tuple[float, float, float]
) -> None:
    """--augment, --rotate_scale, --low_resolution and --grey_values, for `Augmentation3d`.

    Args:
        things: what is changed, such as "training patches".
        rotation: largest angles in words.
        shares: defaults of the latter three.
    """
    group.add_argument(
        "--augment",
        action=Switch,
        default=True,
        help=f"change {things} at random (position, shape, grey values), anew in each epoch; --no-augment "
        "trains on them as they are",
    )
    group.add_argument(
        "--rotate_scale",
        type=fraction,
        default=shares[0],
        help=f"probability, 0 to 1, of a rotation by up to {rotation}, together with a change of size by up "
        "to 15 %%",
    )
    group.add_argument(
        "--low_resolution",
        type=fraction,
        default=shares[1],
        help="probability, 0 to 1, that thick slices are simulated",
    )
    group.add_argument(
        "--grey_values",
        type=fraction,
        default=shares[2],
        help="probability, 0 to 1, of each of noise, blur, brightness, contrast and gamma",
    )


def add_validation_flags(group: argparse._ArgumentGroup, *, every: int, cases: int) -> None:
    """--val_every and --val_cases, with these defaults, for scripts that validate on whole scans."""
    group.add_argument(
        "--val_every",
        type=positive_int,
        default=every,
        help="number of epochs from one validation to the next; the last epoch is validated too",
    )
    group.add_argument(
        "--val_cases",
        type=positive_int,
        default=cases,
        help="largest number of whole scans that a validation predicts; fewer are faster and tell less",
    )


def add_evaluate_flag(group: argparse._ArgumentGroup) -> None:
    """--evaluate."""
    group.add_argument(
        "--evaluate",
        action=Switch,
        default=True,
        help="after training score best.pt on the test scans, or on the validation scans if there are no "
        "test scans",
    )


def add_labelled_flag(parser: argparse.ArgumentParser, whose: str) -> None:
    """--labelled, for data sets of which not everything was annotated; see `labelled_numbers`.

    Args:
        whose: what has the labels, such as "this data set".
    """
    parser.add_argument(
        "--labelled",
        type=positive_int,
        nargs="+",
        metavar="NUMBER",
        help=f"numbers of all labels that {whose} may hold, e.g. 1 2 3 6, where others were not annotated; "
        "those count neither as background nor as errors. Default: 'labelled' of dataset.json, else the "
        "labels that it names, else all",
    )


def add_workers_flag(parser: argparse.ArgumentParser) -> None:
    """--workers of the scripts that read or convert whole scans, several at a time."""
    parser.add_argument(
        "--workers",
        type=non_negative_int,
        default=min(4, os.cpu_count() or 1),
        help="number of processes that read scans; 0 = the main process does it itself; each may take 2 GB "
        "for a long scan",
    )


def check_fold_flags(folds: int | None, fold: str | None, resume: str | None = None) -> None:
    """Refuse flags of a cross-validation that do not fit together.

    Raises:
        ValueError: --folds without --fold or the reverse, a --fold that is neither a number nor all, or
            --fold all with the --resume of a single run.
    """
    if (folds is None) != (fold is None):
        raise ValueError("--folds N and --fold K (or --fold all) belong together")
    if fold not in (None, "all") and not fold.isdecimal():
        raise ValueError(f"--fold {fold}: a number from 0 on, or all")
    if fold == "all" and resume not in (None, "last"):
        raise ValueError("--fold all goes on with a bare --resume, which finds the last run of each fold")
