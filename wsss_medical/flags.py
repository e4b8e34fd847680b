"""The flags of dist_train.py, and the recipes that set several of them."""

from argparse import SUPPRESS, ArgumentParser, Namespace

from common import flags
from common.config import Switch, fraction, non_negative_float, non_negative_int, positive_float, positive_int
from common.mit import BACKBONES
from common.run_flags import add_resume_flags, add_time_budget_flag, add_training_machine_flags
from common.wetr import POOLINGS

# What --recipe sets unless a flag says otherwise: "cam" is a classifier whose class activation maps are all
# there is, "afa" is Affinity from Attention (Ru et al., CVPR 2022), "ours" adds what helped.
PLAIN = {
    "pixel_labels": "cam",
    "slice_peaks": False,
    "seg_weight": 0.0,
    "affinity_weight": 0.0,
    "negative_weight": 0.0,
    "contrast_weight": 0.0,
    "zero_is_background": False,
    "ema": False,
    "dynamic_threshold": False,
    "cam_stages": [4],
}
RECIPES = {
    "cam": PLAIN,
    "afa": PLAIN | {"seg_weight": 0.1, "affinity_weight": 0.1},
    "ours": PLAIN
    | {"pixel_labels": "escape", "slice_peaks": True, "seg_weight": 1.0, "affinity_weight": 0.1, "ema": True},
}
PIXEL_LABELS = ("cam", "escape", "masks")


def add_training_flags(parser: ArgumentParser) -> None:
    """All flags of dist_train.py."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="name of the data set, as preprocess.py was told it; for the log")
    data.add_argument(
        "--data_path",
        help="folder that preprocess.py wrote, or demo for phantoms that are made on the spot; default: "
        "data/<dataset>",
    )
    data.add_argument(
        "--slice_split",
        type=positive_float,
        nargs=2,
        default=[0.2, 0.35],
        metavar=("A", "B"),
        help="how the slices, sorted by name, are divided: test is what comes before A, validation what lies "
        "between A and B, the rest is for training. Below 1: shares of the patients; whole numbers: "
        "numbers of slices, such as 4400 4884 for all of LASC",
    )
    side = "side in pixels of the squares of training, a multiple of 32; memory grows with its square"
    data.add_argument("--crop_size", type=positive_int, default=320, help=side)
    data.add_argument(
        "--scale_range",
        type=positive_float,
        nargs=2,
        default=[0.5, 2.0],
        metavar=("LEAST", "MOST"),
        help="factors between which the size of a training slice is drawn",
    )
    turn = "largest angle in degrees by which a training slice is turned to either side"
    data.add_argument("--rotate", type=non_negative_float, default=0.0, help=turn)
    grey = "change contrast, brightness and gamma of training slices"
    data.add_argument("--grey_values", action=Switch, default=False, help=grey)
    add_network_flags(parser)
    add_label_flags(parser)
    optim = parser.add_argument_group("optimisation")
    flags.add_update_flags(optim, "slices", batch_size=4, accumulate=1, weight_decay=0.01)
    optim.add_argument(
        "--lr",
        type=positive_float,
        default=6e-5,
        help="highest learning rate of the encoder. 6e-5 suits a pretrained one, beside which the heads "
        "learn ten times as fast; a random one needs about 6e-4",
    )
    rise = "share of the run, 0 to 1, during which the learning rate rises"
    optim.add_argument("--warmup", type=fraction, default=0.05, help=rise)
    average = "let a moving average of the weights make the maps and labels, and keep it as the result"
    optim.add_argument("--ema", action=Switch, help=average)
    decay = "share of the old average, 0 to 1, that an update leaves"
    optim.add_argument("--ema_decay", type=fraction, default=0.99, help=decay)
    add_length_flags(parser)
    add_training_machine_flags(parser)
    add_launch_flags(parser)
    run = parser.add_argument_group("run")
    work_dir = "folder of the run; default: work_dir_<dataset>; a second run gets _2 behind it"
    run.add_argument("--work_dir", help=work_dir)
    add_resume_flags(run, "--work_dir")
    maps = "do not train: only write the maps of --checkpoint, or of the best.pth of --work_dir"
    run.add_argument("--generate_only", action=Switch, default=False, help=maps)
    run.add_argument("--checkpoint", help="weights for --generate_only")
    flags.add_evaluate_flag(run)


def add_network_flags(parser: ArgumentParser) -> None:
    """The flags that decide the network, see model.py."""
    net = parser.add_argument_group("network")
    size = "size of the MiT encoder: tiny for processors and few data, b0 to b5 of 3.3 to 81 million weights"
    net.add_argument("--backbone", choices=BACKBONES, default="b1", help=size)
    net.add_argument(
        "--pretrained",
        help="file of encoder weights, as download_weights.py fetches it; without it the encoder starts "
        "from random weights, which needs a higher --lr and learns less",
    )
    net.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="gmp",
        help="how a map becomes one number for its slice: gmp = its maximum, which finds small things, gap = "
        "its mean, which covers large ones better",
    )
    net.add_argument(
        "--drop_path",
        type=fraction,
        default=0.1,
        help="probability, 0 to 1, that the last block of the encoder is skipped for a slice in training; "
        "earlier blocks are skipped less often",
    )
    detach = "the segmentation head reads the encoder's features without changing them"
    net.add_argument("--seg_detach", action=Switch, default=False, help=detach)
    net.add_argument(
        "--cam_stages",
        type=int,
        nargs="+",
        choices=(2, 3, 4),
        help="stages of the encoder whose class activation maps are added up, 4 among them; stage 2 has "
        "twice the resolution",
    )
    again = "compute activations a second time instead of keeping them: less memory, a third more time"
    net.add_argument("--checkpointing", action=Switch, default=False, help=again)


def add_label_flags(parser: ArgumentParser) -> None:
    """The flags that decide how labels of pixels are made from labels of slices."""
    labels = parser.add_argument_group("labels of pixels")
    labels.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default="ours",
        help="what is learned besides the labels of slices: cam = nothing, afa = segmentation and affinity "
        "as published in 2022, ours = that and what helped in our measurements; sets the flags below "
        "that are not given",
    )
    labels.add_argument(
        "--pixel_labels",
        choices=PIXEL_LABELS,
        help="where labels of pixels come from: cam = class activation maps of the network itself, escape = "
        "what is cut off, within the volume, from the slices without the structure, masks = the true masks, "
        "to see how far slice labels are from them",
    )
    labels.add_argument(
        "--dark",
        type=positive_float,
        default=0.8,
        help="for --pixel_labels escape: what is darker than this times Otsu's threshold cannot be the "
        "structure; about 1.3 for lesions that are brighter than most of the tissue",
    )
    labels.add_argument(
        "--slice_peaks",
        action=Switch,
        help="bring the highest probabilities of each slice to 1 before the threshold: brightness, and with "
        "it certainty, differs from scan to scan",
    )
    labels.add_argument(
        "--scales",
        type=positive_float,
        nargs="+",
        default=[1.0, 0.5, 1.5],
        help="sizes of the slice, relative to its own, of which the class activation maps are added up",
    )
    low = "value of the map, 0 to 1, up to which a pixel is labelled as background"
    labels.add_argument("--low", type=fraction, default=0.35, help=low)
    labels.add_argument(
        "--high",
        type=fraction,
        default=0.55,
        help="value of the map, 0 to 1, above which a pixel is labelled as foreground; between --low and "
        "this it is ignored; like --low and --scales for --pixel_labels cam",
    )
    dynamic = "lower --high from 0.7 to 0.55 during the run, as the maps become better"
    labels.add_argument("--dynamic_threshold", action=Switch, help=dynamic)
    zero = "label pixels of value 0, as skull stripping and padding leave them, as background"
    labels.add_argument("--zero_is_background", action=Switch, help=zero)
    radius = "distance in cells of 16 pixels up to which the affinity of two cells is learned and used"
    labels.add_argument("--radius", type=positive_int, default=8, help=radius)
    for name, what in (
        ("seg_weight", "of the segmentation"),
        ("affinity_weight", "of the affinity between cells"),
        ("negative_weight", "of maps that light up in slices without the structure"),
        ("contrast_weight", "that tells tokens of foreground and background apart"),
    ):
        labels.add_argument(
            f"--{name}",
            type=non_negative_float,
            help=f"weight of the loss {what}, that of the labels of slices having 1; 0 = left out",
        )


def add_length_flags(parser: ArgumentParser) -> None:
    """How long the run lasts and when its phases begin."""
    length = parser.add_argument_group("length of the run")
    updates = "number of updates of the weights, rounded up to a multiple of --eval_iters"
    length.add_argument("--max_iters", type=positive_int, default=10_000, help=updates)
    first = "number of updates from the labels of slices alone, before maps are good enough to learn from"
    length.add_argument("--cam_iters", type=non_negative_int, default=1000, help=first)
    length.add_argument(
        "--aff_iters",
        type=non_negative_int,
        help="number of updates after which the segmentation learns from maps that were spread by the "
        "affinity; default: half of --max_iters",
    )
    length.add_argument(
        "--eval_iters", type=positive_int, default=1000, help="number of updates between two validations"
    )
    some = "number of slices, about, that a validation looks at, of whole patients; fewer are faster"
    length.add_argument("--val_slices", type=positive_int, default=1000, help=some)
    add_time_budget_flag(length, "--max_iters, of which the phases then keep their shares,")


def add_launch_flags(parser: ArgumentParser) -> None:
    """How processes find each other."""
    launch = parser.add_argument_group("several processes")
    talk = "how processes talk to each other; default: nccl between graphics cards, gloo between processors"
    launch.add_argument("--backend", choices=("nccl", "gloo"), help=talk)
    launch.add_argument(
        "--cpu", action=Switch, default=False, help="compute on the processor; the same as --device cpu"
    )
    launch.add_argument("--local_rank", type=int, help=SUPPRESS)  # older launchers pass it; torchrun does not


def resolve_flags(args: Namespace) -> None:
    """Settle what several flags say together, in place.

    Raises:
        ValueError: a combination that there cannot be.
    """
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.max_iters = -(-args.max_iters // args.eval_iters) * args.eval_iters
    if args.aff_iters is None:
        args.aff_iters = args.max_iters // 2
    if args.cpu:
        args.device = "cpu"
    if args.crop_size % 32:
        below = args.crop_size // 32 * 32
        near = f"{below or 32} or {below + 32}"
        raise ValueError(f"--crop_size {args.crop_size}: use a multiple of 32, such as {near}")
    if not args.low <= args.high:
        raise ValueError(f"--low {args.low:g} lies above --high {args.high:g}")
    if 4 not in args.cam_stages:
        raise ValueError("--cam_stages: stage 4 has to be among them, such as 4 3")
    if args.pixel_labels != "cam" and (args.dynamic_threshold or args.zero_is_background):
        raise ValueError("--dynamic_threshold and --zero_is_background are for --pixel_labels cam only")
    if args.checkpoint and not args.generate_only:
        raise ValueError(
            "--checkpoint is for --generate_only; --pretrained starts from weights of an encoder"
        )
    if args.cam_iters >= args.max_iters and args.seg_weight:
        never = f"the segmentation would never be trained in {args.max_iters} updates"
        raise ValueError(f"--cam_iters {args.cam_iters}: {never}; lower it, or use --recipe cam")
