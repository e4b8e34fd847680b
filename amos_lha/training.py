"""What train.py needs besides its loop: data, augmentation and optimiser by the flags, lines of the log."""

import math
from argparse import Namespace
from pathlib import Path

from amos_lha import conversion, phantoms, preprocess
from amos_lha.dataset import Amos
from amos_lha.organs import GROUPS, ORGANS, SIDES
from amos_lha.sampling import STRATA
from common.augment import Augmentation3d, grey_value_probabilities
from common.config import parse_args
from common.phantoms import prepare_demo

# Columns of metrics.csv: share of the patches that were drawn for an organ.
DRAWN = {f"drawn_{name.replace(' ', '_')}": name for name in ORGANS.values()}
CURVES = {
    "loss": ["train_loss"],
    "validation, whole scans": ["val_dice", *(f"dice_{group}" for group in GROUPS)],
    "patches by stratum, share": [f"share_{stratum}" for stratum in STRATA],
    "patches by organ, share": list(DRAWN),
    "learning rate": ["lr"],
}


def demo_dataset(folder: Path = Path("data/demo/amos_lha")) -> Path:
    """Phantom abdomens in AMOS22's layout, converted by the ordinary route; made once."""
    source, out = folder / "amos", folder / "h5"
    flags = ["--data_path", str(source), "--out", str(out), "--spacing", *["4"] * 3, "--workers", "2"]

    def make() -> dict[str, str]:
        phantoms.write_amos_phantoms(source)
        return preprocess.convert(parse_args(preprocess.build_parser(), flags))

    return prepare_demo(source, out, make, flags, [phantoms, conversion])


def open_data(args: Namespace) -> Amos:
    """The data sets that the flags name."""
    paths = [demo_dataset() if path == "demo" else path for path in args.data_path]
    data = Amos(
        paths,
        args.modality,
        seed=args.seed,
        folds=args.folds,
        fold=None if args.fold is None else int(args.fold),
        validation=args.validation,
        patient_pattern=args.patient_pattern,
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
        **grey_value_probabilities(args.grey_values),
        noise_sd=0.2,
        brightness=0.2,
        value_range=(-3, 3),
    )


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


def epoch_text(scores: dict[str, float], drawn: dict[str, float]) -> str:
    dice, text = scores["val_dice"], ""
    if not math.isnan(dice):
        groups = {group: scores[f"dice_{group}"] for group in GROUPS}
        shown = ", ".join(f"{group} {of:.3f}" for group, of in groups.items() if not math.isnan(of))
        text = f"Dice {dice:.4f} ({shown})  "
    return text + ", ".join(f"{s} {100 * drawn[f'share_{s}']:.0f} %" for s in STRATA if drawn[f"share_{s}"])
