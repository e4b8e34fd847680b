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

from amos_lha.dataset import Amos, case_scaling
from amos_lha.organs import GROUPS, ORGANS, STRUCTURES, WINDOW_HU
from amos_lha.segment import segment
from common import batch, distributed
from common.checkpoints import TrainedModel
from common.class_metrics import mean_dice
from common.config import make_parser, parse_args, run_script
from common.evaluation import Masks, add_evaluation_flags, evaluate_folder, labelled_beside, score_cases


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_evaluation_flags(parser, ORGANS)
    return parser


def evaluate_cases(
    model: TrainedModel, data: Amos, names: list[str], *, surfaces: bool = True, table: Path | None = None
) -> tuple[list[dict], dict[str, str]]:
    """Predict and score preprocessed cases on their own grid; `surfaces`, `table` and the result are those of
    `score_cases`."""

    def masks_of(name: str) -> Masks:
        case = data.cases[name]
        notes = case.attributes
        scaling = case_scaling(case, model.preprocessing)
        pred = segment(model, case.image, case.spacing_mm, scaling, notes["modality"])
        return Masks(pred, case.label[...], case.spacing_mm, [int(organ) for organ in notes["labelled"]])

    return score_cases(masks_of, names, STRUCTURES, data.patients, surfaces=surfaces, table=table)


def group_dice(rows: list[dict]) -> dict[str, float]:
    """{"small", "medium", "large": `mean_dice` of the organs of the group}; NaN for a group without any."""
    return {group: mean_dice([row for row in rows if row["group"] == group]) for group in GROUPS}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        failed = evaluate_folder(
            args.pred,
            args.target,
            Path(args.out),
            STRUCTURES,
            labelled_beside(args.target, args.labelled, ORGANS),
            images=args.images,
            other=args.compare,
            patient_pattern=args.patient_pattern,
            num_pictures=args.num_pictures,
            window_hu=WINDOW_HU,
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
