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
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed
from common.checkpoints import TrainedModel
from common.class_metrics import Structures
from common.config import fraction, make_parser, parse_args, run_script
from common.evaluation import add_evaluation_flags, evaluate_folder
from common.hardware import choose_precision, start_device
from common.mask_files import label_files
from common.metrics import classification_scores, dice_from_counts, write_table
from common.plots import costs_the_picture, save_curves
from common.report import clear_report
from common.run_flags import add_prediction_flags
from common.runs import run_dir_of
from common.sweep import Sweep
from wsss_medical.dataset import PARTS, MedicalSliceDataset, patient_of
from wsss_medical.model import load_trained
from wsss_medical.segment import (
    GATE,
    OUTPUTS,
    SCALES,
    THRESHOLD,
    add_slice_flags,
    part_of,
    scales_of,
)
from wsss_medical.volume import segment_patient

STRUCTURES = Structures({1: "structure"}, np.array([[0, 0, 0], [230, 30, 30]], np.uint8))
# Groups of slices: all, with empty maps where the class score or the true label says so; with the maps gated
# by score, those with tissue by its share of the pixels.
BY_SCORE, BY_TRUTH = "gated by score", "gated by truth"
SIZES = {"tissue below 1 %": 0.01, "tissue 1 to 5 %": 0.05, "tissue above 5 %": 1.0}
FILES = ("classification.csv", "overlap.csv", "sweep.csv", "volumes.csv", "sweep.png")


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
        sweeps: {(output, group of slices): overlap at many thresholds}; empty without masks.
    """

    scores: dict[str, float]
    sweeps: dict[tuple[str, str], Sweep]

    def thresholds(self) -> dict[str, float]:
        """{output: where the Dice of the volumes is highest}; to be taken from validation slices."""
        return {
            output: sweep.best()["threshold"]
            for (output, group), sweep in self.sweeps.items()
            if group == BY_SCORE and sweep.num_positive
        }

    def overlap(self, thresholds: dict[str, float]) -> list[dict]:
        """One row for each output and group at the output's threshold, with the columns of `Sweep.rows`."""
        table = []
        for (output, group), sweep in self.sweeps.items():
            row = sweep.rows()[index_of(sweep, thresholds.get(output, THRESHOLD))]
            counts = {"positive_slices": sweep.num_positive, "negative_slices": sweep.num_negative}
            table.append({"output": output, "group": group, **row, **counts})
        return table


def index_of(sweep: Sweep, threshold: float) -> int:
    """Of the nearest threshold of a sweep."""
    return int(np.abs(sweep.thresholds - threshold).argmin())


def evaluate_split(
    model: TrainedModel,
    root: str | Path,
    names: Sequence[str],
    *,
    scales: Sequence[float] = SCALES,
    batch_size: int = 4,
    gate: float = GATE,
    cams: bool = True,
) -> Evaluation:
    """Classify and segment the slices `names` of the folder `root`, shared over the processes.

    Args:
        scales, batch_size: as of `segment_slices`.
        gate: score of a slice below which its maps count as empty.
        cams: False leaves out CAM and propagated CAM, which take three quarters of the time.
    """
    data, was_training = MedicalSliceDataset(root, names), model.network.training
    model.network.eval()
    patients = [
        list(of_patient) for _, of_patient in groupby(range(len(data)), lambda i: patient_of(names[i]))
    ]
    mine, found = [], []
    for own in distributed.my_share(patients):
        mine += own
        slices = [data.read(i) for i in own]
        found += segment_patient(model, slices, scales=scales, batch_size=batch_size, cams=cams)
    scores: dict[int, float] = {}
    sweeps: dict[tuple[str, str], Sweep] = {}
    for i, result in zip(mine, found, strict=True):
        scores[i] = result.score
        if data.has_masks:
            mask = data.read_mask(i)
            is_shown, has_tissue = result.score >= gate, bool(mask.any())
            groups = {BY_SCORE: is_shown, BY_TRUTH: has_tissue}
            if has_tissue:
                groups[next(name for name, most in SIZES.items() if mask.mean() <= most)] = is_shown
            for output, (group, factor) in product(OUTPUTS if cams else OUTPUTS[:1], groups.items()):
                sweep = sweeps.setdefault((output, group), Sweep())
                sweep.add(getattr(result, output) * factor, mask, patient_of(data.names[i]))
    model.network.train(was_training)
    merged = {key: Sweep() for key in product(OUTPUTS, (BY_SCORE, BY_TRUTH, *SIZES))}
    for of_process, parts in distributed.gather((scores, sweeps)):
        scores |= of_process
        for key, sweep in parts.items():
            merged[key].merge(sweep)
    probs = [scores[i] for i in range(len(data))]
    filled = {key: sweep for key, sweep in merged.items() if sweep.volumes}
    return Evaluation(classification_scores(probs, data.labels, gate), filled)


def write_evaluation(out: Path, title: str, evaluation: Evaluation, thresholds: dict[str, float]) -> None:
    """Write the tables and, where there are masks, the picture of an evaluation; print the summary.

    Args:
        thresholds: {output: threshold}, 0.5 where there is none.
    """
    clear_report(out, FILES)
    if not distributed.is_main():
        return
    write_table(out / FILES[0], [evaluation.scores])
    lines = [title, "slices: " + ", ".join(f"{name} {v:.3f}" for name, v in evaluation.scores.items())]
    sweeps = {output: s for (output, group), s in evaluation.sweeps.items() if group == BY_SCORE}
    if not sweeps:
        lines.append("there are no masks, so nothing can be said of where the structure was found")
    else:
        rows = evaluation.overlap(thresholds)
        write_table(out / "overlap.csv", rows)
        table = [{"threshold": row["threshold"]} for row in next(iter(sweeps.values())).rows()]
        for output, sweep in sweeps.items():
            for row, of_output in zip(table, sweep.rows(), strict=True):
                row |= {f"{output} {k}": v for k, v in of_output.items() if k != "threshold"}
        write_table(out / "sweep.csv", table)
        panels = {f"Dice, {c}": [f"{k} dice_{c}" for k in sweeps] for c in ("slices", "volumes")}
        names = {column: column.split()[0] for columns in panels.values() for column in columns}
        with costs_the_picture("sweep.png"):
            save_curves(out / "sweep.png", table, panels, names, x="threshold")
        volumes: dict[str, dict] = {}
        for output, sweep in sweeps.items():
            i = index_of(sweep, thresholds.get(output, THRESHOLD))
            for patient, counts in sweep.volumes.items():
                row = volumes.setdefault(patient, {"patient": patient})
                row[f"{output} dice"] = dice_from_counts(*counts[:, i].tolist())
        write_table(out / "volumes.csv", list(volumes.values()))
        lines.append(f"{'Dice of':<28}{'threshold':>10}{'slices':>8}{'volumes':>9}{'false alarms':>14}")
        lines += [
            f"{row['output'] + ', ' + row['group']:<28}{row['threshold']:>10.2f}{row['dice_slices']:>8.3f}"
            f"{row['dice_volumes']:>9.3f}{row['false_alarms']:>14.3f}"
            for row in rows
        ]
    print("\n".join([*lines, f"written to {out}"]))


def evaluate_weights(args: Namespace) -> None:
    """Score a part of the data set of a model."""
    device = start_device(args.device, distributed.local_rank())
    model = load_trained(args.weights, device, choose_precision(args.amp, device))
    options = {"scales": scales_of(model, args.scales), "batch_size": args.batch_size, "gate": args.gate}
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
            merged=True,
        )
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
