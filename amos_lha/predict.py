"""Segment the abdominal organs of CT or MR scans, on the scans' own grids.

    python amos_lha/predict.py --weights runs/amos_lha/small/weights/best.pt --source scan.nii.gz --out organs
    python amos_lha/predict.py --weights best.pt --source scans/ --out organs --save_3d

Of each scan <name>.nii.gz it writes <name>_mask.nii.gz (its own grid, affine and codes, AMOS's organ
numbers), <name>.json (volumes, what was cleaned up, seconds, memory) and <name>_preview.png; of all scans
volumes.csv, in mL. Of a CT only the body is searched. Class scores exist for a few rows at a time. For
research only.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.networks import load_trained
from amos_lha.organs import COLORS, COMPACT, LIVER, NUM_CLASSES, ORGANS, PARTED, SPLEEN, WINDOW_HU
from amos_lha.region import find_region, scaling_of
from amos_lha.segment import segment
from common import batch, distributed, prediction, prediction_flags
from common.checkpoints import TrainedModel
from common.components import remove_stray_pieces
from common.config import Switch, make_parser, parse_args, run_script
from common.files import write_json
from common.hardware import choose_precision, describe_device, start_device
from common.label_measures import label_volumes_ml
from common.messages import warn
from common.nifti import case_name, open_nifti, save_label
from common.planes import legend_of, save_planes
from common.plots import costs_the_picture
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.views import save_views

OWN_NAMES = ("_mask",)  # masks of this script are not scans
TABLE = "volumes.csv"
FRAMES, TURNTABLE_SIZE = 24, (280, 280)  # of a whole abdomen: 30 s of CPU time and 0.3 MB


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    prediction_flags.add_weights_flag(parser, "train.py")
    prediction_flags.add_scan_flags(parser)
    parser.add_argument(
        "--modality",
        choices=["ct", "mr", "auto"],
        default="auto",
        help="what the scans are: CT in Hounsfield units, or MR. auto goes by AMOS's numbers in names such "
        "as amos_0507, else by what the model was trained on, else by the grey values",
    )
    parser.add_argument(
        "--no_roi",
        action="store_true",
        help="search the whole CT and not only the box of the body; slower, but right if organs are left out "
        "of the box",
    )
    swap = "; left and right organs change places, so only for models trained with --flip_sides"
    prediction_flags.add_tta_flag(parser, swap)
    prediction_flags.add_window_flags(parser)
    parser.add_argument(
        "--clean_up",
        action=Switch,
        default=True,
        help="remove stray pieces of organs and report them, but none of stomach and duodenum; "
        "--no-clean_up keeps the mask as the network gave it",
    )
    prediction_flags.add_probability_flag(parser, "organs", ORGANS, "4 11 12")
    prediction_flags.add_picture_flags(
        parser,
        "organs",
        "a picture of their surfaces from three sides, and an animation of a full turn",
    )
    add_prediction_flags(parser)
    return parser


def predict_scan(model: TrainedModel, path: Path, out: Path, args: Namespace) -> dict:
    """Write all files of one scan; returns its row of volumes.csv."""
    started, name, file = time.perf_counter(), case_name(path), open_nifti(path)
    modality, region = find_region(file, model, wish=args.modality, whole_scan=args.no_roi)
    reading = prediction.read_region(
        file,
        region,
        model.preprocessing["spacing_mm"],
        model.config["patch_size"],
        NUM_CLASSES,
        batch_size=args.batch_size,
        device=model.device,
        smaller="a smaller --batch_size, no --no_roi, or a scan cut to the abdomen",
        source=modality.upper(),
    )
    scaling = scaling_of(model, modality, reading.image)
    with (
        prediction.probability_maps(out, args.save_probabilities, file, reading) as maps,
        prediction.window_bar(path.name) as progress,
    ):
        labels = segment(
            model,
            reading.image,
            file.spacing_mm,
            scaling,
            modality,
            box=reading.region,
            tta=args.tta,
            overlap=args.overlap,
            batch_size=args.batch_size,
            probabilities=maps,
            progress=progress,
        )
    removed: dict[int, dict] = {}
    if args.clean_up:
        labels, removed = remove_stray_pieces(labels, file.voxel_mm3, compact=COMPACT, parted=PARTED)
    save_label(out / f"{name}_mask.nii.gz", reading.on_scan(labels, file), file)
    is_mirrored = prediction.warn_if_mirrored(path, labels, LIVER, SPLEEN, ORGANS)
    # Of an organ that the model was not trained on, nothing is known: its column stays empty.
    volumes_ml = label_volumes_ml(labels, ORGANS, file.voxel_mm3, model.preprocessing["labelled"])
    if not labels.any():
        warn(f"{path.name}: no organ found, its mask is empty")
    if args.save_preview:
        with costs_the_picture(f"{name}_preview.png"):
            save_planes(
                out / f"{name}_preview.png",
                reading.image,
                file.spacing_mm,
                labels,
                palette=COLORS[1:],
                value_range=WINDOW_HU if modality == "ct" else (scaling.low, scaling.high),
                title=name,
                legend=legend_of(labels, ORGANS, COLORS),
            )
    if args.save_3d:
        with costs_the_picture(f"{name}_3d.png"):
            save_views(out / name, labels, file.spacing_mm, colors=COLORS, frames=FRAMES, size=TURNTABLE_SIZE)
    notes = prediction.prediction_notes(path, model, reading.need, started)
    notes |= {
        "modality": modality,
        "scaling": scaling._asdict(),
        "region": {"start": list(region[0]), "stop": list(region[1]), "axes": "z y x in RAS"},
        "volume_ml": volumes_ml,
        "clean_up": {ORGANS[organ]: entry for organ, entry in removed.items()},
        "looks_mirrored": is_mirrored,
    }
    write_json(out / f"{name}.json", notes)
    return {
        "scan": str(path),
        "modality": modality,
        "looks_mirrored": is_mirrored,
        "organs": sum(bool(ml) for ml in volumes_ml.values()),
        **{f"{organ.replace(' ', '_')}_ml": ml for organ, ml in volumes_ml.items()},
        "removed_ml": sum(entry["removed_ml"] for entry in removed.values()),
        "seconds": notes["seconds"],
        "peak_mib": notes["peak_mib"],
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        device = start_device(args.device, distributed.local_rank())
        precision = choose_precision(args.amp, device)
        model = load_trained(args.weights, device, precision)
        if args.tta:
            prediction.check_tta(model)
        if unknown := set(args.save_probabilities) - set(model.preprocessing["labelled"]):
            names = ", ".join(ORGANS[organ] for organ in sorted(unknown))
            raise ValueError(f"--save_probabilities: the model was not trained on labels of {names}")
        out = Path(args.out) if args.out else run_dir_of(args.weights) / "predictions"
        failed = prediction.predict_scans(
            lambda path, folder: predict_scan(model, path, folder, args),
            args.source,
            out,
            own_names=OWN_NAMES,
            recursive=args.recursive,
            table=TABLE,
            machine=f"{describe_device(device)}, {precision.name}",
            found=lambda row: f"{row['organs']} organ(s)",
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
