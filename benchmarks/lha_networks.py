"""The networks of amos_lha: parameters, arithmetic, memory and seconds of a training step on this CPU.

    python benchmarks/lha_networks.py --threads 2

Batch 1, 16 classes, AdamW, Dice + cross-entropy. Memory is predicted, not allocated. Time is that of a whole
step; the networks take turns, so that they share what else the machine does. Writes lha_networks.json and .md
to --out.
"""

import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.networks import get_model
from benchmarks.results_files import write_results
from common.config import make_parser, parse_args, positive_int
from common.hardware import DTYPES
from common.losses import dice_ce_loss
from common.memory import training_peak_mib

CONFIG = {
    "preset": "small",
    "heads": "size_aware",
    "attention": True,
    "router": False,
    "deep_supervision": False,
    "feature_size": 24,
}
NETWORKS = {
    "LHANet tiny": {"model": "LHANet", "preset": "tiny"},
    "LHANet small": {"model": "LHANet"},
    "LHANet small, no attention": {"model": "LHANet", "attention": False},
    "LHANet small, shared heads": {"model": "LHANet", "heads": "shared"},
    "LHANet small, router and deep supervision": {
        "model": "LHANet",
        "router": True,
        "deep_supervision": True,
    },
    "LHANet base": {"model": "LHANet", "preset": "base"},
    "UNet": {"model": "UNet"},
    "ResEncUNet": {"model": "ResEncUNet"},
    "SegResNet": {"model": "SegResNet"},
    "SegFormer3D": {"model": "SegFormer3D"},
    "SwinUNetR 24": {"model": "SwinUNetR"},
}
CUBE = (2.0, 1.5, 1.5)  # mm, z y x: every step down halves all axes
THICK_SLICES = (7.7, 1.2, 1.2)  # the first two leave z alone


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--networks", choices=NETWORKS, nargs="+", default=list(NETWORKS), help="networks to measure"
    )
    parser.add_argument(
        "--cube",
        type=positive_int,
        nargs=3,
        default=[96, 96, 96],
        help="size in voxels, z y x, of the patch that all axes of are halved alike",
    )
    parser.add_argument(
        "--slab",
        type=positive_int,
        nargs=3,
        default=[32, 128, 128],
        help="size in voxels, z y x, of the patch of thick slices, whose z the first two steps leave alone",
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=5, help="number of timed steps of each network"
    )
    parser.add_argument(
        "--threads", type=positive_int, default=2, help="number of processor threads of torch"
    )
    parser.add_argument("--amp", choices=("bf16", "off"), default="bf16", help="precision of the timed steps")
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def total_loss(output, target: Tensor) -> Tensor:
    """Of the finest level; coarser ones and the router are pulled towards 0, so that they are computed."""
    if isinstance(output, Tensor):
        return dice_ce_loss(output, target)
    levels, router = (output.levels, output.router) if hasattr(output, "router") else (output, None)
    extra = sum(x.square().mean() for x in [*levels[1:], *([] if router is None else [router])])
    return dice_ce_loss(levels[0], target) + extra


def make_network(name: str, spacing_mm: tuple, checkpointing: str = "none") -> nn.Module:
    """The network of a line in NETWORKS, for voxels of `spacing_mm` (z y x)."""
    return get_model(CONFIG | NETWORKS[name] | {"checkpointing": checkpointing}, spacing_mm)


def gflop(network: nn.Module, shape: tuple) -> float:
    """Arithmetic of a forward pass: multiplications and additions of convolutions and products, / 1e9."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 1, *shape))
    return counter.get_total_flops() / 1e9


def step_seconds(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict]:
    """Seconds of each step, in turns, after one that is not counted: by the clock, and of the processor."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            taken[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {
        name: {"seconds": [t[0] for t in times[1:]], "cpu_s": [t[1] for t in times[1:]]}
        for name, times in taken.items()
    }


def training_step(network: nn.Module, shape: tuple, dtype: torch.dtype | None) -> Callable[[], None]:
    """A function that makes one update of `network` on noise."""
    image = torch.randn(1, 1, *shape)
    target = torch.randint(16, (1, *shape))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = network.train()(image)
        total_loss(output, target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = DTYPES["fp32" if args.amp == "off" else args.amp]
    patches = {"cube": (tuple(args.cube), CUBE), "slab": (tuple(args.slab), THICK_SLICES)}
    times = {}
    for patch, (shape, spacing_mm) in patches.items():
        networks = {name: make_network(name, spacing_mm) for name in args.networks}
        steps = {name: training_step(network, shape, dtype) for name, network in networks.items()}
        times[patch] = step_seconds(steps, args.repeats)
    cells, rows = [], []
    for name in args.networks:
        network = make_network(name, CUBE)
        cell = {"network": name, "parameters": sum(p.numel() for p in network.parameters())}
        cell["gflop"] = gflop(network, args.cube)
        row = {
            "network": name,
            "parameters": f"{cell['parameters']:,}",
            "GFLOP": f"{cell['gflop']:.1f}",
        }
        for precision in ("fp32", "bf16"):
            for policy in ("none", "high", "all"):
                if policy == "high" and NETWORKS[name]["model"] != "LHANet":
                    continue  # the others only know all or none
                cell[f"mib_{precision}_{policy}"] = training_peak_mib(
                    lambda name=name, policy=policy: make_network(name, CUBE, policy),
                    total_loss,
                    (1, 1, *args.cube),
                    dtype=DTYPES[precision],
                )
            mib = [cell.get(f"mib_{precision}_{policy}") for policy in ("none", "high", "all")]
            row[f"MiB {precision}: none, high, all"] = ", ".join(
                "-" if value is None else f"{value:,.0f}" for value in mib
            )
        for patch, (shape, _) in patches.items():
            cell[patch] = times[patch][name]
            fastest, median = (pick(cell[patch]["seconds"]) for pick in (min, statistics.median))
            size = " x ".join(map(str, shape))
            row[f"s a step, {size}: fastest (median)"] = f"{fastest:.2f} ({median:.2f})"
        row["on a GPU"] = "not measured"
        print(*row.values(), flush=True)
        cells.append(cell)
        rows.append(row)

    notes = f"""{args.repeats} steps in {args.amp}, {args.threads} threads. MiB are predicted for
{" x ".join(map(str, args.cube))} by the checkpointing policy; "-": the network only knows none and all."""
    content = {"cells": cells}
    write_results(args.out, "lha_networks", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
