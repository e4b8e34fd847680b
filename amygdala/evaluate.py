"""Score masks against true ones: overlap, surfaces, volumes and their agreement, by site.

    python amygdala/evaluate.py --pred masks --target labelsTs --out evaluation
    python amygdala/evaluate.py --pred a --target labelsTs --out a_scores --compare b --sites sites.csv

Files belong together by the name of the case, with or without an ending such as _mask. Every file of --target
needs a prediction. Masks hold the labels 1 and 2, see --dataset. Writes results.csv (one row for each case
and label), cases.csv, summary.csv (by label), volume_agreement.csv (ICC, bias, limits of agreement),
summary.md and worst_and_median.png; with --sites also sites.csv; with --compare also comparison.csv, in which
B is the second folder.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amygdala.dataset import Cohort
from amygdala.localiser import find_box
from amygdala.segment import segment
from amygdala.structures import DATASETS
from common import batch, distributed
from common.checkpoints import TrainedModel
from common.class_metrics import case_row, case_summary, mean_of_classes, score_structures
from common.config import make_parser, parse_args, run_script
from common.evaluation import add_evaluation_flags, evaluate_folder
from common.mask_files import label_files
from common.sites import read_sites
from common.volumes import crop


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--dataset",
        choices=list(DATASETS),
        default="Amygdala",
        help="what the labels mean. Amygdala: 1 left, 2 right; Hippocampus: 1 anterior, 2 posterior",
    )
    add_evaluation_flags(parser)
    parser.add_argument(
        "--sites",
        help="table (.csv, or .tsv) with the columns name (of the case) and site; scores are then also given "
        "for each site",
    )
    return parser


def evaluate_cases(
    models: Sequence[TrainedModel],
    cohort: Cohort,
    names: Sequence[str],
    *,
    surfaces: bool = True,
    table: Path | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """Predict and score preprocessed cases on their own grid, shared over the processes.

    In whole heads the region that is searched comes from the localiser, as in prediction.

    Args:
        models: as of `segment`.
        surfaces: also the distances between surfaces, which take longer.
        table: CSV file that gets a row for each case as soon as it is scored. Its column voxels_outside tells
            how many labelled voxels lie outside of the region that was searched.

    Returns:
        (rows of `score_structures` with "case" and "patient" in front, in the order of `names`; {failed case:
        reason}), the same in every process.
    """
    structures = DATASETS[cohort.dataset].structures

    def evaluate(name: str) -> dict:
        case = cohort.cases[name]
        image, target = case.image[...], case.label[...]
        box = find_box(models[0], image, case.spacing_mm)
        pred = segment(models, image, case.spacing_mm, box=box)
        scores = score_structures(
            pred, target, case.spacing_mm, structures, list(structures.names), surfaces=surfaces
        )
        outside = np.count_nonzero(target) - np.count_nonzero(crop(target, *box))
        more = {"site": cohort.sites[name], "voxels_outside": outside}
        return case_row(name, cohort.subjects[name], scores, case_summary(scores) | more)

    rows, failed = batch.each(evaluate, list(names), unit="case", table=table)
    return [row for of_case in rows for row in of_case["classes"]], failed


def mean_dice(rows: Sequence[dict]) -> float:
    """Mean over the labels of the mean over the cases that have the label or a false alarm of it."""
    return mean_of_classes(rows, "dice")["mean"]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    structures = DATASETS[args.dataset].structures
    with distributed.session():
        names = label_files(args.target)
        failed = evaluate_folder(
            args.pred,
            args.target,
            Path(args.out),
            structures,
            dict.fromkeys(names, list(structures.names)),
            images=args.images,
            other=args.compare,
            patient_pattern=args.patient_pattern,
            num_pictures=args.num_pictures,
            window_hu=None,
            volumes=True,
            sites=read_sites(args.sites) if args.sites else None,
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
