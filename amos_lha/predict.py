"""Segment the abdominal organs of CT or MR scans, on the scans' own grids.

    python amos_lha/predict.py --weights runs/amos_lha/small/weights/best.pt --source scan.nii.gz --out organs
    python amos_lha/predict.py --weights best.pt --source scans/ --out organs --tta --save_3d

Of each scan <name>.nii.gz it writes <name>_mask.nii.gz (its own grid, affine and codes, AMOS's organ
numbers), <name>.json (volumes, what was cleaned up, seconds, memory) and <name>_preview.png; of all scans
volumes.csv, in mL. Of a CT only the body is searched. Class scores exist for a few rows at a time. For
research only.
"""

import math
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.networks import load_trained
from amos_lha.organs import NUM_CLASSES, ORGANS
from amos_lha.pictures import save_3d, save_preview, shown_range
from amos_lha.region import find_region, scaling_of
from amos_lha.segment import clean_up, looks_mirrored, segment
from common import batch, distributed
from common.checkpoints import TrainedModel
from common.config import Switch, add_prediction_flags, make_parser, parse_args, run_script
from common.files import make_folder, write_json
from common.hardware import choose_precision, describe_device, peak_memory_mib, start_device
from common.label_measures import label_counts
from common.nifti import case_name, open_nifti, save_label, save_probability
from common.prediction import (
    add_scan_flags,
    add_window_flags,
    predict_scans,
    print_written,
    read_region,
    window_bar,
)
from common.runs import run_dir_of
from common.volumes import crop

OWN_NAMES = ("_mask",)  # masks of this script are not scans
PROBABILITIES = "probabilities"  # folder of the maps, apart from the masks
TABLE = "volumes.csv"


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--weights",
        required=True,
        help="trained model: weights/best.pt in the folder of a run of train.py",
    )
    add_scan_flags(parser)
    parser.add_argument(
        "--modality",
        choices=["ct", "mr", "auto"],
        default="auto",
        help="what the scans are: CT in Hounsfield units, or MR. auto goes by AMOS's numbers in names such "
        "as amos_0507, else by what the model was trained on, else by the grey values",
    )
    parser.add_argument(
        "--any_modality",
        action=Switch,
        default=False,
        help="also predict MR with a model of CT and the other way round, although the masks will be poor",
    )
    parser.add_argument(
        "--no_roi",
        action="store_true",
        help="search the whole CT and not only the box of the body; slower, but right if organs are left out "
        "of the box",
    )
    parser.add_argument(
        "--tta",
        action=Switch,
        default=False,
        help="average the prediction with those of the scan mirrored along each axis, where left and right "
        "organs change places; takes four times as long",
    )
    add_window_flags(parser)
    parser.add_argument(
        "--clean_up",
        action=Switch,
        default=True,
        help="remove stray pieces of organs and report them, but none of stomach and duodenum; "
        "--no-clean_up keeps the mask as the network gave it",
    )
    parser.add_argument(
        "--clean_hollow",
        action=Switch,
        default=False,
        help="also remove pieces of stomach and duodenum that are below 5 %% of the largest one",
    )
    parser.add_argument(
        "--save_probabilities",
        type=int,
        nargs="+",
        choices=list(ORGANS),
        default=[],
        metavar="ORGAN",
        help="also write probability maps of these organs, by number, such as 4 11 12; each takes a byte of "
        "disk for each voxel while the scan is predicted",
    )
    parser.add_argument(
        "--save_preview",
        action=Switch,
        default=True,
        help="write a picture of each scan with three planes through the organs",
    )
    parser.add_argument(
        "--save_3d",
        action=Switch,
        default=False,
        help="also write a picture of the organs' surfaces from three sides, and an animation of a full turn",
    )
    add_prediction_flags(parser)
    return parser


def predict_scan(model: TrainedModel, path: Path, out: Path, args: Namespace) -> dict:
    """Write all files of one scan; returns its row of volumes.csv."""
    started, name = time.perf_counter(), case_name(path)
    file = open_nifti(path)
    modality, region = find_region(
        file, model, wish=args.modality, any_modality=args.any_modality, whole_scan=args.no_roi
    )
    reading = read_region(
        file,
        region,
        model.preprocessing["spacing_mm"],
        model.config["patch_size"],
        NUM_CLASSES,
        batch_size=args.batch_size,
        device=model.device,
        source=modality.upper(),
    )
    image, start, stop, need = reading.image, reading.start, reading.stop, reading.need
    scaling = scaling_of(model, modality, image)
    with tempfile.TemporaryDirectory(dir=out, prefix=".maps_") as folder, window_bar(path.name) as progress:
        maps = {
            organ: np.memmap(Path(folder) / str(organ), np.uint8, "w+", shape=image.shape)
            for organ in args.save_probabilities
        }
        inside = segment(
            model,
            image,
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
        for organ in list(maps):
            whole = np.zeros(file.shape, np.uint8)
            crop(whole, start, stop)[...] = maps.pop(organ)
            save_probability(out / PROBABILITIES / f"{name}_{organ:02d}.nii.gz", whole, file)
    removed: dict[int, dict] = {}
    if args.clean_up:
        inside, removed = clean_up(
            inside, file.spacing_mm, hollow=args.clean_hollow, voxel_mm3=file.voxel_mm3
        )
    mask = np.zeros(file.shape, np.uint8)
    crop(mask, start, stop)[...] = inside
    save_label(out / f"{name}_mask.nii.gz", mask, file)
    del mask
    is_mirrored = looks_mirrored(inside)
    if is_mirrored:
        tqdm.write(
            f"warning: {path.name}: the liver lies left of the spleen; are left and right exchanged in the "
            "file? Then left and right organs are too"
        )
    counts = label_counts(inside, NUM_CLASSES)
    volumes = {organ: float(counts[organ] * file.voxel_mm3 / 1000) for organ in ORGANS}
    if not any(volumes.values()):
        tqdm.write(f"warning: {path.name}: no organ found, its mask is empty")
    if args.save_preview:
        value_range = shown_range(modality, scaling)
        save_preview(out / f"{name}_preview.png", image, file.spacing_mm, inside, value_range, name)
    if args.save_3d:
        save_3d(out / name, inside, file.spacing_mm)
    seconds, memory = time.perf_counter() - started, peak_memory_mib(model.device)
    removed_ml = sum(entry["removed_ml"] for entry in removed.values())
    write_json(
        out / f"{name}.json",
        {
            "scan": str(path),
            "modality": modality,
            "scaling": scaling._asdict(),
            "region": {"start": list(region[0]), "stop": list(region[1]), "axes": "z y x in RAS"},
            "volume_ml": {ORGANS[organ]: ml for organ, ml in volumes.items()},
            "clean_up": {ORGANS[organ]: entry for organ, entry in removed.items()},
            "looks_mirrored": is_mirrored,
            "seconds": seconds,
            "predicted_mib": {"host": need.host_mib, "device": need.device_mib},
            "peak_mib": None if math.isnan(memory) else memory,
            "device": describe_device(model.device),
            "precision": model.precision.name,
        },
    )
    columns = {f"{ORGANS[organ].replace(' ', '_')}_ml": ml for organ, ml in volumes.items()}
    found = sum(ml > 0 for ml in volumes.values())
    first = {"scan": str(path), "modality": modality, "looks_mirrored": is_mirrored, "organs": found}
    return first | columns | {"removed_ml": removed_ml, "seconds": seconds, "peak_mib": memory}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        device = start_device(args.device, distributed.local_rank())
        precision = choose_precision(args.amp, device)
        model = load_trained(args.weights, device, precision)
        out = Path(args.out) if args.out else run_dir_of(args.weights) / "predictions"
        make_folder(out)
        if args.save_probabilities:
            make_folder(out / PROBABILITIES)

        def predict(path: Path) -> dict:
            return predict_scan(model, path, out, args)

        rows, failed = predict_scans(
            predict,
            args.source,
            out,
            own_names=OWN_NAMES,
            recursive=args.recursive,
            table=TABLE,
            machine=f"{describe_device(device)}, {precision.name}",
        )
        if distributed.is_main():
            lines = [
                f"{Path(row['scan']).name}: {row['organs']} organ(s), {row['seconds']:.1f} s" for row in rows
            ]
            print_written(lines, failed, out, TABLE)
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
