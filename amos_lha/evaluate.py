"""Score organ masks against true ones: overlap, surfaces and volumes by organ, misses and false alarms.

    python amos_lha/evaluate.py --pred predictions --target AMOS/labelsVa --out evaluation
    python amos_lha/evaluate.py --pred a --target labelsVa --out a_scores --images imagesVa --compare b

Files belong together by the name of the case, with or without an ending such as _mask. Every file of --target
needs a prediction. Writes results.csv (one row for each case and organ), cases.csv, summary.csv (by organ),
groups.csv (small, medium, large, all), summary.md and worst_and_median.png; with --compare also
comparison.csv, in which B is the second folder.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import labelled_organs
from amos_lha.dataset import Amos, case_scaling
from amos_lha.organs import GROUPS, ORGANS, STRUCTURES, WINDOW_HU
from amos_lha.segment import segment
from common import batch, distributed
from common.checkpoints import TrainedModel
from common.class_metrics import case_row, case_summary, mean_of_classes, score_structures
from common.config import make_parser, parse_args, run_script
from common.decathlon import read_dataset_json
from common.evaluation import add_evaluation_flags, evaluate_folder
from common.mask_files import label_files


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_evaluation_flags(parser, ORGANS)
    return parser


def evaluate_cases(
    model: TrainedModel,
    data: Amos,
    names: list[str],
    *,
    surfaces: bool = True,
    table: Path | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Predict and score preprocessed cases on their own grid, shared over the processes.

    Args:
        surfaces: also the distances between surfaces, which take longer.
        table: CSV file that gets a row for each case as soon as it is scored.

    Returns:
        (rows of `score_structures` with "case" and "patient" in front, in the order of `names`; {failed case:
        reason}), the same in every process.
    """

    def evaluate(name: str) -> dict:
        case = data.cases[name]
        notes = case.attributes
        scaling = case_scaling(case, model.preprocessing)
        pred = segment(model, case.image, case.spacing_mm, scaling, notes["modality"])
        labelled = [int(organ) for organ in notes["labelled"]]
        scores = score_structures(
            pred, case.label[...], case.spacing_mm, STRUCTURES, labelled, surfaces=surfaces
        )
        return case_row(name, data.patients[name], scores, case_summary(scores))

    rows, failed = batch.each(evaluate, names, unit="case", table=table)
    return [row for of_case in rows for row in of_case["classes"]], failed


def mean_dice(rows: list[dict]) -> float:
    """Mean over the organs of the mean over the cases that have the organ or a false alarm of it."""
    return mean_of_classes(rows, "dice")["mean"]


def group_dice(rows: list[dict]) -> dict[str, float]:
    """{"small", "medium", "large": `mean_dice` of the organs of the group}; NaN for a group without any."""
    return {group: mean_dice([row for row in rows if row["group"] == group]) for group in GROUPS}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        folder = Path(args.target).resolve().parent
        notes, path = read_dataset_json(folder), folder / "dataset.json"
        labelled = {
            name: labelled_organs(name, notes, args.labelled, path) for name in label_files(args.target)
        }
        failed = evaluate_folder(
            args.pred,
            args.target,
            Path(args.out),
            STRUCTURES,
            labelled,
            images=args.images,
            other=args.compare,
            patient_pattern=args.patient_pattern,
            num_pictures=args.num_pictures,
            window_hu=WINDOW_HU,
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
