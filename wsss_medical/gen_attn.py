"""Class activation maps, and attention if asked for, of all slices of a part of the split.

    python wsss_medical/gen_attn.py --checkpoint work_dir_lasc/checkpoints/best.pth
    python wsss_medical/gen_attn.py --config wsss_medical/lasc.yaml --split test --save_attn --device cpu

Split and scales are those of the checkpoint; of a --config only dataset, work_dir and data_path count. Writes
attention_maps/, cam_npy/ and attn_npy/ to the folder of the run; maps.py tells what they hold.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed, runs
from common.config import Switch, make_parser, parse_args, run_script
from common.hardware import choose_precision, start_device
from common.run_flags import add_prediction_flags
from common.splits import natural_key
from common.wetr import POOLINGS
from wsss_medical.dataset import PARTS, MedicalSliceDataset
from wsss_medical.maps import generate_maps
from wsss_medical.model import load_trained
from wsss_medical.segment import add_slice_flags, part_of


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", help="trained model; default: checkpoints/best.pth in --work_dir")
    work_dir = "folder of the run; default: that of --checkpoint, else work_dir_<dataset>"
    parser.add_argument("--work_dir", help=work_dir)
    parser.add_argument("--dataset", help="name of the data set, for --work_dir")
    final = "take the last wetr_iter_<N>.pth of the run instead of its best checkpoint"
    parser.add_argument("--use_final", action=Switch, default=False, help=final)
    data_path = "folder that preprocess.py wrote; default: the one that the model was trained on"
    parser.add_argument("--data_path", help=data_path)
    parser.add_argument("--split", choices=[*PARTS, "all"], default="val", help="part of the data set")
    parser.add_argument("--output_dir", help="folder of the pictures; default: attention_maps/ of the run")
    parser.add_argument("--cam_npy_dir", help="folder of the maps; default: cam_npy/ of the run")
    parser.add_argument("--attn_npy_dir", help="folder of the attention; default: attn_npy/ of the run")
    layers = "also write affinities and attention of the last four blocks, up to 32 MB each at 512 x 512"
    parser.add_argument("--save_attn", action=Switch, default=False, help=layers)
    parser.add_argument("--pooling", choices=POOLINGS, help="refuse a model trained with another pooling")
    add_slice_flags(parser, batch_size=1)
    add_prediction_flags(parser)
    return parser


def find_checkpoint(checkpoint: str | None, work_dir: str | None, use_final: bool) -> Path:
    """The file that the flags mean."""
    if not checkpoint and not work_dir:
        raise ValueError("name a model: --checkpoint, or --work_dir, or a --config file with dataset")
    best = Path(checkpoint or Path(work_dir) / "checkpoints" / "best.pth")
    final = sorted(best.parent.glob("wetr_iter_*.pth"), key=lambda path: natural_key(path.name))
    if use_final and not final:
        raise FileNotFoundError(f"{best.parent}: no wetr_iter_<N>.pth in it; leave --use_final out")
    return final[-1] if use_final else best


def main(argv: list[str] | None = None) -> int:
    with distributed.session():
        args = parse_args(build_parser(), argv, from_file=("dataset", "work_dir", "data_path"))
        if str(args.dataset).lower().startswith(("voc", "coco")):
            raise ValueError("VOC and COCO have 20 and 80 classes; this task knows slices with one structure")
        device = start_device(args.device, distributed.local_rank())
        if args.dataset and not (args.checkpoint or args.work_dir):
            args.work_dir = f"work_dir_{args.dataset.lower()}"  # as dist_train.py names it
        checkpoint = find_checkpoint(args.checkpoint, args.work_dir, args.use_final)
        model = load_trained(checkpoint, device, choose_precision(args.amp, device))
        if args.pooling not in (None, model.config["pooling"]):
            raise ValueError(f"{checkpoint}: trained with --pooling {model.config['pooling']}")
        run = Path(args.work_dir or runs.run_dir_of(checkpoint))
        root, names = part_of(model, args.data_path, args.split)
        pictures, maps = args.output_dir or run / "attention_maps", args.cam_npy_dir or run / "cam_npy"
        counts, failed = generate_maps(
            model,
            MedicalSliceDataset(root, names),
            pictures,
            maps,
            (args.attn_npy_dir or run / "attn_npy") if args.save_attn else None,
            scales=args.scales,
            batch_size=args.batch_size,
        )
        if distributed.is_main():
            found = f"{counts['slices']} slices of {root} ({args.split}), {counts['positives']} with a score"
            print("\n".join([f"{found} of at least 0.5: {pictures}, {maps}", *batch.failed_lines(failed)]))
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
