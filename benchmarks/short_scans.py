"""Scans shorter than the network's patch: what windows see beyond the border, and what that costs in Dice.

    python benchmarks/short_scans.py --weights runs/verse_spine/demo/weights/best.pt

Every validation and test scan of the model's data set is cut into pieces of some rows along an axis. Each
piece is predicted three times: surrounded by air up to the size of the patch (as it was done before), with
its edge repeated (as it is done), and as a region of the uncut scan, where windows see the tissue around it.
Dice is that of all pieces of a scan together, without clean-up. Writes short_scans.json and .md to --out.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from common.config import make_parser, parse_args, positive_int, run_script
from common.hardware import choose_precision, start_device
from common.metrics import binary_counts, dice_from_counts
from verse_spine.dataset import VerSe
from verse_spine.heatmap import HU_RANGE
from verse_spine.networks import TrainedModel, load_trained
from verse_spine.segment import segment

AXES = ("z", "y", "x")
WAYS = ("air", "edge repeated", "region of the whole scan")


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--weights",
        required=True,
        help="trained model of the second stage: weights/best.pt in the folder of a run of "
        "train_segmentation.py",
    )
    parser.add_argument(
        "--data_path", help="folder that preprocess.py wrote; default: the one that the model was trained on"
    )
    parser.add_argument(
        "--rows",
        type=positive_int,
        nargs="+",
        default=[60, 50, 40, 24, 15],
        help="lengths of the pieces in voxels; along each axis those that are shorter than the patch are "
        "tried",
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def pieces(shape: tuple, axis: int, rows: int) -> list[tuple[list[int], list[int]]]:
    """Boxes (start, stop) of `rows` along the axis, one after the other; the rest of the scan is left out."""
    boxes = []
    for first in range(0, shape[axis] - rows + 1, rows):
        start, stop = [0, 0, 0], list(shape)
        start[axis], stop[axis] = first, first + rows
        boxes.append((start, stop))
    return boxes


def in_air(image: np.ndarray, patch: tuple) -> tuple[np.ndarray, tuple[slice, ...]]:
    """The image in the middle of air, at least as large as the patch; and where in it the image lies."""
    missing = [max(p - n, 0) for p, n in zip(patch, image.shape, strict=True)]
    around = [(m // 2, m - m // 2) for m in missing]
    inner = tuple(slice(a, a + n) for (a, _), n in zip(around, image.shape, strict=True))
    return np.pad(image, around, constant_values=HU_RANGE[0]), inner


def predict(model: TrainedModel, way: str, image: np.ndarray, box: tuple, spacing_mm: tuple) -> np.ndarray:
    """Labels of the box, of its shape."""
    inside = tuple(slice(a, b) for a, b in zip(*box, strict=True))
    if way == "region of the whole scan":
        return segment(model, image, spacing_mm, box=box)[inside]
    if way == "edge repeated":
        return segment(model, image[inside], spacing_mm)
    surrounded, inner = in_air(image[inside], tuple(model.config["patch_size"]))
    return segment(model, surrounded, spacing_mm)[inner]


def dice_of_pieces(model: TrainedModel, way: str, image, target, boxes: list, spacing_mm: tuple) -> float:
    """Dice of vertebra against background over all pieces of a scan."""
    total = np.zeros(4, np.int64)
    for box in boxes:
        truth = target[tuple(slice(a, b) for a, b in zip(*box, strict=True))]
        total += binary_counts(predict(model, way, image, box, spacing_mm) > 0, truth > 0)
    return dice_from_counts(*total[:3].tolist())


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    device = start_device("cpu")
    model = load_trained(args.weights, device, choose_precision("off", device), "segmentation")
    verse = VerSe(args.data_path or model.preprocessing["data_path"])
    names = [*verse.split["val"], *verse.split["test"]]
    cuts = [("whole", 0)]
    for axis, patch in zip(AXES, model.config["patch_size"], strict=True):
        cuts += [(axis, rows) for rows in args.rows if rows < patch]
    dice: dict[str, dict[str, list[float]]] = {}
    for axis, rows in tqdm(cuts, "lengths", disable=None):
        values: dict[str, list[float]] = {way: [] for way in WAYS}
        for name in names:
            case = verse.cases[name]
            image, target = case.image[...], case.label[...]
            boxes = [([0, 0, 0], list(case.shape))]
            if axis != "whole":
                boxes = pieces(case.shape, AXES.index(axis), rows)
            for way in WAYS if boxes else ():
                values[way].append(dice_of_pieces(model, way, image, target, boxes, case.spacing_mm))
        dice["whole" if axis == "whole" else f"{rows} along {axis}"] = values
    table = []
    for cut, values in dice.items():
        row = {"voxels": cut, "scans": len(values[WAYS[0]])}
        table.append(row | {way: f"{np.mean(v):.3f}" if v else "" for way, v in values.items()})
    patch = " x ".join(map(str, model.config["patch_size"]))
    shapes = ", ".join(sorted({" x ".join(map(str, verse.cases[name].shape)) for name in names}))
    notes = f"""Mean Dice over scans. Patch {patch} (z y x), float32, overlap 0.5. Scans of {shapes} voxels:
where they are narrower than the patch, all three ways fill that axis too."""
    content = {"patch": model.config["patch_size"], "cases": names, "dice": dice}
    write_results(args.out, "short_scans", argv, content, table, notes)
    return content


if __name__ == "__main__":
    run_script(main)
