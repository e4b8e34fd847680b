"""What train.py needs besides its loop: where a run lies, data, augmentation, lines of the log, results."""

import re
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from amygdala import phantoms, preprocess
from amygdala.cross_validation import write_cross_validation
from amygdala.dataset import Cohort, PatchDataset
from amygdala.localiser import train_localiser
from amygdala.structures import DATASETS
from common.augment import Augmentation3d, grey_value_probabilities
from common.config import parse_args, resolved_config
from common.distributed import main_first, on_main, world_size
from common.files import check_keys, link_file, read_json, write_json
from common.hardware import Precision
from common.phantoms import prepare_demo

RESULTS = "fold_{}_results.json"
DIVISION = ("folds", "split_seed", "leave_site_out")  # flags that decide who is held out by which fold
# Flags that may differ between folds that count as trained alike: they do not decide what is learned.
MAY_DIFFER = ("fold", "unique_name", "out", "log_path", "use_wandb", "evaluate", "workers", "deterministic")
MAY_DIFFER += ("device", "gpu", "amp", "vram", "checkpointing", "config", "resume")
BIASED = "epochs were chosen by the test scans (--select_on_test), so that these scores are too good"


def resolve_flags(args: Namespace) -> None:
    """Settle what several flags say together, in place: the data folder and the device.

    Raises:
        ValueError: a --fold that there cannot be, a --batch_size that the processes cannot share, or one card
            for several processes.
    """
    args.data_path = args.data_path or f"dataset/{args.dataset}"
    args.log_path = args.log_path or str(Path(args.out).with_name("log"))
    if args.fold not in ("all", "test") and not args.fold.isdecimal():
        raise ValueError(f"--fold {args.fold}: a number from 0 on, all or test")
    if args.gpu is not None:
        if world_size() > 1:
            raise ValueError("--gpu is for a single process; torchrun gives each process a card of its own")
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


def demo_dataset(folder: Path = Path("data/demo/amygdala")) -> Path:
    """Phantom heads of two sites, converted by the ordinary route; made once."""
    source, out = folder / "heads", folder / "h5"
    flags = ["--source", str(source), "--out", str(out), "--workers", "2"]

    def make() -> dict[str, str]:
        phantoms.write_head_phantoms(source)
        return preprocess.convert(parse_args(preprocess.build_parser(), flags), out)

    return prepare_demo(source, out, make, flags, [phantoms, preprocess])


def data_folder(args: Namespace) -> Path:
    """The folder of preprocess.py that the flags name; the demo's phantoms are made if need be."""
    return demo_dataset() if args.data_path == "demo" else Path(args.data_path)


def open_data(args: Namespace) -> Cohort:
    """The data set, divided as the flags ask; --fold is the number of a fold or of a site, or "test"."""
    fold = args.fold
    number = None if fold == "test" else int(fold)
    sites = site_names(args) if args.leave_site_out else []
    if sites and not (number is not None and number < len(sites)):
        raise ValueError(f"--fold {fold}: with {len(sites)} sites choose 0 to {len(sites) - 1}")
    data = main_first(
        lambda: Cohort(
            data_folder(args),
            dataset=args.dataset,
            seed=args.split_seed,
            folds=args.folds,
            fold=None if sites else number,
            leave_site_out=sites[number] if sites else None,
            validation=args.validation and not args.select_on_test,
        )
    )
    if fold == "test" and not data.split["test"]:
        raise ValueError(
            f"--fold test: {args.data_path} has no test part; convert again with labelled scans in imagesTs "
            "and labelsTs, or take --fold all"
        )
    if args.select_on_test:
        data.split["val"] = data.split["test"]
    return data


def site_names(args: Namespace) -> list[str]:
    """The sites of the data set in the order of --leave_site_out.

    Raises:
        ValueError: there is one only.
    """
    data = main_first(lambda: Cohort(data_folder(args), dataset=args.dataset))
    sites = sorted({data.sites[name] for name in data.split["train"] + data.split["val"]})
    if len(sites) < 2:
        raise ValueError(
            f"--leave_site_out: all cases are of one site, {sites[0]}; name sites in participants.tsv, or in "
            "the table of preprocess.py --subjects, and convert again"
        )
    return sites


def fold_names(args: Namespace) -> dict[str, str]:
    """{fold: the site that it holds out, "" without --leave_site_out} of a whole cross-validation.

    To be called in every process. A folds.json in the data folder decides how many folds there are.
    """
    if args.leave_site_out:
        return {str(k): site for k, site in enumerate(site_names(args))}
    own = main_first(lambda: data_folder(args)) / "folds.json"
    number = len(read_json(own, list)) if own.is_file() else args.folds
    return dict.fromkeys(map(str, range(number)), "")


def experiment_folder(args: Namespace, folds: Collection[str]) -> Path:
    """exp/<dataset>/<unique_name>; with _2 behind it where one of these folds was trained already. With a
    bare --resume the one that was written to last.

    Raises:
        FileNotFoundError: --resume, but there is none.
    """
    root, name = Path(args.out) / args.dataset, args.unique_name
    if args.resume is not None:
        logs = root.glob(f"{name}*/fold_*/log.txt")
        of_name = [p for p in logs if re.fullmatch(re.escape(name) + r"(_\d+)?", p.parents[1].name)]
        if not of_name:
            raise FileNotFoundError(
                f"--resume: no run called {name} under {root}; if it was stopped before it began, start it "
                "without --resume"
            )
        return max(of_name, key=lambda p: p.stat().st_mtime).parents[1]
    number, folder = 1, root / name
    while any((folder / f"fold_{k}").exists() for k in folds):
        number += 1
        folder = root / f"{name}_{number}"
    return folder


def link_weights(folder: Path, fold: str) -> None:
    """Put names that users of the original code look for beside the folder of a fold: fold_<i>_best.pt,
    fold_<i>_latest.pt, fold_<i>.txt; copies of what is there where the system allows no links."""
    targets = {"_best.pt": "weights/best.pt", "_latest.pt": "weights/last.pt", ".txt": "log.txt"}
    for ending, target in targets.items():
        link_file(folder.with_name(f"fold_{fold}{ending}"), f"{folder.name}/{target}")


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
        **grey_value_probabilities(args.grey_values),
        noise_sd=0.2,
        brightness=0.3,
        gamma=(0.6, 1.7),
        value_range=(-3, 3),
    )


def get_patches(args: Namespace, data: Cohort, patch_size: Sequence[int]) -> PatchDataset:
    """Training patches of an epoch: --patches, or one of each scan where there are more scans."""
    names = data.split["train"]
    return PatchDataset(
        data,
        names,
        patch_size,
        max(args.patches, len(names)),
        jitter=args.jitter,
        surroundings=args.surroundings if args.augment else 0.0,
    )


def get_localiser(
    args: Namespace, data: Cohort, device: torch.device, precision: Precision, resumed: dict | None
) -> tuple[dict | None, float | None]:
    """(localiser of the fold, None where none is needed; seconds of --time_budget that it has left).

    It is trained on the training scans, unless a `resumed` run has it already.
    """
    if not DATASETS[args.dataset].localised:
        return None, args.time_budget
    if resumed:
        localiser = resumed["preprocessing"].get("localiser")
        check_keys(localiser, {"state": dict, "seconds": float | int}, "--resume: the run's localiser")
    else:
        heads = [data.cases[name] for name in data.split["train"]]
        updates = args.localiser_updates
        localiser = on_main(lambda: train_localiser(heads, device, precision, args.seed, updates))
    left_s = args.time_budget and max(1.0, args.time_budget - localiser["seconds"])
    return localiser, left_s


def data_lines(data: Cohort, num_patches: int, num_batches: int, localiser: dict | None) -> list[str]:
    """What the log says about the data, and about the localiser."""
    split = data.split
    names = [name for part in split.values() for name in part]  # without the published test scans in a fold
    subjects, sites = {data.subjects[name] for name in names}, sorted({data.sites[name] for name in names})
    lines = [
        f"cases: {len(split['train'])} training, {len(split['val'])} validation, {len(split['test'])} test; "
        f"{len(subjects)} subjects of {len(sites)} site(s): {', '.join(sites)}",
        f"{num_patches} patches in an epoch, {num_batches} batches for each process",
    ]
    if split["test"]:
        lines.append(f"held out: {', '.join(split['test'])}")
    if localiser:
        lines.append(f"localiser: trained in {localiser['seconds']:.0f} s, loss {localiser['loss']:.3f}")
    return lines


def is_scored(experiment: Path, fold: str, weights: Path) -> bool:
    """Whether these weights have met the test scans already, as in folds that --resume finds finished."""
    results = experiment / RESULTS.format(fold)
    return results.is_file() and results.stat().st_mtime >= weights.stat().st_mtime


def note_results(
    experiment: Path, args: Namespace, data: Cohort, rows: list[dict], folds: Mapping[str, str]
) -> Path | None:
    """Keep the rows of a fold; once all `folds` are there, write cross_validation.txt and return its path.

    A fold divided off by other flags does not count; one trained differently does, with a note that says so.
    Called in the main process alone, so that it must not talk to the others.
    """
    settings = resolved_config(args, leave_out=MAY_DIFFER)
    write_json(experiment / RESULTS.format(args.fold), {"settings": settings, "rows": rows})
    if args.fold == "test":
        return None
    files = [experiment / RESULTS.format(k) for k in folds]
    if not all(file.is_file() for file in files):
        return None
    found = [read_json(file, {"settings": dict | None, "rows": list}) for file in files]
    settings_of = [settings | (fold.get("settings") or {}) for fold in found]
    if any(of_fold[key] != settings[key] for of_fold in settings_of for key in DIVISION):
        return None
    path = experiment / "cross_validation.txt"
    names = DATASETS[args.dataset].structures.names
    notes = [f"{args.model} {args.dimension}, {args.dataset}"]
    if any(of_fold["select_on_test"] for of_fold in settings_of):
        notes.append(BIASED)
    for key in settings:
        values = [of_fold[key] for of_fold in settings_of]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"{value} in fold {k}" for k, value in enumerate(values))
            notes.append(f"the folds were not trained alike: --{key} was {listed}")
    if args.leave_site_out:
        notes.append("each fold holds out a site: " + ", ".join(f"{k} = {folds[k]}" for k in folds))
    write_cross_validation(path, [fold["rows"] for fold in found], names, data.sites, notes=notes)
    return path
