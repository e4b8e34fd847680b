"""Memory of a training step of each network of verse_spine: predicted, and on a CUDA card also measured.

    python benchmarks/training_memory.py

Batch 1, one output, Prodigy, Dice + cross-entropy. A measurement counts tensors only, as the prediction does:
max_memory_allocated of the second step; its time is the median of five further ones. Writes
training_memory.json and .md to --out.
"""

import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from common.config import make_parser, parse_args, positive_int
from common.hardware import describe_device, pick_device
from common.losses import dice_ce_loss
from common.memory import MIB, training_peak_mib
from verse_spine.networks import FEATURE_SIZES, MODELS, get_model
from verse_spine.prodigy import Prodigy

NETWORKS = [(name, f) for name in MODELS for f in (FEATURE_SIZES if name == "SwinUNetR" else (24,))]
SHAPES = ((96, 96, 96), (128, 128, 128), (128, 64, 64))
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # on a card also fp16


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--models", choices=MODELS, nargs="+", default=list(MODELS), help="networks to measure"
    )
    parser.add_argument(
        "--patch_size",
        type=positive_int,
        nargs=3,
        help="size in voxels, z y x, of the only patch to try; default: three usual sizes",
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


def measure(
    make_network: Callable[[], nn.Module],
    loss_function: Callable[..., Tensor],
    shape: tuple,
    *,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict:
    """Peak of the second step and milliseconds of a later one, on a CUDA card; empty if it does not fit."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    try:
        network = make_network().to(device).train()
        optimizer = make_optimizer(network.parameters())
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        taken_ms, peak_mib = [], 0.0
        for step in range(7):
            if step == 1:
                torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            image = torch.zeros(1, 1, *shape, device=device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = network(image)
            target = torch.zeros_like(image[:, 0], dtype=torch.long)
            scaler.scale(loss_function(logits, target)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            del logits
            torch.cuda.synchronize(device)
            taken_ms.append(1000 * (time.perf_counter() - start))
            if step == 1:
                peak_mib = (torch.cuda.max_memory_allocated(device) - before) / MIB
    except torch.OutOfMemoryError:
        return {}
    return {"measured_mib": peak_mib, "ms_per_step": statistics.median(taken_ms[2:])}


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    device = pick_device(args.device)
    on_card = device.type == "cuda"
    shapes = [tuple(args.patch_size)] if args.patch_size else SHAPES
    cells, rows = [], []
    for name, feature_size in NETWORKS:
        if name not in args.models:
            continue
        label = f"{name} {feature_size}" if name == "SwinUNetR" else name
        for shape in shapes:
            row = {"network": label, "patch": " x ".join(map(str, shape))}
            for precision, dtype in PRECISIONS.items():
                if precision == "fp16" and not on_card:
                    continue  # as many bytes as bf16
                for checkpointing in (False, True):
                    config = dict(model=name, feature_size=feature_size, init_filters=8)
                    config["checkpointing"] = checkpointing
                    cell = dict(network=label, shape=shape, precision=precision, checkpointing=checkpointing)
                    cell["predicted_mib"] = training_peak_mib(
                        lambda config=config: get_model(config),
                        dice_ce_loss,
                        (1, 1, *shape),
                        make_optimizer=Prodigy,
                        dtype=dtype,
                    )
                    if on_card:
                        cell |= measure(
                            lambda config=config: get_model(config),
                            dice_ce_loss,
                            shape,
                            make_optimizer=Prodigy,
                            dtype=dtype,
                            device=device,
                        )
                    print(*cell.values(), flush=True)
                    cells.append(cell)
                    title = precision if on_card else {"fp32": "fp32", "bf16": "bf16 or fp16"}[precision]
                    text = f"{cell['predicted_mib']:,.0f}"
                    if on_card:
                        measured = "out of memory"
                        if "measured_mib" in cell:
                            measured = f"{cell['measured_mib']:,.0f}, {cell['ms_per_step']:.0f} ms"
                        text += f" ({measured})"
                    row[f"{title}, checkpointing" if checkpointing else title] = text
            rows.append(row)
    measured_on = describe_device(device) if on_card else "not measured"
    notes = f"""Predicted MiB of tensors; on a card 300 to 500 MiB of CUDA context come on top.
In brackets measured MiB and milliseconds a step on a CUDA card: {measured_on}."""
    content = {"cuda": measured_on, "cells": cells}
    write_results(args.out, "training_memory", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
