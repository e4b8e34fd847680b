"""Score a trained model on slices with true masks, or masks in files against true ones.

    python wsss_medical/evaluate.py --weights work_dir_lasc/checkpoints/best.pth --split test
    python wsss_medical/evaluate.py --pred masks --target labelsTs --out scores

With --weights: how well slices are classified and, where there are masks, how well segmentation head, class
activation map (CAM) and propagated CAM overlap with them. Thresholds are chosen on the validation part, never
on the part that is scored. Without masks only the classification means anything: nobody knows then where in a
slice the structure lies. With --pred: masks on the scans' own grids, of which all values above 0 count.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed
from common.checkpoints import TrainedModel
from common.class_metrics import Structures
from common.config import fraction, make_parser, parse_args, run_script
from common.evaluation import add_evaluation_flags, evaluate_folder
from common.hardware import choose_precision, start_device
from common.mask_files import label_files, merged_labels
from common.metrics import classification_scores
from common.report import clear_report
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.sweep import Sweep, overlap_lines, size_line, write_sweeps
from common.tables import write_table
from wsss_medical.dataset import PARTS, MedicalSliceDataset, patient_of
from wsss_medical.model import load_trained
from wsss_medical.segment import GATE, OUTPUTS, THRESHOLD, add_slice_flags, part_of
from wsss_medical.volume import by_patient, segment_patient

STRUCTURES = Structures({1: "structure"}, np.array([[0, 0, 0], [230, 30, 30]], np.uint8))
BY_SCORE, BY_TRUTH = "gated by score", "gated by truth"  # what says in which slices a map counts as empty
FILES = ("classification.csv", "overlap.csv", "sweep.csv", "volumes.csv", "sizes.csv", "sweep.png")


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--weights", help="trained model: checkpoints/best.pth of a run of dist_train.py")
    data_path = "folder that preprocess.py wrote; default: the one that the model was trained on"
    parser.add_argument("--data_path", help=data_path)
    parser.add_argument("--split", choices=PARTS, default="test", help="part of the data set to score")
    gate = "probability of the whole slice, 0 to 1, below which its mask counts as empty"
    parser.add_argument("--gate", type=fraction, default=GATE, help=gate)
    add_slice_flags(parser, batch_size=4)
    add_evaluation_flags(parser, required=False)
    add_prediction_flags(parser)
    return parser


class Evaluation(NamedTuple):
    """Scores of a part of the data set.

    Attributes:
        scores: of `classification_scores`, at the gate.
        sweeps: {(output, BY_SCORE or BY_TRUTH): overlap at many thresholds}; empty without masks.
    """

    scores: dict[str, float]
    sweeps: dict[tuple[str, str], Sweep]

    def thresholds(self) -> dict[str, float]:
        """{output: where the Dice of the volumes is highest}; to be taken from validation slices."""
        return {
            output: sweep.best()["threshold"]
            for (output, gate), sweep in self.sweeps.items()
            if gate == BY_SCORE and sweep.num_positive
        }

    def overlap(self, thresholds: dict[str, float]) -> list[dict]:
        """One row for each output and gate at the output's threshold, with the columns of `Sweep.row_at`."""
        return [
            {"output": output, "group": gate} | sweep.row_at(thresholds.get(output, THRESHOLD))
            for (output, gate), sweep in self.sweeps.items()
        ]


def evaluate_split(
    model: TrainedModel,
    root: str | Path,
    names: Sequence[str],
    *,
    scales: Sequence[float] | None = None,
    batch_size: int = 4,
    gate: float = GATE,
) -> Evaluation:
    """Classify and segment the slices `names` of the folder `root`, shared over the processes.

    Args:
        scales, batch_size: as of `segment_slices`.
        gate: score of a slice below which its maps count as empty.
    """
    data, was_training = MedicalSliceDataset(root, names), model.network.training
    model.network.eval()
    scores: dict[str, float] = {}
    sweeps = {key: Sweep() for key in product(OUTPUTS, (BY_SCORE, BY_TRUTH))}
    mine = distributed.my_share(by_patient(names))  # one at a time: maps of all would fill the memory
    no_bar = None if distributed.is_main() else True  # None: only on a terminal
    for patient in tqdm(mine, "scoring", unit="patient", disable=no_bar, leave=False):
        own = MedicalSliceDataset(root, patient)
        slices = [own.read(i) for i in range(len(own))]
        results = segment_patient(model, slices, scales=scales, batch_size=batch_size)
        for i, (name, result) in enumerate(zip(patient, results, strict=True)):
            scores[name] = result.score
            if data.has_masks:
                mask = own.read_mask(i, result.seg.shape)
                factors = {BY_SCORE: result.score >= gate, BY_TRUTH: mask.any()}
                for (output, by), sweep in sweeps.items():
                    sweep.add(getattr(result, output) * factors[by], mask, patient_of(name))
    model.network.train(was_training)
    merged = {key: Sweep() for key in sweeps}
    for of_process, parts in distributed.gather((scores, sweeps)):
        scores |= of_process
        for key, sweep in parts.items():
            merged[key].merge(sweep)
    probs = [scores[name] for name in data.names]
    return Evaluation(classification_scores(probs, data.labels, gate), merged if data.has_masks else {})


def write_evaluation(out: Path, title: str, evaluation: Evaluation, thresholds: dict[str, float]) -> None:
    """Write tables and, where there are masks, the picture; `thresholds` are 0.5 for outputs without one."""
    clear_report(out, FILES)
    if not distributed.is_main():
        return
    write_table(out / "classification.csv", [evaluation.scores])
    lines = [title, "slices: " + ", ".join(f"{name} {v:.3f}" for name, v in evaluation.scores.items())]
    if evaluation.sweeps:
        rows = evaluation.overlap(thresholds)
        write_table(out / "overlap.csv", rows)
        by_score = {output: sweep for (output, by), sweep in evaluation.sweeps.items() if by == BY_SCORE}
        write_sweeps(out, by_score, dict.fromkeys(OUTPUTS, THRESHOLD) | thresholds)
        lines += overlap_lines({f"{row['output']}, {row['group']}": row for row in rows})
        lines.append(size_line("seg", by_score["seg"].rows_by_size(thresholds.get("seg", THRESHOLD))))
    else:
        lines.append("there are no masks, so nothing can be said of where the structure was found")
    print("\n".join([*lines, f"written to {out}"]))


def evaluate_weights(args: Namespace) -> None:
    """Score a part of the data set of a model."""
    device = start_device(args.device, distributed.local_rank())
    model = load_trained(args.weights, device, choose_precision(args.amp, device))
    options = {"scales": args.scales, "batch_size": args.batch_size, "gate": args.gate}
    root, names = part_of(model, args.data_path, args.split)
    evaluation = evaluate_split(model, root, names, **options)
    thresholds = model.preprocessing.get("threshold") or {}
    if args.split == "val":
        thresholds = evaluation.thresholds()
    elif not thresholds and model.split["val"]:
        val_root, val = part_of(model, args.data_path, "val")
        if set(val).isdisjoint(names):
            thresholds = evaluate_split(model, val_root, val, **options).thresholds()
    out = Path(args.out) if args.out else run_dir_of(args.weights) / f"evaluation_{args.split}"
    title = f"{len(names)} slices of {root} ({args.split}), {model.precision.name}, gate {args.gate:g}"
    write_evaluation(out, title, evaluation, thresholds)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        if bool(args.weights) == bool(args.pred) or (args.pred and not (args.target and args.out)):
            raise ValueError("give --weights for a trained model, or --pred, --target and --out for files")
        if args.weights:
            evaluate_weights(args)
            return 0
        failed = evaluate_folder(
            args.pred,
            args.target,
            Path(args.out),
            STRUCTURES,
            dict.fromkeys(label_files(args.target), [1]),
            images=args.images,
            other=args.compare,
            patient_pattern=args.patient_pattern,
            num_pictures=args.num_pictures,
            window_hu=None,
            volumes=True,
            renumber=merged_labels,
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
