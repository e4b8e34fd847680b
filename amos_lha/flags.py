"""The flags of train.py."""

from argparse import ArgumentParser

from amos_lha.dataset import MODALITIES
from amos_lha.lha_net import CHECKPOINTING, PRESETS
from amos_lha.networks import FEATURE_SIZES, HEADS, MODELS
from amos_lha.sampling import SAMPLING
from common.config import Switch, add_run_flags, fraction, positive_float, positive_int
from common.flags import (
    add_augmentation_flags,
    add_ema_flags,
    add_evaluate_flag,
    add_fold_flags,
    add_update_flags,
    add_validation_flags,
)

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("warmup_cosine", "cosine_annealing", "poly", "constant")


def add_training_flags(parser: ArgumentParser) -> None:
    """All flags of train.py."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        nargs="+",
        default=["data/amos"],
        help="folder that preprocess.py wrote, or demo for phantoms that are made on the spot; several "
        "folders, whose cases may have labels of different organs, train one network together",
    )
    data.add_argument(
        "--modality",
        choices=MODALITIES,
        default="both",
        help="scans to train on: ct, mr, or both = whatever the folder holds",
    )
    data.add_argument(
        "--patient_pattern",
        help="regular expression whose group finds the patient in the name of a case, such as 'p([0-9]+)'; "
        "needed where a patient has several scans, which must stand in one part",
    )
    add_fold_flags(data)
    data.add_argument(
        "--validation",
        action=Switch,
        default=True,
        help="keep the validation part out of the training, to choose the best epoch by it; --no-validation "
        "trains on it too and takes the weights of the last epoch, for final models and small data sets",
    )
    data.add_argument(
        "--patch_size",
        type=positive_int,
        nargs=3,
        default=[96, 96, 96],
        metavar=("Z", "Y", "X"),
        help="size in voxels, z y x, of what the network sees at a time: multiples of 16, with thick slices "
        "fewer along z, such as 32 128 128; memory grows with their product",
    )
    data.add_argument(
        "--sampling",
        choices=SAMPLING,
        default="smart",
        help="where training patches come from: smart = mostly small organs, borders and what goes badly, "
        "original = 70 %% small organs and 20 %% borders, uniform = anywhere in the scan",
    )
    data.add_argument(
        "--patches",
        type=positive_int,
        default=250,
        help="number of patches in an epoch, shared evenly by the training scans, and at least one of each",
    )
    add_network_flags(parser)
    optim = parser.add_argument_group("optimisation")
    add_update_flags(optim, "patches", batch_size=1, accumulate=2, weight_decay=1e-4)
    add_ema_flags(optim, ema=True, decay=0.999)
    optim.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="optimiser: adamw with --lr 0.001, or sgd with Nesterov momentum 0.99, which goes with "
        "--lr 0.01, --schedule poly and --grad_clip 12",
    )
    optim.add_argument("--lr", type=positive_float, default=1e-3, help="highest learning rate of the run")
    optim.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="warmup_cosine",
        help="how the learning rate falls: warmup_cosine = rises during the first 5 %% of the run, then half "
        "a cosine, cosine_annealing = without that rise, poly = as (1 - share of the run) to the power 0.9, "
        "constant = it does not fall",
    )
    optim.add_argument(
        "--class_weights",
        action=Switch,
        default=True,
        help="count rare classes more in the cross-entropy, by the square root of their rarity and at most "
        "fourfold",
    )
    augment = parser.add_argument_group("augmentation")
    rotation = "30 degrees in the axial plane and 15 about the other axes"
    add_augmentation_flags(augment, "training patches", rotation=rotation, shares=(0.3, 0.1, 0.15))
    augment.add_argument(
        "--flip_sides",
        type=fraction,
        default=0.0,
        help="probability, 0 to 1, that left and right are swapped, the labels of kidneys and adrenal glands "
        "with them; above 0 the network can no longer tell the sides by where liver and spleen lie",
    )
    val = parser.add_argument_group("validation")
    add_validation_flags(val, every=10, cases=10)
    add_evaluate_flag(val)
    add_run_flags(parser, epochs=200, early_stopping=0, model_name="lha_net", out="runs/amos_lha")


def add_network_flags(parser: ArgumentParser) -> None:
    """The flags that decide the network, see networks.py."""
    net = parser.add_argument_group("model")
    net.add_argument(
        "--model",
        choices=MODELS,
        default="LHANet",
        help="network to train; the README compares their parameters and memory",
    )
    net.add_argument(
        "--preset",
        choices=PRESETS,
        default="small",
        help="size of LHANet: tiny, small or base",
    )
    net.add_argument(
        "--heads",
        choices=HEADS,
        default="size_aware",
        help="heads of LHANet: size_aware = small organs are read from the finest level, larger ones from "
        "coarser levels, shared = all from the finest",
    )
    net.add_argument(
        "--attention",
        action=Switch,
        default=True,
        help="multi-scale attention in LHANet at strides 4, 8 and 16",
    )
    net.add_argument(
        "--router",
        action=Switch,
        default=False,
        help="LHANet also learns a map of the size groups, which weighs the logits of each group",
    )
    net.add_argument(
        "--deep_supervision",
        action=Switch,
        default=True,
        help="in training also predict at a half, a quarter and an eighth of the resolution, and add the "
        "losses of these predictions",
    )
    net.add_argument(
        "--feature_size",
        type=int,
        choices=FEATURE_SIZES,
        default=24,
        help="number of channels of the first level of SwinUNetR, doubled at each deeper level; 48 takes "
        "four times the weights of 24",
    )
    net.add_argument(
        "--checkpointing",
        choices=CHECKPOINTING,
        default="none",
        help="compute activations a second time in the backward pass instead of keeping them, which takes "
        "less memory and about a third more time: none, high = only where the resolution is high, all",
    )
