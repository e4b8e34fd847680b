"""The flags of train.py."""

from argparse import ArgumentParser

from amos_lha.dataset import MODALITIES
from amos_lha.lha_net import CHECKPOINTING, PRESETS
from amos_lha.networks import FEATURE_SIZES, HEADS, MODELS
from amos_lha.sampling import SAMPLING
from common import flags
from common.config import Switch, fraction
from common.run_flags import add_run_flags


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
    flags.add_patient_pattern_flag(data, "which must stand in one part")
    flags.add_fold_flags(data)
    flags.add_train_on_validation_flag(data)
    advice = "multiples of 16, with thick slices fewer along z, such as 32 128 128"
    flags.add_patch_size_flag(data, (96, 96, 96), advice)
    data.add_argument(
        "--sampling",
        choices=SAMPLING,
        default="smart",
        help="where training patches come from: smart = mostly small organs, borders and what goes badly, "
        "original = 70 %% small organs and 20 %% borders, uniform = anywhere in the scan",
    )
    flags.add_patches_flag(data, 250)
    add_network_flags(parser)
    optim = parser.add_argument_group("optimisation")
    flags.add_update_flags(optim, "patches", batch_size=1, accumulate=2, weight_decay=1e-4)
    flags.add_ema_flags(optim, ema=True, decay=0.999)
    flags.add_optimizer_flags(optim, ("warmup_cosine", "cosine_annealing", "poly", "constant"))
    optim.add_argument(
        "--class_weights",
        action=Switch,
        default=True,
        help="count rare classes more in the cross-entropy, by the square root of their rarity and at most "
        "fourfold",
    )
    augment = parser.add_argument_group("augmentation")
    rotation = "30 degrees in the axial plane and 15 about the other axes"
    flags.add_augmentation_flags(augment, "training patches", rotation=rotation, shares=(0.3, 0.1, 0.15))
    augment.add_argument(
        "--flip_sides",
        type=fraction,
        default=0.0,
        help="probability, 0 to 1, that left and right are swapped, the labels of kidneys and adrenal glands "
        "with them; above 0 the network can no longer tell the sides by where liver and spleen lie",
    )
    val = parser.add_argument_group("validation")
    flags.add_validation_flags(val, every=10, cases=10)
    flags.add_evaluate_flag(val)
    add_run_flags(parser, epochs=200, early_stopping=0, model_name="lha_net", out="runs/amos_lha")


def add_network_flags(parser: ArgumentParser) -> None:
    """The flags that decide the network, see networks.py."""
    net = parser.add_argument_group("model")
    flags.add_model_flags(net, MODELS, FEATURE_SIZES)
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
    flags.add_deep_supervision_flag(net, True)
    net.add_argument(
        "--checkpointing",
        choices=CHECKPOINTING,
        default="none",
        help="compute activations a second time in the backward pass instead of keeping them, which takes "
        "less memory and about a third more time: none, high = only where the resolution is high, all",
    )
