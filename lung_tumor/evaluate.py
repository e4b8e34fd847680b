"""Score a trained model on whole volumes, slice by slice as in prediction, on each scan's own grid.

    python lung_tumor/evaluate.py --weights runs/demo/weights/best.pt

Takes the data set and the held-out part from the checkpoint. Volumes are read from their scans again, so that
every slice counts and the mask is compared at the scan's own resolution; where a scan is gone, its converted
slices are scored. Writes per_volume.csv, summary.csv, sweep.csv and evaluation.png to --out.
"""

import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed
from common.config import fraction, make_parser, parse_args, run_script
from common.hardware import autocast, choose_precision, start_device
from common.hu import why_not_hu
from common.messages import warn
from common.metrics import binary_counts, dice_from_counts, iou_from_counts, lesion_counts
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.slices import to_display
from common.sweep import counts_at
from lung_tumor.cases import case_from_entry, find_cases, load_case
from lung_tumor.dataset import SliceDataset, load_splits
from lung_tumor.model import TrainedModel, load_trained, predict_slices, window_hu
from lung_tumor.report import THRESHOLDS, clear_report, write_report
from lung_tumor.slice_files import SliceFile, list_slices, read_volumes
from lung_tumor.slices import read_image, read_mask, volume_to_slices


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--weights", required=True, help="trained model: weights/best.pt in the folder of a run of train.py"
    )
    parser.add_argument(
        "--data_path", help="folder that preprocess.py wrote; default: the one that the model was trained on"
    )
    parser.add_argument(
        "--part",
        choices=["test", "val", "train"],
        help="part of the split to score; default: test, or val if the split has no test part",
    )
    parser.add_argument(
        "--volumes", nargs="+", help="names of the volumes to score, instead of a part of the split"
    )
    parser.add_argument(
        "--source",
        help="folder with the scans and masks, as for preprocess.py; needed only if they were moved after "
        "their conversion",
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=0.5,
        help="probability, 0 to 1, above which a pixel counts as tumour; a lower one finds more tumour and "
        "more false alarms; choose it on validation volumes",
    )
    parser.add_argument(
        "--out",
        help="folder that the tables and the picture are written to; default: evaluation/ in the run's "
        "folder, or evaluation_<part>/ for another part than the default, evaluation_named/ for "
        "--volumes",
    )
    add_prediction_flags(parser)
    return parser


@torch.inference_mode()
def validate(model: TrainedModel, dataset: SliceDataset, loss_function: Callable) -> dict[str, float]:
    """The scores of an epoch, from one confusion matrix over all slices of `dataset` at training size.

    The slices are shared over the processes and none is counted twice. val_loss is the mean over the slices,
    whatever the size of the batches; a pixel counts as tumour where that logit is the larger one.
    val_false_alarms is the share of slices without tumour in which some is predicted, val_pred_to_true the
    ratio of predicted to true tumour pixels.
    """
    model.network.eval()
    sums = torch.zeros(8, dtype=torch.float32 if model.device.type == "mps" else torch.float64)
    mine = distributed.my_share(list(range(len(dataset))))
    batch_size = model.config["batch_size"]
    for start in range(0, len(mine), batch_size):
        pairs = [dataset[i] for i in mine[start : start + batch_size]]
        image, target = (torch.stack(part) for part in zip(*pairs, strict=True))
        with autocast(model.device, model.precision):
            logits = model.network(image.to(model.device, memory_format=torch.channels_last))
        logits = logits.float().cpu()
        tumour, pred = target.bool(), logits[:, 1] > logits[:, 0]
        loss = loss_function(logits, target) * len(pairs)
        tp, fp, fn = (pred & tumour).sum(), (pred & ~tumour).sum(), (~pred & tumour).sum()
        empty = ~tumour.flatten(1).any(1)
        alarms = (empty & pred.flatten(1).any(1)).sum()
        sums += torch.tensor(
            [loss, len(pairs), target.numel(), tp, fp, fn, empty.sum(), alarms], dtype=sums.dtype
        )
    loss, slices, pixels, tp, fp, fn, empty, alarms = distributed.all_sum(sums.to(model.device)).tolist()
    return {
        "val_loss": loss / slices,
        "val_dice": dice_from_counts(tp, fp, fn),
        "val_iou": iou_from_counts(tp, fp, fn),
        "val_pixel_accuracy": 1 - (fp + fn) / pixels,
        "val_false_alarms": alarms / empty if empty else float("nan"),
        "val_pred_to_true": (tp + fp) / (tp + fn),
    }


@dataclass
class Volume:
    """Slices (n, row, column) of one volume as displayed, uint8, and their masks 0/1.

    Attributes:
        for_training: positions of the slices that training would use (`kept` in volumes.json).
        complete: no slice of the scan is missing.
        pixel_size_mm: of the slices, (row, column); None if unknown.
    """

    name: str
    slices: np.ndarray | list[np.ndarray]
    masks: np.ndarray | list[np.ndarray]
    for_training: list[int]
    voxel_mm3: float
    complete: bool
    pixel_size_mm: tuple[float, float] | None = None


def load_volume(name: str, files: list[SliceFile], entry: dict, model: TrainedModel, cases: dict) -> Volume:
    """From the scan if it is there, else from its converted slices.

    Args:
        entry: of volumes.json; {} for a plain folder of images.
        cases: {name: case} of a --source folder; looked at first.

    Raises:
        ValueError: files that do not fit or cannot be read, or slices of another window than the model's.
    """
    case = cases.get(name) or (case_from_entry(name, entry) if entry else None)
    if entry and case is not None:
        scan, mask = load_case(case)
        if suspicion := why_not_hu(scan.array):
            warn(f"{name}: {suspicion}")
        slices = volume_to_slices(scan.array, window_hu(model))
        return Volume(
            name,
            slices,
            to_display(mask),
            for_training=entry["kept"],
            voxel_mm3=scan.voxel_mm3,
            complete=True,
            pixel_size_mm=scan.spacing_mm[1:],
        )
    shown_hu = entry.get("settings", {}).get("window_hu")
    if shown_hu and list(shown_hu) != list(window_hu(model)):
        raise ValueError(
            f"volume {name}: its slices show {shown_hu} HU, but the model was trained on {window_hu(model)}; "
            "name the folder of the scans with --source"
        )
    chosen = entry.get("kept", [f.number for f in files])
    for_training = [i for i, f in enumerate(files) if f.number in chosen]
    complete = bool(entry) and len(files) == entry["num_slices"]
    images, masks = [read_image(f.image) for f in files], [read_mask(f.label)[0] for f in files]
    if len({array.shape for array in images + masks}) != 1:
        raise ValueError(f"volume {name}: its slices and masks differ in size; convert it again")
    voxel_mm3, pixel_size_mm = float("nan"), None
    if entry:
        # The slices cover the scan's field of view with pixels of another size, or of the same.
        sides = zip(entry["shape_zyx"][1:], entry["spacing_mm"][1:], images[0].shape, strict=True)
        pixel_size_mm = tuple(num * mm / new_num for num, mm, new_num in sides)
        voxel_mm3 = entry["voxel_mm3"] * math.prod(entry["shape_zyx"][1:]) / images[0].size
    return Volume(name, images, masks, for_training, voxel_mm3, complete, pixel_size_mm)


def score_volume(model: TrainedModel, volume: Volume, threshold: float) -> dict:
    """All counts and scores of one volume; see the README for their definitions."""
    pred = np.zeros((len(volume.slices), *volume.slices[0].shape), bool)
    target = np.stack(volume.masks).astype(bool)
    sweep = np.zeros((3, len(THRESHOLDS)), np.int64)  # tp, fp, fn
    probs = predict_slices(model, volume.slices, model.config["batch_size"], volume.pixel_size_mm)
    for z, prob in enumerate(probs):
        pred[z] = prob > threshold
        sweep += counts_at(THRESHOLDS, prob, target[z])
    tp, fp, fn, _ = binary_counts(pred, target)
    kept_tp, kept_fp, kept_fn, kept_tn = binary_counts(pred[volume.for_training], target[volume.for_training])
    has_tumour = target.any(axis=(1, 2))
    per_slice = [dice_from_counts(*binary_counts(pred[z], target[z])[:3]) for z in np.flatnonzero(has_tumour)]
    false_alarms = int(pred[~has_tumour].any(axis=(1, 2)).sum())
    return {
        "volume": volume.name,
        "slices": len(pred),
        "all_slices": volume.complete,
        "dice": dice_from_counts(tp, fp, fn),
        "iou": iou_from_counts(tp, fp, fn),
        "slice_dice": float(np.mean(per_slice)) if per_slice else float("nan"),
        "empty_slices": int((~has_tumour).sum()),
        "empty_with_false_positive": false_alarms,
        **lesion_counts(pred, target),
        "target_mm3": float(target.sum() * volume.voxel_mm3),
        "pred_mm3": float(pred.sum() * volume.voxel_mm3),
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "kept_tp": kept_tp,
        "kept_fp": kept_fp,
        "kept_fn": kept_fn,
        "kept_tn": kept_tn,
        "sweep": sweep.T.tolist(),
    }


def evaluate_volumes(
    model: TrainedModel,
    data_path: str | Path,
    volumes: list[str],
    *,
    threshold: float = 0.5,
    source: str | Path | None = None,
    table: Path | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Score whole volumes, shared over the processes.

    Args:
        source: folder of the scans, if they were moved since the conversion.
        table: CSV file that gets each row as soon as its volume is scored; reports that an earlier evaluation
            left in its folder are removed first.

    Returns:
        (one row for each volume in the order of `volumes`, {failed volume: reason}), the same in every
        process.

    Raises:
        ValueError: a volume that the data set does not have.
    """
    files: dict[str, list[SliceFile]] = {}
    for f in list_slices(data_path):
        files.setdefault(f.volume, []).append(f)
    missing = [v for v in volumes if v not in files]
    if missing or not volumes:
        raise ValueError(f"{data_path}: no slices of volume {', '.join(missing) or '(none asked for)'}")
    entries = read_volumes(data_path)
    patients = load_splits(data_path, list(sum(files.values(), [])), seed=42)[1]
    cases = {c.case_id: c for c in find_cases(source)} if source else {}

    def score(name: str) -> dict:
        volume = load_volume(name, files[name], entries.get(name, {}), model, cases)
        return {"patient": patients.get(name, name), **score_volume(model, volume, threshold)}

    if table:
        clear_report(table.parent)
    return batch.each(score, volumes, unit="volume", table=table)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        device = start_device(args.device, distributed.local_rank())
        model = load_trained(args.weights, device, choose_precision(args.amp, device))
        data_path = Path(args.data_path or model.preprocessing["data_path"])
        own_data = data_path.resolve() == Path(model.preprocessing["data_path"]).resolve()
        split = model.split if own_data else load_splits(data_path, list_slices(data_path), 42)[0]
        usual = "test" if split["test"] else "val"
        part = args.part or usual
        volumes = args.volumes or split[part]
        seen = sorted(set(volumes) & set(model.split["train"])) if own_data and part != "train" else []
        name = "named" if args.volumes else part
        folder = "evaluation" if name == usual else f"evaluation_{name}"
        out = Path(args.out) if args.out else run_dir_of(args.weights) / folder
        rows, failed = evaluate_volumes(
            model,
            data_path,
            volumes,
            threshold=args.threshold,
            source=args.source,
            table=out / "per_volume.csv",
        )
        if distributed.is_main():
            title = f"{len(rows)} {name} volumes of {data_path}, threshold {args.threshold:g}, "
            write_report(rows, out, title + model.precision.name, failed)
            if seen:
                warn(f"the model was trained on {', '.join(seen)}; these scores say little")
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
