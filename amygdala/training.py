"""What train.py needs besides its loop: where a run lies, data, augmentation, lines of the log, results."""

import math
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from amygdala.cross_validation import write_cross_validation
from amygdala.dataset import Cohort
from amygdala.localiser import train_localiser
from amygdala.model import get_model
from amygdala.structures import DATASETS
from common import runs
from common.augment import Augmentation3d
from common.distributed import on_main, world_size
from common.files import read_json, write_json
from common.hardware import Precision
from common.memory import Plan, StepSetup, set_up_step

RESULTS = "fold_{}_results.json"


def resolve_flags(args: Namespace) -> None:
    """Settle what several flags say together, in place: the data folder and the device.

    Raises:
        ValueError: a --batch_size that the processes cannot share, or several cards without torchrun.
    """
    args.data_path = args.data_path or args.data_root or f"dataset/{args.dataset}"
    if args.gpu is not None:
        if not args.gpu.isdecimal():
            raise ValueError(
                f"--gpu {args.gpu}: one number; for several cards: torchrun --nproc_per_node "
                f"{len(args.gpu.split(','))} amygdala/train.py ... without --gpu"
            )
        if torch.cuda.is_available():
            args.device = f"cuda:{args.gpu}"
        else:
            print(f"--gpu {args.gpu}: there is no graphics card that torch can use; going on without")
    if args.batch_size % world_size():
        raise ValueError(
            f"--batch_size {args.batch_size} is that of all {world_size()} processes together and has to be "
            "a multiple of their number"
        )


def open_data(args: Namespace, fold: str) -> Cohort:
    """The data set, divided as the flags ask; `fold` is the number of a fold or of a site, or "test"."""
    number = None if fold == "test" else int(fold)
    sites = site_names(args) if args.leave_site_out else []
    if sites and not (number is not None and number < len(sites)):
        raise ValueError(f"--fold {fold}: with {len(sites)} sites choose 0 to {len(sites) - 1}")
    data = Cohort(
        args.data_path,
        dataset=args.dataset,
        seed=args.split_seed,
        folds=args.folds,
        fold=None if sites else number,
        leave_site_out=sites[number] if sites else None,
        validation=args.validation and not args.select_on_test,
    )
    if args.select_on_test:
        data.split["val"] = data.split["test"]
    return data


def site_names(args: Namespace) -> list[str]:
    """The sites of the data set in the order of --leave_site_out."""
    return sorted(set(Cohort(args.data_path, dataset=args.dataset).sites.values()))


def fold_names(args: Namespace) -> list[str]:
    """The runs of a whole cross-validation: numbers of the folds or, with --leave_site_out, of the sites."""
    return [str(k) for k in range(len(site_names(args)) if args.leave_site_out else args.folds)]


def experiment_folder(args: Namespace, folds: list[str]) -> Path:
    """exp/<dataset>/<unique_name>; with _2 behind it where one of these folds was trained already."""
    folder = Path(args.out) / args.dataset / args.unique_name
    if args.resume is None and any((folder / f"fold_{k}").exists() for k in folds):
        return runs.new_run_dir(folder.parent, folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def note_fold(experiment: Path, fold: str, flags: dict) -> None:
    """Write config.yaml, and links with the names that users of the original code look for: fold_<i>_best.pt,
    fold_<i>_latest.pt and the log fold_<i>.txt."""
    runs.save_config(experiment / "config.yaml", flags)
    targets = {"best.pt": "weights/best.pt", "latest.pt": "weights/last.pt"}
    links = {f"fold_{fold}_{name}": f"fold_{fold}/{target}" for name, target in targets.items()}
    for name, target in (links | {f"fold_{fold}.txt": f"fold_{fold}/log.txt"}).items():
        link = experiment / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def set_up(
    args: Namespace,
    config: dict,
    network: nn.Module,
    loss_function: Callable,
    device: torch.device,
    resumed: dict | None,
) -> StepSetup:
    """Precision and memory of the steps, and what the log says about them; --batch_size is that of all
    processes together."""
    batch_size = args.batch_size // world_size()
    return set_up_step(
        network,
        lambda checkpointing: get_model(config | {"checkpointing": checkpointing}),
        loss_function,
        Plan(tuple(args.patch_size), batch_size, args.accumulate, args.checkpointing),
        device,
        name=args.model,
        amp=args.amp,
        resumed=resumed,
        vram_gib=args.vram,
        patch_step=0 if DATASETS[args.dataset].localised else 16,  # it has to hold both amygdalae
    )


def get_localiser(
    args: Namespace, data: Cohort, device: torch.device, precision: Precision, resumed: dict | None
) -> dict | None:
    """What `find_box` needs: from the checkpoint, or trained now on the training cases; None where the scans
    are crops already."""
    if resumed:
        return resumed["preprocessing"]["localiser"]
    if not DATASETS[data.dataset].localised:
        return None
    heads = [data.cases[name] for name in data.split["train"]]
    return on_main(lambda: train_localiser(heads, device, precision, args.seed, args.localiser_updates))


def time_left(time_budget_s: float | None, localiser: dict | None) -> float | None:
    """The time budget without what the localiser took of it; at least a second."""
    if time_budget_s is None or localiser is None:
        return time_budget_s
    return max(1.0, time_budget_s - localiser["seconds"])


def get_augmentation(args: Namespace) -> Augmentation3d:
    """What the flags ask for; grey values are in standard deviations about the mean of the window."""
    return Augmentation3d(
        flip_probability=(0, 0, args.flip_sides),
        swap_labels=DATASETS[args.dataset].sides,
        spatial_probability=args.rotate_scale,
        rotation_deg=(15, 15, 15),
        elastic_probability=args.elastic,
        elastic_mm=4.0,
        elastic_grid_mm=16.0,
        low_resolution_probability=args.low_resolution,
        noise_probability=args.grey_values,
        noise_sd=0.2,
        blur_probability=args.grey_values,
        brightness_probability=args.grey_values,
        brightness=0.3,
        contrast_probability=args.grey_values,
        gamma_probability=args.grey_values,
        gamma=(0.6, 1.7),
        value_range=(-3, 3),
    )


def data_lines(data: Cohort, num_patches: int, num_batches: int, localiser: dict | None) -> list[str]:
    """What the log says about the data."""
    split = data.split
    sites = sorted(set(data.sites.values()))
    subjects = len(set(data.subjects.values()))
    lines = [
        f"cases: {len(split['train'])} training, {len(split['val'])} validation, {len(split['test'])} test; "
        f"{subjects} subjects of {len(sites)} site(s): {', '.join(sites)}",
        f"{num_patches} patches in an epoch, {num_batches} batches for each process",
    ]
    if localiser:
        about = f"trained in {localiser['seconds']:.0f} s, loss {localiser['loss']:.3f}"
        lines.append(f"localiser: {about}")
    if split["test"]:
        lines.append(f"held out: {', '.join(split['test'])}")
    return lines


def note_results(experiment: Path, args: Namespace, data: Cohort, fold: str, rows: list[dict]) -> Path | None:
    """Keep the rows of a fold; once all folds are there, write cross_validation.txt and return its path."""
    write_json(experiment / RESULTS.format(fold), {"rows": [_plain(row) for row in rows]})
    files = [experiment / RESULTS.format(k) for k in fold_names(args)]
    if fold == "test" or not all(file.is_file() for file in files):
        return None
    found = [read_json(file, {"rows": list})["rows"] for file in files]
    by_fold = [[{k: math.nan if v is None else v for k, v in row.items()} for row in rows] for rows in found]
    path = experiment / "cross_validation.txt"
    names = DATASETS[args.dataset].structures.names
    notes = [f"{args.model} {args.dimension}, {args.dataset}"]
    if args.select_on_test:
        notes.append("epochs were chosen by the test folds, so that these scores are too good")
    write_cross_validation(path, by_fold, names, data.sites, notes=notes)
    return path


def _plain(row: dict) -> dict:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def next_command(weights: Path) -> str:
    """What to do with the weights."""
    words = ["python", "amygdala/predict.py", "--weights", str(weights)]
    return f"next: {shlex.join(words)} --source <T1 scan or folder>"
