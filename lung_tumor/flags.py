"""The flags of lung_tumor/train.py; those that every train script has are in common/config.py."""

import argparse

from common.config import Switch, fraction, non_negative_float, non_negative_int, positive_float, positive_int
from common.flags import (
    add_deep_supervision_flag,
    add_ema_flags,
    add_fold_flags,
    add_patient_pattern_flag,
    add_update_flags,
)
from common.run_flags import add_run_flags
from common.schedules import SCHEDULES
from lung_tumor.model import LOSSES, MODELS


def add_network_flags(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, base_features: int
) -> None:
    """The flags that decide the shape of the network, in train.py and in overfit_test.py.

    Args:
        base_features: default of --base_features.
    """
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="AttentionUNet",
        help="network: a U-Net, with attention gates on its skips or without",
    )
    parser.add_argument(
        "--base_features",
        type=positive_int,
        default=base_features,
        help="number of channels of the network's first level, doubled at each deeper level; half as many "
        "take a quarter of the weights",
    )
    parser.add_argument(
        "--bilinear",
        action=Switch,
        default=True,
        help="enlarge feature maps by interpolation; --no-bilinear enlarges them by transposed convolutions, "
        "which learn how and have more weights",
    )
    parser.add_argument(
        "--norm",
        choices=["batch", "group"],
        default="batch",
        help="how feature maps are normalised: batch = over all slices of a batch, group = over groups of "
        "channels of each slice, which is better for --batch_size 1",
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of train.py."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        default="data/lung_tumor",
        help="folder that preprocess.py wrote, or demo for phantoms that are made on the spot",
    )
    data.add_argument(
        "--image_size",
        type=positive_int,
        default=512,
        help="side in pixels of the square in which the network sees a slice; 256 instead of 512 takes a "
        "quarter of memory and time, but where the median slice does not fit all slices are shrunk "
        "and small tumours are lost",
    )
    add_fold_flags(data)
    add_patient_pattern_flag(
        data,
        "which must stand in one part of the split. It counts where there is no splits.json yet; default: "
        "images called <patient>_<number> are of that patient, each volume of preprocess.py is a patient",
    )
    model = parser.add_argument_group("model")
    add_network_flags(model, base_features=64)
    add_deep_supervision_flag(model, False)
    model.add_argument(
        "--checkpointing",
        action=Switch,
        default=True,
        help="compute activations a second time in the backward pass instead of keeping them, which takes "
        "less memory and about a third more time",
    )
    optim = parser.add_argument_group("optimisation")
    add_update_flags(optim, "slices", batch_size=2, accumulate=16, weight_decay=1e-4)
    optim.add_argument(
        "--lr",
        type=positive_float,
        default=5e-5,
        help="highest learning rate of the run, for AdamW; the default fits an effective batch of 32",
    )
    optim.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="cosine_annealing",
        help="course of the learning rate: cosine_annealing = down a cosine, warmup_cosine = first up "
        "during --warmup, then down the cosine, reduce_on_plateau = halved whenever the validation "
        "score stands still (--plateau_patience), constant = always --lr",
    )
    optim.add_argument(
        "--min_lr",
        type=non_negative_float,
        default=1e-6,
        help="lowest learning rate, at the end of the cosine or after many halvings",
    )
    optim.add_argument(
        "--warmup",
        type=fraction,
        default=0.07,
        help="share of the run, 0 to 1, in which warmup_cosine raises the learning rate from 0 to --lr",
    )
    optim.add_argument(
        "--plateau_patience",
        type=non_negative_int,
        default=10,
        help="number of epochs without a better validation Dice that reduce_on_plateau waits before it "
        "halves the learning rate",
    )
    optim.add_argument(
        "--loss",
        choices=LOSSES,
        default="dice_bce",
        help="what is minimised: dice_bce = class-balanced cross-entropy + Dice (finds small tumours), "
        "dice = Dice alone, ce = cross-entropy, balanced_ce = class-balanced cross-entropy alone, "
        "focal_tversky = a loss that weighs missed tumour more than false alarms",
    )
    optim.add_argument(
        "--ce_weight",
        type=non_negative_float,
        default=1.0,
        help="factor on the cross-entropy in dice_bce; a larger one makes it count more",
    )
    optim.add_argument(
        "--dice_weight",
        type=non_negative_float,
        default=1.0,
        help="factor on the Dice loss in dice_bce; a larger one makes it count more",
    )
    optim.add_argument(
        "--tumour_weight",
        type=fraction,
        default=0.5,
        help="share, 0 to 1, that the tumour pixels of a slice together have in the class-balanced "
        "cross-entropy, however few they are; a larger one finds more tumour and more false alarms",
    )
    optim.add_argument(
        "--empty_weight",
        type=fraction,
        default=1.0,
        help="factor, 0 to 1, on the Dice loss of slices without tumour in dice_bce and dice; a smaller one "
        "finds more of large and faint tumours and gives false alarms in more slices without tumour; 0 "
        "leaves these slices to the cross-entropy of dice_bce",
    )
    add_ema_flags(optim, ema=False, decay=0.99)
    augment = parser.add_argument_group("augmentation")
    augment.add_argument(
        "--augment",
        action=Switch,
        default=True,
        help="change training slices at random (position, shape, grey values), anew in each epoch; "
        "--no-augment trains on them as they are",
    )
    augment.add_argument(
        "--horizontal_flip",
        type=fraction,
        default=0.5,
        help="probability, 0 to 1, that left and right are swapped",
    )
    augment.add_argument(
        "--rotation_limit",
        type=non_negative_float,
        default=15.0,
        help="largest angle in degrees by which a slice is rotated to either side",
    )
    augment.add_argument(
        "--elastic",
        type=fraction,
        default=0.3,
        help="probability, 0 to 1, of each of two smooth deformations, an elastic one and one of a grid",
    )
    augment.add_argument(
        "--brightness_contrast",
        type=fraction,
        default=0.15,
        help="largest change of brightness and of contrast, as a share, 0 to 1, of the range of grey values",
    )
    add_run_flags(
        parser,
        epochs=150,
        early_stopping=30,
        model_name="lung_tumor_ds512",
        name_flags=("--model_name", "--experiment_name"),
    )
