"""What train.py needs besides its loop: where a run lies, data, augmentation, lines of the log, results."""

import math
import shlex
from argparse import Namespace
from pathlib import Path

import torch

from amygdala.cross_validation import write_cross_validation
from amygdala.dataset import Cohort
from amygdala.structures import DATASETS
from common import runs
from common.augment import Augmentation3d
from common.distributed import world_size
from common.files import read_json, write_json

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
        raise ValueError(f"--batch_size {args.batch_size} is that of all {world_size()} processes together; choose a multiple")


def experiment_folder(args: Namespace, folds: list[int]) -> Path:
    """exp/<dataset>/<unique_name>, made if need be; _2 behind it if a fold to be trained lies there already."""
    folder = Path(args.out) / args.dataset / args.model_name
    if args.resume is None and any((folder / f"fold_{k}").exists() for k in folds):
        return runs.new_run_dir(folder.parent, folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def link_weights(experiment: Path, fold: int) -> None:
    """Names that users of the original code look for: fold_<i>_best.pt, fold_<i>_latest.pt, fold_<i>.txt."""
    targets = {"best.pt": "weights/best.pt", "latest.pt": "weights/last.pt"}
    links = {f"fold_{fold}_{name}": f"fold_{fold}/{target}" for name, target in targets.items()}
    for name, target in (links | {f"fold_{fold}.txt": f"fold_{fold}/log.txt"}).items():
        link = experiment / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)


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


def data_lines(data: Cohort, num_patches: int, num_batches: int) -> list[str]:
    """What the log says about the data."""
    split = data.split
    counts = ", ".join(f"{len(split[part])} {word}" for part, word in (("train", "training"), ("val", "validation"), ("test", "test")))
    sites = sorted({data.sites[name] for name in data.cases})
    lines = [
        f"cases: {counts}; {len(set(data.subjects.values()))} subjects of {len(sites)} site(s): {', '.join(sites)}",
        f"{num_patches} patches in an epoch, {num_batches} batches for each process",
    ]
    if split["test"]:
        lines.append(f"held out: {', '.join(split['test'])}")
    return lines


def note_results(experiment: Path, args: Namespace, folds: int, fold: int, rows: list[dict]) -> Path | None:
    """Keep the rows of a fold; once all folds are there, write cross_validation.txt and return its path."""
    write_json(experiment / RESULTS.format(fold), {"rows": [_plain(row) for row in rows]})
    files = [experiment / RESULTS.format(k) for k in range(folds)]
    if not all(file.is_file() for file in files):
        return None
    found = [read_json(file, {"rows": list})["rows"] for file in files]
    by_fold = [[{k: math.nan if v is None else v for k, v in row.items()} for row in rows] for rows in found]
    path = experiment / "cross_validation.txt"
    names = DATASETS[args.dataset].structures.names
    title = f"{args.model} {args.dimension}, {args.dataset}"
    if args.select_on_test:
        title += "; epochs were chosen by the test folds, so that these scores are too good"
    write_cross_validation(path, by_fold, names, title=title)
    return path


def _plain(row: dict) -> dict:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def next_command(weights: Path) -> str:
    """What to do with the weights."""
    words = ["python", "amygdala/predict.py", "--weights", str(weights)]
    return f"next: {shlex.join(words)} --source <T1 scan or folder>"
