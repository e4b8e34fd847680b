"""The flags that train_heatmap.py and train_segmentation.py share."""

from argparse import ArgumentParser

from common.config import Switch, add_run_flags, fraction, positive_int
from verse_spine.networks import FEATURE_SIZES, MODELS
from verse_spine.training import DEFAULT_LR


def add_training_flags(parser: ArgumentParser, *, patch_size: tuple[int, int, int]) -> None:
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
        help="scans of VerSe19 only, or of VerSe20, which includes them",
    )
    data.add_argument(
        "--download",
        action=Switch,
        default=False,
        help="fetch VerSe and convert it into --data_path if that folder does not exist",
    )
    data.add_argument(
        "--patch_size",
        "--input_shape",
        type=positive_int,
        nargs=3,
        default=list(patch_size),
        metavar=("Z", "Y", "X"),
        help="voxels that the network sees at a time, z y x, best multiples of 16; memory grows with their "
        "product",
    )
    net = parser.add_argument_group("model")
    net.add_argument(
        "--model", choices=MODELS, default="UNet", help="network; the README compares parameters and memory"
    )
    net.add_argument(
        "--feature_size",
        type=int,
        choices=FEATURE_SIZES,
        default=24,
        help="channels of the first level of SwinUNetR; 48 takes four times the weights of 24",
    )
    net.add_argument(
        "--init_filters",
        type=int,
        choices=[8, 16],
        default=8,
        help="channels of the first level of SegResNet",
    )
    net.add_argument(
        "--checkpointing",
        action=Switch,
        default=None,
        help="compute activations a second time in the backward pass instead of keeping them: less memory, "
        "about a third more time (default: only for SwinUNetR, which would not fit 4 GB without it)",
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument(
        "--batch_size",
        type=positive_int,
        default=1,
        help="patches or scans that each process holds in memory at a time",
    )
    optim.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        help="batches whose gradients are added up before the weights change; the effective batch is this "
        "times --batch_size times the number of processes",
    )
    optim.add_argument(
        "--optimizer",
        choices=list(DEFAULT_LR),
        default="prodigy",
        help="prodigy finds its step size itself; adamw and sgd need a good --lr",
    )
    optim.add_argument(
        "--lr",
        type=float,
        default=1.0,
        help="learning rate; 1.0 suits Prodigy, and means 0.001 for adamw and 0.01 for sgd",
    )
    optim.add_argument(
        "--weight_decay",
        type=float,
        default=0.0,
        help="share of the weights taken away at each update, times --lr",
    )
    optim.add_argument(
        "--grad_clip",
        type=float,
        default=1.0,
        help="gradients with a larger norm are scaled down to it; 0 leaves them as they are",
    )
    augment = parser.add_argument_group("augmentation")
    augment.add_argument(
        "--augment",
        action=Switch,
        default=True,
        help="change training patches or scans at random, each time anew",
    )
    augment.add_argument(
        "--flip",
        type=fraction,
        default=0.5,
        help="probability of swapping left and right; vertebrae have no sides",
    )
    augment.add_argument(
        "--rotate_scale",
        type=fraction,
        default=0.5,
        help="probability of a rotation by up to 15 degrees about each axis and a change of size by up to 15"
        " %%",
    )
    augment.add_argument(
        "--elastic", type=fraction, default=0.2, help="probability of a smooth deformation by up to 7.5 mm"
    )
    augment.add_argument(
        "--low_resolution", type=fraction, default=0.2, help="probability of simulated thick slices"
    )
    augment.add_argument(
        "--grey_values",
        type=fraction,
        default=0.15,
        help="probability of each of noise, blur, brightness, contrast and gamma",
    )
    add_run_flags(parser, epochs=200, early_stopping=30, out="runs/verse_spine")
