"""Does everything work together? A short training on synthetic abdomens, with a Dice that must be reached.

    python amos_lha/dummy_training.py

Takes under two minutes on two processor cores and no download. It is the run of demo.yaml: phantoms of the 15
organs in AMOS22's layout, preprocess.py, train.py and its evaluation on whole scans that took no part in the
training. Passes (exit code 0) when their mean Dice is above --target; other flags are those of train.py.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha import train
from common import distributed, runs
from common.class_metrics import mean_dice
from common.config import fraction, run_script

DEMO = Path(__file__).with_name("demo.yaml")


def build_parser() -> ArgumentParser:
    parser = train.build_parser()
    parser.description = __doc__
    parser.add_argument(
        "--target",
        type=fraction,
        default=0.7,
        help="mean Dice of the whole scans, 0 to 1, that must be reached",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = ["--config", str(DEMO), "--model_name", "dummy", *(sys.argv[1:] if argv is None else argv)]
    with distributed.session():
        args, resumed, folder = runs.resume(build_parser(), flags, same=train.UNCHANGEABLE, stage="amos_lha")
        rows, failed, _ = train.train(args, resumed, folder)
    dice = mean_dice(rows)
    passed = dice >= args.target and not failed
    print(f"{'passed' if passed else 'FAILED'}: Dice {dice:.3f} of whole scans, target {args.target:g}")
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
