"""What a train script does with --folds and --fold: one run, or one for each fold and a report of all."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence

from common import distributed, runs
from common.config import parse_args
from common.flags import check_fold_flags


def run_name(model_name: str, fold: str | None) -> str:
    """Name of the folder of a run: that of the model, and of its fold if it has one."""
    return model_name if fold is None else f"{model_name}_fold{fold}"


def run_folds(
    train: Callable[..., tuple[list[dict], dict[str, str], str]],
    write_report: Callable[..., None],
    parser: ArgumentParser,
    argv: Sequence[str] | None,
    *,
    same: Sequence[str],
    stage: str | None = None,
    unit: str = "case",
) -> dict[str, str]:
    """Train as the flags ask; with --fold all one run for each fold, and a report of all that was held out.

    Args:
        train: train(flag values, checkpoint and folder of the run that goes on, the words that go on with it)
            -> rows of its evaluation, {case that failed: reason}, precision.
        write_report: write_report(rows, folder, title, failed).
        parser: with the flags of `add_run_flags` and `add_fold_flags`.
        same, stage: as of `runs.resume`.
        unit: what is scored, such as "volume", for the title.

    Returns:
        {case that failed: reason}.

    Raises:
        ValueError: as `check_fold_flags` and `runs.resume`.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(parser, argv)
    check_fold_flags(args.folds, args.fold, args.resume)
    if args.fold != "all":
        name = run_name(args.model_name, args.fold)
        return train(*runs.resume(parser, argv, same=same, name=name, stage=stage))[1]
    rows, failed, amp = [], {}, args.amp
    for fold in range(args.folds):
        found = runs.resume_fold(parser, argv, fold, args.model_name, amp, same=same, stage=stage)
        fold_rows, fold_failed, amp = train(*found, resume_words=runs.with_resume(sys.argv))
        rows += fold_rows
        failed |= fold_failed
    if distributed.is_main():
        out = runs.new_run_dir(args.out, f"{args.model_name}_all_folds")
        title = f"all {args.folds} folds, each {unit} scored by a model that never saw it"
        write_report(rows, out, title, failed)
    return failed
