"""The flags of lung_tumor/train.py; those that every train script has are in common/config.py."""

from argparse import ArgumentParser

from common.config import Switch, add_run_flags, fraction, non_negative_int, positive_int
from common.schedules import SCHEDULES
from lung_tumor.model import LOSSES, MODELS


def add_training_flags(parser: ArgumentParser) -> None:
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
        help="side in pixels of the square that the network sees of a slice, at the pixel size of the data "
        "set; 256 instead of 512 takes a quarter of memory and time",
    )
    data.add_argument(
        "--folds",
        type=positive_int,
        help="number of parts, 3 or more, that cross-validation divides the patients into; give --fold as "
        "well",
    )
    data.add_argument(
        "--fold", help="part to hold out in this run, 0 to folds - 1, or all for one run after the other"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        choices=MODELS,
        default="AttentionUNet",
        help="network: a U-Net with or without attention gates",
    )
    model.add_argument(
        "--base_features",
        type=positive_int,
        default=64,
        help="channels of the first level, doubled at each level below; 32 takes a quarter of the weights",
    )
    model.add_argument(
        "--bilinear",
        action=Switch,
        default=True,
        help="enlarge feature maps by interpolation; --no-bilinear learns it by transposed convolutions, "
        "which have more weights",
    )
    model.add_argument(
        "--norm",
        choices=["batch", "group"],
        default="batch",
        help="normalisation of feature maps over the batch or, better for --batch_size 1, over groups of "
        "channels",
    )
    model.add_argument(
        "--deep_supervision",
        action=Switch,
        default=False,
        help="add the losses of predictions at a half, a quarter and an eighth of the resolution",
    )
    model.add_argument(
        "--checkpointing",
        action=Switch,
        default=True,
        help="compute activations a second time in the backward pass instead of keeping them: needs half the"
        " memory and about a third more time",
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument(
        "--batch_size",
        type=positive_int,
        default=2,
        help="slices that each process holds in memory at a time; halve it if memory runs out, and double "
        "--accumulate",
    )
    optim.add_argument(
        "--accumulate",
        type=positive_int,
        default=16,
        help="batches whose gradients are added up before the weights change; the effective batch is this "
        "times --batch_size times the number of processes",
    )
    optim.add_argument(
        "--lr",
        type=float,
        default=5e-5,
        help="learning rate of AdamW at its highest; fits an effective batch of 32",
    )
    optim.add_argument(
        "--weight_decay",
        type=float,
        default=1e-4,
        help="share of the weights that AdamW takes away, times --lr",
    )
    optim.add_argument(
        "--grad_clip",
        type=float,
        default=1.0,
        help="gradients with a larger norm are scaled down to it; 0 leaves them as they are",
    )
    optim.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="cosine_annealing",
        help="course of the learning rate: down a cosine from the start or after a warm-up, halved whenever "
        "the validation stands still, or constant",
    )
    optim.add_argument("--min_lr", type=float, default=1e-6, help="learning rate at the end of the schedule")
    optim.add_argument(
        "--warmup", type=fraction, default=0.07, help="share of the run in which warmup_cosine rises to --lr"
    )
    optim.add_argument(
        "--plateau_patience",
        type=non_negative_int,
        default=10,
        help="epochs without a better validation Dice after which reduce_on_plateau halves the learning rate",
    )
    optim.add_argument(
        "--loss",
        choices=LOSSES,
        default="dice_bce",
        help="what is minimised: dice_bce = class-balanced cross-entropy + Dice (finds small tumours), dice,"
        " ce = cross-entropy, balanced_ce, focal_tversky (weighs missed tumour more than false alarms)",
    )
    optim.add_argument("--ce_weight", type=float, default=1.0, help="factor of the cross-entropy in dice_bce")
    optim.add_argument("--dice_weight", type=float, default=1.0, help="factor of the Dice loss in dice_bce")
    optim.add_argument(
        "--tumour_weight",
        type=fraction,
        default=0.5,
        help="share of the balanced cross-entropy that tumour pixels make up together, however few they are",
    )
    optim.add_argument(
        "--ema",
        action=Switch,
        default=False,
        help="validate and keep a moving average of the weights, which is often better and always smoother",
    )
    optim.add_argument(
        "--ema_decay",
        type=fraction,
        default=0.99,
        help="how much of the average an update leaves: 0.99 averages about the last 100 updates",
    )
    augment = parser.add_argument_group("augmentation")
    augment.add_argument(
        "--augment", action=Switch, default=True, help="change training slices at random, each time anew"
    )
    augment.add_argument(
        "--horizontal_flip", type=fraction, default=0.5, help="probability of swapping left and right"
    )
    augment.add_argument(
        "--rotation_limit", type=float, default=15.0, help="largest rotation to either side, in degrees"
    )
    augment.add_argument(
        "--elastic", type=fraction, default=0.3, help="probability of each of the elastic distortions"
    )
    augment.add_argument(
        "--brightness_contrast",
        type=fraction,
        default=0.15,
        help="largest change of brightness and of contrast, as a share of the grey-value range",
    )
    add_run_flags(
        parser,
        epochs=150,
        early_stopping=30,
        model_name="lung_tumor_ds512",
        name_flags=("--model_name", "--experiment_name"),
    )
