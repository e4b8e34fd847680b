"""Mark tumour on images or CT scans with a trained model.

    python lung_tumor/predict.py --weights runs/lung_tumor_ds512/weights/best.pt --source slice.png
    python lung_tumor/predict.py --weights best.pt --source slices/ --recursive --save_overlay
    python lung_tumor/predict.py --weights best.pt --source scan.nii.gz

Model, image size and HU window come from the checkpoint. An image gives <name>_mask.png (0/255, its own
size), a NIfTI scan <name>_mask.nii.gz on the scan's own grid. results.csv has one row for each file. For
research only.
"""

import math
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed
from common.config import Switch, fraction, make_parser, parse_args, positive_float, positive_int, run_script
from common.dicom import find_scans
from common.files import make_folder
from common.hardware import choose_precision, describe_device, start_device
from common.hu import why_not_hu
from common.messages import warn
from common.metrics import largest_component
from common.nifti import NIFTI_SUFFIXES, case_name, is_nifti, load_nifti, save_label
from common.plots import PRED_COLOR, costs_the_picture, overlay, save_panels
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.slices import to_display, to_pixel_size, write_png
from lung_tumor.model import TrainedModel, load_trained, predict_slices, window_hu
from lung_tumor.slices import IMAGE_SUFFIXES, read_image, volume_to_slices

OWN_NAMES = ("_mask", "_overlay")  # what this script writes itself


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--weights", required=True, help="trained model: weights/best.pt in the folder of a run of train.py"
    )
    parser.add_argument(
        "--source",
        required=True,
        help="what to predict: a NIfTI scan, an image file, or a folder with scans and images or with DICOM "
        "files, which dcm2niix converts",
    )
    parser.add_argument(
        "--out", help="folder that the results are written to; default: predictions/ in the run's folder"
    )
    parser.add_argument(
        "--recursive", action=Switch, default=False, help="also look into the subfolders of --source"
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=0.5,
        help="probability, 0 to 1, above which a pixel counts as tumour; a lower one finds more tumour and "
        "more false alarms; choose it on validation volumes",
    )
    parser.add_argument(
        "--pixel_mm",
        type=positive_float,
        help="side of a pixel of the image files in mm (a NIfTI scan states its own); default: that of the "
        "training slices, which is right for images from preprocess.py",
    )
    parser.add_argument(
        "--save_overlay",
        "--save-overlay",
        action="store_true",
        help="also write a picture of each result with the predicted tumour in red",
    )
    parser.add_argument(
        "--save_mask",
        action=Switch,
        default=True,
        help="write the masks; --no-save_mask writes results.csv only",
    )
    parser.add_argument(
        "--largest_only",
        action=Switch,
        default=False,
        help="keep only the largest connected piece of tumour in each scan; right if there is one tumour",
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=4,
        help="number of slices that are computed at a time; more are faster on a large GPU, fewer take "
        "less memory",
    )
    add_prediction_flags(parser)
    return parser


def predict_image(model: TrainedModel, path: Path, out: Path, args) -> dict:
    """Mask (and overlay) of one image file; returns its row of results.csv."""
    image = read_image(path)
    pixel_size_mm = (args.pixel_mm, args.pixel_mm) if args.pixel_mm else None
    prob = next(predict_slices(model, image[None], pixel_size_mm=pixel_size_mm))
    mask = prob > args.threshold
    if args.save_mask:
        write_png(out / f"{path.stem}_mask.png", mask * np.uint8(255))
    if args.save_overlay:
        with costs_the_picture(f"{path.stem}_overlay.png"):
            (out / "overlays").mkdir(exist_ok=True)
            write_png(out / "overlays" / f"{path.stem}_overlay.png", overlay(image, mask, PRED_COLOR))
    return result_row(path, mask, float(prob.max()), float("nan"))


def predict_scan(model: TrainedModel, path: Path, out: Path, args) -> dict:
    """Mask (and montage) of one CT scan on its own grid; returns its row of results.csv.

    Slice by slice: class scores exist for one batch of slices only, whatever the length of the scan.
    """
    scan = load_nifti(path)
    if suspicion := why_not_hu(scan.array):
        warn(f"{path.name}: {suspicion}")
    slices = volume_to_slices(scan.array, window_hu(model))
    mask, highest = np.zeros(slices.shape, np.uint8), 0.0
    probs = predict_slices(model, slices, args.batch_size, scan.spacing_mm[1:])
    for z, prob in enumerate(tqdm(probs, path.name, len(slices), unit="slice", disable=None, leave=False)):
        mask[z] = prob > args.threshold
        highest = max(highest, float(prob.max()))
    if args.largest_only:
        mask = largest_component(mask)
    if not mask.any():
        tqdm.write(
            f"note: {path.name}: no tumour found, the mask is empty (highest probability {highest:.2f})"
        )
    if args.save_mask:
        save_label(out / f"{case_name(path)}_mask.nii.gz", to_display(mask), scan)
    if args.save_overlay:
        with costs_the_picture(f"{case_name(path)}_overlay.png"):
            (out / "overlays").mkdir(exist_ok=True)
            save_montage(
                out / "overlays" / f"{case_name(path)}_overlay.png", slices, mask, scan.spacing_mm[1:]
            )
    return result_row(path, mask, highest, float(mask.sum()) * scan.voxel_mm3)


def save_montage(
    path: Path,
    slices: np.ndarray,
    mask: np.ndarray,
    pixel_size_mm: tuple[float, float],
    count: int = 8,
) -> None:
    """The scan's slices with most predicted tumour, or evenly spaced ones if there is none; shown with square
    pixels."""
    areas = mask.sum(axis=(1, 2), dtype=np.int64)
    if areas.any():
        chosen = sorted(np.argsort(-areas, kind="stable")[: min(count, np.count_nonzero(areas))])
    else:
        chosen = np.unique(np.linspace(0, len(slices) - 1, count).round().astype(int))
    pictures = []
    for z in chosen:
        image = to_pixel_size(slices[z], pixel_size_mm, min(pixel_size_mm))
        marked = to_pixel_size(mask[z], pixel_size_mm, min(pixel_size_mm), is_mask=True)
        pictures.append(overlay(image, marked, PRED_COLOR))
    titles = [f"slice {z}, {areas[z]} pixels" for z in chosen]
    titles[0] = f"{path.name.removesuffix('_overlay.png')}, {titles[0]}"
    rows = range(0, len(chosen), 4)
    save_panels(path, [pictures[i : i + 4] for i in rows], [titles[i : i + 4] for i in rows])


def result_row(path: Path, mask: np.ndarray, highest: float, volume_mm3: float) -> dict:
    """One row of results.csv; the volume of an image file is not known (NaN)."""
    return {
        "file": str(path),
        "tumour_pixels": int(mask.sum()),
        "tumour_fraction": float(mask.mean()),
        "max_probability": highest,
        "volume_mm3": volume_mm3,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        device = start_device(args.device, distributed.local_rank())
        model = load_trained(args.weights, device, choose_precision(args.amp, device))
        out = Path(args.out) if args.out else run_dir_of(args.weights) / "predictions"
        sources, unconverted = find_scans(
            args.source,
            (*NIFTI_SUFFIXES, *IMAGE_SUFFIXES),
            out=out,
            own_names=OWN_NAMES,
            recursive=args.recursive,
            what="NIfTI scan and no image",
        )
        make_folder(out)
        if distributed.is_main():
            print(f"{len(sources)} file(s) on {describe_device(device)}, {model.precision.name}")
        root = Path(args.source) if Path(args.source).is_dir() else Path(args.source).parent
        names = {path: case_name(path) for path in sources}
        folders = batch.result_folders(names, root, out, mirrored=True)
        clashes = batch.name_clashes({path: folders[path] / name for path, name in names.items()})

        def predict(path: Path) -> dict:
            folders[path].mkdir(parents=True, exist_ok=True)
            predict_one = predict_scan if is_nifti(path) else predict_image
            return predict_one(model, path, folders[path], args)

        started = time.perf_counter()
        todo = [path for path in sources if path not in clashes]
        rows, failed = batch.each(predict, todo, unit="file", table=out / "results.csv")
        failed = unconverted | clashes | failed
        if distributed.is_main():
            report(rows, failed, out, time.perf_counter() - started)
        return batch.exit_code(failed)


def report(rows: list[dict], failed: dict[Path, str], out: Path, seconds: float) -> None:
    for row in rows[:20]:
        volume = "" if math.isnan(row["volume_mm3"]) else f", {row['volume_mm3'] / 1000:.2f} mL"
        share = 100 * row["tumour_fraction"]
        print(f"  {Path(row['file']).name}: {row['tumour_pixels']} tumour pixels ({share:.2f} %){volume}")
    if len(rows) > 20:
        print(f"  ... {len(rows) - 20} more in results.csv")
    with_tumour = sum(row["tumour_pixels"] > 0 for row in rows)
    num_files = len(rows) + len(failed)
    print(
        f"{len(rows)} of {num_files} file(s) written to {out} in {seconds:.1f} s, {with_tumour} with tumour"
    )
    for line in batch.failed_lines(failed):
        print(line)


if __name__ == "__main__":
    run_script(main)
