"""Memory of a training step of MedFormer: predicted, and on a CUDA card also measured.

    python benchmarks/medformer_memory.py

Batch 1, 3 classes, auxiliary head, AdamW, Dice + cross-entropy of both outputs; patches of 64 and 96 cubed,
full and half width, with and without checkpointing. A measurement counts tensors only, as the prediction
does: max_memory_allocated of the second step; its time is the median of five further ones. Writes
medformer_memory.json and .md to --out.
"""

import inspect
import sys
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amygdala.medformer import MedFormer
from amygdala.structures import NUM_CLASSES
from benchmarks.results_files import write_results
from benchmarks.training_memory import PRECISIONS, measure
from common.config import make_parser, parse_args, positive_int, read_yaml_files
from common.hardware import describe_device, pick_device
from common.losses import dice_ce_loss
from common.memory import training_peak_mib

CONFIG = Path(__file__).resolve().parents[1] / "amygdala" / "config" / "Amygdala"
WIDTHS = {"full": "medformer_3d.yaml", "half": "medformer_half_3d.yaml"}


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--widths", choices=WIDTHS, nargs="+", default=list(WIDTHS), help="widths of the network to try"
    )
    parser.add_argument(
        "--sides", type=positive_int, nargs="+", default=[64, 96], help="sides in voxels of the cubes to try"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="where to compute: a CUDA card also measures each step, elsewhere its memory is only "
        "predicted; auto takes the first of cuda, mps and cpu that this machine has",
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def total_loss(output: list[Tensor], target: Tensor) -> Tensor:
    """Of the logits and the auxiliary ones."""
    return sum(dice_ce_loss(logits, target) for logits in output)


def make_network(width: str, checkpointing: bool) -> MedFormer:
    """The network of a configuration file."""
    files = read_yaml_files(make_parser(None), CONFIG / WIDTHS[width])
    config = {key: value for _, content in files for key, value in content.items()}
    options = {key: config[key] for key in config.keys() & inspect.signature(MedFormer).parameters.keys()}
    return MedFormer(1, NUM_CLASSES, **options | {"checkpointing": checkpointing})


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    device = pick_device(args.device)
    on_card = device.type == "cuda"
    cells, rows = [], []
    for width in args.widths:
        for side in args.sides:
            shape = (side,) * 3
            for checkpointing in (False, True):
                row = {
                    "width": width,
                    "patch": f"{side}^3",
                    "checkpointing": "on" if checkpointing else "off",
                }
                measured = {}
                for precision, dtype in PRECISIONS.items():
                    if precision == "fp16" and not on_card:
                        continue  # as many bytes as bf16
                    cell = dict(width=width, side=side, checkpointing=checkpointing, precision=precision)
                    make, optimizer = partial(make_network, width, checkpointing), torch.optim.AdamW
                    cell["predicted_mib"] = training_peak_mib(
                        make, total_loss, (1, 1, *shape), make_optimizer=optimizer, dtype=dtype
                    )
                    row[f"predicted MiB, {precision}"] = f"{cell['predicted_mib']:,.0f}"
                    measured[f"measured MiB, {precision}"] = "not measured"
                    if on_card:
                        cell |= measure(
                            make, total_loss, shape, make_optimizer=optimizer, dtype=dtype, device=device
                        )
                        text = "out of memory"
                        if "measured_mib" in cell:
                            text = f"{cell['measured_mib']:,.0f} ({cell['ms_per_step']:.0f} ms)"
                        measured[f"measured MiB, {precision}"] = text
                    print(*cell.values(), flush=True)
                    cells.append(cell)
                rows.append(row | measured)
    measured_on = describe_device(device) if on_card else "not measured"
    notes = f"""Predicted MiB of tensors; on a card 300 to 500 MiB of CUDA context come on top.
CUDA card: {measured_on}."""
    content = {"cuda": measured_on, "cells": cells}
    write_results(args.out, "medformer_memory", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
