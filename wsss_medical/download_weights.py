"""Fetch an encoder that was trained on ImageNet from Hugging Face, and check it.

    python wsss_medical/download_weights.py --backbone b1 --out pretrained

Ends with the flags for wsss_medical/dist_train.py, or with the steps to do by hand. The weights are
NVIDIA's, whose licence allows research and evaluation only.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import make_parser, parse_args, run_script
from common.conversion import failure_reason
from common.files import make_folder
from common.mit import BACKBONES
from common.mit_weights import download_encoder, load_encoder
from common.wetr import WeTr

STEPS = """By hand, in a browser:
  1. Open https://huggingface.co/nvidia/mit-{backbone}/tree/main and download pytorch_model.bin.
  2. Save it as {target} and run this command again, which checks it.
mit_{backbone}.pth of NVlabs' SegFormer or a model.safetensors does as well: --pretrained takes all three."""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--backbone",
        choices=[name for name in BACKBONES if name != "tiny"],
        default="b1",
        help="size of the encoder: b0 for a CPU, b1 as in the paper, up to b5 for a large GPU",
    )
    parser.add_argument("--out", default="pretrained", help="folder that the weights are written to")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    target = Path(args.out) / f"mit_{args.backbone}.bin"
    try:
        make_folder(args.out)
        if not target.exists():
            download_encoder(args.backbone, target)
        for line in load_encoder(WeTr(args.backbone), target):
            print(line)
    except RuntimeError as error:
        print(f"{error}\n{STEPS.format(backbone=args.backbone, target=target)}")
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {failure_reason(error)}; delete the file if it is damaged", file=sys.stderr)
        return 1
    print(f"Next: add --backbone {args.backbone} --pretrained {target} to wsss_medical/dist_train.py")
    return 0


if __name__ == "__main__":
    run_script(main)
