"""What both train scripts share: the flags of the task's seed, data, optimiser, the plan for --vram."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from common import distributed, runs
from common.augment import Augmentation3d
from common.config import Switch, add_length_flags, add_machine_flags, fraction, positive_int
from common.memory import Plan, training_peak_mib
from verse_spine import download, preprocess
from verse_spine.dataset import VerSe
from verse_spine.networks import FEATURE_SIZES, MODELS, get_model
from verse_spine.prodigy import Prodigy

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Learning rates that replace the seed's --lr 1.0, which only Prodigy understands.
DEFAULT_LR = {"prodigy": 1.0, "adamw": 1e-3, "sgd": 1e-2}


def add_training_flags(parser: ArgumentParser, *, input_shape: tuple, model: str, out: str) -> None:
    """Flags with the seed's names and defaults, and what came with them."""
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", required=True, help="folder from preprocess.py, or demo")
    data.add_argument("--dataset_edition", type=int, choices=[19, 20], default=19, help="VerSe19 or VerSe20")
    data.add_argument(
        "--download", action=Switch, default=False, help="fetch and convert VerSe into --data_path if absent"
    )
    data.add_argument(
        "--patch_size",
        "--input_shape",
        type=positive_int,
        nargs=3,
        default=list(input_shape),
        metavar=("Z", "Y", "X"),
        help="voxels that the network sees at a time, z y x",
    )
    net = parser.add_argument_group("model")
    net.add_argument("--model", choices=MODELS, default=model, help="network")
    net.add_argument("--feature_size", type=int, choices=FEATURE_SIZES, default=24, help="of SwinUNetR")
    net.add_argument("--init_filters", type=int, choices=[8, 16], default=8, help="of SegResNet")
    net.add_argument(
        "--checkpointing",
        action=Switch,
        default=None,
        help="recompute activations instead of keeping them; slower (default: for SwinUNetR only)",
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--batch_size", type=positive_int, default=1, help="items a step and process")
    optim.add_argument("--accumulate", type=positive_int, default=1, help="steps an optimiser update")
    optim.add_argument("--optimizer", choices=list(DEFAULT_LR), default="prodigy", help="see --lr")
    optim.add_argument(
        "--lr", type=float, default=1.0, help="1.0 is for Prodigy; with another optimiser its own default"
    )
    optim.add_argument("--weight_decay", type=float, default=0.0, help="decoupled from the gradient")
    optim.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 = any")
    augment = parser.add_argument_group("augmentation, probabilities for each item")
    augment.add_argument("--augment", action=Switch, default=True, help="random changes of training items")
    augment.add_argument("--flip", type=fraction, default=0.5, help="left-right; levels have no sides")
    augment.add_argument(
        "--rotate_scale", type=fraction, default=0.5, help="15 degrees about each axis, 15 %%"
    )
    augment.add_argument("--elastic", type=fraction, default=0.2, help="smooth deformation up to 7.5 mm")
    augment.add_argument("--low_resolution", type=fraction, default=0.2, help="simulated thick slices")
    augment.add_argument(
        "--grey_values", type=fraction, default=0.15, help="noise, blur, brightness, contrast, gamma, each"
    )
    add_length_flags(parser, epochs=200, early_stopping=30)
    add_machine_flags(parser)
    parser.add_argument(
        "--vram", type=float, help="GiB of the card: fit patch, batch and checkpointing to it and keep to it"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--model_name", required=True, help="name of the run")
    run.add_argument("--out", default=out, help="folder of all runs")
    run.add_argument("--use_wandb", action=Switch, default=False, help="also log to Weights & Biases")


def open_data(args: Namespace) -> VerSe:
    """The data set that the flags name: phantoms, downloaded, or there already."""
    if args.data_path == "demo":
        return VerSe(preprocess.demo_dataset(), seed=args.seed)
    if args.download and not (Path(args.data_path) / "preprocessing.json").is_file():
        download_and_convert(Path(args.data_path), args.dataset_edition)
    verse = VerSe(args.data_path, args.dataset_edition, args.seed)
    if distributed.is_main() and (left_out := len(verse.entries) - len(verse.cases)):
        print(f"--dataset_edition {args.dataset_edition}: leaves out {left_out} case(s) of VerSe20")
    return verse


def validation_names(verse: VerSe) -> list[str]:
    """Validation scans; without any the first training scan, so that a run can still be watched."""
    return verse.split["val"] or verse.split["train"][:1]


def no_validation_note(verse: VerSe) -> str:
    if verse.split["val"]:
        return ""
    return (
        f"warning: {verse.path} has no validation scan: the training scan {verse.split['train'][0]} stands "
        "in for one, and best.pt is that of the last validation"
    )


def download_and_convert(data_path: Path, edition: int) -> None:
    """VerSe into <data_path>_raw and converted into <data_path>."""
    raw = data_path.with_name(f"{data_path.name}_raw")
    # VerSe20 in its subject-based release leaves out the scans that VerSe19 has already.
    editions = ["19", "20"] if edition == 20 else ["19"]
    if download.main(["--out", str(raw), "--dataset_edition", *editions]):
        raise ValueError(f"VerSe{edition} could not be downloaded; see the steps above")
    if preprocess.main(["--source", str(raw), "--out", str(data_path)]):
        print("some cases could not be converted, see above; going on with the others")


def load_resumed(args: Namespace, stage: str) -> tuple[dict, Path] | None:
    """(checkpoint, run folder) that --resume means, of a run of this stage; None without --resume."""
    found = runs.load_resumed(args.resume, args.out, args.model_name)
    if found and found[0].get("stage") != stage:
        raise ValueError(
            f"--resume: {found[1]} is no run of verse_spine/train_{stage}.py; choose another name"
        )
    return found


def get_augmentation(args: Namespace) -> Augmentation3d:
    """What the flags ask for. Only left-right flips: upside down there is no spine."""
    return Augmentation3d(
        flip_probability=(0, 0, args.flip),
        spatial_probability=args.rotate_scale,
        elastic_probability=args.elastic,
        low_resolution_probability=args.low_resolution,
        noise_probability=args.grey_values,
        blur_probability=args.grey_values,
        brightness_probability=args.grey_values,
        contrast_probability=args.grey_values,
        gamma_probability=args.grey_values,
    )


def get_optimizer(name: str, parameters: Iterable, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Prodigy, AdamW or SGD with momentum; `lr` 1.0 becomes the default of the latter two."""
    lr = usual_lr(name, lr)
    if name == "prodigy":
        return Prodigy(parameters, lr=lr, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.99, nesterov=True, weight_decay=weight_decay)


def usual_lr(name: str, lr: float) -> float:
    return DEFAULT_LR[name] if lr == 1.0 else lr


def optimizer_notes(args: Namespace, num_parameters: int) -> list[str]:
    """What a user should know about the optimiser, for the log."""
    if args.optimizer == "prodigy":
        mib = 16 * num_parameters / 2**20
        return [f"Prodigy finds its step size itself (--lr is a factor); its state takes {mib:.0f} MiB"]
    if args.lr == 1.0:
        return [f"--lr 1.0 belongs to Prodigy: {args.optimizer} takes {DEFAULT_LR[args.optimizer]:g}"]
    return []


def step_peak_mib(config: dict, num_outputs: int, loss_function: Callable[..., Tensor], plan: Plan) -> float:
    """Predicted MiB of a training step under a plan; see common/memory.py."""
    return training_peak_mib(
        lambda: get_model(config | {"checkpointing": plan.checkpointing}, num_outputs),
        loss_function,
        (plan.batch_size, 1, *plan.patch_size),
        make_optimizer=lambda parameters: get_optimizer(config["optimizer"], parameters, 1.0, 0.0),
        dtype=DTYPES[plan.precision],
    )


def wanted_plan(config: dict, precision: str) -> Plan:
    """What the flags ask for."""
    checkpointing = config["checkpointing"]
    if checkpointing is None:
        checkpointing = config["model"] == "SwinUNetR"
    return Plan(
        tuple(config["patch_size"]), config["batch_size"], config["accumulate"], checkpointing, precision
    )


def training_trial(
    network: nn.Module, loss_function: Callable[..., Tensor], plan_shape: tuple, device: torch.device
) -> Callable[[torch.dtype | None], None]:
    """A function that computes one training step in the given precision, to be timed; `network` stays as it
    is.

    Args:
        plan_shape: (batch size, d, h, w).
    """

    def trial(dtype: torch.dtype | None) -> None:
        copy = deepcopy(network).train()
        image = torch.zeros(plan_shape[0], 1, *plan_shape[1:], device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = copy(image)
        loss_function(logits, torch.zeros_like(image[:, 0], dtype=torch.long)).backward()

    return trial


def check_same_data(resumed: dict, verse: VerSe) -> None:
    """Refuse to go on with a run on other cases or other voxels than it began with.

    Raises:
        ValueError: naming both.
    """
    began, now = (p["spacing_mm"] for p in (resumed["preprocessing"], verse.preprocessing))
    if list(began) != list(now):
        raise ValueError(f"--resume: the run began with voxels of {began} mm, {verse.path} now has {now}")
    if resumed["split"] != verse.split:
        raise ValueError(f"--resume: the split of {verse.path} is not the one that this run began with")
