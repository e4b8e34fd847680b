"""What train.py needs besides its loop: data, augmentation and optimiser by the flags, lines of the log."""

import math
from argparse import Namespace
from pathlib import Path

from amos_lha import preprocess
from amos_lha.dataset import Amos
from amos_lha.organs import GROUPS, ORGANS, SIDES
from amos_lha.phantoms import write_amos_phantoms
from amos_lha.sampling import STRATA
from common.augment import Augmentation3d
from common.config import parse_args

# Columns of metrics.csv: share of the patches that were drawn for an organ.
DRAWN = {f"drawn_{name.replace(' ', '_')}": name for name in ORGANS.values()}


def demo_dataset(folder: Path = Path("data/demo/amos_lha")) -> Path:
    """Phantom abdomens in AMOS22's layout, converted by the ordinary route; made once."""
    source, out = write_amos_phantoms(folder / "amos"), folder / "h5"
    flags = ["--data_path", str(source), "--out", str(out), "--spacing", *["4"] * 3, "--workers", "2"]
    if not (out / "complete").is_file():
        if preprocess.convert(parse_args(preprocess.build_parser(), flags)):
            raise ValueError(f"{source}: the phantoms could not be converted; delete {folder} and try again")
        (out / "complete").touch()
    return out


def open_data(args: Namespace) -> Amos:
    """The data sets that the flags name."""
    paths = [demo_dataset() if path == "demo" else path for path in args.data_path]
    folds = {"folds": args.folds, "fold": None if args.fold is None else int(args.fold)}
    data = Amos(
        paths,
        args.modality,
        seed=args.seed,
        validation=args.validation,
        patient_pattern=args.patient_pattern,
        **folds,
    )
    for name in data.split["train"]:
        organs = data.cases[name].attributes["labelled"]
        if args.flip_sides and any((a in organs) != (b in organs) for a, b in SIDES):
            raise ValueError(
                f"--flip_sides {args.flip_sides:g}: {name} has labels of one side of a pair of organs only, "
                "which a mirror would turn into labels that it does not have; use --flip_sides 0"
            )
    return data


def get_augmentation(args: Namespace) -> Augmentation3d:
    """What the flags ask for; grey values are in standard deviations about the mean of the organs."""
    return Augmentation3d(
        flip_probability=(0, 0, args.flip_sides),
        swap_labels=SIDES,
        spatial_probability=args.rotate_scale,
        rotation_deg=(30, 15, 15),
        elastic_probability=0,
        low_resolution_probability=args.low_resolution,
        noise_probability=args.grey_values,
        blur_probability=args.grey_values,
        brightness_probability=args.grey_values,
        contrast_probability=args.grey_values,
        gamma_probability=args.grey_values,
        noise_sd=0.2,
        brightness=0.2,
        value_range=(-3, 3),
    )


def run_name(args: Namespace) -> str:
    return args.model_name if args.fold is None else f"{args.model_name}_fold{args.fold}"


def data_lines(data: Amos, num_patches: int, num_batches: int) -> list[str]:
    """What the log says about the data."""
    split, notes = data.split, data.preprocessing
    mm = " x ".join(f"{side:g}" for side in notes["spacing_mm"])
    lines = [
        f"cases: {len(split['train'])} training, {len(split['val'])} validation, {len(split['test'])} test; "
        f"modality {notes['modality']}, voxels of {mm} mm (z y x)",
        f"{num_patches} patches in an epoch, {num_batches} batches for each process",
    ]
    if notes["scaling"]:
        low, high, mean, sd = notes["scaling"]
        lines.append(f"fingerprint of the CT: {low:.0f} to {high:.0f} HU, mean {mean:.1f}, sd {sd:.1f}")
    if len(notes["labelled"]) < len(ORGANS):
        missing = [name for organ, name in ORGANS.items() if organ not in notes["labelled"]]
        lines.append(f"no case has labels for: {', '.join(missing)}")
    return lines


def shares(counts: dict[str, float]) -> dict[str, float]:
    """Shares of the epoch's patches: of each stratum, and of each organ that patches were drawn for."""
    total = max(sum(counts.get(stratum, 0) for stratum in STRATA), 1)
    columns = {f"share_{stratum}": stratum for stratum in STRATA} | DRAWN
    return {column: counts.get(name, 0) / total for column, name in columns.items()}


def curves(history: list[dict]) -> dict[str, list[str]]:
    """Panels of the training curves; without the organs and strata that were never drawn, and the validation
    where there was none."""
    panels = {
        "loss": ["train_loss"],
        "validation, whole scans": ["val_dice", *(f"dice_{group}" for group in GROUPS)],
        "patches by stratum, share": [f"share_{stratum}" for stratum in STRATA],
        "patches by organ, share": list(DRAWN),
        "learning rate": ["lr"],
    }
    for title, columns in panels.items():
        panels[title] = [c for c in columns if any(row[c] > 0 for row in history)]
    return {title: columns for title, columns in panels.items() if columns}


def epoch_text(scores: dict[str, float], drawn: dict[str, float]) -> str:
    dice, text = scores["val_dice"], ""
    if not math.isnan(dice):
        groups = {group: scores[f"dice_{group}"] for group in GROUPS}
        shown = ", ".join(f"{group} {of:.3f}" for group, of in groups.items() if not math.isnan(of))
        text = f"Dice {dice:.4f} ({shown})  "
    return text + ", ".join(f"{s} {100 * drawn[f'share_{s}']:.0f} %" for s in STRATA if drawn[f"share_{s}"])
