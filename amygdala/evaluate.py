"""Score masks against true ones: overlap, surfaces, volumes and their agreement, by site.

    python amygdala/evaluate.py --pred masks --target labelsTs --out evaluation
    python amygdala/evaluate.py --pred a --target labelsTs --out a_scores --compare b --sites sites.csv

Files belong together by the name of the case, with or without an ending such as _mask. Every file of --target
needs a prediction. Masks hold the labels 1 and 2, see --dataset, or FreeSurfer's 18 and 54; the true ones may
have other numbers, see --label_map. Writes results.csv (one row for each case and label), cases.csv,
summary.csv (by label), volume_agreement.csv (ICC, bias, limits of agreement), summary.md and
worst_and_median.png; with --sites also sites.csv; with --compare also comparison.csv (B: the second folder).
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amygdala.dataset import Cohort
from amygdala.labels import add_label_map_flag, map_mask, parse_label_map
from amygdala.localiser import find_box
from amygdala.segment import segment
from amygdala.structures import DATASETS, add_dataset_flag, side_columns
from common import batch, distributed
from common.checkpoints import TrainedModel
from common.config import make_parser, parse_args, run_script
from common.evaluation import Masks, add_evaluation_flags, evaluate_folder, score_cases
from common.mask_files import label_files
from common.volumes import crop


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_dataset_flag(parser)
    add_label_map_flag(parser, "the files of --target")
    add_evaluation_flags(parser, sites=True)
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

    The table of `score_cases` has the columns site and voxels_outside, too: how many labelled voxels lie
    outside of the region that was searched.

    Args:
        models: as of `segment`.
        surfaces, table: as of `score_cases`, whose result this returns.
    """
    structures = DATASETS[cohort.dataset].structures

    def masks_of(name: str) -> Masks:
        case = cohort.cases[name]
        image, target = case.image[...], case.label[...]
        box = find_box(models[0], image, case.spacing_mm)
        pred = segment(models, image, case.spacing_mm, box=box)
        outside = np.count_nonzero(target) - np.count_nonzero(crop(target, *box))
        columns = {"site": cohort.sites[name], "voxels_outside": outside}
        return Masks(pred, target, case.spacing_mm, list(structures.names), columns=columns)

    return score_cases(masks_of, list(names), structures, cohort.subjects, surfaces=surfaces, table=table)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    data_set = DATASETS[args.dataset]
    with distributed.session():
        label_map = parse_label_map(args.label_map, data_set)
        failed = evaluate_folder(
            args.pred,
            args.target,
            Path(args.out),
            data_set.structures,
            dict.fromkeys(label_files(args.target), list(data_set.structures.names)),
            images=args.images,
            other=args.compare,
            patient_pattern=args.patient_pattern,
            num_pictures=args.num_pictures,
            window_hu=None,
            volumes=True,
            sites=args.sites,
            renumber=partial(map_mask, label_map=label_map, data_set=data_set),
            volume_columns=side_columns(data_set).values(),
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
