"""Segment the amygdalae, or the parts of the hippocampus, in T1 scans, on the scans' own grids.

    python amygdala/predict.py --weights exp/Amygdala/test/fold_0_best.pt --source T1.nii.gz --overlay
    python amygdala/predict.py --weights fold_0_best.pt fold_1_best.pt --source scans/ --out masks

Scans are NIfTI or .mgz (FreeSurfer), in any orientation. In a whole head a small network first finds the
region to search. Of each scan <name> it writes <name>_mask.nii.gz (the scan's own grid and affine) and
<name>.json (volumes, region, warnings, seconds, memory); of all scans volumes.csv, in mm3, with the asymmetry
of left and right. Several --weights, such as the folds of a run, are averaged. For research only.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amygdala.localiser import find_box
from amygdala.model import load_trained
from amygdala.segment import segment
from amygdala.structures import COLORS, DATASETS, NUM_CLASSES, DataSet, side_columns
from common import batch, distributed, prediction, prediction_flags
from common.checkpoints import TrainedModel
from common.components import remove_stray_pieces
from common.config import Switch, make_parser, parse_args, run_script
from common.files import write_json
from common.hardware import choose_precision, describe_device, start_device
from common.intensity import shown_range
from common.label_measures import asymmetry_index, label_counts
from common.messages import warn
from common.nifti import case_name, save_label
from common.planes import legend_of, middle, save_planes
from common.plots import costs_the_picture
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.volumes import Box

OWN_NAMES = ("_mask",)  # masks of this script are not scans
TABLE = "volumes.csv"
MARGIN_MM, PIXEL_MM = 25.0, 0.5  # of --overlay: what is shown around the structures, side of a pixel
LEAST_HEAD_MM = 100.0  # a scan with a shorter side does not show a whole head
BESIDE_MM = 20.0  # a region whose middle lies farther from that of the head is suspicious


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    prediction_flags.add_weights_flag(parser, "train.py", file="fold_<i>_best.pt", several=True)
    prediction_flags.add_scan_flags(parser)
    parser.add_argument(
        "--overlay",
        action=Switch,
        default=False,
        help="write <name>_overlay.png, a close-up of three planes through the structures",
    )
    parser.add_argument(
        "--save_prob",
        action=Switch,
        default=False,
        help="also write a probability map of each label to probabilities/",
    )
    swap = "; left and right labels change places, so only for models trained with --flip_sides"
    prediction_flags.add_tta_flag(parser, swap)
    prediction_flags.add_window_flags(parser)
    parser.add_argument(
        "--clean_up",
        action=Switch,
        default=True,
        help="keep only the largest piece of each label and report what was removed; --no-clean_up keeps the "
        "mask as the network gave it",
    )
    add_prediction_flags(parser)
    return parser


def find_warnings(
    labels: np.ndarray, volumes_mm3: dict[int, float], dataset: DataSet, beside_mm: float
) -> list[str]:
    """Sentences about what a person should look at.

    Args:
        labels: (z, y, x) in RAS+.
        volumes_mm3: {label: volume}.
        beside_mm: how far the region that was searched lies beside the middle of the head.
    """
    low, high = dataset.volume_mm3
    names = dataset.structures.names
    found = [
        f"{names[label]} of {volume:.0f} mm3 is hardly plausible ({low:.0f} to {high:.0f} mm3 in adults); "
        "look at --overlay"
        for label, volume in volumes_mm3.items()
        if not low <= volume <= high
    ]
    if not any(volumes_mm3.values()):
        found = ["nothing found, its mask is empty"]
    found += filter(None, (prediction.why_mirrored(labels, b, a, names) for a, b in dataset.sides))
    if beside_mm > BESIDE_MM:
        found.append(
            f"the region searched lies {beside_mm:.0f} mm beside the middle of the head; is it a whole head, "
            "and is its orientation right?"
        )
    return found


def beside_middle_mm(image: np.ndarray, box: Box, spacing_mm: Sequence[float]) -> float:
    """How far, left or right, the middle of a box lies from that of what is bright in a scan (z, y, x)."""
    in_box = (box[0][2] + box[1][2] - 1) / 2
    return abs(in_box - middle(image > image.mean())[2]) * spacing_mm[2]


def predict_scan(models: Sequence[TrainedModel], path: Path, out: Path, args: Namespace) -> dict:
    """Write all files of one scan; returns its row of volumes.csv."""
    started, name, scan = time.perf_counter(), case_name(path), prediction.load_scan(path)
    model = models[0]
    dataset = DATASETS[model.preprocessing["dataset"]]
    sides_mm, problems = np.multiply(scan.shape, scan.spacing_mm), []
    if (min(sides_mm) >= LEAST_HEAD_MM) != dataset.localised:  # told at once: a head takes minutes as a crop
        expected = "whole head" if dataset.localised else "crop around a hippocampus as those trained on"
        problems.append("{:.0f} x {:.0f} x {:.0f} mm (z y x), which is no {}".format(*sides_mm, expected))
        warn(f"{path.name}: {problems[0]}")
    region = find_box(model, scan.array, scan.spacing_mm)
    beside_mm = beside_middle_mm(scan.array, region, scan.spacing_mm) if dataset.localised else 0.0
    reading = prediction.read_region(
        scan,
        region,
        model.preprocessing["spacing_mm"],
        model.config["patch_size"],
        NUM_CLASSES,
        batch_size=args.batch_size,
        device=model.device,
        source="region searched",
        smaller="a smaller --batch_size",
        scan=scan.array,
    )
    maps_of = list(dataset.structures.names) if args.save_prob else []
    with (
        prediction.probability_maps(out, maps_of, scan, reading) as maps,
        prediction.window_bar(path.name) as progress,
    ):
        labels = segment(
            models,
            reading.image,
            scan.spacing_mm,
            box=reading.region,
            tta=args.tta,
            overlap=args.overlap,
            batch_size=args.batch_size,
            probabilities=maps,
            progress=progress,
        )
    removed: dict[int, dict] = {}
    if args.clean_up:
        labels, removed = remove_stray_pieces(labels, scan.voxel_mm3, compact=dataset.structures.names)
    save_label(out / f"{name}_mask.nii.gz", reading.on_scan(labels, scan), scan)
    counts = label_counts(labels, NUM_CLASSES)
    volumes_mm3 = {label: float(counts[label] * scan.voxel_mm3) for label in dataset.structures.names}
    for problem in (found := find_warnings(labels, volumes_mm3, dataset, beside_mm)):
        warn(f"{path.name}: {problem}")
    problems += found
    if args.overlay:
        with costs_the_picture(f"{name}_overlay.png"):
            save_planes(
                out / f"{name}_overlay.png",
                reading.image,
                scan.spacing_mm,
                labels,
                palette=COLORS[1:],
                value_range=shown_range(reading.image),
                voxel_mm=PIXEL_MM,
                title=name,
                legend=legend_of(labels, dataset.structures.names, COLORS),
                margin_mm=MARGIN_MM,
            )
    columns = side_columns(dataset)
    volumes = {columns[label]: volume for label, volume in volumes_mm3.items()}
    if dataset.sides:
        volumes["asymmetry_index"] = asymmetry_index(*volumes_mm3.values())
    notes = prediction.prediction_notes(path, model, reading.need, started)
    notes |= {
        "weights": list(map(str, args.weights)),
        "region": {"start": list(region[0]), "stop": list(region[1]), "axes": "z y x in RAS"},
        "volumes": volumes,
        "clean_up": {dataset.structures.names[label]: entry for label, entry in removed.items()},
        "warnings": problems,
    }
    write_json(out / f"{name}.json", notes)
    return {
        "scan": str(path),
        **volumes,
        "removed_mm3": 1000 * sum(entry["removed_ml"] for entry in removed.values()),
        "warnings": "; ".join(problems),
        "seconds": notes["seconds"],
        "peak_mib": notes["peak_mib"],
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        device = start_device(args.device, distributed.local_rank())
        precision = choose_precision(args.amp, device)
        models = [load_trained(path, device, precision) for path in args.weights]
        prediction.check_ensemble(models, args.weights, NUM_CLASSES)
        if args.tta:
            for model in models:
                prediction.check_tta(model)
        columns = side_columns(DATASETS[models[0].preprocessing["dataset"]]).values()
        out = Path(args.out) if args.out else run_dir_of(args.weights[0]) / "predictions"

        failed = prediction.predict_scans(
            lambda path, folder: predict_scan(models, path, folder, args),
            args.source,
            out,
            own_names=OWN_NAMES,
            recursive=args.recursive,
            table=TABLE,
            machine=f"{describe_device(device)}, {precision.name}",
            found=lambda row: ", ".join(f"{c.removesuffix('_mm3')} {row[c]:.0f} mm3" for c in columns),
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
