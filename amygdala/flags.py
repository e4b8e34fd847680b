"""The flags of train.py."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from amygdala.losses import LOSSES
from amygdala.model import MODELS_2D, MODELS_3D, add_architecture_flags
from amygdala.structures import add_dataset_flag
from common import flags
from common.checkpoints import load_checkpoint
from common.config import (
    Switch,
    fraction,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_int,
    read_yaml_files,
    seed_number,
)
from common.files import check_keys
from common.run_flags import add_run_flags
from common.runs import find_checkpoint

CONFIGS = Path(__file__).resolve().parent / "config"


def add_choice_flags(parser: ArgumentParser) -> None:
    """--model, --dimension and --dataset, which decide what the other flags are and what they are set to."""
    parser.add_argument("--model", choices=MODELS_3D, default="unet", help="network to train")
    parser.add_argument(
        "--dimension",
        choices=("2d", "3d"),
        default="3d",
        help=f"3d, or 2d: slice by slice, for {', '.join(MODELS_2D)}",
    )
    add_dataset_flag(parser)


def choose(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """(model, dimension, dataset and --resume; the command line with the YAML file of the model in front).

    The model comes from the checkpoint of --resume, else from the command line or the file of --config.
    Without these two files the recipe is config/<dataset>/<model>_<dimension>.yaml beside this file.

    Raises:
        SystemExit: with one line about a wrong value, or a combination that there is not.
        FileNotFoundError, ValueError: --resume names no run, or that of another script.
    """
    finder = make_parser(None)
    add_choice_flags(finder)
    finder.add_argument("--resume", nargs="?", const="last")
    asked = [word for word in argv if word not in ("-h", "--help")]  # it is for the whole parser
    given, _ = finder.parse_known_args(asked)
    found, names = {}, ("model", "dimension", "dataset")
    if given.resume not in (None, "last"):
        path = find_checkpoint(given.resume, "", "")
        checkpoint = load_checkpoint(path)
        if checkpoint.get("stage") != "amygdala":
            raise ValueError(f"--resume: {path} is a run of another script, not of amygdala/train.py")
        check_keys(checkpoint["config"], dict.fromkeys(names, str), f"--resume {path}: config")
        found = {name: checkpoint["config"][name] for name in names}
        return Namespace(**found, resume=given.resume), list(argv)
    if given.config:
        files = read_yaml_files(finder, given.config)
        found = {key: value for _, content in files for key, value in content.items()}
    words = [word for name in names if name in found for word in (f"--{name}", str(found[name]))]
    chosen, _ = finder.parse_known_args([*words, *asked])
    if chosen.dimension == "2d" and chosen.model not in MODELS_2D:
        finder.error(f"--model {chosen.model} --dimension 2d: in 2-D there are {', '.join(MODELS_2D)}")
    if given.config:
        return chosen, list(argv)
    file = CONFIGS / chosen.dataset / f"{chosen.model}_{chosen.dimension}.yaml"
    return chosen, ["--config", str(file), *argv]


def add_training_flags(parser: ArgumentParser, chosen: Namespace) -> None:
    """All flags of train.py for a model, with those of its architecture."""
    add_choice_flags(parser)
    parser.add_argument(
        "--gpu", help="number of the graphics card, such as 0; several cards are used through torchrun"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        "--data_root",
        help="folder that preprocess.py wrote, or demo for phantoms that are made on the spot; default: "
        "dataset/<dataset>",
    )
    data.add_argument(
        "--folds",
        type=positive_int,
        default=5,
        help="number of parts into which cross-validation divides the subjects of the training part",
    )
    data.add_argument(
        "--fold",
        default="all",
        help="part to hold out in this run, 0 to folds - 1; all = one run after the other, for every part; "
        "test = train on the whole training part and test on the published test part, if there is one",
    )
    data.add_argument(
        "--split_seed",
        type=seed_number,
        default=0,
        help="number that fixes who is in which fold, whatever the --seed of the training",
    )
    data.add_argument(
        "--leave_site_out",
        action=Switch,
        default=False,
        help="hold out one site after the other instead of folds, so that each is tested by a model that "
        "has not seen its scanner; --fold then counts the sites",
    )
    flags.add_train_on_validation_flag(data)
    data.add_argument(
        "--select_on_test",
        action=Switch,
        default=False,
        help="choose the best epoch by the test fold, as many publications do: scores come out too good, "
        "and the results say so",
    )
    flags.add_patch_size_flag(data, (48, 64, 80), "of whole heads it has to hold both amygdalae")
    flags.add_patches_flag(data, 50)
    data.add_argument(
        "--jitter",
        type=non_negative_int,
        default=8,
        help="largest distance in voxels, along each axis, of a training patch from the structures' middle",
    )
    data.add_argument(
        "--localiser_updates",
        type=positive_int,
        default=300,
        help="number of updates of the localiser, which finds the amygdalae in whole heads and is trained "
        "first; about a minute on two processor cores",
    )

    learning = parser.add_argument_group("learning")
    flags.add_update_flags(
        learning, "patches, over all processes,", batch_size=2, accumulate=1, weight_decay=0.05
    )
    flags.add_schedule_flags(learning, ("warmup_cosine", "cosine_annealing", "poly", "constant"), 6e-4)
    learning.add_argument(
        "--loss",
        choices=LOSSES,
        default="adaptive",
        help="form of the Dice that is added to the cross-entropy: adaptive = errors of the kind that "
        "prevails cost more, dice = plain",
    )
    learning.add_argument(
        "--boundary_weight",
        type=non_negative_float,
        default=0.0,
        help="extra weight in the cross-entropy of voxels at the boundary of a structure; 0 = all alike",
    )
    flags.add_ema_flags(learning, ema=True, decay=0.99)

    augmentation = parser.add_argument_group("augmentation")
    shares = (0.5, 0.1, 0.2)
    flags.add_augmentation_flags(augmentation, "training patches", rotation="15 degrees", shares=shares)
    augmentation.add_argument(
        "--elastic", type=fraction, default=0.2, help="probability, 0 to 1, of an elastic deformation"
    )
    augmentation.add_argument(
        "--flip_sides",
        type=fraction,
        default=0.5,
        help="probability, 0 to 1, of exchanging left and right in the image, and their labels with it",
    )
    augmentation.add_argument(
        "--surroundings",
        type=fraction,
        default=0.3,
        help="probability, 0 to 1, that what skull stripping has blanked is filled with a made-up skull and "
        "scalp, so that scans with skull can be predicted as well",
    )

    flags.add_validation_flags(parser.add_argument_group("validation"), every=10, cases=10)
    flags.add_evaluate_flag(parser)
    add_architecture_flags(parser, chosen.model, chosen.dimension)
    add_run_flags(
        parser,
        epochs=200,
        early_stopping=0,
        model_name=f"{chosen.dataset}_{chosen.dimension}_{chosen.model}",
        out="exp",
        name_flags=("--unique_name", "--model_name"),
    )
    parser.add_argument("--log_path", help="folder for the curves of TensorBoard; default: log beside --out")
