"""Flags of the predict scripts that segment whole scans; see common/prediction.py for what they do."""

import argparse
from collections.abc import Collection

from common.config import Switch, fraction, positive_int


def add_weights_flag(
    parser: argparse.ArgumentParser,
    script: str,
    of: str = "",
    *,
    file: str = "weights/best.pt",
    several: bool = False,
) -> None:
    """--weights of a run of `script`.

    Args:
        of: tells the model from others, such as "of the second stage".
        file: where the weights lie in the folder of the run.
        several: take a list of models, whose predictions are averaged.
    """
    parser.add_argument(
        "--weights",
        required=True,
        nargs="+" if several else None,
        help=f"trained model {of}: {file} in the folder of a run of {script}".replace(" :", ":")
        + several * "; several, such as all folds of a run, are averaged, which takes so many times as long",
    )


def add_scan_flags(parser: argparse.ArgumentParser) -> None:
    """--source, --out and --recursive, with one meaning in all scripts."""
    parser.add_argument(
        "--source",
        required=True,
        help="what to predict: a scan (NIfTI, .nrrd, or .mgz of FreeSurfer), or a folder with scans or with "
        "DICOM files, which dcm2niix converts",
    )
    parser.add_argument(
        "--out", help="folder that the results are written to; default: predictions/ in the run's folder"
    )
    parser.add_argument(
        "--recursive", action=Switch, default=False, help="also look into the subfolders of --source"
    )


def add_window_flags(parser: argparse.ArgumentParser) -> None:
    """--overlap and --batch_size, with one meaning in all scripts."""
    parser.add_argument(
        "--overlap",
        type=fraction,
        default=0.5,
        help="share of a window, from 0 to below 1, that the next one covers too; 0.25 is faster, but less "
        "exact where windows meet",
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=1,
        help="number of windows that are computed at a time; more are faster on a large GPU, fewer take "
        "less memory",
    )


def add_tta_flag(parser: argparse.ArgumentParser, more: str = "") -> None:
    """--tta; `more` is what a user must know besides, after a comma or semicolon."""
    parser.add_argument(
        "--tta",
        action=Switch,
        default=False,
        help="average the prediction with that of the scan mirrored left to right; takes twice as long"
        f"{more}",
    )


def add_probability_flag(
    parser: argparse.ArgumentParser, what: str, labels: Collection[int], example: str
) -> None:
    """--save_probabilities, for `probability_maps`; `what` are the labels, such as "organs"."""
    parser.add_argument(
        "--save_probabilities",
        type=int,
        nargs="+",
        choices=list(labels),
        default=[],
        metavar="LABEL",
        help=f"also write probability maps of these {what}, by number, such as {example}; each takes a byte "
        "of disk for each voxel while the scan is predicted",
    )


def add_picture_flags(parser: argparse.ArgumentParser, what: str, views: str) -> None:
    """--save_preview and --save_3d; `what` is segmented, such as "organs", `views` what --save_3d writes."""
    parser.add_argument(
        "--save_preview",
        action=Switch,
        default=True,
        help=f"write a picture of each scan with three planes through the {what}",
    )
    parser.add_argument("--save_3d", action=Switch, default=False, help=f"also write {views}")
