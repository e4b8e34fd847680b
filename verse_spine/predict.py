"""Segment the vertebrae of CT scans: find the spine, then segment inside its box, on the scan's own grid.

    python verse_spine/predict.py --weights seg/best.pt --heatmap_weights hm/best.pt --source scan.nii.gz
    python verse_spine/predict.py --weights seg/best.pt --source scans/ --out masks/

Of each scan <name>.nii.gz it writes <name>_mask.nii.gz (its own grid, affine and codes), <name>_ctd.json
(centres of the vertebral bodies in VerSe's format; of models trained without levels26 they are only counted
from head to foot, in <name>_bodies.json), <name>.json (region, seconds, memory) and <name>_preview.png.
Without --heatmap_weights the whole body is searched. The scan is read where it is needed, and class scores
exist for a few rows at a time. For research only.
"""

import math
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed, prediction, prediction_flags
from common.config import Switch, make_parser, parse_args, run_script
from common.files import write_json
from common.hardware import choose_precision, describe_device, start_device
from common.messages import warn
from common.nifti import case_name, open_nifti, save_label
from common.planes import save_planes
from common.plots import costs_the_picture
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.volumes import crop
from verse_spine.labels import class_names, num_outputs, unmap_labels, write_centroids
from verse_spine.networks import TrainedModel, load_trained
from verse_spine.pictures import LABEL_COLORS, WINDOW_HU
from verse_spine.region import find_region
from verse_spine.segment import clean_up, mask_centroids, segment

OWN_NAMES = ("_mask", "_msk")  # masks of this script and of VerSe are not scans
TABLE = "predictions.csv"


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    prediction_flags.add_weights_flag(parser, "train_segmentation.py", "of the second stage")
    parser.add_argument(
        "--heatmap_weights",
        help="trained model of the first stage: weights/best.pt in the folder of a run of "
        "train_heatmap.py; with it only the box around the spine is segmented, which is faster and "
        "gives fewer false alarms",
    )
    prediction_flags.add_scan_flags(parser)
    parser.add_argument(
        "--no_roi",
        action="store_true",
        help="segment the whole scan and not only a box around the spine or the body; slower, but right if "
        "a vertebra was left out of the box",
    )
    parser.add_argument(
        "--roi",
        help="segment only this box: <name>.json of an earlier run, or a JSON file with {'start': [z, y, "
        "x], 'stop': [z, y, x]} in voxels of the scan in RAS",
    )
    prediction_flags.add_tta_flag(parser)
    prediction_flags.add_window_flags(parser)
    parser.add_argument(
        "--clean_up",
        action=Switch,
        default=True,
        help="remove pieces that are small or far from the spine, and fill small holes; --no-clean_up "
        "keeps the mask as the network gave it",
    )
    prediction_flags.add_picture_flags(
        parser, "spine", "pictures of the surface, and a page that shows it in a browser"
    )
    add_prediction_flags(parser)
    return parser


def predict_scan(
    model: TrainedModel, heatmap: TrainedModel | None, path: Path, out: Path, args: Namespace
) -> dict:
    """Write all files of one scan; returns its row of predictions.csv."""
    started = time.perf_counter()
    file, labels = open_nifti(path), model.config["labels"]
    name = case_name(path)
    region = find_region(file, heatmap, roi=args.roi, whole_scan=args.no_roi)
    found_s = time.perf_counter() - started
    reading = prediction.read_region(
        file,
        region.box,
        model.preprocessing["spacing_mm"],
        model.config["patch_size"],
        num_outputs(labels),
        batch_size=args.batch_size,
        device=model.device,
        smaller="a smaller --batch_size, --heatmap_weights (without --no_roi) or a smaller --roi",
        source=region.source,
    )
    image = reading.image
    with prediction.window_bar(path.name) as progress:
        inside = segment(
            model,
            image,
            file.spacing_mm,
            box=reading.region,
            mirror=args.tta,
            overlap=args.overlap,
            batch_size=args.batch_size,
            progress=progress,
        )
    mask = reading.on_scan(inside, file)
    del inside
    report = {"removed_ml": 0.0, "filled_ml": 0.0}
    if args.clean_up:
        mask, report = clean_up(mask, file.spacing_mm, file.voxel_mm3)
    counts = np.zeros(256, np.int64)
    for plane in mask:  # plane by plane: as an index the whole mask would take 8 bytes for each voxel
        plane[...] = unmap_labels(plane, labels)
        counts += np.bincount(plane.ravel(), minlength=256)
    volumes = {int(v): float(counts[v] * file.voxel_mm3 / 1000) for v in np.flatnonzero(counts) if v}
    if not volumes:
        warn(f"{path.name}: no vertebra found, its mask is empty")
    save_label(out / f"{name}_mask.nii.gz", mask, file)
    # Without levels the bodies are only counted: another file name, so that nobody takes 1, 2 for C1, C2.
    ending = "ctd" if labels == "levels26" else "bodies"
    write_centroids(out / f"{name}_{ending}.json", mask_centroids(mask, file, labels))
    inside = crop(mask, reading.start, reading.stop)
    if args.save_preview:
        with costs_the_picture(f"{name}_preview.png"):
            save_planes(
                out / f"{name}_preview.png",
                image,
                file.spacing_mm,
                inside,
                palette=LABEL_COLORS,
                value_range=WINDOW_HU,
                title=name,
            )
    if args.save_3d:
        from verse_spine.views import save_views

        with costs_the_picture(f"what is missing of the 3-D pictures of {name}"):
            save_views(out / name, inside, file.spacing_mm, image=image)
    notes = prediction.prediction_notes(path, model, reading.need, started)
    notes |= {
        "labels": labels,
        "classes": class_names(labels),
        "volume_ml": volumes,
        "region": {
            "source": region.source,
            "start": list(region.box[0]),
            "stop": list(region.box[1]),
            "axes": "z y x, voxels of the scan in RAS",
            "max_heat": None if math.isnan(region.heat) else region.heat,
            "seconds": found_s,
        },
        "clean_up": report,
    }
    write_json(out / f"{name}.json", notes)
    return {
        "scan": str(path),
        "region": region.source,
        "volume_ml": sum(volumes.values()),
        "labels": " ".join(map(str, volumes)),
        "removed_ml": report["removed_ml"],
        "seconds": notes["seconds"],
        "peak_mib": notes["peak_mib"],
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        if args.roi and args.no_roi:
            raise ValueError("--roi and --no_roi contradict each other")
        device = start_device(args.device, distributed.local_rank())
        precision = choose_precision(args.amp, device)
        model = load_trained(args.weights, device, precision, "segmentation")
        heatmap = None
        if args.heatmap_weights:
            heatmap = load_trained(args.heatmap_weights, device, precision, "heatmap")
        out = Path(args.out) if args.out else run_dir_of(args.weights) / "predictions"
        failed = prediction.predict_scans(
            lambda path, folder: predict_scan(model, heatmap, path, folder, args),
            args.source,
            out,
            own_names=OWN_NAMES,
            recursive=args.recursive,
            table=TABLE,
            machine=f"{describe_device(device)}, {precision.name}",
            found=lambda row: f"{row['volume_ml']:.1f} mL of vertebrae",
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
