"""Segment scans, or slices in .npy files, with a network that was trained on slice labels.

    python wsss_medical/predict.py --weights work_dir_lasc/checkpoints/best.pth --source scan.nii.gz
    python wsss_medical/predict.py --weights best.pth --source slices/ --out masks --output cam --overlay

Of a scan <name> it writes <name>_mask.nii.gz on the scan's own grid, of a slice <stem>_mask.png (0 or 255),
with --overlay also a picture, and results.csv of all. MR sequence and pixel size are those of the training:
the right channel of a 4-D file and the right file of a BraTS case are taken. Slices of a patient that lie in
one folder under the names that preprocess.py gives are segmented as a volume; a .npy file of another name is
segmented by itself, which gives another mask. For research only.
"""

import math
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed, prediction, prediction_flags
from common.checkpoints import TrainedModel
from common.components import smooth_mask
from common.config import Switch, fraction, make_parser, parse_args, run_script
from common.hardware import choose_precision, describe_device, start_device
from common.intensity import shown_range
from common.metrics import largest_component
from common.nifti import NIFTI_SUFFIXES, is_nifti, save_label
from common.nifti_checks import check_memory
from common.planes import save_planes
from common.plots import PRED_COLOR, costs_the_picture
from common.raw_layouts import endings_beside, find_sequences, name_of_case
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.slices import read_scan, robust_read_npy, to_scan_grid, write_png
from common.splits import natural_key
from wsss_medical.dataset import patient_of
from wsss_medical.maps import write_picture
from wsss_medical.model import load_trained
from wsss_medical.segment import GATE, OUTPUTS, SliceResult, add_slice_flags, threshold_of
from wsss_medical.volume import segment_patient

# Titles of the pictures. Headers may be wrong about how the patient lay: the Decathlon's hearts are sagittal.
PLANES = ("as sliced", "across the rows", "across the columns")


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    prediction_flags.add_weights_flag(parser, "dist_train.py", file="checkpoints/best.pth")
    prediction_flags.add_scan_flags(parser)
    parser.add_argument(
        "--output",
        choices=OUTPUTS,
        default="seg",
        help="what the mask is made of: seg, the segmentation head; cam, the class activation map; affinity, "
        "that map propagated along the affinities",
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        help="probability, 0 to 1, above which a pixel belongs to the structure; default: what was best on "
        "the validation slices of the training, else 0.5",
    )
    gate = "probability of the whole slice, 0 to 1, below which its mask stays empty"
    parser.add_argument("--gate", type=fraction, default=GATE, help=gate)
    smooth = "let each voxel of a scan become what most of the 27 around it are, also in the next slices"
    parser.add_argument("--smooth_slices", action=Switch, default=False, help=smooth)
    largest = "keep only the largest connected piece in each scan; right if there is one structure"
    parser.add_argument("--largest_only", action=Switch, default=False, help=largest)
    pictures = "also write pictures: three planes of a scan, the map over a slice"
    parser.add_argument("--overlay", action=Switch, default=False, help=pictures)
    add_slice_flags(parser, batch_size=4)
    add_prediction_flags(parser)
    return parser


def segment(
    model: TrainedModel, slices: Sequence[np.ndarray], path: Path, args: Namespace
) -> list[SliceResult]:
    """Results of the slices of a volume; `path` is for the message if they would not fit into memory."""
    is_seg = args.output == "seg"
    num_maps = 2 if is_seg else 5  # of SliceResult, and once more those that the mask is made of
    check_memory(
        f"{path}: predicting it",
        4 * num_maps * sum(math.prod(image.shape[:2]) for image in slices),  # they are float32
        f"it needs {'' if is_seg else '--output seg, or '}a scan cut to the part that matters",
    )
    options = {"scales": args.scales, "batch_size": args.batch_size, "gate": args.gate}
    return segment_patient(model, slices, cams=not is_seg, **options)


def volumes_in(folder: Path) -> dict[Path, tuple[Path, ...]]:
    """{slice: all slices of its patient, in their order} of the files <patient>_<number>_<0 or 1>.npy, as
    preprocess.py calls them; other names do not tell."""
    patients: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
        if re.fullmatch(r".+_\d+_[01]\.npy", path.name, re.IGNORECASE):
            patients.setdefault(patient_of(path.stem), []).append(path)
    return {path: tuple(paths) for paths in patients.values() for path in paths}


def slice_segmenter(model: TrainedModel, args: Namespace) -> Callable[[Path], tuple[np.ndarray, SliceResult]]:
    """A function: slice in a .npy file -> the slice, and its result as part of its volume.

    Slices of a patient should be asked for one after the other: they are all computed with the first one.
    """
    volumes = lru_cache(maxsize=1)(volumes_in)

    @lru_cache(maxsize=1)
    def segment_files(paths: tuple[Path, ...]) -> dict[Path, tuple[np.ndarray, SliceResult]]:
        slices = [robust_read_npy(path) for path in paths]
        results = segment(model, slices, paths[0], args)
        return dict(zip(paths, zip(slices, results, strict=True), strict=True))

    def segment_file(path: Path) -> tuple[np.ndarray, SliceResult]:
        uses_volumes = model.config.get("pixel_labels") == "escape"
        paths = volumes(path.parent).get(path, (path,)) if uses_volumes else (path,)
        return segment_files(paths)[path]

    return segment_file


def predict_one(
    model: TrainedModel, path: Path, name: str, out: Path, args: Namespace, segment_file: Callable
) -> dict:
    """Write the mask, and the picture, of a scan or slice; returns its row of results.csv.

    Args:
        segment_file: of `slice_segmenter`.
    """
    started, volume_ml = time.perf_counter(), float("nan")
    if is_nifti(path):
        images = find_sequences(path, model.preprocessing["channels"] or ["image"])
        slices, scan = read_scan(images, model.preprocessing["pixel_mm"])
        results = segment(model, slices, path, args)
    else:
        image, result = segment_file(path)
        results = [result]
    probs = np.stack([getattr(result, args.output) for result in results])
    scores = [result.score for result in results]
    if is_nifti(path):
        mask = to_scan_grid(probs, scan) > args.threshold
        mask = smooth_mask(mask) if args.smooth_slices else mask
        mask = (largest_component(mask) if args.largest_only else mask).astype(np.uint8)
        save_label(out / f"{name}_mask.nii.gz", mask, scan)
        volume_ml = float(mask.sum(dtype=int)) * scan.voxel_mm3 / 1000
        if args.overlay:
            with costs_the_picture(f"{name}_overlay.png"):
                save_planes(
                    out / f"{name}_overlay.png",
                    scan.array,
                    scan.spacing_mm,
                    mask,
                    palette=np.array([PRED_COLOR]),
                    value_range=shown_range(scan.array),
                    title=name,
                    names=PLANES,
                )
    else:
        write_png(out / f"{name}_mask.png", (probs[0] > args.threshold) * np.uint8(255))
        if args.overlay:
            with costs_the_picture(f"the picture of {name}"):
                write_picture(out, name, image, scores[0], probs[0])
    return {
        "scan": str(path),
        "slices": len(results),
        "slices_with": sum(score >= args.gate for score in scores),
        "lowest_score": min(scores),
        "highest_score": max(scores),
        "highest_probability": float(probs.max()),
        "volume_ml": volume_ml,
        "seconds": time.perf_counter() - started,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        device = start_device(args.device, distributed.local_rank())
        model = load_trained(args.weights, device, choose_precision(args.amp, device))
        if args.threshold is None:
            args.threshold = threshold_of(model, args.output)
        out = Path(args.out) if args.out else run_dir_of(args.weights) / "predictions"
        sequence = (model.preprocessing["channels"] or ["image"])[0]
        name_of = partial(name_of_case, sequence=sequence)
        segment_file = slice_segmenter(model, args)
        failed = prediction.predict_scans(
            lambda path, folder: predict_one(model, path, name_of(path), folder, args, segment_file),
            args.source,
            out,
            own_names=("_mask", *endings_beside(sequence)),
            recursive=args.recursive,
            table="results.csv",
            machine=f"{describe_device(device)}, {model.precision.name}, threshold {args.threshold:g}",
            found=lambda row: (
                f"{row['slices_with']} of {row['slices']} slices, {row['volume_ml']:.1f} mL, "
                f"highest probability {row['highest_probability']:.2f}"
            ).replace(" nan mL,", ""),  # of a slice nobody knows it
            suffixes=(*NIFTI_SUFFIXES, ".npy"),
            name_of=name_of,
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
