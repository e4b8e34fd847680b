"""The flags that train_heatmap.py and train_segmentation.py share."""

from argparse import ArgumentParser

from common.config import Switch, fraction, positive_float
from common.flags import (
    add_augmentation_flags,
    add_evaluate_flag,
    add_model_flags,
    add_patch_size_flag,
    add_update_flags,
)
from common.run_flags import add_run_flags
from verse_spine.networks import FEATURE_SIZES, MODELS
from verse_spine.training import DEFAULT_LR


def add_training_flags(parser: ArgumentParser, *, patch_size: tuple[int, int, int]) -> None:
    """The flags that both stages have, those of every train script included.

    Args:
        patch_size: default of --patch_size, z y x.
    """
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        required=True,
        help="folder that preprocess.py wrote, or demo for phantoms that are made on the spot",
    )
    data.add_argument(
        "--dataset_edition",
        type=int,
        choices=[19, 20],
        default=19,
        help="edition of VerSe to train on: 19 = its scans only, 20 = the scans of both editions",
    )
    data.add_argument(
        "--download",
        action=Switch,
        default=False,
        help="fetch VerSe and convert it into --data_path, unless a converted data set is there already",
    )
    advice = "of a patch, or in the first stage of the grid that holds a whole scan; best multiples of 16"
    add_patch_size_flag(data, patch_size, advice, "--input_shape")
    net = parser.add_argument_group("model")
    add_model_flags(net, MODELS, FEATURE_SIZES)
    net.add_argument(
        "--init_filters",
        type=int,
        choices=[8, 16],
        default=8,
        help="number of channels of the first level of SegResNet, doubled at each deeper level; 16 takes "
        "four times the weights of 8",
    )
    net.add_argument(
        "--checkpointing",
        action=Switch,
        default=None,
        help="compute activations a second time in the backward pass instead of keeping them, which takes "
        "less memory and about a third more time (default: only for SwinUNetR, which would not fit 4 "
        "GB without it)",
    )
    optim = parser.add_argument_group("optimisation")
    things = "patches, or in the first stage whole scans,"
    add_update_flags(optim, things, batch_size=1, accumulate=1, weight_decay=0.0)
    optim.add_argument(
        "--optimizer",
        choices=list(DEFAULT_LR),
        default="prodigy",
        help="optimiser: prodigy finds its step size itself, adamw and sgd need a suitable --lr",
    )
    optim.add_argument(
        "--lr",
        type=positive_float,
        default=1.0,
        help="highest learning rate of the run; leave it at 1.0 for prodigy, where it is a factor on the "
        "step size; with adamw 1.0 means 0.001, with sgd 0.01",
    )
    augment = parser.add_argument_group("augmentation")
    add_augmentation_flags(
        augment,
        "training patches, or in the first stage whole scans,",
        rotation="15 degrees about each axis",
        shares=(0.5, 0.2, 0.15),
    )
    augment.add_argument(
        "--flip",
        type=fraction,
        default=0.5,
        help="probability, 0 to 1, that left and right are swapped; vertebrae have no sides",
    )
    augment.add_argument(
        "--elastic",
        type=fraction,
        default=0.2,
        help="probability, 0 to 1, of a smooth deformation by up to 7.5 mm",
    )
    add_evaluate_flag(parser)
    add_run_flags(parser, epochs=200, early_stopping=30, out="runs/verse_spine")
