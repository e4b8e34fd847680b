"""The flags that decide how long a run lasts, on which machine, what it is called and how it goes on."""

import argparse
from collections.abc import Sequence

from common.config import Switch, duration_s, non_negative_int, positive_float, positive_int, seed_number


def add_prediction_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--device and --amp, with one meaning in all scripts; returns their group."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto",
        help="where to compute: cuda, cuda:1 (the second card), mps (Apple) or cpu; auto takes the first of "
        "cuda, mps and cpu that this machine has",
    )
    group.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help="mixed precision, which saves memory and on most cards time; auto takes what this card or "
        "processor computes fast and logs why, off computes everything in 32 bits",
    )
    return group


def add_run_flags(
    parser: argparse.ArgumentParser,
    *,
    epochs: int,
    early_stopping: int,
    model_name: str | None = None,
    out: str = "runs",
    name_flags: Sequence[str] = ("--model_name",),
) -> None:
    """The flags that every train script has, with one meaning everywhere: how long a run lasts, on which
    machine, what it is called and how it goes on.

    Args:
        model_name: default name of the run; None = it must be given.
        name_flags: spellings of --model_name, more than one where a task's users know another.
    """
    length = parser.add_argument_group("length of the run")
    length.add_argument(
        "--epochs", type=positive_int, default=epochs, help="number of passes over the training set"
    )
    add_time_budget_flag(length, "--epochs")
    length.add_argument(
        "--early_stopping",
        type=non_negative_int,
        default=early_stopping,
        help="end the run after this many epochs without a better validation score; 0 = never",
    )
    add_training_machine_flags(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        *name_flags,
        default=model_name,
        required=model_name is None,
        help="name of the run and of its folder; a second run of this name gets _2 behind it",
    )
    run.add_argument("--out", default=out, help="folder in which each run gets a folder of its own")
    add_resume_flags(run, "--model_name")


def add_time_budget_flag(group: argparse._ArgumentGroup, instead_of: str) -> None:
    """--time_budget; `instead_of` is the flag that otherwise says how long a run lasts."""
    group.add_argument(
        "--time_budget",
        type=duration_s,
        help=f"train for this long (90s, 45m, 2h) instead of a number of {instead_of}; the learning rate "
        "then follows the elapsed share of the time",
    )


def add_training_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--device, --amp, --vram, --workers, --seed and --deterministic."""
    machine = add_prediction_flags(parser)
    machine.add_argument(
        "--vram",
        type=positive_float,
        help="memory of the card in GiB (4 for a GTX 1050 Ti): batch size, recomputation and, where the task "
        "allows it, the patch are made to fit before the run starts, and the run takes no more than this",
    )
    machine.add_argument(
        "--workers",
        type=non_negative_int,
        default=2,
        help="number of processes that prepare batches; 0 = the main process does it itself; raise it if "
        "the log shows a large share of waiting for data",
    )
    machine.add_argument(
        "--seed",
        type=seed_number,
        default=42,
        help="number that fixes what is random: the first weights, shuffling and augmentation; the same "
        "number gives the same run on a CPU",
    )
    machine.add_argument(
        "--deterministic",
        action=Switch,
        default=False,
        help="use repeatable CUDA kernels where there are any, which are slower; a run on a CPU is "
        "repeatable without it",
    )


def add_resume_flags(group: argparse._ArgumentGroup, name_flag: str) -> None:
    """--resume and --use_wandb; a bare --resume means the newest run that has the value of `name_flag`."""
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        help="go on with a run that was stopped: its folder or last.pt, or without a value the newest run of "
        f"this {name_flag}; it keeps its flags, whatever a --config file says, but for those given with this",
    )
    group.add_argument(
        "--use_wandb",
        action=Switch,
        default=False,
        help="also log to Weights & Biases, whose package wandb must be installed",
    )
