"""Score vertebra masks: preprocessed scans with a trained model, or masks in files.

    python verse_spine/evaluate.py --weights runs/verse_spine/spine/weights/best.pt
    python verse_spine/evaluate.py --weights seg/best.pt --heatmap_weights hm/best.pt --region heatmap
    python verse_spine/evaluate.py --pred predictions/ --source data/verse --labels levels26

With --weights the scans of --part are predicted and scored on the grid of training: in the whole scan, in
the box that the heat map finds, or in the box of the truth (oracle: flattering, but what some papers report).
With --pred the files of verse_spine/predict.py are scored on the scans' own grids (--grid 1mm: as VerSe's own
script). Writes results.csv (one row for each case and class), cases.csv, summary.csv and summary.md.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed
from common.class_metrics import case_row
from common.config import make_parser, parse_args, run_script
from common.hardware import choose_precision, start_device
from common.hdf5 import CaseFile
from common.hdf5_checks import AGAIN
from common.mask_files import label_files, matching_files
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.scan_files import voxel_mm3
from verse_spine.cases import Case, find_cases
from verse_spine.dataset import SmallScan, VerSe, spine_box
from verse_spine.heatmap import MARGIN_MM, box_recall
from verse_spine.labels import MODES
from verse_spine.networks import TrainedModel, load_trained
from verse_spine.report import CASES, HEAT_MAP_FAINT, clear_report, write_report
from verse_spine.scores import score_case, score_files
from verse_spine.segment import Region, clean_up, predict_heatmap, segment, spine_region

REGIONS = ("none", "heatmap", "oracle")


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--weights",
        help="trained model of the second stage: weights/best.pt in the folder of a run of "
        "train_segmentation.py, which predicts scans that are then scored; give this or --pred",
    )
    parser.add_argument(
        "--heatmap_weights",
        help="trained model of the first stage: weights/best.pt in the folder of a run of "
        "train_heatmap.py; needed for --region heatmap",
    )
    parser.add_argument(
        "--data_path", help="folder that preprocess.py wrote; default: the one that the model was trained on"
    )
    parser.add_argument(
        "--part",
        choices=["train", "val", "test"],
        help="part of the split to score; default: test, or val if the split has no test part",
    )
    parser.add_argument(
        "--region",
        choices=REGIONS,
        default="none",
        help="where --weights predicts: none = in the whole scan, heatmap = in the box that the heat map "
        "finds, as predict.py does, oracle = in the box of the true vertebrae",
    )
    parser.add_argument(
        "--pred",
        help="folder with masks of predict.py, which are scored against those of --source; give this or "
        "--weights",
    )
    parser.add_argument(
        "--source", help="folder with the scans and masks in VerSe's layout; needed with --pred"
    )
    parser.add_argument(
        "--labels",
        choices=MODES,
        default="binary",
        help="what the labels tell apart: binary = vertebra or not, region3 = cervical, thoracic and "
        "lumbar vertebrae, levels26 = every vertebra by its name; needed with --pred, and must be "
        "that of the training",
    )
    parser.add_argument(
        "--grid",
        choices=["native", "1mm"],
        default="native",
        help="grid on which the masks of --pred are scored: the scan's own, or 1 mm as in VerSe's own script",
    )
    parser.add_argument(
        "--out",
        help="folder that the tables are written to; default: evaluation_<part>_<region>/ in the run's "
        "folder, or the folder of --pred",
    )
    add_prediction_flags(parser)
    return parser


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
    table: Path | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Predict and score preprocessed cases on their own grid, shared over the processes.

    Args:
        region: where to predict, one of REGIONS; "heatmap" needs the network `heatmap`.
        surfaces: as for `score_case`.
        table: CSV file that gets each row as soon as its case is scored; reports that an earlier evaluation
            left in its folder are removed first.

    Returns:
        (one row for each case in the order of `names`: case, patient, scores, and "classes", its rows by
        class; {failed case: reason}), the same in every process.
    """
    if region == "heatmap" and heatmap is None:
        raise ValueError("--region heatmap needs --heatmap_weights")
    folder = verse.path / "small_grids"
    if region == "heatmap":
        folder.mkdir(exist_ok=True)

    def score(name: str) -> dict:
        case = verse.cases[name]
        target = case.label[...]
        where = case_region(case, region, heatmap, folder)
        box = None if where is None else where.box
        pred = segment(model, case.image, case.spacing_mm, box=box)
        affine = np.asarray(case.attributes["affine"])
        if affine.shape != (4, 4):
            raise ValueError(f"{case.path}: its affine is no matrix of 4 x 4; {AGAIN}")
        pred, _ = clean_up(pred, case.spacing_mm, voxel_mm3(affine))
        centroids = np.asarray(case.attributes["centroids"]).reshape(-1, 4)
        classes, summary = score_case(
            pred,
            target,
            case.spacing_mm,
            affine,
            model.config["labels"],
            {int(label): tuple(zyx) for label, *zyx in centroids},
            surfaces=surfaces,
        )
        if where is not None:
            summary["region"] = where.source
        else:
            summary["region"] = HEAT_MAP_FAINT if region == "heatmap" else "whole scan"
        if region != "none":
            summary["region_recall"] = 1.0 if box is None else box_recall(target > 0, box)
        return case_row(name, verse.subjects[name], classes, summary)

    if table:
        clear_report(table.parent)
    return batch.each(score, names, unit="case", table=table)


def mean_dice(rows: list[dict]) -> float:
    """Mean over the cases of the mean Dice over the classes of their truth; a missed class counts 0."""
    values = [row["dice_classes"] for row in rows if not np.isnan(row["dice_classes"])]
    return float(np.mean(values)) if values else float("nan")


# ---- masks in files ----


def true_masks(source: Path) -> list[Case]:
    """The cases of a VerSe folder that have a mask; of any other folder its masks, without scans.

    Raises:
        FileNotFoundError, ValueError: as `find_cases` and `label_files`.
    """
    try:
        return [case for case in find_cases(source) if case.mask is not None]
    except FileNotFoundError:
        if not Path(source).is_dir():
            raise
    masks = label_files(source)
    return [Case(name.split("_")[0], name, path, path) for name, path in masks.items()]


def evaluate_files(
    pred: Path, source: Path, labels: str, grid: str, *, table: Path | None = None
) -> tuple[list[dict], dict[str, str]]:
    """Score the masks of a folder against those of a VerSe folder.

    Args:
        labels: what the predicted masks hold, one of MODES.
        grid: "native", that of the scan, or "1mm".
        table: CSV file that gets each row as soon as its case is scored; reports that an earlier evaluation
            left in its folder are removed first.

    Returns:
        as `evaluate_cases`.

    Raises:
        FileNotFoundError, ValueError: as `matching_files`.
    """
    cases = {c.name: c for c in true_masks(source)}
    files = matching_files(pred, cases, source)
    names = [name for name in files if name in cases]

    def score(name: str) -> dict:
        classes, summary = score_files(files[name], cases[name], labels, grid)
        return case_row(name, cases[name].subject, classes, summary)

    if table:
        clear_report(table.parent)
    return batch.each(score, names, unit="case", table=table)


def missing_notes(source: Path, scored: list[str]) -> tuple[str, ...]:
    """Cases of the truth that nothing was predicted for: they are in no mean."""
    missing = [c.name for c in true_masks(source) if c.name not in scored]
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
    with distributed.session():
        if (args.weights is None) == (args.pred is None):
            raise ValueError("give either --weights (predict and score) or --pred (score masks in files)")
        if args.pred and not args.source:
            raise ValueError("--pred needs --source, the VerSe folder with the true masks")
        failed = score_masks(args) if args.pred else score_weights(args)
        return batch.exit_code(failed)


def score_masks(args: Namespace) -> dict[str, str]:
    """Evaluation of the masks in a folder; returns {failed case: reason}."""
    pred, source, out = Path(args.pred), Path(args.source), Path(args.out or args.pred)
    rows, failed = evaluate_files(pred, source, args.labels, args.grid, table=out / CASES)
    if distributed.is_main():
        notes = missing_notes(source, [row["case"] for row in rows] + list(failed))
        title = f"{len(rows)} masks of {pred}, {args.grid} grid"
        write_report(rows, out, title, failed, notes)
    return failed


def score_weights(args: Namespace) -> dict[str, str]:
    """Evaluation of a trained model on preprocessed scans; returns {failed case: reason}."""
    device = start_device(args.device, distributed.local_rank())
    precision = choose_precision(args.amp, device)
    model = load_trained(args.weights, device, precision, "segmentation")
    heatmap = None
    if args.heatmap_weights:
        heatmap = load_trained(args.heatmap_weights, device, precision, "heatmap")
    verse = VerSe(args.data_path or model.preprocessing["data_path"])
    same = verse.path.resolve() == Path(model.preprocessing["data_path"]).resolve()
    split = model.split if same else verse.split  # the run's own, which its --seed may have drawn
    part = args.part or ("test" if split["test"] else "val")
    names = [name for name in split[part] if name in verse.cases]
    if not names:
        raise ValueError(f"{verse.path}: no case in its part {part}; choose another --part")
    out = Path(args.out or run_dir_of(args.weights) / f"evaluation_{part}_{args.region}")
    rows, failed = evaluate_cases(model, verse, names, region=args.region, heatmap=heatmap, table=out / CASES)
    if distributed.is_main():
        notes = part_notes(part, {verse.subjects[name] for name in names}, model, verse)
        title = f"{len(rows)} {part} scans of {verse.path}, region: {args.region}, {precision.name}"
        write_report(rows, out, title, failed, notes)
    return failed


if __name__ == "__main__":
    run_script(main)
