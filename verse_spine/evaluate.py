"""Score vertebra masks: preprocessed scans with a trained model, or masks in files.

    python verse_spine/evaluate.py --weights runs/verse_spine/spine/weights/best.pt
    python verse_spine/evaluate.py --weights seg/best.pt --heatmap_weights hm/best.pt --region heatmap
    python verse_spine/evaluate.py --pred predictions/ --source data/verse --labels levels26

With --weights the scans of --part are predicted and scored on the grid of training: in the whole scan, in
the box that the heat map finds, or in the box of the truth (oracle: flattering, but what some papers report).
With --pred the files of verse_spine/predict.py are scored on the scans' own grids (--grid 1mm: as VerSe's own
script). Writes results.csv (a row a case and class), cases.csv, summary.csv and summary.md.
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import distributed
from common.config import add_prediction_flags, make_parser, parse_args, run_script
from common.hardware import choose_precision, start_device
from common.hdf5 import CaseFile
from common.metrics import binary_counts, case_metrics, dice_from_counts
from common.nifti import case_name, is_nifti, load_label, same_grid, voxel_mm3
from common.runs import run_dir_of
from common.splits import natural_key
from common.volumes import resample_labels, resampled_affine, resampled_shape
from verse_spine.cases import find_cases
from verse_spine.dataset import SmallScan, VerSe, spine_box
from verse_spine.heatmap import MARGIN_MM, box_recall
from verse_spine.labels import (
    MODES,
    VERTEBRAE,
    body_centres,
    centroids_to_mm,
    class_names,
    identification_rate,
    map_labels,
    read_centroids,
    unmap_labels,
)
from verse_spine.networks import TrainedModel, load_trained
from verse_spine.report import write_report
from verse_spine.segment import Region, clean_up, predict_heatmap, segment, spine_region

REGIONS = ("none", "heatmap", "oracle")
TOLERANCES_MM = (1.0, 2.0)


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--weights", help="best.pt of train_segmentation.py")
    parser.add_argument("--heatmap_weights", help="best.pt of train_heatmap.py, for --region heatmap")
    parser.add_argument("--data_path", help="folder from preprocess.py; default: that of the training")
    parser.add_argument("--part", choices=["train", "val", "test"], help="default: test if there is one")
    parser.add_argument("--region", choices=REGIONS, default="none", help="where to predict")
    parser.add_argument("--pred", help="folder of masks from predict.py, instead of --weights")
    parser.add_argument("--source", help="with --pred: VerSe folder of the true masks")
    parser.add_argument("--labels", choices=MODES, default="binary", help="with --pred: what the masks hold")
    parser.add_argument(
        "--grid", choices=["native", "1mm"], default="native", help="with --pred: grid of the scores"
    )
    parser.add_argument("--out", help="folder of the results; default: in the run's folder, or --pred")
    add_prediction_flags(parser)
    return parser


# ---- one case ----


def score_case(
    pred: np.ndarray,
    target: np.ndarray,
    spacing_mm: tuple,
    affine: np.ndarray,
    labels: str,
    true_centres: dict[int, tuple],
    *,
    surfaces: bool = True,
) -> tuple[list[dict], dict]:
    """Rows by class, and the case's own row, of one scan.

    Args:
        pred: class indices of `labels`, (z, y, x).
        target: VerSe's numbers on the same grid.
        affine: of that grid, as `Scan.affine`.
        true_centres: {VerSe label: (z, y, x) mm}, for the identification rate of levels26.
    """
    classes = map_labels(target, labels)
    names = dict(enumerate(class_names(labels)[1:], 1))
    rows = case_metrics(
        pred, classes, spacing_mm, names, TOLERANCES_MM, surfaces=surfaces, voxel_mm3=voxel_mm3(affine)
    )
    present = [r["dice"] for r in rows if r["status"] in ("ok", "missed")]
    tp, fp, fn, _ = binary_counts(pred > 0, classes > 0)
    summary = {
        "dice_any": dice_from_counts(tp, fp, fn),
        "dice_classes": float(np.mean(present)) if present else float("nan"),
    }
    if labels == "levels26":
        summary |= instance_scores(pred, classes)
        if surfaces:
            found = body_centres(unmap_labels(pred, labels), affine)
            # Some centroid files hold the sacrum too, which the masks do not.
            known = {label: zyx for label, zyx in true_centres.items() if label in VERTEBRAE}
            summary |= identification_rate(found, known)
    return rows, summary


def instance_scores(pred: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """dice_instance: mean over true vertebrae of the best Dice with any predicted one, whatever its name. An
    error by one level shows as a low dice_classes beside a high dice_instance.

    dice_inner: mean Dice by name of the vertebrae that the scan does not cut.
    """
    size = int(max(pred.max(), target.max())) + 1
    joint = np.zeros(size * size, np.int64)
    for true_plane, pred_plane in zip(target, pred, strict=True):  # bincount works in int64
        both = true_plane.astype(np.intp) * size + pred_plane
        joint += np.bincount(both.ravel(), minlength=size * size)
    joint = joint.reshape(size, size)
    totals_target, totals_pred = joint.sum(1), joint.sum(0)
    dice = 2 * joint / np.maximum(totals_target[:, None] + totals_pred[None], 1)
    true = np.flatnonzero(totals_target[1:]) + 1
    if len(true) == 0:
        return {"dice_instance": np.nan, "dice_inner": np.nan}
    boxes = ndimage.find_objects(target)
    inner = [
        k
        for k in true
        if all(s.start > 0 and s.stop < n for s, n in zip(boxes[k - 1], target.shape, strict=True))
    ]
    return {
        "dice_instance": float(dice[true, 1:].max(1).mean()),
        "dice_inner": float(np.mean([dice[k, k] for k in inner])) if inner else np.nan,
    }


# ---- preprocessed cases ----


def case_region(case: CaseFile, region: str, heatmap: TrainedModel | None, folder: Path) -> Region | None:
    """Where to predict in a preprocessed case; None for the whole scan."""
    if region == "none":
        return None
    if region == "oracle":
        box = spine_box(case, MARGIN_MM)
        return None if box is None else Region(box, "oracle")
    small = SmallScan(case, tuple(heatmap.config["patch_size"]), folder)
    return spine_region(predict_heatmap(heatmap, small.image), small.grid)


def evaluate_cases(
    model: TrainedModel,
    verse: VerSe,
    names: list[str],
    *,
    region: str = "none",
    heatmap: TrainedModel | None = None,
    surfaces: bool = True,
) -> tuple[list[dict], dict[str, str]]:
    """Predict and score preprocessed cases on their own grid, shared over the processes.

    Returns:
        (one dict a case in the order of `names`: case, patient, scores, "classes": rows by class;
        {failed case: reason}), the same in every process.
    """
    if region == "heatmap" and heatmap is None:
        raise ValueError("--region heatmap needs --heatmap_weights")
    rows: dict[str, dict] = {}
    failed: dict[str, str] = {}
    folder = verse.path / "small_grids"
    if region == "heatmap":
        folder.mkdir(exist_ok=True)
    bar = tqdm(distributed.my_share(names), "evaluating", unit="case", disable=None, leave=False)
    for name in bar:
        case = verse.cases[name]
        try:
            target = case.label[...]
            where = case_region(case, region, heatmap, folder)
            box = None if where is None else where.box
            pred = segment(model, case.image, case.spacing_mm, box=box)
            affine = np.asarray(case.attributes["affine"])
            pred, _ = clean_up(pred, case.spacing_mm, voxel_mm3(affine))
            centroids = np.asarray(case.attributes["centroids"]).reshape(-1, 4)
            centres = {int(n): tuple(zyx) for n, *zyx in centroids}
            classes, summary = score_case(
                pred,
                target,
                case.spacing_mm,
                affine,
                model.config["labels"],
                centres,
                surfaces=surfaces,
            )
            own = {"case": name, "patient": verse.subjects[name]}
            source = where.source if where else "whole scan" + ", heat map faint" * (region == "heatmap")
            recall = 1.0 if box is None else box_recall(target > 0, box)
            rows[name] = own | summary | {"region": source, "region_recall": recall}
            rows[name]["classes"] = [own | r for r in classes]
        except (ValueError, OSError) as error:  # one damaged case must not cost the others
            failed[name] = str(error)
    for other_rows, other_failed in distributed.gather((rows, failed)):
        rows |= other_rows
        failed |= other_failed
    return [rows[name] for name in names if name in rows], failed


def mean_dice(rows: list[dict]) -> float:
    """Mean over cases of the mean Dice over the classes that the truth has; a missed one counts 0."""
    values = [row["dice_classes"] for row in rows if not np.isnan(row["dice_classes"])]
    return float(np.mean(values)) if values else float("nan")


# ---- masks in files ----


def evaluate_files(pred: Path, source: Path, labels: str, grid: str) -> tuple[list[dict], dict[str, str]]:
    """Score the masks of a folder against those of a VerSe folder; returns as `evaluate_cases`.

    Raises:
        FileNotFoundError: no mask in `pred` belongs to a case of `source`.
    """
    if not pred.is_dir():
        raise FileNotFoundError(f"--pred {pred}: no such folder")
    cases = {c.name: c for c in find_cases(source) if c.mask is not None}
    files = {case_name(p).removesuffix("_mask").removesuffix("_ct"): p for p in pred.iterdir() if is_nifti(p)}
    names = sorted(cases.keys() & files.keys(), key=natural_key)
    if not names:
        raise FileNotFoundError(
            f"{pred}: none of its {len(files)} masks has the name of one of the {len(cases)} cases of "
            f"{source} (e.g. {next(iter(cases), 'sub-verse004')}_mask.nii.gz)"
        )
    rows, failed = [], {}
    for name in tqdm(names, "evaluating", unit="case", disable=None, leave=False):
        case = cases[name]
        try:
            check_labels_flag(files[name], labels)
            found, truth = load_label(files[name]), load_label(case.mask)
            if not same_grid(found, truth):
                raise ValueError(
                    f"{files[name]}: lies on another grid than {case.mask.name} (shape {found.array.shape}, "
                    f"truth {truth.array.shape}); score masks that predict.py wrote for this very scan"
                )
            centres = {}
            if case.centroids is not None:
                centres = centroids_to_mm(read_centroids(case.centroids), truth)
            elif labels == "levels26":
                centres = body_centres(truth.array, truth.affine)
            pred_labels = map_labels(found.array, labels) if labels == "levels26" else found.array
            target, spacing_mm, affine = truth.array, truth.spacing_mm, truth.affine
            if grid == "1mm":
                shape = resampled_shape(target.shape, spacing_mm, (1.0, 1.0, 1.0))
                affine = resampled_affine(affine, target.shape, shape)
                spacing_mm = tuple(np.multiply(spacing_mm, target.shape) / shape)
                pred_labels, target = resample_labels(pred_labels, shape), resample_labels(target, shape)
            classes, summary = score_case(pred_labels, target, spacing_mm, affine, labels, centres)
            own = {"case": name, "patient": case.subject}
            rows.append(own | summary | {"classes": [own | r for r in classes]})
        except (ValueError, OSError) as error:
            failed[name] = str(error)
    return rows, failed


def check_labels_flag(mask: Path, labels: str) -> None:
    """Refuse to score, say, a binary mask as levels: predict.py noted beside the mask what it holds."""
    note = mask.with_name(f"{case_name(mask).removesuffix('_mask')}.json")
    if note.is_file():
        held = json.loads(note.read_text(encoding="utf8")).get("labels", labels)
        if held != labels:
            raise ValueError(f"{mask}: holds {held} labels; score it with --labels {held}")


def missing_notes(source: Path, scored: list[str]) -> tuple[str, ...]:
    """Cases of the truth that nothing was predicted for: they are in no mean."""
    missing = [c.name for c in find_cases(source) if c.mask is not None and c.name not in scored]
    if not missing:
        return ()
    return (f"no prediction for {len(missing)} case(s), left out of all means: {', '.join(missing[:5])} ...",)


def part_notes(part: str, subjects: set[str], model: TrainedModel, verse: VerSe) -> tuple[str, ...]:
    """What makes the scores of a part flattering."""
    trained = {verse.subjects.get(name, name) for name in model.split["train"]}
    if part == "train" or subjects & trained:
        return ("the model was trained on some of these scans, so the scores say little",)
    return ("these scans also chose the epoch, which flatters a little",) if part == "val" else ()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    distributed.init()
    try:
        if (args.weights is None) == (args.pred is None):
            raise ValueError("give either --weights (predict and score) or --pred (score masks in files)")
        if args.pred:
            if not args.source:
                raise ValueError("--pred needs --source, the VerSe folder with the true masks")
            rows, failed = evaluate_files(Path(args.pred), Path(args.source), args.labels, args.grid)
            notes = missing_notes(Path(args.source), [row["case"] for row in rows] + list(failed))
            title = f"{len(rows)} masks of {args.pred}, {args.grid} grid"
            write_report(rows, Path(args.out or args.pred), title, failed, notes)
            return 1 if failed else 0
        device = start_device(args.device, distributed.local_rank())
        precision = choose_precision(args.amp, device)
        model = load_trained(args.weights, device, precision, "segmentation")
        heatmap = (
            load_trained(args.heatmap_weights, device, precision, "heatmap") if args.heatmap_weights else None
        )
        verse = VerSe(args.data_path or model.preprocessing["data_path"])
        same = verse.path.resolve() == Path(model.preprocessing["data_path"]).resolve()
        split = model.split if same else verse.split  # the run's own, which its --seed may have drawn
        part = args.part or ("test" if split["test"] else "val")
        names = [name for name in split[part] if name in verse.cases]
        if not names:
            raise ValueError(f"{verse.path}: no case in its part {part}; choose another --part")
        notes = part_notes(part, {verse.subjects[name] for name in names}, model, verse)
        rows, failed = evaluate_cases(model, verse, names, region=args.region, heatmap=heatmap)
        if distributed.is_main():
            out = Path(args.out or run_dir_of(args.weights) / f"evaluation_{part}_{args.region}")
            title = f"{len(rows)} {part} scans of {verse.path}, region: {args.region}, {precision.name}"
            write_report(rows, out, title, failed, notes)
        return 1 if failed else 0
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    run_script(main)
